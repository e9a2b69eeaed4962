"""One site's update for given records, by fedtune's own way from a signed request to the bytes that leave the site."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site_round import answer
from fedtune.privacy.release import Update
from fedtune.privacy.run_plan import Plan
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.virtual_site import Participants

SITE = "bank-a"


class OneSite(Participants):
    """A federation of one site on a model that is loaded already."""

    def __init__(self, config: RunConfig, folder: Path, shared: RunModel) -> None:
        super().__init__(config, folder)
        self.shared = RunModel(shared.loaded, config)


@dataclass(frozen=True)
class Released:
    """What the server holds after a round: what it sent and what came back.

    Attributes:
        sent: the adapter that went to the site.
        returned: the tensors of the site's update, decoded from the bytes that left the site.
        rates: learning rates of the LoRA tensors and of the head.
    """

    sent: Mapping[str, np.ndarray]
    returned: Mapping[str, np.ndarray]
    plan: Plan
    rates: tuple[float, float]

    def gradient(self, name: str) -> np.ndarray:
        """What the site stepped by in one tensor, over the learning rate: for plain SGD the mean gradient (float64)."""
        change = self.sent[name].astype(np.float64) - self.returned[name].astype(np.float64)
        return change / self.rates[name.startswith("head.")]

    def names(self, part: str) -> list[str]:
        """Names of the tensors with `part` in them."""
        return [name for name in self.returned if part in name]


def config_of(overrides: Sequence[str], records_file: Path, declared_size: int) -> RunConfig:
    """The run that the server proposes to its one site."""
    return compose_run(
        [
            "tracking=quiet",
            "name=reconstruction",
            "federation.num_sites=1",
            "model.dtype=float32",  # the same bits on every machine
            "federation.update_dtype=float32",  # the most that an update can tell: bfloat16 is this, rounded
            f"federation.site_names=[{SITE}]",
            f"data.train_file='{records_file}'",
            f"data.declared_sizes={declared_size}",
            "data.validation_file=null",
            "data.test_file=null",
            *overrides,
        ]
    )


def shared_model(overrides: Sequence[str]) -> RunModel:
    """The model that the runs with `overrides` have in common; loading it once saves seconds a run."""
    config = config_of(overrides, Path("unused.jsonl"), 1)
    return RunModel(LoadedModel(config), config)


def released(shared: RunModel, records: Sequence[Mapping[str, str]], overrides: Sequence[str]) -> Released:
    """Ask the site that has `records` for its first round, and take what it answers."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = config_of(overrides, file, len(records))
        federation = OneSite(config, Path(scratch), shared)
        lead, adapter = federation.sites.lead_key(), shared.initial_adapter
        request = RoundRequest(
            proposal=config.proposal(lead=lead.public, plan=federation.plan),
            round=1,
            site=SITE,
            adapter_digest=adapter.digest(),
            receipt=None,
            expires=time.time() + 3600.0,
        )
        reply = answer(federation.site(0), request.sign_with(lead), adapter)
    if not isinstance(reply.body, Update):
        raise SystemExit(f"the site refused: {reply.body}")
    update = Update.from_bytes(reply.body.to_bytes())
    rates = config.training.compute_peak_rates(clipped=federation.plan.private)
    return Released(sent=adapter.tensors, returned=update.tensors, plan=federation.plan, rates=rates)
