"""Tests, before anything is charged, whether an example's contribution depends on that example alone on this machine.

Shapes are fixed (`fedtune.data.shapes`), so kernels cannot depend on the content of a batch.  Whether they treat every
row and every number of rows alike is tested here, at every shape that a step may have: first with the run's own
weights, then with random weights, since the run's own could have been chosen so that dummy examples reveal nothing.
Dummy examples and weights are drawn anew each time, so that nobody can search for a model that happens to pass.

One part is not tested for each number of rows: a language model's output layer, which processes each record by itself
(`fedtune.tasks.causal_lm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch, Part, Shapes, TextDataset
from fedtune.data.batching import isolate_example
from fedtune.model.adapter import Adapter
from fedtune.model.hf_logging import get_first_line
from fedtune.model.quantized import FourBit
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel
from fedtune.training.accelerators import total_memory
from fedtune.training.dp_step import CLIP_NORM_CELLS, add_clipped, compute_clipped_contributions, make_zero_sums
from fedtune.training.examples import SiteExamples, Told, ignore_progress
from fedtune.training.machine import measure_model_bytes, measure_peak_bytes
from fedtune.training.per_example import PerExampleGradients, record_gradients

See = Callable[[Mapping[str, torch.Tensor]], None]


def ignore_gradients(gradients: Mapping[str, torch.Tensor]) -> None:
    """Ignore the gradients."""


_DECIDED_BY = "decided_by"
"""Beside gradients' names: what a discrete choice was made by.  Another choice moves a whole contribution."""
_LARGEST_ROUNDING = 0.05
"""In clip norms.  Rounding moves an example by less; one that moves further is mixed with others."""
_SIZE = 0.2
"""Of the random values that the adapter is tried at: with B at zero, as training starts, the gradient of A is zero."""


def max_batch_influence(
    model: TaskModel,
    shapes: Shapes,
    *,
    keeps_states: bool,
    max_grad_norm: float,
    pad_id: int = 0,
    weights_chosen: bool = True,
    told: Told = ignore_progress,
    seed: int | None = None,
    see: See = ignore_gradients,
) -> float:
    """Measure how much an example's contribution to a sum changes with the rest of its micro-batch.

    `require_batch_invariance` judges the result.

    Dummy examples cover, for each padded length, the longest length and some shorter ones, over the whole vocabulary up
    to its ends.  If records of such lengths and ids would cause failures of positions, losses or memory, the failure
    occurs here, before a round is charged.

    Args:
        model: a model with adapters; its adapter values and weights are restored afterwards.
        shapes: the shapes that steps will have.
        keeps_states: whether steps will start from cached outputs of the frozen layers.
        max_grad_norm: the run's clip norm, for the measured bound.
        pad_id: the token id that steps will use as padding.
        weights_chosen: whether somebody chose the weights; a randomly initialized model needs no second test with
            random weights.
        told: called with the number of finished trials and their total, which is the same for every data set.
        seed: seed of all dummy data; None: a seed that nobody knows.
        see: receives the gradients of each micro-batch and then their contributions to a sum, both on the CPU; the same
            seed yields the same dummy data.

    Returns:
        The largest observed change of an example's clipped contribution, in clip norms; 0.0: bit-identical.

    Raises:
        ConfigError: for `model.path`, or for any setting that prevents the training pass.
    """
    draws, numbers, total = np.random.default_rng(seed), count(1), (3 if weights_chosen else 2) * len(shapes.lengths)

    def trial() -> _Trial:
        made = _Trial(model, shapes, draws, keeps_states=keeps_states, pad_id=pad_id)
        made.tried, made.see = lambda: told(next(numbers), total), see
        return made

    with _restore_adapter_afterwards(model), _convert_model_errors(model, shapes):
        _randomize_adapter(model, draws)
        moved = trial().measure_max_influence(max_grad_norm) if weights_chosen else 0.0
        with _randomize_weights(model, draws) if weights_chosen else nullcontext():
            last = trial()
            return max(moved, last.measure_max_influence(max_grad_norm), last.measure_row_influence(max_grad_norm))


