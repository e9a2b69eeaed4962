"""A run of a tiny model, and a real site with its own records that answers the run's lead."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.data.features import FeatureSpec
from fedtune.data.partition import PartitionSpec
from fedtune.data.spec import DataSpec
from fedtune.federation.protocol import EndOfRun, Reply, RoundRequest
from fedtune.federation.site_round import answer, end_run
from fedtune.federation.spec import FederationSpec
from fedtune.model.adapter import Adapter
from fedtune.model.base_model import hash_model
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason, Receipt, Refusal, Update
from fedtune.privacy.site_files import SiteFiles
from fedtune.sites import work
from fedtune.sites.real_site import SiteProcess
from fedtune.sites.shared_model import LoadedModel
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.sites.site_settings import read_site_settings
from fedtune.sites.virtual_site import Participants, generate_policy
from fedtune.spec import ConfigError
from fedtune.training.spec import RuntimeSpec, TrainingSpec

from ..builders import round_request
from ..conftest import list_tiny_overrides
from ..privacy.builders import change_values

LABELS = ("invoice", "complaint", "praise")
COLUMNS = {"text": "body", "label": "kind"}
"""Columns of the sites' files; the lead's columns have other names."""
TABLE: dict[str, Any] = {
    "model": {"path": "none", "sha256": None},
    "lora": {"kind": "none"},
    "data": {
        "input": "features",
        "columns": {"label": "lead's label"},
        "max_length": 1,
        "features": (
            FeatureSpec(columns=("age",), range=(0.0, 110.0)),
            FeatureSpec(columns=("ward",), categories=("a", "b"), missing="indicator"),
        ),
    },
}
"""Groups of settings for records of a table."""


@cache
def _make_letters() -> RunConfig:
    return RunConfig(
        name="trial",
        task="classification",
        model=ModelSpec(path="random:bert", sha256=hash_model(ModelSpec(path="random:bert"))),
        data=DataSpec(
            dataset="letters",
            train_file="unused.csv",
            columns={"text": "text", "label": "label"},
            labels=LABELS,
            declared_sizes=40,
            max_length=12,
        ),
        lora=LoraSpec(rank=2, alpha=4.0),
        privacy=PrivacySpec(noise_multiplier=4.0, sampling_rate=0.5),
        training=TrainingSpec(local_steps=2),
        # In float32 an update is the trained adapter itself, which tests read and compare bit for bit.
        federation=FederationSpec(num_rounds=3, num_sites=2, site_names=("north", "south"), update_dtype="float32"),
        runtime=RuntimeSpec(kind="deployment", device="cpu", num_threads=1, seeded_noise=True),
    )


def make_letters(**groups: Any) -> RunConfig:
    """Make the lead's configuration of a run over the sites north and south; keywords change its groups."""
    return change_values(_make_letters(), **groups)


def make_first_request(config: RunConfig, lead: SigningKey, **fields: Any) -> RoundRequest:
    """Make a request for the first round of a run at the site north, with an arbitrary adapter."""
    return round_request(config.proposal(lead=lead.public, plan=config.plan()), **{"site": "north"} | fields)


