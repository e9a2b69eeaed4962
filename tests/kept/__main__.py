"""Write `tests/kept/VERSION.tar.xz`, the files of the installed version: a run folder with its ledgers, reports and
adapter, and a federation's kits.

Run `python -m tests.kept` only while that version is unreleased: later versions must read the archive unchanged.
"""

import json
import os
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from fedtune.ops.kits import provisioning
from fedtune.tasks.saved import load_task_model
from fedtune.version import __version__

from ..conftest import run_command, simulate
from ..ops.conftest import Desk

ARCHIVE = Path(__file__).with_name(f"{__version__}.tar.xz")
RENDERED = (".html", ".svg", "README.md")
"""Files rendered from a report: their wording may change within a version, and no later version reads them."""


def write_run(folder: Path) -> None:
    """Write a run of two sites, one site's signed report, and what the ledger and the run said about it."""
    site = simulate("training=sgd", "federation.algorithm=scaffold", into=folder) / "sites" / "site-1"
    signed = ("--sign", str(site / "site_key.pem"), "--output", str(folder / "site_report"))
    assert run_command("report", str(site / "site.toml"), *signed).code == 0
    spent = json.loads(run_command("ledger", "spent", str(site / "ledger.db"), "--json").printed)
    norms = measure_parameter_norms(folder / "run" / "adapter")
    (folder / "expected.json").write_text(json.dumps({"spent": spent, "parameter_norms": norms}))


def measure_parameter_norms(adapter: Path) -> dict[str, float]:
    """Return the Euclidean norm of each trained parameter of a saved adapter."""
    return {name: float(values.detach().norm()) for name, values in load_task_model(adapter).trainable().items()}


def write_kits(folder: Path) -> None:
    """Write a federation with the kits of its server, its lead and one site."""
    (folder / "federation.toml").write_text('name = "cardiology"\nserver = "127.0.0.1:9"\n')
    now = datetime.now(UTC).replace(microsecond=0)
    made = provisioning.init_federation(folder / "federation.toml", out=folder / "federation", now=now)
    Desk(made.folder, now).join("north")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the run's settings contain no local folder
        write_run(Path())
        write_kits(Path())
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(".", filter=lambda one: None if one.name.endswith(RENDERED) else one)