@contextmanager
def _restore_adapter_afterwards(model: TaskModel) -> Iterator[None]:
    before = Adapter.from_task_model(model)
    try:
        yield
    finally:
        before.load_into(model)


@contextmanager
def _convert_model_errors(model: TaskModel, shapes: Shapes) -> Iterator[None]:
    """Convert errors in a model's code to a ConfigError for `model.path`, or for the batch size if memory ran out."""
    try:
        yield
    except ConfigError:
        raise
    except torch.OutOfMemoryError as error:
        bound = f"must be smaller: the device is out of memory for this micro-batch ({get_first_line(error)})"
        raise ConfigError("runtime.micro_batch_tokens", shapes.max_tokens, bound) from None
    except Exception as error:
        bound = f"cannot be trained on examples of {shapes.lengths[-1]} tokens here: {get_first_line(error)}"
        raise ConfigError("model.path", model.spec.model.path, bound) from error


def fit_to_memory(model: TaskModel, shapes: Shapes, *, most_bytes: int, keeps_states: bool, pad_id: int = 0) -> Shapes:
    """Return the shapes, with as many rows for each length as fit into `most_bytes` of memory.

    The rows are found by measuring dummy examples of every length.

    Args:
        model: a model with adapters, whose values do not matter.
        shapes: the shapes by tokens alone.
        most_bytes: for a micro-batch, its per-example gradients and all temporary memory of clipping.
        keeps_states: as in `max_batch_influence`.
        pad_id: the token id that steps will use as padding.

    Raises:
        ConfigError: for `runtime.step_mib`: the smallest micro-batch needs more.
    """
    draws = np.random.default_rng()

    def measure_needed(rows: int, length: int) -> int:
        room = shapes.capacity(length, rows)
        made_up = _make_longest(model, shapes.compute_longest_record(length), draws).select_examples([0] * room)
        examples = SiteExamples(made_up, pad_id=pad_id, shapes=shapes, device=model.device)
        part = Part(np.arange(room), rows, length)
        return measure_peak_bytes(lambda: _run_full_step(model, examples, part, keeps_states), model.device)

    with _convert_model_errors(model, shapes):
        most_rows = tuple(_compute_max_rows(most_bytes, shapes, length, measure_needed) for length in shapes.lengths)
    return replace(shapes, most_rows=most_rows)


