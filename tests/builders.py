"""Builders that tests of several layers share."""

import copy
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch

from fedtune.data import Batch, Shapes
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.secure.at_site import SiteAggregator
from fedtune.federation.site_round import PreparedRun, Site, TrainingResult
from fedtune.model.adapter import Adapter
from fedtune.model.spec import TaskModelSpec
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.proposal import Proposal
from fedtune.runs.results import BaseModel, RunProvenance, RunResult
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.per_example import record_gradients


def run_result(**fields: Any) -> RunResult:
    """Build the content of a run.json; `rounds`, `final` and `privacy` are required."""
    provenance = RunProvenance(
        dataset="letters", declared_sizes={}, base_model=BaseModel(path="random:bert", sha256="00" * 32)
    )
    about = {"fedtune_version": "0", "config_sha256": "00", "task": "classification", "provenance": provenance}
    return RunResult(**about | fields)


def round_request(proposal: Proposal, **about: Any) -> RoundRequest:
    """Build a request for the first round of a run at site `a`, with an arbitrary adapter; keywords override fields."""
    fields = {"round": 1, "site": "a", "adapter_digest": "ab" * 32, "receipt": None, "expires": 1e12}
    return RoundRequest(proposal=proposal, **fields | about)


Train = Callable[[RoundRequest, Adapter, int], TrainingResult]


class MadeSite(Site):
    """A site whose preparation and training are callables; records stored adapters and runs that await approval."""

    def __init__(
        self,
        ledger: SiteLedger,
        *,
        prepare: Callable[[Proposal], PreparedRun],
        train: Train,
        paused: bool = False,
        sums: SiteAggregator | None = None,
    ) -> None:
        super().__init__(ledger, sums=sums)
        self._prepare, self._train, self._paused = prepare, train, paused
        self.stored: list[tuple[str, str]] = []
        self.submitted: list[Proposal] = []

    @property
    def paused(self) -> bool:
        return self._paused

    def prepare(self, proposal: Proposal) -> PreparedRun:
        return self._prepare(proposal)

    def train(
        self, request: RoundRequest, adapter: Adapter, attempt: int, admitted: Collection[str] | None = None
    ) -> TrainingResult:
        return self._train(request, adapter, attempt)

    def read_adapter_shapes(self, run: str) -> Mapping[str, list[int]] | None:
        return self._prepare(self.ledger.history.runs[run].proposal).template.shapes

    def store_adapter(self, run: str, adapter: Adapter) -> None:
        self.stored.append((run, adapter.digest()))

    def await_approval(self, proposal: Proposal, *, software: str) -> None:
        self.submitted.append(proposal)


def set_methods(site: Site, **methods: Callable[..., Any]) -> Site:
    for name, method in methods.items():
        setattr(site, name, method)
    return site


DEVICE = torch.device(os.environ.get("FEDTUNE_TEST_DEVICE", "cpu"))
"""The device of models and examples in training tests; simulations/gpu/run.py sets it to an accelerator."""


def adapt_shapes_to_device(shapes: Shapes) -> Shapes:
    """Return the shapes that a preflight leaves on DEVICE: GPU kernels depend on row counts, so one per length."""
    return shapes if DEVICE.type == "cpu" else dataclasses.replace(shapes, row_shares=(1,))


def pad_length(shapes: Shapes, num_tokens: int) -> int:
    """Return the padded length of a record, computed separately from the package, which pads many records at once."""
    return next(length for length in shapes.lengths if num_tokens <= shapes.compute_longest_record(length))


def build_copy(spec: TaskModelSpec) -> TaskModel:
    """Return a copy of the tiny model for this spec; each model is built once per process."""
    # The weights of 4-bit layers depend on the CPU's instruction set.
    return copy.deepcopy(_build_once(spec, torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@cache
def _build_once(spec: TaskModelSpec, with_bfloat16: bool) -> TaskModel:
    return build_task_model(spec, device=DEVICE)


def record_example_gradients(model: TaskModel, batch: Batch) -> dict[str, torch.Tensor]:
    with record_gradients(model) as gradients:
        return {name: gradient.clone() for name, gradient in gradients.compute_gradients(batch).items()}


def set_random_values(model: TaskModel, size: float, *, seed: int = 11) -> TaskModel:
    """Set the trainable tensors to random values of a given size, as after some training (B is initialized to zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model
