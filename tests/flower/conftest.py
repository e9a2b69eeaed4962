"""A federation of sites that train by adding known numbers, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from fedtune.federation.checkpoint import Checkpoints
from fedtune.federation.lead import LeadState
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site import Site
from fedtune.federation.spec import FederationSpec
from fedtune.flower.client import make_client_app
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.server import Lead
from fedtune.flower.strategy import make_strategy
from fedtune.model import Adapter
from fedtune.privacy.ledger import JournalLedger
from fedtune.privacy.plan import Plan

STEPS = {"site-1": 1.0, "site-2": -2.0, "site-3": 0.125}
"""What each site adds to every value of the adapter in a round."""


@pytest.fixture
def adapter() -> Adapter:
    values = np.random.default_rng(5).normal(size=(2, 3)).astype(np.float32)
    return Adapter({"b.lora_A": values, "head": np.linspace(-1, 1, 4, dtype=np.float32)})


@pytest.fixture
def plan() -> Plan:
    return Plan(
        unit="record",
        delta=1e-5,
        sampling_rate=0.2,
        noise_multiplier=4.0,
        max_grad_norm=1.0,
        local_steps=2,
        num_rounds=3,
    )


class Federation:
    """Three sites, their grid and their lead."""

    def __init__(self, folder: Path, adapter: Adapter, plan: Plan, spec: FederationSpec, sizes: dict[str, int]) -> None:
        self.spec, self.adapter, self.plan, self.sizes, self.folder = spec, adapter, plan, sizes, folder
        self.trained: list[str] = []
        app = make_client_app(self._site, lambda context: self._name(context))
        self.grid = InProcessGrid(app, spec.num_sites, replied=lambda number: None)
        self.finished: list[LeadState] = []
        self.lead = Lead(
            run="r",
            plan=plan,
            federation=spec,
            declared_sizes=sizes,
            strategy=make_strategy(spec),
            checkpoints=Checkpoints(folder / "checkpoints", "digest"),
            evaluate=lambda adapter: {"sum": float(sum(value.sum() for value in adapter.tensors.values()))},
            finished=self.finished.append,
            elapsed=lambda: 1.0,
        )
        self.start = LeadState(round=0, adapter=adapter)

    def _name(self, context: Context) -> str:
        return self.spec.names[int(context.node_config["partition-id"])]

    def _site(self, context: Context) -> Site:
        name = self._name(context)
        ledger = JournalLedger(name, self.folder / f"{name}.jsonl")
        return Site(name=name, run="r", plan=self.plan, ledger=ledger, train=self._train)

    def _train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> Adapter:
        self.trained.append(request.site)
        return Adapter({name: value + np.float32(STEPS[request.site]) for name, value in adapter.tensors.items()})


@pytest.fixture
def federation(tmp_path: Path, adapter: Adapter, plan: Plan) -> Callable[..., Federation]:
    def make(
        *, sizes: tuple[int, ...] = (10, 10, 10), adapter: Adapter = adapter, folder: str = "a", **settings: Any
    ) -> Federation:
        spec = FederationSpec(**({"num_rounds": 1, "num_sites": 3} | settings))
        declared = dict(zip(spec.names, sizes, strict=True))
        return Federation(tmp_path / folder, adapter, plan, spec, declared)

    return make


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[Message]], list[Message]]], None]:
    """Change what comes back from the sites in a round of training."""

    def patch(change: Callable[[list[Message]], list[Message]]) -> None:
        pull = InProcessGrid.pull_messages

        def changed(self: InProcessGrid, message_ids: Any) -> list[Message]:
            messages = pull(self, message_ids)
            training = all(message.metadata.message_type == "train" for message in messages)
            return change(messages) if training else messages

        monkeypatch.setattr(InProcessGrid, "pull_messages", changed)

    return patch
