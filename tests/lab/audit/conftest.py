"""Fixtures: audits of a tiny federation, and injected faults."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.privacy.mechanism import compute_cell_width
from fedtune.report.derive.verdicts import read_audit
from fedtune.report.facts import Audit
from fedtune.training import dp_step, users

from ...conftest import Outcome, list_tiny_overrides, run_command

Break = Callable[[str], None]
"""Function that injects a named fault into the private step of this process."""
BY_USER = ("privacy.unit=user", "+data.columns.user=label", "privacy.records_per_user=3", "data.train_fraction=0.1")


def remove_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_step, "add_gaussian_noise", lambda sums, **_: dict(sums))


def remove_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_up(gradients: Any, max_grad_norm: float) -> dict[str, torch.Tensor]:
        cell = compute_cell_width(max_grad_norm)
        return {name: (grad.double() / cell).round().to(torch.int64).sum(dim=0) for name, grad in gradients.items()}

    monkeypatch.setattr(dp_step, "sum_clipped", add_up)


def clip_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault: records of sampled users are clipped individually."""

    def compute_gradients(self: Any, batch: Any) -> dict[str, torch.Tensor]:
        parts = [self._examples.compute_gradients(examples) for examples, _, _ in batch.parts()]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    monkeypatch.setattr(users.UserGradients, "compute_gradients", compute_gradients)


FAULTS = {"no noise": remove_noise, "no clipping": remove_clipping, "clipping by record": clip_by_record}


@pytest.fixture
def inject_fault(monkeypatch: pytest.MonkeyPatch) -> Break:
    return lambda fault: FAULTS[fault](monkeypatch)


def audit(*overrides: str, into: Path) -> tuple[Outcome, Audit, Path]:
    """Return a function that audits a tiny run, and returns outcome, findings and folder."""
    outcome = run_command("audit", *list_tiny_overrides("tracking=quiet", *overrides, into=into, name="audited"))
    result = read_audit(into / "audited")
    assert result is not None
    return outcome, result, into / "audited"


@pytest.fixture
def run_audit(tmp_path: Path) -> Any:
    return partial(audit, into=tmp_path)
