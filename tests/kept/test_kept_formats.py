"""Files written by released versions can be read, and give the figures that they gave then."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits.kit_file import Kit
from fedtune.version import __version__

from ..conftest import run_command
from .__main__ import measure_parameter_norms

IDENTITIES = ("ledger", "site_key", "num_events")
EPSILONS = ("epsilon", "epsilon_pld", "epsilon_rdp", "remaining_epsilon")
ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.xz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one version, which tests of this module may read but must not change."""
    folder = tmp_path_factory.mktemp("kept")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def expected(kept: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((kept / "expected.json").read_text())
    return values


def test_archive_of_the_current_version_exists() -> None:
    assert f"{__version__}.tar.xz" in {path.name for path in ARCHIVES}


def test_archived_ledger_verifies_with_the_same_epsilon(kept: Path, expected: dict[str, Any]) -> None:
    ledger = kept / "run" / "sites" / "site-1" / "ledger.db"
    assert run_command("ledger", "verify", str(ledger)).code == 0
    spent = json.loads(run_command("ledger", "spent", str(ledger), "--json").printed)
    assert [spent[name] for name in IDENTITIES] == [expected["spent"][name] for name in IDENTITIES]
    assert [spent[name] for name in EPSILONS] == pytest.approx([expected["spent"][name] for name in EPSILONS], rel=1e-9)


@pytest.mark.parametrize("report", ["run", "site_report/report.json"])
def test_archived_report_passes_verification(kept: Path, report: str) -> None:
    outcome = run_command("report", "verify", str(kept / report))
    assert (outcome.code, outcome.err) == (0, ""), outcome.out


def test_archived_run_folder_produces_the_same_report(kept: Path, tmp_path: Path) -> None:
    assert run_command("report", str(kept / "run"), "--output", str(tmp_path)).code == 0
    drawn, stored = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, kept / "run"))
    assert {name: drawn["facts"][name] for name in stored["facts"]} == stored["facts"]


def test_archived_adapter_loads_with_all_parameters(kept: Path, expected: dict[str, Any]) -> None:
    assert measure_parameter_norms(kept / "run" / "adapter") == pytest.approx(expected["parameter_norms"])


@pytest.mark.parametrize(
    ("folder", "kind"), [("federation/server", "server"), ("federation/lead", "lead"), ("north/kit", "site")]
)
def test_archived_kit_can_be_opened(kept: Path, folder: str, kind: str) -> None:
    assert Kit.read(kept / folder, kind=kind).federation == "cardiology"
