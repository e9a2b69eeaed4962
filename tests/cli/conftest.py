"""Fixtures: site folders with and without ledger history, and finished runs."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits import provisioning
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Refused
from fedtune.version import find_config_folder

from ..books import Books
from ..conftest import list_tiny_overrides, restore_logging, run_command
from ..ops.conftest import Desk
from ..privacy.builders import make_proposal
from .snapshots import COLUMNS


@pytest.fixture
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the terminal width to 80 columns."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


@pytest.fixture
def own_process() -> Iterator[None]:
    """Restore logging and umask after a command, which changes them for the process."""
    before = os.umask(0o022)
    with restore_logging():
        yield
    os.umask(before)


class SiteFolder(Books):
    """A site with the shipped policy template, completed by a lead, a model and an anchor."""

    @property
    def anchor(self) -> Path:
        return self.folder / "anchor.json"

    @property
    def lead(self) -> SigningKey:
        return SigningKey.load_or_create(self.folder / "lead.pem")

    def write_policy(self, **changes: str | None) -> None:
        """Write the policy template with some values replaced (as TOML) or omitted."""
        text = (find_config_folder() / "site.toml").read_text(encoding="utf-8")
        values: dict[str, str | None] = {
            "approval": '"automatic"',
            "anchor": '"anchor.json"',
            "leads": f'["{self.lead.public}"]',
            "base_models": f'["{"ab" * 32}"]',
            "path": '"letters.csv"',
            "no_person_at_another_site": "true",
        }
        for key, value in {**values, **changes}.items():
            line = "" if value is None else f"{key} = {value}"
            text, count = re.subn(rf"^(?:# )?{key} = .*$", line, text, flags=re.MULTILINE)
            assert count == 1, key
        self.site_toml.write_text(text)

    def proposal(self, run: str, *, seeded_noise: bool = False, **plan: Any) -> Proposal:
        """Return a permitted run of four rounds with ten steps each."""
        usual = {"sampling_rate": 0.05, "noise_multiplier": 2.0, "max_grad_norm": 1.0}
        usual |= {"local_steps": 10, "num_rounds": 4}
        about = {"dataset": "discharge_letters", "base_model": "ab" * 32, "target_modules": ("query",)}
        about |= {"lora_scale": 2.0, "head_scale": 20.0, "lead": self.lead.public, "seeded_noise": seeded_noise}
        return make_proposal(run=run, plan=usual | plan, **about)

    def ask_too_much(self, proposal: Proposal, *, named: str | None = None) -> None:
        """Request a run that exceeds the policy, and record the refusal."""
        ledger = self.open()
        with pytest.raises(Refused) as caught:
            ledger.reserve(proposal, round=1, request="x")
        ledger.record_refusal(caught.value, run=named or proposal.run, round=1, request="x")


class Here(Books):
    """An admitted site: folder with site.toml, keys and kit."""

    @property
    def state(self) -> SiteState:
        return SiteState.in_kit(self.folder / "kit")

    @property
    def words(self) -> tuple[str, ...]:
        return ("--kit", str(self.folder / "kit"), "--site", str(self.site_toml))

    @property
    def kit(self) -> tuple[str, ...]:
        return self.words[:2]

    def start_run(self, proposal: Proposal, *rounds: int) -> None:
        self.open().approve(proposal)
        self.charge(proposal, *rounds, committed=False)


@pytest.fixture
def join_site(tmp_path: Path) -> Callable[..., Here]:
    """Return a function that creates sites of a federation with manual approval."""

    def make(name: str, *, days_ago: int = 0) -> Here:
        joined = datetime.now(UTC).replace(microsecond=0) - timedelta(days=days_ago)
        federation = tmp_path / "federation"
        if not federation.exists():
            (tmp_path / "federation.toml").write_text('name = "cardiology"\nserver = "127.0.0.1:9"\n')
            provisioning.init_federation(tmp_path / "federation.toml", out=federation, now=joined)
        return Here(Desk(federation, joined).join(name, approval="manual").parent)

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with its report, and the command's output; read-only."""
    into = tmp_path_factory.mktemp("runs")
    (into / "printed.json").write_text(
        run_command("simulate", *list_tiny_overrides(into=into, name="one"), "--json").printed
    )
    return into / "one"


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """Copy of the finished run's folder."""
    return Path(shutil.copytree(finished_run, tmp_path / "one"))


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """A site with a policy and without a ledger."""
    folder = SiteFolder(tmp_path / "north")
    folder.folder.mkdir()
    folder.write_policy()
    return folder


@pytest.fixture(scope="session")
def _site_with_history_once(tmp_path_factory: pytest.TempPathFactory) -> SiteFolder:
    """A site with an ended run, an interrupted round, refusals and an open run; read-only."""
    site = SiteFolder(tmp_path_factory.mktemp("lived") / "north")
    site.folder.mkdir()
    site.write_policy()
    first = site.proposal("diagnosis")
    site.charge(first, 1, 2)
    site.charge(first, 3, committed=False)
    site.charge(first, 3)
    site.open().end_run("diagnosis")
    site.ask_too_much(site.proposal("greedy", noise_multiplier=0.5))
    site.charge(site.proposal("triage", noise_multiplier=2.5), 1)
    return site


@pytest.fixture
def site_with_history(_site_with_history_once: SiteFolder, tmp_path: Path) -> SiteFolder:
    return SiteFolder(Path(shutil.copytree(_site_with_history_once.folder, tmp_path / "north")))


@pytest.fixture
def put_back(site_with_history: SiteFolder) -> SiteFolder:
    """A site whose ledger was rolled back to a backup, three rounds before its end."""
    backup = site_with_history.copy_ledger("backup.db")
    site_with_history.charge(site_with_history.proposal("triage", noise_multiplier=2.5), 2)
    site_with_history.charge(site_with_history.proposal("third"), 1, 2)
    shutil.copy(backup, site_with_history.ledger)
    return site_with_history