def write_records(path: Path, rows: Iterable[Sequence[str]], *, header: Iterable[str] = COLUMNS.values()) -> None:
    """Write a site's data file."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([header, *rows])


def simulate_same_run(config: RunConfig, folder: Path, rows: Iterable[Sequence[str]]) -> Participants:
    """Simulate the same run over records of text, label and site."""
    columns, file = {role: role for role in ("text", "label", "site")}, folder / "all.csv"
    write_records(file, rows, header=columns)
    partition = PartitionSpec(kind="column", sites={"north": 0, "south": 1})
    data = {"train_file": str(file), "columns": columns, "partition": partition}
    groups = {"data": data, "runtime": {"kind": "simulation"}, "training": {"ignore_weak_signal": True}}
    return Participants(change_values(config, **groups), folder)


@dataclass
class Station:
    """A site in a folder, and its lead.

    Attributes:
        real: the state in the memory of the site's process; `restart` recreates it.
        waits: called with runs that await approval.
        first: the lead's initial adapter.
    """

    folder: Path
    lead: SigningKey
    first: Adapter
    name: str
    config: RunConfig
    waits: Callable[[Proposal, str], None] = lambda proposal, settings: None

    def __post_init__(self) -> None:
        self.site_toml, self.data = self.folder / "site.toml", self.folder / "mail.csv"
        self.paused, self.adapters = self.folder / "paused", self.folder / "adapters"
        self.restart()

    def restart(self) -> None:
        """End the site's process, and start another one in the same folder."""
        self.real = SiteProcess(
            site_toml=self.site_toml,
            installed=self.installed,
            paused=self.paused.exists,
            runs=self.folder / "runs",
            adapters=self.adapters,
            awaits=lambda proposal, settings, software: self.waits(proposal, settings),
            open_ledger=partial(SiteFiles.open_ledger, create=True),
        )

    def installed(self, sha256: str) -> Path:
        raise ConfigError("base model", sha256, "is not installed")

    def edit(self, *, machine: Any = MappingProxyType({}), **changes: Any) -> None:
        """Rewrite policy or machine settings: dicts change tables, and `dataset` changes the only data set."""
        policy, machine_settings = read_policy(self.site_toml), read_site_settings(self.site_toml).machine
        dataset = replace(policy.dataset[0], **changes.pop("dataset", {}))
        tables = {"machine": asdict(replace(machine_settings, **machine))}
        write_policy(change_values(policy, **changes, dataset=(dataset,)), self.site_toml, others=tables)

    def ledger(self) -> SiteLedger:
        return SiteFiles.from_site_toml(self.site_toml).open_ledger(create=True)

    def request(self, config: RunConfig | None = None, *, round: int = 1, **about: Any) -> RoundRequest:
        """Build the lead's request; `about` are fields of the request or of its proposal."""
        sent = select_settings_for_sites(config or self.config)
        proposal = sent.proposal(lead=self.lead.public, plan=sent.plan())
        of_proposal = {key: value for key, value in about.items() if hasattr(proposal, key)}
        fields = {"round": round, "site": self.name, "adapter_digest": self.first.digest()}
        fields |= {key: value for key, value in about.items() if key not in of_proposal}
        return round_request(replace(proposal, **of_proposal), **fields)

    def ask(self, config: RunConfig | None = None, *, settings: str | None = None, **fields: Any) -> Reply:
        """Return the answer to a request for a round, with an adapter and a signature.

        `settings` are sent instead of the configuration's own.
        """
        adapter, key = fields.pop("adapter", self.first), fields.pop("key", self.lead)
        request = self.request(config, adapter_digest=adapter.digest(), **fields)
        text = json.dumps(select_settings_for_sites(config or self.config).to_json()) if settings is None else settings
        return answer(self.real.site(text), request.sign_with(key), adapter)

    def update(self, config: RunConfig | None = None, **fields: Any) -> Update:
        """Return the update, which must be the answer."""
        reply = self.ask(config, **fields)
        assert isinstance(reply.body, Update), reply.body
        return reply.body

    def refusal(self, config: RunConfig | None = None, **fields: Any) -> Reason:
        """Return the reason of the refusal, which must be the answer."""
        reply = self.ask(config, **fields)
        assert isinstance(reply.body, Refusal)
        return reply.body.reason

    def end(self, adapter: Adapter, config: RunConfig | None = None) -> Receipt | None:
        """Send the site the end-of-run notice, with its final adapter."""
        run = select_settings_for_sites(config or self.config).run_id()
        notice = EndOfRun(run=run, lead=self.lead.public, adapter_digest=adapter.digest())
        return end_run(self.real.site(""), notice.sign_with(self.lead), adapter)


@pytest.fixture(scope="session")
def first_adapter() -> Adapter:
    """The initial adapter of every run of the tiny model."""
    return LoadedModel(make_letters()).initial_adapter


@pytest.fixture
def station(tmp_path: Path, lead_key: SigningKey, first_adapter: Adapter) -> Any:
    """A site that allows several runs like that of its configuration; keywords change the configuration."""

    def make(name: str = "north", **groups: Any) -> Station:
        config = make_letters(**groups)
        new_station = Station(tmp_path / name, lead_key, first_adapter, name, config)
        new_station.folder.mkdir()
        sent = select_settings_for_sites(config)
        policy = generate_policy(sent, sent.plan(), name, lead=lead_key.public)
        columns = COLUMNS if config.privacy.unit == "record" else {**COLUMNS, "user": "kind"}
        columns |= {} if config.privacy.cohorts is None else {"user": "who", "arrival": "came"}
        asserted = {"no_person_at_another_site": True}
        tables = {"machine": {"device": "cpu", "num_threads": 1}}
        write_policy(change_values(policy, simulated=False, asserted=asserted), new_station.site_toml, others=tables)
        budget = {"max_epsilon": 10 * policy.budget.max_epsilon}
        new_station.edit(dataset={"path": new_station.data.name, "columns": columns}, budget=budget)
        write_records(new_station.data, [(f"letter {n} of {n % 7}", LABELS[n % 3]) for n in range(40)])
        return new_station

    return make


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """The tiny simulation's configuration with overrides."""
    return lambda *overrides: compose_run(list_tiny_overrides(*overrides, into=tmp_path))


@pytest.fixture
def exact_scores(monkeypatch: pytest.MonkeyPatch) -> list[npt.NDArray[np.float64]]:
    """The exact scores that each round adds noise to."""
    seen, original = list[npt.NDArray[np.float64]](), work.release_scores
    monkeypatch.setattr(work, "release_scores", lambda scores, **rest: seen.append(scores) or original(scores, **rest))
    return seen
