"""Models whose examples influence each other are refused before anything is charged."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.data import Shapes
from fedtune.model.adapter import Adapter
from fedtune.model.spec import LoraSpec
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel
from fedtune.training.algorithms.fedavg import FEDAVG
from fedtune.training.batch_invariance import _Trial, max_batch_influence, require_batch_invariance
from fedtune.training.local import list_frozen_tensors
from fedtune.training.machine import prepare_model
from fedtune.training.per_example import PerExampleGradients
from fedtune.training.spec import RuntimeSpec

from .conftest import KINDS, LAST, build_fresh

kinds = pytest.mark.parametrize(("path", "task"), KINDS)
SHAPES = Shapes.from_limits(max_length=20, max_tokens=80)
Change = Callable[[torch.Tensor], torch.Tensor]


def check(
    model: TaskModel, *, shapes: Shapes = SHAPES, keeps: bool = False, inexact_allowed: bool = False, **settings: Any
) -> float:
    influence = max_batch_influence(model, shapes, keeps_states=keeps, **({"max_grad_norm": 0.1} | settings))
    require_batch_invariance(influence, path=model.spec.model.path, inexact_allowed=inexact_allowed)
    return influence


def require_refused(model: TaskModel, message: str, **settings: Any) -> None:
    before = Adapter.from_task_model(model).digest()
    with pytest.raises(ConfigError, match=message):
        check(model, **settings)
    assert Adapter.from_task_model(model).digest() == before, "values must be restored after a refusal, too"


def list_layers(model: TaskModel) -> Any:
    base = model.base.get_base_model()
    return base.encoder.layer if hasattr(base, "encoder") else base.model.layers


def change_layer(model: TaskModel, change: Change, *, number: int = 0) -> TaskModel:
    list_layers(model)[number].register_forward_hook(lambda _, inputs, hidden: change(hidden))
    return model


def build_last_layer(path: str = "random:bert", task: str = "classification") -> TaskModel:
    return build_fresh(path, task, lora=LAST)


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[Any, ...]]] = set()

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(product in str(kernel) for product in ("mm", "linear")):
            shapes = tuple((tuple(value.shape), value.stride()) for value in args if isinstance(value, torch.Tensor))
            self.seen.add((str(kernel), shapes))
        return kernel(*args, **(kwargs or {}))


@pytest.mark.by_day("True")
@pytest.mark.parametrize("onednn", [True, False])
def test_training_uses_only_matrix_shapes_covered_by_the_trial(onednn: bool) -> None:
    """Also covers rounds in which A or B is frozen, whose products must use the same kernels."""
    lora = LoraSpec(rank=4, alpha=8.0, alternate=True)
    model = prepare_model(lambda: build_fresh(lora=lora), RuntimeSpec(onednn=onednn), max_length=12)

    def record_products() -> set[Any]:
        with Products() as products:
            check(model, seed=1, shapes=Shapes.from_limits(max_length=12, max_tokens=40))
        return products.seen

    trial_shapes = record_products()
    for round in (1, 2):
        with model.freeze_tensors(list_frozen_tensors(lora, FEDAVG, model.trainable(), round=round, sent={})):
            assert (recorded := record_products()) <= trial_shapes
        assert recorded


@pytest.mark.by_day(
    "random:bert-classification-False-uncached",
    "random:llama-causal_lm-True-cached states",
    "random:llama-preference-False-cached states",
    "random:bert-triplets-True-uncached",
)
@pytest.mark.parametrize("keeps", [False, True], ids=["uncached", "cached states"])
@pytest.mark.parametrize("checkpointing", [False, True])
@kinds
def test_ordinary_models_pass_the_batch_invariance_trial(
    path: str, task: str, checkpointing: bool, keeps: bool
) -> None:
    model = build_last_layer(path, task)
    before = Adapter.from_task_model(model).digest()
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert check(model, keeps=keeps) == 0.0
    assert Adapter.from_task_model(model).digest() == before, "the adapter's values must be restored"
    expected = build_last_layer(path, task).state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in model.state_dict().items()), "weights must be restored"


OTHERS = {
    "as long as the model": Shapes.from_limits(max_length=20, max_tokens=64, positions=20),
    "a place behind the longest": Shapes.from_limits(max_length=20, max_tokens=64, positions=21),
    "one shape a length": Shapes((8, 24), max_tokens=64, row_shares=(1,)),
    "a row at a time": Shapes((24,), max_tokens=1),
}


@pytest.mark.by_day(
    *(f"random:bert-classification-{name}" for name in OTHERS),
    "random:llama-causal_lm-as long as the model",
    "random:llama-preference-a row at a time",
)
@pytest.mark.parametrize("shapes", OTHERS.values(), ids=OTHERS)
@kinds
def test_ordinary_models_pass_the_trial_in_other_shapes(path: str, task: str, shapes: Shapes) -> None:
    assert check(build_fresh(path, task), shapes=shapes) == 0.0


def add_batch_mean(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + hidden.mean(dim=0, keepdim=True)  # as batch normalization does


def mix_from_six_rows(hidden: torch.Tensor) -> torch.Tensor:
    return add_batch_mean(hidden) if len(hidden) >= 6 else hidden


def change_single_record(hidden: torch.Tensor) -> torch.Tensor:
    # Not a multiple of the hidden state, which the normalization after the last layer would cancel.
    return hidden + hidden.roll(1, dims=-1) if len(hidden) <= 2 else hidden  # in batches of at most two rows


def mix_previous_row(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.5 * hidden.roll(1, dims=0)


@pytest.mark.by_day(
    *("trained-add_batch_mean", "trained-mix_from_six_rows", "trained-change_single_record"),
    *("trained-mix_previous_row", "frozen-add_batch_mean", "llama-mix_from_six_rows", "pairs-change_single_record"),
)
@pytest.mark.parametrize(
    "change",
    [add_batch_mean, mix_from_six_rows, change_single_record, mix_previous_row],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize(
    ("path", "task", "number"),
    [(*KINDS[0], 0), (*KINDS[0], -1), (*KINDS[1], -1), (*KINDS[4], -1)],
    ids=["frozen", "trained", "llama", "pairs"],
)
def test_layer_mixing_examples_is_refused(path: str, task: str, change: Change, number: int) -> None:
    model = change_layer(build_last_layer(path, task), change, number=number)
    require_refused(model, r"model\.path .*mixes the examples", inexact_allowed=True)  # even if rounding is accepted


def test_layer_depending_on_the_longest_row_is_refused() -> None:
    model, longest = build_last_layer(), [0]
    model.base.get_base_model().register_forward_pre_hook(
        lambda _, __, given: longest.__setitem__(0, int(given["attention_mask"].sum(dim=1).max())), with_kwargs=True
    )
    change_layer(model, lambda hidden: hidden * (1.0 + 0.1 * longest[0]))
    require_refused(model, r"model\.path .*mixes the examples")


def test_last_bit_dependence_is_refused_or_measured() -> None:
    def change_last_bit(hidden: torch.Tensor) -> torch.Tensor:
        # Changes every value of the first row, but only in large batches.
        if len(hidden) < 6:
            return hidden
        changed = hidden.clone()
        changed[0] = torch.nextafter(hidden[0].detach(), torch.tensor(torch.inf)) + (hidden[0] - hidden[0].detach())
        return changed

    model = change_layer(build_last_layer(), change_last_bit, number=-1)
    require_refused(model, r"gradient differently depending .*inexact_gradients = true")
    before = Adapter.from_task_model(model).digest()
    assert 2.0**-24 <= check(model, inexact_allowed=True) < 1e-4
    assert Adapter.from_task_model(model).digest() == before


@pytest.mark.by_day("classification-inexact gradients are accepted", "votes-")
@pytest.mark.parametrize("accepted", [False, True], ids=["", "inexact gradients are accepted"])
@pytest.mark.parametrize("task", ["classification", "votes"])
def test_rounding_dependence_is_detected_for_every_task(task: str, accepted: bool) -> None:
    """Rounding changes the gradient of a vote for hardly any dummy record, because only the nearest candidate
    matters.
    """

    def round_by_batch(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 2.0**-22) if len(hidden) >= 6 else hidden

    for _ in range(9):
        model = change_layer(build_fresh("random:bert", task), round_by_batch, number=0)
        if task == "votes":
            require_refused(model, r"model\.path .*mixes the examples", inexact_allowed=accepted)
        elif not accepted:
            require_refused(model, r"model\.path .*gradient differently depending")
    assert check(build_fresh("random:bert", task)) == 0.0


@pytest.mark.parametrize("candidate", [0, 1, 2])
def test_last_bit_change_in_a_vote_score_is_detected(monkeypatch: pytest.MonkeyPatch, candidate: int) -> None:
    original = PerExampleGradients.compute_all_gradients

    def nudge_score(self: PerExampleGradients, batch: Any) -> dict[str, torch.Tensor]:
        result = original(self, batch)
        if len(batch.input_ids) == SHAPES.rows(batch.input_ids.shape[1])[0]:
            value = self._model.decided_by[-1 - batch.empty_rows - (-len(batch.input_ids) % 32), candidate]
            value.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
        return result

    monkeypatch.setattr(PerExampleGradients, "compute_all_gradients", nudge_score)
    require_refused(build_fresh("random:bert", "votes"), "mixes the examples", inexact_allowed=True)


def test_last_bit_change_in_one_gradient_value_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PerExampleGradients.compute_all_gradients

    def nudge_gradient(self: PerExampleGradients, batch: Any) -> dict[str, torch.Tensor]:
        result = original(self, batch)
        if len(batch.input_ids) == SHAPES.rows(batch.input_ids.shape[1])[0]:
            # Change the smallest value: clipping then rounds to the same grid cell, so only the bit comparison can
            # detect it.
            values = result["head.weight"][-1 - batch.empty_rows].flatten()
            value = values[values.abs().masked_fill(values == 0, torch.inf).argmin()]
            value.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
        return result

    monkeypatch.setattr(PerExampleGradients, "compute_all_gradients", nudge_gradient)
    require_refused(build_last_layer(), "gradient differently depending")
    assert check(build_last_layer(), inexact_allowed=True) >= 2.0**-24


@pytest.mark.parametrize("keeps", [False, True])
def test_frozen_layers_with_cached_states_are_tested_in_varied_batches(keeps: bool) -> None:
    model = build_last_layer()
    embeddings = model.base.get_base_model().embeddings
    embeddings.register_forward_hook(lambda module, inputs, hidden: add_batch_mean(hidden))
    require_refused(model, r"mixes the examples|gradient differently depending", keeps=keeps)


@pytest.mark.parametrize("fault", ["mixed", "rounded"])
def test_preference_reference_is_checked_in_varied_batches(monkeypatch: Any, fault: str) -> None:
    model, plain = build_last_layer("random:llama", "preference"), TaskModel.reference

    def change_reference(self: TaskModel, batch: Any) -> torch.Tensor | None:
        result = plain(self, batch)
        return result + result.mean() if fault == "mixed" else result * (1 + 1e-6 * len(result))

    assert check(model, max_grad_norm=10.0) == 0.0
    monkeypatch.setattr(TaskModel, "reference", change_reference)
    require_refused(model, r"mixes the examples|gradient differently depending", max_grad_norm=10.0)


# Every row count at the longest length, and the smallest row count at every other length.
@pytest.mark.parametrize(
    ("length", "rows"),
    [(SHAPES.lengths[-1], rows) for rows in SHAPES.rows(SHAPES.lengths[-1])]
    + [(length, SHAPES.rows(length)[-1]) for length in SHAPES.lengths[:-1]],
)
def test_frozen_layers_are_checked_at_every_row_count(length: int, rows: int) -> None:
    model = build_last_layer()

    def round_differently(_: nn.Module, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 2e-6) if hidden.shape[:2] == (rows, length) else hidden

    model.base.get_base_model().embeddings.register_forward_hook(round_differently)
    require_refused(model, "gradient differently depending", keeps=True)


@pytest.mark.by_day("False-IndexError", "True-MemoryError")
@pytest.mark.parametrize("error", [IndexError, MemoryError])
@pytest.mark.parametrize("keeps", [False, True])
def test_record_dependent_failure_is_a_configuration_error(error: type[Exception], keeps: bool) -> None:
    model = build_last_layer()
    last = model.num_ids - 1
    embedding = model.base.get_base_model().get_input_embeddings()

    def fail_on_last(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == last).any():
            raise error("no such id")

    handle = embedding.register_forward_pre_hook(fail_on_last)
    attributes_before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    message = r"model\.path .*cannot be trained on examples of 24 tokens on this machine: .*no such id"
    require_refused(model, message, keeps=keeps)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes_before
    handle.remove()
    assert check(model, keeps=keeps) == 0.0


def test_frozen_layers_failing_on_an_example_are_refused() -> None:
    """At a site such an example counts as zero; in the trial it would hide differences in all other examples."""

    def fail_on_example(_: Any, inputs: Any, hidden: tuple[torch.Tensor, ...]) -> None:
        if not torch.equal(hidden[0][0, 0], hidden[0][-1, 0]):  # all rows without an example are equal
            raise RuntimeError("not this one")

    model = build_last_layer()
    model.base.get_base_model().encoder.layer[0].attention.register_forward_hook(fail_on_example)
    require_refused(model, r"model\.path .*cannot be trained on .* on this machine: not this one", keeps=True)


def test_length_without_positions_is_refused_before_training() -> None:
    model = build_fresh()
    too_long = model.base.config.max_position_embeddings + 8
    message, shapes = (
        r"model\.path .*cannot be trained on examples of \d+ tokens on this machine",
        Shapes((8, too_long), max_tokens=64),
    )
    require_refused(model, message, shapes=shapes)
    # Non-finite gradients must not count as equal, either.
    require_refused(change_layer(build_last_layer(), lambda hidden: hidden * torch.nan, number=-1), r"model\.path")


def test_model_weights_cannot_hide_kernel_rounding() -> None:
    """In an external review, a model cancelled the output of most tokens and amplified the last bit of the others."""

    def enlarge_row(module: Any, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        # Like the last values of a tensor, which are in the last row and are rounded differently.
        is_last = torch.arange(len(hidden), device=hidden.device) == len(hidden) - 1
        return hidden + 1e-6 * is_last[:, None, None] * module.scale

    model = build_last_layer()
    layer = list_layers(model)[-1]
    layer.scale = nn.Parameter(torch.zeros(32), requires_grad=False)  # so that dummy examples show no difference
    layer.register_forward_hook(enlarge_row)
    require_refused(model, r"model\.path .*gradient differently depending")
    assert not layer.scale.any(), "the model's own weights must be restored"


@kinds
def test_trial_covers_every_token_position_in_every_row(path: str, task: str) -> None:
    """In a trial with mostly padding, a kernel that rounds the end of a thread's share differently could pass."""
    model = build_last_layer(path, task)

    def round_one_token(row: int, token: int, _: Any, inputs: Any) -> Any:
        changed = inputs[0].clone()
        if len(changed) > row and changed.shape[1] > token:
            changed[row, token] *= 1 + 2.0**-20
        return changed, *inputs[1:]

    trial = partial(_Trial, model, SHAPES, np.random.default_rng(5), keeps_states=False, pad_id=0)
    length = SHAPES.lengths[-1]
    rows = SHAPES.rows(length)[0]
    for row, token in ((rows - 1, length - 3), (rows // 2, length - 3), (0, 0)):
        handle = list_layers(model)[0].register_forward_pre_hook(partial(round_one_token, row, token))
        assert trial().measure_row_influence(0.1) > 0, (row, token)
        handle.remove()
    assert trial().measure_row_influence(0.1) == 0


@pytest.mark.parametrize("chosen", [True, False])
def test_trial_examples_are_redrawn_and_progress_is_reported(chosen: bool) -> None:
    model, log, reported = build_last_layer(), list[torch.Tensor](), list[tuple[int, int]]()
    embeddings = model.base.get_base_model().get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, output: log.append(inputs[0]))
    total = (3 if chosen else 2) * len(SHAPES.lengths)
    for _ in range(2):
        check(model, weights_chosen=chosen, told=lambda *progress: reported.append(progress))
    assert reported == 2 * [(done, total) for done in range(1, total + 1)]
    first = len(log) // 2
    num_equal = sum(torch.equal(value, changed) for value, changed in zip(log[:first], log[first:], strict=True))
    assert num_equal <= first // 10, "at most a few one-token examples may be drawn twice"
