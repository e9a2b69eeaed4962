"""A site in a folder, whose ledger has lived."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.experiment_file import config_folder
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.members import REQUEST, site_init
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import Ledger, Reservation
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy


@dataclass(frozen=True)
class SiteFolder:
    """A site's files.  The policy is the shipped template with a lead, a model and an anchor in it."""

    folder: Path

    @property
    def policy(self) -> Path:
        return self.folder / "site.toml"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.db"

    @property
    def anchor(self) -> Path:
        return self.folder / "anchor.json"

    @property
    def key(self) -> SigningKey:
        return SigningKey.load_or_make(self.folder / "site_key.pem")

    @property
    def lead(self) -> SigningKey:
        return SigningKey.load_or_make(self.folder / "lead.pem")

    def write_policy(self, **changes: str | None) -> None:
        """The template with some values replaced, as TOML, or left out."""
        text = (config_folder() / "site.toml").read_text(encoding="utf-8")
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
        self.policy.write_text(text)

    def open(self) -> Ledger:
        """The ledger, as a site that starts opens it."""
        return Ledger(self.ledger, read_policy(self.policy), self.key, anchor=self.anchor)

    def proposal(self, run: str, *, seeded_noise: bool = False, **plan: Any) -> Proposal:
        """A run that the policy allows: four rounds of ten steps."""
        fields: dict[str, Any] = {
            "unit": "record",
            "delta": 1e-5,
            "sampling_rate": 0.05,
            "noise_multiplier": 2.0,
            "max_grad_norm": 1.0,
            "local_steps": 10,
            "num_rounds": 4,
        }
        return Proposal(
            run=run,
            lead=self.lead.public,
            dataset="discharge_letters",
            task="classification",
            base_model="ab" * 32,
            target_modules=("query",),
            rank=4,
            train_head=True,
            seeded_noise=seeded_noise,
            num_sites=3,
            dtype="float32",
            lora_scale=2.0,
            head_scale=20.0,
            plan=Plan(**{**fields, **plan}),
        )

    def train(self, ledger: Ledger, proposal: Proposal, *rounds: int, commit: bool = True) -> None:
        """Charge rounds and, unless they are interrupted, store a reply."""
        for round in rounds:
            granted = ledger.reserve(proposal, round=round, request=f"{proposal.run} {round}")
            assert isinstance(granted, Reservation)
            if commit:
                ledger.commit(granted, f"reply of {proposal.run} {round}".encode())

    def refuse(self, ledger: Ledger, proposal: Proposal, *, named: str | None = None) -> None:
        """Ask for too much, and record the refusal."""
        with pytest.raises(Refused) as caught:
            ledger.reserve(proposal, round=1, request="x")
        ledger.refuse(caught.value, run=named or proposal.run, round=1, request="x")


@dataclass(frozen=True)
class Here:
    """A site that has joined: its folder with site.toml, keys and kit."""

    folder: Path

    @property
    def toml(self) -> Path:
        return self.folder / "site.toml"

    @property
    def state(self) -> SiteState:
        return SiteState.of(self.folder / "kit")

    @property
    def words(self) -> tuple[str, ...]:
        return ("--kit", str(self.folder / "kit"), "--site", str(self.toml))

    @property
    def kit(self) -> tuple[str, ...]:
        return self.words[:2]

    def ledger(self) -> Ledger:
        return SiteFiles.of(self.toml).open()

    def edit(self, **changes: Any) -> None:
        policy = read_policy(self.toml)
        tables = {key: replace(getattr(policy, key), **value) for key, value in changes.items() if type(value) is dict}
        write_policy(replace(policy, **(changes | tables)), self.toml)

    def start_run(self, proposal: Proposal, *rounds: int) -> None:
        ledger = self.ledger()
        ledger.approve(proposal)
        for round in rounds:
            assert isinstance(ledger.reserve(proposal, round=round, request=f"{proposal.run} {round}"), Reservation)


@pytest.fixture
def joined(tmp_path: Path, site_policy: Callable[..., Policy]) -> Callable[..., Here]:
    """A site of one federation; it approves runs by hand."""

    def make(name: str, *, days_ago: int = 0) -> Here:
        begun = datetime.now(UTC).replace(microsecond=0) - timedelta(days=days_ago)
        federation = tmp_path / "federation"
        if not federation.exists():
            (tmp_path / "federation.toml").write_text('name = "cardiology"\nserver = "127.0.0.1:9"\n')
            provisioning.init(tmp_path / "federation.toml", out=federation, now=begun)
        here = Here(tmp_path / name)
        here.folder.mkdir()
        write_policy(site_policy(name, approval="manual"), here.toml)
        request = site_init(here.toml, out=None) / REQUEST
        archive = provisioning.ask_to_add(federation, request=request, days=None, now=begun).let_in().archive
        with zipfile.ZipFile(archive) as kit:
            kit.extractall(request.parent)
        return here

    return make


@pytest.fixture(scope="session")
def finished(command: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end, with its report, and beside it what the command printed; not to be changed."""
    into = tmp_path_factory.mktemp("runs")
    outcome = command("simulate", *tiny(into=into, name="one"), "--json")
    assert outcome.code == 0, outcome.err
    (into / "printed.json").write_text(outcome.out)
    return into / "one"


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """A site that has a policy, and no ledger yet."""
    made = SiteFolder(tmp_path / "north")
    made.folder.mkdir()
    made.write_policy()
    return made


@pytest.fixture(scope="session")
def _lived_once(tmp_path_factory: pytest.TempPathFactory) -> SiteFolder:
    """A site with an ended run, an interrupted round, refusals and an open run; not to be changed."""
    site = SiteFolder(tmp_path_factory.mktemp("lived") / "north")
    site.folder.mkdir()
    site.write_policy()
    ledger = site.open()
    first = site.proposal("diagnosis")
    site.train(ledger, first, 1, 2)
    site.train(ledger, first, 3, commit=False)
    site.train(ledger, first, 3)
    ledger.end("diagnosis")
    site.refuse(ledger, site.proposal("greedy", noise_multiplier=0.5))
    site.train(ledger, site.proposal("triage", noise_multiplier=2.5), 1)
    return site


@pytest.fixture
def lived(_lived_once: SiteFolder, tmp_path: Path) -> SiteFolder:
    return SiteFolder(Path(shutil.copytree(_lived_once.folder, tmp_path / "north")))


@pytest.fixture
def put_back(lived: SiteFolder) -> SiteFolder:
    """A site whose ledger was lost after three more rounds, and replaced by a backup."""
    backup = lived.folder / "backup.db"
    shutil.copy(lived.ledger, backup)
    ledger = lived.open()
    lived.train(ledger, lived.proposal("triage", noise_multiplier=2.5), 2)
    lived.train(ledger, lived.proposal("third"), 1, 2)
    shutil.copy(backup, lived.ledger)
    return lived
