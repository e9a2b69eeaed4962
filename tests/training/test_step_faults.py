"""Small tests of a private step, most of them for one mutant in tests/mutants."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fedtune.data import Shapes, TextDataset
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import draw_poisson_sample
from fedtune.privacy.randomness import SeededRandomness
from fedtune.privacy.run_plan import Plan
from fedtune.training import local
from fedtune.training.dp_step import Records, compute_clipped_contributions, take_dp_sgd_step
from fedtune.training.examples import SiteExamples
from fedtune.training.spec import TrainingSpec
from fedtune.training.users import UserExamples, UserGradients

from ..builders import pad_length
from ..conftest import has_scale
from . import conftest
from .conftest import CELLS, Table, build_trained, make_work, release_round

Gradients = dict[str, torch.Tensor]
IndexArray = npt.NDArray[np.int64]


def draw_gradients(count: int, *, size: float = 1.0, seed: int = 3) -> Gradients:
    """Draw gradients of two tensors with norms around `size`, each unit ten times as large as the previous unit."""
    generator = torch.Generator().manual_seed(seed)
    sizes = size * 10.0 ** (torch.arange(count) - count // 2)
    return {
        "lora_A": torch.randn((count, 5, 7), generator=generator) * sizes[:, None, None],
        "head.weight": torch.randn((count, 3, 4), generator=generator) * sizes[:, None, None],
    }


def test_contributions_are_truncated_toward_zero() -> None:
    expected = torch.tensor([0.6, -0.6, 0.99, -0.99, 1.6, -1.6, 3.0, -3.0, 0.0])
    assert compute_clipped_contributions({"a": (expected / CELLS)[None]}, 1.0)["a"].tolist() == [
        [0, 0, 0, 0, 1, -1, 3, -3, 0]
    ]


def test_tiny_clip_norm_does_not_amplify_rounding() -> None:
    clip = 1e-6
    gradient = {"a": torch.tensor([[3e-5, 4e-5], [0.6, 0.8]])}  # norms of 50 and of a million clip norms
    contributions = compute_clipped_contributions(gradient, clip)["a"]
    assert contributions[0].tolist() == pytest.approx([0.03 * CELLS, 0.04 * CELLS], rel=1e-5)
    assert contributions[1].tolist() == pytest.approx([0.6 * CELLS, 0.8 * CELLS], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [60_000, 1_000_000])
def test_many_equal_values_stay_within_the_clip_norm(size: int, count: int) -> None:
    contributions = compute_clipped_contributions({"a": torch.full((count, size), 0.1)}, 1.0)["a"].to(torch.int64)
    assert all(0.99 * CELLS**2 < int(square) <= CELLS**2 for square in (contributions**2).sum(dim=1))


@pytest.mark.parametrize("bad_value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_gradient_is_zeroed_and_affects_no_other_example(bad_value: float) -> None:
    gradients = draw_gradients(5)
    ref = {name: value.clone() for name, value in compute_clipped_contributions(gradients, 1.0).items()}
    gradients["head.weight"][2, 1, 1] = bad_value
    for name, value in compute_clipped_contributions(gradients, 1.0).items():
        assert not value[2].any()
        assert torch.equal(value[[0, 1, 3, 4]], ref[name][[0, 1, 3, 4]])
    largest = torch.finfo(torch.float32).max
    parts = compute_clipped_contributions({"a": torch.tensor([[largest, -largest, 0.0], [3.0, -3.0, 0.0]])}, 1.0)["a"]
    assert torch.equal(parts[0], parts[1]), "the largest finite gradient must be clipped normally"
    assert 0.99 * CELLS**2 < float(parts[0].square().sum()) <= CELLS**2


make_plan = partial(conftest.make_plan, sampling_rate=0.5, max_grad_norm=0.7, local_steps=1)


@dataclass
class MadeUp:
    """Units with given gradients, a few per micro-batch; stores the sampled units of each step."""

    gradients: Gradients
    drawn: list[list[int]] = field(default_factory=list)

    def compute_gradients(self, batch: IndexArray) -> Gradients:
        return {name: gradient[batch] for name, gradient in self.gradients.items()}

    def records(self, *, declared_size: int) -> Records:
        def cut(indices: IndexArray) -> Iterator[Any]:
            self.drawn.append(indices.tolist())
            for first in range(0, len(indices), 3):
                yield indices[first : first + 3]

        return Records(count=len(next(iter(self.gradients.values()))), declared_size=declared_size, cut=cut)


def measure_moves(units: MadeUp, plan: Plan, *, declared_size: int, steps: int = 1) -> npt.NDArray[np.float64]:
    """Measure the moves of plain gradient descent at rate 1 along each coordinate of the joint vector."""
    parameters = {
        name: nn.Parameter(torch.zeros(grad.shape[1:], dtype=torch.float64)) for name, grad in units.gradients.items()
    }
    streams = {purpose: SeededRandomness(4).stream(purpose) for purpose in ("sampling", "noise")}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    for _ in range(steps):
        records = units.records(declared_size=declared_size)
        take_dp_sgd_step(units, records, plan, parameters=parameters, optimizer=optimizer, **streams)
    return -np.concatenate([value.detach().numpy().ravel() for value in parameters.values()])


def test_step_is_the_sampled_sum_over_the_declared_size() -> None:
    units = MadeUp({name: grad.repeat(4, *[1] * (grad.dim() - 1)) for name, grad in draw_gradients(7).items()})
    rows = [np.asarray(value, dtype=np.float64).reshape(len(value), -1) for value in units.gradients.values()]
    exact = np.concatenate(rows, axis=1)  # (n, all values of a unit)
    clipped = exact * np.minimum(1, 0.7 / np.linalg.norm(exact, axis=1))[:, None]
    parts = measure_moves(units, make_plan(), declared_size=40)
    sampled = draw_poisson_sample(28, 0.5, SeededRandomness(4).stream("sampling"))
    assert units.drawn == [sampled.tolist()]
    assert len(sampled) not in (0, 20, 28)
    np.testing.assert_allclose(parts, clipped[sampled].sum(axis=0) / (0.5 * 40), atol=1e-5)


@pytest.mark.parametrize("count", [0, 30])
def test_step_adds_noise_once_for_any_sample(count: int) -> None:
    silent = MadeUp({"lora_A": torch.zeros(count, 60, 100), "head.weight": torch.zeros(count, 6000)})
    contributions, of_two_samples = (
        measure_moves(silent, make_plan(noise_multiplier=1.3), declared_size=40, steps=steps) for steps in (1, 2)
    )
    assert (len(silent.drawn[0]) > 6) == (count > 0), "there must be several micro-batches"
    scale = 1.3 * 0.7 / (0.5 * 40)
    for values in (contributions[:6000], contributions[6000:]):
        assert has_scale(values, scale)
        for factor in (0.9, 1.1, 1 / 0.7, 0.7, 0.5, 2.0):
            assert not has_scale(values, factor * scale)
    assert (of_two_samples - contributions != contributions).all(), "every step must add its own noise"


def make_numbered_records(*lengths: int) -> TextDataset:
    """Make records with these lengths, whose first token is their index."""
    ids = tuple(np.array([number, *[1] * (length - 1)], dtype=np.int32) for number, length in enumerate(lengths))
    return TextDataset(ids, np.zeros(len(ids), dtype=np.int64))


def make_examples(dataset: TextDataset) -> SiteExamples:
    shapes = Shapes.from_limits(max_length=int(dataset.lengths.max(initial=1)), max_tokens=64)
    return conftest.make_examples(dataset, shapes)


def test_adapter_values_never_exceed_the_site_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = build_trained(), make_examples(conftest.make_dummy_examples("classification", 6))
    bound = 0.05
    start = Adapter.from_task_model(model)
    assert max(float(np.abs(value).max()) for value in start.tensors.values()) > 5 * bound
    before: list[float] = []

    def note_largest(*arguments: Any, parameters: Any, **settings: Any) -> None:
        before.append(max(float(one.detach().abs().max()) for one in parameters.values()))
        take_dp_sgd_step(*arguments, parameters=parameters, **settings)

    monkeypatch.setattr(local, "take_dp_sgd_step", note_largest)
    sgd = TrainingSpec(local_steps=6, optimizer="sgd", learning_rate=10.0)
    plan = make_plan(noise_multiplier=1.0, local_steps=6)
    after = release_round(model, examples, make_work(max_adapter_value=bound, plan=plan, training=sgd))
    max_value = float(np.float32(bound))
    assert before[0] <= max_value, "the received adapter must be clamped before records are used"
    assert max(before[1:]) <= max_value, "every step must clamp the adapter"
    assert max(float(np.abs(value).max()) for value in after.tensors.values()) == max_value


@pytest.mark.parametrize("max_value", [0.25, float("inf")])
def test_projection_changes_only_values_outside_the_bound(max_value: float) -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.1, -9.0, 0.25])
    parameter = nn.Parameter(values.clone())
    local.clamp_parameters({"a": parameter}, max_value)
    assert torch.equal(parameter.detach(), values.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-max_value, max_value))
    assert parameter.requires_grad


def test_micro_batch_shape_is_independent_of_its_contents() -> None:
    examples = make_examples(make_numbered_records(9, 10, 11, 17, 9, 3))
    for chosen in ([0, 1, 2, 3, 4, 5], [0, 4], [5], [3], [2, 1, 0]):
        for part in examples.parts(np.array(chosen)):
            batch = examples.batch(part)
            assert tuple(batch.input_ids.shape) == tuple(batch.attention_mask.shape) == (part.rows, part.length)
            assert part.length == pad_length(examples._shapes, int(examples._dataset.lengths[part.places[0]]))
            assert part.rows in examples._shapes.rows(part.length)


@pytest.mark.parametrize("neighbors", [[], [1], [1, 2], [2, 3], [1, 2, 3]])
def test_cancelling_user_mean_is_bitwise_equal_in_any_batch(neighbors: list[int]) -> None:
    """Records of several lengths cancel, so another order of summation would change the rounding error."""
    rows = torch.tensor([-1e8, 1e8, 1.0, 3e-7, *[5.0] * 16])[:, None].repeat(1, 3)
    lengths = [5, 13, 9, 30, *[13] * 8, *[30] * 5, *[5] * 3]
    batches = ([3, 1, 0, 2], range(4, 12), range(12, 17), range(17, 20))
    users = UserExamples(
        make_examples(make_numbered_records(*lengths)), [np.array(gradient) for gradient in batches], most_records=100
    )

    def compute_last_mean(*chosen: int) -> torch.Tensor:
        (batch,) = users.make_batcher(SeededRandomness(1).stream("records"))(np.array(chosen))
        return UserGradients(Table({"a": rows})).compute_gradients(batch)["a"][-1]  # type: ignore[arg-type]

    assert torch.equal(compute_last_mean(*neighbors, 0), compute_last_mean(0))
    sums = {float(np.cumsum(rows[order, 0].double().numpy() / 4)[-1]) for order in ([0, 2, 1, 3], [0, 2, 3, 1])}
    assert len(sums) > 1, "the order must matter for these records"
