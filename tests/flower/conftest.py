"""A federation of sites that train by adding known numbers, without a model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.routing import iter_route_contexts
from flwr.app import Context, Message
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME

from fedtune.federation.invitation import ProposedRun
from fedtune.federation.lead import Checkpoints, Lead, LeadState
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.rounds import run_rounds
from fedtune.federation.site_round import PreparedRun, Site, TrainingResult
from fedtune.federation.spec import FederationSpec
from fedtune.flower.averaging import Average
from fedtune.flower.client import make_answering
from fedtune.flower.grid_transport import GridTransport
from fedtune.flower.internals import create_superlink_app
from fedtune.flower.simulation import InProcessGrid
from fedtune.flower.site_socket import make_client_app
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Event
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.training.spec import TrainingSpec

from ..builders import MadeSite, set_methods
from ..conftest import make_site_policy, run_proposal
from ..privacy.builders import lead_key
from .certificates import LOOPBACK, Authority
from .loopback import Loopback, run_server

STEPS = {"site-1": 1.0, "site-2": -2.0, "site-3": 0.125}
"""The number that each site adds to every adapter value in a round."""


@pytest.fixture
def adapter() -> Adapter:
    values = np.random.default_rng(5).normal(size=(2, 3)).astype(np.float32)
    return Adapter({"b.lora_A": values, "head": np.linspace(-1, 1, 4, dtype=np.float32)})


class Died(Exception):
    """Exception that stands for the death of a lead's process."""


class Federation:
    """Three sites with separate ledgers, their grid and their lead."""

    def __init__(self, folder: Path, asks: Any, policies: Any, adapter: Adapter, spec: FederationSpec) -> None:
        proposal = run_proposal(**asks)
        self.folder, self.proposal, self.policies, self.plan = folder, proposal, policies, proposal.plan
        self.adapter, self.spec = adapter, spec
        self.sizes = {site: policy.dataset[0].declared_size for site, policy in policies.items()}
        self.asked: list[tuple[str, str]] = []  # each question's site and settings
        self.trained: list[str] = []  # the site of each training
        self.kept: dict[str, tuple[str, str]] = {}  # run and adapter digest that each site stored
        app = make_client_app(
            lambda context, *asked: make_answering(partial(self._site, context), name=self._name(context))(*asked)
        )
        self.grid = InProcessGrid(app, spec.num_sites, replied=lambda number: None)
        self.transport = GridTransport(self.grid)
        self.finished: list[LeadState] = []
        self.lead = Lead(
            asked=ProposedRun(proposal=proposal, key=lead_key, federation=spec),
            training=TrainingSpec(optimizer="sgd", learning_rate=1.0),
            lora=LoraSpec(),
            declared_sizes=self.sizes,
            average=Average(spec, self.sizes),
            checkpoints=Checkpoints(folder / "checkpoints", "digest"),
            evaluate=lambda adapter: {"sum": float(sum(value.sum() for value in adapter.tensors.values()))},
            finished=self.finished.append,
            elapsed=lambda: 1.0,
        )
        self.start = LeadState(round=0, adapter=adapter)

    def run(self, state: LeadState | None = None, **changes: Any) -> LeadState:
        with self.transport.explain_protocol_mismatch():
            return run_rounds(self.transport, replace(self.lead, **changes), state or self.start)

    def run_until(self, round: int, state: LeadState | None = None) -> LeadState:
        """Run until the lead's process dies after `round`; return the state in its checkpoint."""

        def stop_in_round(state: LeadState) -> None:
            if state.round == round:
                raise Died

        with pytest.raises(Died):
            self.run(state, finished=stop_in_round)
        return self.lead.checkpoints.load()

    def _name(self, context: Context) -> str:
        return self.spec.names[int(context.node_config["partition-id"])]

    def find_ledger_path(self, site: str) -> Path:
        return self.folder / site / self.policies[site].ledger

    def ledger(self, name: str) -> SiteLedger:
        policy, folder = self.policies[name], self.folder / name
        anchor = folder / policy.anchor if policy.anchor else None
        key = SigningKey.load_or_create(folder / policy.site_key)
        return SiteLedger(folder / policy.ledger, policy, key, anchor=anchor, create=True)

    def _site(self, context: Context, settings: str) -> Site:
        name = self._name(context)
        self.asked.append((name, settings))
        about = {"declared_size": self.sizes[name], "update_dtype": self.spec.update_dtype}
        prepared = PreparedRun(proposal=self.proposal, template=self.adapter, **about)
        made = MadeSite(self.ledger(name), prepare=lambda proposal: prepared, train=self._train)
        return set_methods(made, store_adapter=lambda run, adapter: self.kept.update({name: (run, adapter.digest())}))

    def _train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> TrainingResult:
        self.trained.append(request.site)
        updated = {name: value + np.float32(STEPS[request.site]) for name, value in adapter.tensors.items()}
        scores = (STEPS[request.site], 0.5) if self.plan.releases_metrics else None
        return TrainingResult(adapter=Adapter(updated), scores=scores)

    def events(self, site: str) -> tuple[Event, ...]:
        return verify(self.find_ledger_path(site)).events


@pytest.fixture
def federation(tmp_path: Path, adapter: Adapter) -> Callable[..., Federation]:
    """A federation; `more` are additional settings."""

    def build(*, sizes: Any = (10, 10, 10), folder: str = "a", asks: Any = (), policies: Any = (), **more: Any) -> Any:
        initial = more.pop("adapter", adapter)
        spec = FederationSpec(**({"num_rounds": 1, "num_sites": 3} | more))
        of_sites = {
            site: make_site_policy(site, declared_size=size, **dict(policies).get(site, {}))
            for site, size in zip(spec.names, sizes, strict=True)
        }
        return Federation(tmp_path / folder, dict(asks), of_sites, initial, spec)

    return build


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change the sites' replies in a round of training, or in exchanges of other types."""

    def patch(change: Callable[[list[Message]], list[Message]], types: tuple[str, ...] = ("train",)) -> None:
        receive = InProcessGrid.receive

        def receive_changed(
            self: InProcessGrid, messages: Iterable[Message], *, timeout: float | None
        ) -> Iterator[Message]:
            answers = list(receive(self, messages, timeout=timeout))
            matching = all(message.metadata.message_type in types for message in answers)
            yield from change(answers) if matching else answers

        monkeypatch.setattr(InProcessGrid, "receive", receive_changed)

    return patch


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A server that is shared by the tests of a file."""
    with run_server(tmp_path_factory.mktemp("network")) as made:
        yield made
        assert "Traceback" not in made.output


@pytest.fixture
def network(server: Loopback) -> Iterator[Loopback]:
    """The shared server, with all site processes stopped after the test."""
    yield server
    server.stop_sites()


@pytest.fixture(scope="module")
def list_flower_routes(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """List (method, path) of all routes of the installed Flower with our settings."""
    tls = Authority(tmp_path_factory.mktemp("authority") / "ca").issue("server", address=LOOPBACK)
    app, _ = create_superlink_app(**asdict(tls), host=LOOPBACK, port=1, database=Path(FLWR_IN_MEMORY_DB_NAME))
    contexts = iter_route_contexts(app.routes)
    return {(method, context.path) for context in contexts for method in context.methods}