def _compute_max_rows(most_bytes: int, shapes: Shapes, length: int, needed: Callable[[int, int], int]) -> int:
    """Return the most rows of a micro-batch of this length that fit; `needed` measures the bytes for a number of rows.

    Raises:
        ConfigError: for `runtime.step_mib`: the smallest micro-batch needs more.
    """
    fewest, rows = shapes.compute_min_rows(length), shapes.rows(length)[0]
    if (twice := needed(2 * fewest, length)) * rows <= most_bytes * 2 * fewest:
        return rows  # more than enough, since what does not grow with the rows is counted several times
    if (least := needed(fewest, length)) > most_bytes:
        bound = (
            f"must be at least {-(-least // 2**20)}: a micro-batch of {fewest} x {length} tokens needs "
            "that much memory on this machine"
        )
        raise ConfigError("runtime.step_mib", most_bytes // 2**20, bound)
    # By a straight line first, since a GPU may have no room to measure the whole.
    rows = min(rows, fewest + fewest * (most_bytes - least) // max(1, twice - least))
    while rows > fewest and (bytes_now := needed(rows, length)) > most_bytes:
        rows = min(rows - 1, fewest + (rows - fewest) * (most_bytes - least) // (bytes_now - least))
    return rows


def _run_full_step(model: TaskModel, examples: SiteExamples, part: Part, keeps_states: bool) -> None:
    """Do a step's work on a micro-batch along the code path that takes the most memory.

    On this path one example fails, so that the others are computed one at a time, and another one becomes NaN: a record
    that causes this needs no more memory than any other.
    """
    if keeps_states:
        examples.keep_frozen_states(model, parts=[part], lenient=False)
    examples.keep_reference(model, parts=[part], lenient=False)
    with record_gradients(model) as gradients:
        batch, sums = examples.batch(part), make_zero_sums(model.trainable())
        gradients.compute_all_gradients(batch)
        nothing = gradients.compute_all_gradients(isolate_example(batch, None))
        gathered = {name: one.clone() for name, one in nothing.items()}
        gradients.compute_all_gradients(isolate_example(batch, 0))
        del nothing
        for unusable in (slice(1), slice(None)):
            next(iter(gathered.values()))[unusable] = torch.nan
            add_clipped(sums, gathered, 1.0)


def require_batch_invariance(moved: float, *, path: str, inexact_allowed: bool) -> None:
    """Require that an example's contribution to a sum is bit-identical whatever else is in its micro-batch.

    Args:
        moved: the largest observed change of a contribution, in clip norms.
        path: the model's path.
        inexact_allowed: accept different bits, as long as they are explained by rounding.

    Raises:
        ConfigError: for `model.path`.
    """
    if moved > _LARGEST_ROUNDING:
        bound = "mixes the examples of a batch or depends on their rounding, so examples cannot be clipped separately"
        raise ConfigError("model.path", path, bound)
    if moved > 0 and not inexact_allowed:
        bound = (
            "gives an example a different gradient when other examples share its micro-batch here (by up to "
            f"{moved:.1e} clip norms), so the bound on one record is not exact here; a site may accept that: "
            "inexact_gradients = true under [allow] in site.toml"
        )
        raise ConfigError("model.path", path, bound)


class _Trial:
    """Dummy examples of every shape, each split into micro-batches in two different ways.

    Attributes:
        tried: called whenever a length was tested.
        see: receives the gradients of each micro-batch, and their contributions.
    """

    def __init__(
        self, model: TaskModel, shapes: Shapes, draws: np.random.Generator, *, keeps_states: bool, pad_id: int
    ) -> None:
        self._model, self._shapes, self._draws = model, shapes, draws
        self._keeps_states, self._pad_id = keeps_states, pad_id
        self.tried: Callable[[], None] = lambda: None
        self.see: See = ignore_gradients
        self._places: dict[int, npt.NDArray[np.int64]] = {}
        lengths: list[int] = []
        for number, length in enumerate(shapes.lengths):
            most, room = shapes.compute_longest_record(length), self._compute_max_room(length)
            least = shapes.lengths[number - 1] if number else 1
            self._places[length] = np.arange(len(lengths), len(lengths) + room)
            # The longest first; it is left out of the other companies, for models that choose by the longest example.
            lengths += [most, *draws.integers(min(least, most), most, size=room - 1, endpoint=True)]
        made_up = _make_dummy_examples(model, draw_text_lengths(lengths, model.spec.texts, draws), draws)
        self._whole = {length: self._make_full_part(places, length) for length, places in self._places.items()}
        self._smaller = {length: tuple(self._regroup(places, length)) for length, places in self._places.items()}
        # What the frozen base makes of the examples has the same two companies.
        self._examples = self._prepare_examples(made_up, self._whole.values())
        self._again = self._prepare_examples(made_up, (part for parts in self._smaller.values() for part in parts))

    def _make_full_part(self, places: npt.NDArray[np.int64], length: int) -> Part:
        """Return a micro-batch with as many examples as it may have."""
        return Part(places, self._shapes.rows(length)[0], length)

    def _compute_max_room(self, length: int) -> int:
        return self._shapes.capacity(length, self._shapes.rows(length)[0])

    def _prepare_examples(self, dataset: TextDataset, parts: Iterable[Part]) -> SiteExamples:
        parts = tuple(parts)
        examples = SiteExamples(dataset, pad_id=self._pad_id, shapes=self._shapes, device=self._model.device)
        if self._keeps_states:
            examples.keep_frozen_states(self._model, parts=parts, lenient=False)
        examples.keep_reference(self._model, parts=parts, lenient=False)
        return examples

    def measure_max_influence(self, max_grad_norm: float) -> float:
        """Return the largest change of a contribution between one full micro-batch and smaller ones, in clip norms."""
        with record_gradients(self._model) as gradients:
            return max(
                self._measure_influence_at_length(gradients, length, max_grad_norm) for length in self._shapes.lengths
            )

    def _measure_influence_at_length(self, gradients: PerExampleGradients, length: int, max_grad_norm: float) -> float:
        whole = self._compute_contributions(gradients, self._examples.batch(self._whole[length]), max_grad_norm)
        moved = 0.0
        for part in self._smaller[length]:
            other = self._compute_contributions(gradients, self._again.batch(part), max_grad_norm)
            rows = torch.from_numpy(part.places - self._places[length][0])
            moved = max(moved, _compute_max_difference(whole, rows, other, torch.arange(len(rows))))
        self.tried()
        return moved

    def _regroup(self, places: npt.NDArray[np.int64], length: int) -> Iterator[Part]:
        """Yield the examples in other rows, in another order and with every other number of rows; the longest one
        alone.
        """
        most_rows, *fewer = self._shapes.rows(length)
        choices = fewer or [most_rows]
        yield Part(places[:1], choices[-1], length)
        places = places[:0:-1]
        while len(places):
            rows, *choices = choices if len(choices) > 1 else choices * 2
            room = self._shapes.capacity(length, rows)
            yield Part(places[:room].copy(), rows, length)
            places = places[room:]

    def measure_row_influence(self, max_grad_norm: float) -> float:
        """Return the largest difference, in clip norms, between one example's contributions in different rows.

        The longest example of each length, with every token supervised, is copied to all rows: every position that a
        kernel might round differently holds a token, and only the row distinguishes the copies.
        """
        parts = [
            self._make_full_part(np.arange(self._compute_max_room(length)), length) for length in self._shapes.lengths
        ]
        copied = [self._prepare_examples(self._make_copies(part.length), [part]) for part in parts]
        moved = 0.0
        with record_gradients(self._model) as gradients:
            for part, examples in zip(parts, copied, strict=True):
                found = self._compute_contributions(gradients, examples.batch(part), max_grad_norm)
                rows = torch.from_numpy(part.places)
                moved = max(moved, _compute_max_difference(found, rows, found, torch.zeros_like(rows)))
                self.tried()
        return moved

    def _compute_contributions(self, gradients: PerExampleGradients, batch: Batch, max_grad_norm: float) -> _Added:
        """Compute gradients and contributions on the model's device, clipped with the same rows together as in a
        step.
        """
        there = gradients.compute_all_gradients(batch)
        chosen = {} if self._model.decided_by is None else {_DECIDED_BY: self._model.decided_by}
        found = (
            {name: one.cpu() for name, one in (there | chosen).items()},
            compute_clipped_contributions(there, max_grad_norm),
        )
        for one in found:
            self.see(one)
        return found

    def _make_copies(self, length: int) -> TextDataset:
        return _make_longest(self._model, self._shapes.compute_longest_record(length), self._draws).select_examples(
            [0] * self._compute_max_room(length)
        )


_Added: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Gradients of n examples and what was chosen by, by name; what each adds (`dp_step.contributions`); on the CPU."""


def _compute_max_difference(one: _Added, rows: torch.Tensor, other: _Added, others: torch.Tensor) -> float:
    """Return the largest difference, in clip norms, between contributions of the same examples.

    The examples are in `rows` of `one`, and in `others` of `other`.
    """
    (gradients, cells), (other_gradients, other_cells) = one, other
    squares = [(added[rows] - other_cells[name][others]).square().sum(dim=1) for name, added in cells.items()]
    moved = float(torch.stack(squares).sum(dim=0).sqrt().max()) / CLIP_NORM_CELLS
    differ = [name for name, found in gradients.items() if not torch.equal(found[rows], other_gradients[name][others])]
    if _DECIDED_BY in differ:
        return 1.0
    return max(moved, 1 / CLIP_NORM_CELLS) if differ else moved  # bits that clipping happens to hide here


def _make_longest(model: TaskModel, length: int, draws: np.random.Generator) -> TextDataset:
    """Make one dummy example whose texts all have `length` tokens, all of them supervised."""
    return _make_dummy_examples(model, [length] * model.spec.texts, draws, first=lambda _: 0)


def _make_dummy_examples(
    model: TaskModel,
    lengths: list[int],
    draws: np.random.Generator,
    *,
    first: Callable[[int], int] = lambda length: length // 2,
) -> TextDataset:
    input_ids = model.generate_dummies(lengths, draws)
    targets = model.task.dummy_targets(input_ids, spec=model.spec, draws=draws, first=first)
    return TextDataset(input_ids, targets, model.spec.texts)


def draw_text_lengths(longest: list[int], texts: int, draws: np.random.Generator) -> list[int]:
    """Draw the lengths of all texts of records with `texts` texts each; any text of a record may be the longest."""
    each = ([length, *draws.integers(1, length, size=texts - 1, endpoint=True)] for length in longest)
    return [int(length) for place, some in enumerate(each) for length in np.roll(some, place % texts)]


def _randomize_adapter(model: TaskModel, draws: np.random.Generator) -> None:
    generator = _make_generator(draws, "cpu")
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _SIZE)


def _make_generator(draws: np.random.Generator, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(draws.integers(1 << 62)))


def list_frozen_values(model: TaskModel) -> dict[str, torch.Tensor]:
    """Return the values of a model that a weights file sets and training does not change, by name: parameters, and
    buffers that are saved (such as Gemma 4's factor of each layer).  The codes of 4-bit layers are not among them.
    """
    frozen: dict[str, torch.Tensor] = {name: one for name, one in model.named_parameters() if not one.requires_grad}
    coded = {id(each) for layer in model.modules() if isinstance(layer, FourBit) for each in layer.buffers()}
    saved = model.base.state_dict(keep_vars=True)
    for name, one in model.base.named_buffers():
        if name in saved and one.is_floating_point() and id(one) not in coded:
            frozen[f"base.{name}"] = one
    return frozen


@contextmanager
def _randomize_weights(model: TaskModel, draws: np.random.Generator) -> Iterator[None]:
    """Replace the frozen weights by random ones, as in a new model, and restore them at the end of the block."""
    frozen = list_frozen_values(model)
    in_four_bits = [module for module in model.modules() if isinstance(module, FourBit)]
    own: list[torch.Tensor] = [*frozen.values(), *(each for layer in in_four_bits for each in layer.buffers())]
    # On the model's device if both leave room for a step, which has four fifths of what a model leaves free.
    beside = model.device.type != "cpu" and 6 * measure_model_bytes(model) <= total_memory(model.device)
    kept = [one.detach().to(model.device if beside else "cpu", copy=True) for one in own]
    generators = {one.device: _make_generator(draws, one.device) for one in frozen.values()}
    try:
        with torch.no_grad():
            for name, one in frozen.items():
                one.normal_(generator=generators[one.device])
                if one.ndim > 1:
                    one.mul_(one.shape[-1] ** -0.5)
                else:
                    one.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
            for layer in in_four_bits:
                drawn = torch.empty(layer.shape, device=layer.codes.device)
                layer.keep(drawn.normal_(generator=generators[drawn.device]).mul_(layer.shape[-1] ** -0.5))
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(own, kept, strict=True):
                tensor.copy_(before)
