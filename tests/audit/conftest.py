"""Audits of a tiny federation, and faults to be found in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.privacy.mechanism import cell
from fedtune.report.derive.verdicts import read_audit
from fedtune.report.facts import Audit
from fedtune.training import dp_step, users


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_step, "add_gaussian_noise", lambda sums, **_: dict(sums))


def without_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(sums: Any, gradients: Any, max_grad_norm: float) -> None:
        for name, gradient in gradients.items():
            sums[name] += (gradient.double() / cell(max_grad_norm)).round().to(torch.int64).sum(dim=0)

    monkeypatch.setattr(dp_step, "add_clipped", add)


def clipping_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users are sampled, and their records are clipped and added up one by one."""

    def of(self: Any, batch: Any) -> dict[str, torch.Tensor]:
        parts = [self._examples.of(examples) for examples, _, _ in batch.parts()]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    monkeypatch.setattr(users.UserGradients, "of", of)


FAULTS = {"no noise": without_noise, "no clipping": without_clipping, "clipping by record": clipping_by_record}


@pytest.fixture
def break_it(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a named fault into the private step of this process."""
    return lambda fault: FAULTS[fault](monkeypatch)


@pytest.fixture
def audited(command: Any, tiny: Any, tmp_path: Path) -> Callable[..., tuple[Any, Audit, Path]]:
    """Outcome of `fedtune audit` on a run of seconds, what it found, and its folder."""

    def run(*overrides: str, name: str = "audited") -> tuple[Any, Audit, Path]:
        outcome = command("audit", *tiny("tracking=quiet", *overrides, into=tmp_path, name=name))
        found = read_audit(tmp_path / name)
        assert found is not None
        return outcome, found, tmp_path / name

    return run
