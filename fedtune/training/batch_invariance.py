"""Batch-invariance test: an example's contribution must not depend on the other examples in its micro-batch.

The test runs before anything is charged. Shapes are fixed (`fedtune.data.shapes`), so kernels cannot depend on the
content of a batch. The test checks at every shape of a step that kernels treat all rows and all numbers of rows alike:
first with the run's own weights, then with random weights, because somebody could choose weights for which dummy
examples reveal nothing. Dummy examples and random weights are freshly drawn for each test, so nobody can search for a
model that happens to pass.

The output layer of a language model is not tested for every number of rows, because it processes each record separately
(`fedtune.tasks.causal_lm`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Batch, MicroBatch, Shapes, TextDataset
from fedtune.data.batching import isolate_example
from fedtune.model.adapter import Adapter
from fedtune.model.hf_logging import get_first_line
from fedtune.model.quantized import FourBit
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel
from fedtune.training.accelerators import get_total_memory
from fedtune.training.dp_step import CLIP_NORM_CELLS, add_clipped, compute_clipped_contributions, make_zero_sums
from fedtune.training.examples import SiteExamples, Told, ignore_progress
from fedtune.training.machine import measure_model_bytes, measure_peak_bytes
from fedtune.training.per_example import PerExampleGradients, record_gradients

GradientCallback = Callable[[Mapping[str, torch.Tensor]], None]


def ignore_gradients(gradients: Mapping[str, torch.Tensor]) -> None:
    """Discard the gradients: the default callback of a test."""


_DECIDED_BY = "decided_by"
"""Key, among the names of gradients, of the values that determine a discrete choice by argmax.

A different choice changes a whole contribution.
"""
_LARGEST_ROUNDING = 0.05
"""Largest change of a contribution, in clip norms, that rounding can explain; a larger change means that examples are
mixed.
"""
_SIZE = 0.2
"""Standard deviation of the random adapter values in the test."""


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
    see: GradientCallback = ignore_gradients,
) -> float:
    """Measure how much an example's clipped contribution changes with the other examples in its micro-batch.

    `require_batch_invariance` checks the result.

    For each padded length, the dummy examples cover the longest and some shorter lengths, over the whole vocabulary
    including its first and last ids. If records of such lengths and ids would cause an error in position embeddings,
    losses or memory allocation, the error occurs here, before a round is charged.

    Args:
        model: a model with adapters; its adapter values and weights are restored afterwards.
        shapes: the shapes of the run's micro-batches.
        keeps_states: whether training steps will start from cached outputs of the frozen layers.
        max_grad_norm: the run's clip norm, the unit of the result.
        pad_id: the token id that steps will use as padding.
        weights_chosen: whether somebody chose the weights. A randomly initialized model is not tested again with random
            weights.
        told: called with the number of finished trials and their total, which is the same for every data set.
        seed: the seed of all dummy data; None draws a secret seed.
        see: receives the gradients of each micro-batch and then their contributions to a sum, both on the CPU; the same
            seed yields the same dummy data.

    Returns:
        The largest observed change of an example's clipped contribution, in clip norms; 0.0 if contributions are
        bit-identical.

    Raises:
        ConfigError: for `model.path`, or for any setting that prevents the training pass.
    """
    draws, numbers, total = np.random.default_rng(seed), count(1), (3 if weights_chosen else 2) * len(shapes.lengths)

    def trial() -> _Trial:
        made = _Trial(model, shapes, draws, keeps_states=keeps_states, pad_id=pad_id)
        made.tried, made.see = lambda: told(next(numbers), total), see
        return made

    with use_random_adapter(model, draws), _convert_model_errors(model, shapes):
        moved = trial().measure_max_influence(max_grad_norm) if weights_chosen else 0.0
        with _randomize_weights(model, draws) if weights_chosen else nullcontext():
            last = trial()
            return max(moved, last.measure_max_influence(max_grad_norm), last.measure_row_influence(max_grad_norm))


@contextmanager
def use_random_adapter(model: TaskModel, draws: np.random.Generator) -> Iterator[None]:
    """Give the adapter random values for the block's duration: with B at zero, A would have a zero gradient."""
    before, generator = Adapter.from_task_model(model), _make_generator(draws, "cpu")
    try:
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _SIZE)
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
        bound = f"must be smaller: the device ran out of memory on a micro-batch ({get_first_line(error)})"
        raise ConfigError("runtime.micro_batch_tokens", shapes.max_tokens, bound) from None
    except Exception as error:
        bound = f"cannot be trained on examples of {shapes.lengths[-1]} tokens on this machine: {get_first_line(error)}"
        raise ConfigError("model.path", model.spec.model.path, bound) from error


def fit_to_memory(model: TaskModel, shapes: Shapes, *, most_bytes: int, keeps_states: bool, pad_id: int = 0) -> Shapes:
    """Limit the shapes to the largest number of rows per padded length that fits into `most_bytes` of memory.

    Every length is measured with dummy examples.

    Args:
        model: a model with adapters, whose values do not matter.
        shapes: the shapes that the limit on tokens allows.
        most_bytes: the memory for a micro-batch, its per-example gradients and all temporary memory of clipping.
        keeps_states: as in `max_batch_influence`.
        pad_id: the token id that steps will use as padding.

    Raises:
        ConfigError: for `runtime.step_mib`, if the smallest micro-batch does not fit.
    """
    draws = np.random.default_rng()

    def measure_needed(rows: int, length: int) -> int:
        room = shapes.capacity(length, rows)
        made_up = _make_longest(model, shapes.compute_longest_record(length), draws).select_examples([0] * room)
        examples = SiteExamples(made_up, pad_id=pad_id, shapes=shapes, device=model.device)
        part = MicroBatch(np.arange(room), rows, length)
        return measure_peak_bytes(lambda: _run_full_step(model, examples, part, keeps_states), model.device)

    with _convert_model_errors(model, shapes):
        most_rows = tuple(_compute_max_rows(most_bytes, shapes, length, measure_needed) for length in shapes.lengths)
    return replace(shapes, most_rows=most_rows)


def _compute_max_rows(most_bytes: int, shapes: Shapes, length: int, needed: Callable[[int, int], int]) -> int:
    """Return the maximum number of rows of a micro-batch of this length that fits into memory.

    Args:
        most_bytes: the memory limit.
        shapes: the shapes that the limit on tokens allows.
        length: the padded length, in tokens.
        needed: measures the bytes for a number of rows and a length.

    Raises:
        ConfigError: for `runtime.step_mib`, if the smallest micro-batch does not fit.
    """
    fewest, rows = shapes.compute_min_rows(length), shapes.rows(length)[0]
    if (twice := needed(2 * fewest, length)) * rows <= most_bytes * 2 * fewest:
        return rows  # an overestimate: memory that does not grow with the rows is counted several times
    if (least := needed(fewest, length)) > most_bytes:
        bound = (
            f"must be at least {-(-least // 2**20)} MiB, the memory for a micro-batch of {fewest} x {length} tokens "
            "on this machine"
        )
        raise ConfigError("runtime.step_mib", most_bytes // 2**20, bound)
    # Interpolate first: a GPU may not have the memory to measure the full size.
    rows = min(rows, fewest + fewest * (most_bytes - least) // max(1, twice - least))
    while rows > fewest and (bytes_now := needed(rows, length)) > most_bytes:
        rows = min(rows - 1, fewest + (rows - fewest) * (most_bytes - least) // (bytes_now - least))
    return rows


def _run_full_step(model: TaskModel, examples: SiteExamples, part: MicroBatch, keeps_states: bool) -> None:
    """Run one step on a micro-batch along the code path with the highest memory use.

    On this path one example fails, so the others are computed one at a time, and another example's gradient is NaN. A
    record that causes this path in a run uses no more memory than any other record.
    """
    if keeps_states:
        examples.cache_frozen_states(model, parts=[part], lenient=False)
    examples.cache_reference(model, parts=[part], lenient=False)
    with record_gradients(model) as gradients:
        batch, sums = examples.batch(part), make_zero_sums(model.trainable())
        gradients.compute_all_gradients(batch)
        nothing = gradients.compute_all_gradients(isolate_example(batch, None))
        gathered = {name: tensor.clone() for name, tensor in nothing.items()}
        gradients.compute_all_gradients(isolate_example(batch, 0))
        del nothing
        for unusable in (slice(1), slice(None)):
            next(iter(gathered.values()))[unusable] = torch.nan
            add_clipped(sums, gathered, 1.0)


def require_batch_invariance(moved: float, *, path: str, inexact_allowed: bool) -> None:
    """Check that contributions are bit-identical in every micro-batch, or differ only by rounding if that is allowed.

    Args:
        moved: the largest observed change of a contribution, in clip norms.
        path: the model's path.
        inexact_allowed: whether to accept differences that rounding explains.

    Raises:
        ConfigError: for `model.path`.
    """
    if moved > _LARGEST_ROUNDING:
        bound = (
            "mixes the examples of a batch or amplifies their rounding errors, so per-example clipping is impossible"
        )
        raise ConfigError("model.path", path, bound)
    if moved > 0 and not inexact_allowed:
        bound = (
            "computes an example's gradient differently depending on the other examples in its micro-batch (by up to "
            f"{moved:.1e} clip norms), so the bound on one record is not exact on this machine; a site can accept this "
            "with inexact_gradients = true under [allow] in site.toml"
        )
        raise ConfigError("model.path", path, bound)


class _Trial:
    """Test data: dummy examples of every padded length, each cut into micro-batches in two different ways.

    Attributes:
        tried: called after each tested length.
        see: receives the gradients of each micro-batch, and then their contributions.
    """

    def __init__(
        self, model: TaskModel, shapes: Shapes, draws: np.random.Generator, *, keeps_states: bool, pad_id: int
    ) -> None:
        self._model, self._shapes, self._draws = model, shapes, draws
        self._keeps_states, self._pad_id = keeps_states, pad_id
        self.tried: Callable[[], None] = lambda: None
        self.see: GradientCallback = ignore_gradients
        self._places: dict[int, npt.NDArray[np.int64]] = {}
        lengths: list[int] = []
        for number, length in enumerate(shapes.lengths):
            most, room = shapes.compute_longest_record(length), self._compute_max_room(length)
            least = shapes.lengths[number - 1] if number else 1
            self._places[length] = np.arange(len(lengths), len(lengths) + room)
            # The longest first. It is tested in a batch of its own, for models that switch on the longest example.
            lengths += [most, *draws.integers(min(least, most), most, size=room - 1, endpoint=True)]
        made_up = _make_dummy_examples(model, draw_text_lengths(lengths, model.spec.texts, draws), draws)
        self._whole = {length: self._make_full_part(places, length) for length, places in self._places.items()}
        self._smaller = {
            length: tuple(self._iter_regrouped_parts(places, length)) for length, places in self._places.items()
        }
        # The outputs of the frozen base are computed in the same two groupings.
        self._examples = self._prepare_examples(made_up, self._whole.values())
        self._again = self._prepare_examples(made_up, (part for parts in self._smaller.values() for part in parts))

    def _make_full_part(self, places: npt.NDArray[np.int64], length: int) -> MicroBatch:
        """Return a micro-batch with the maximum number of examples."""
        return MicroBatch(places, self._shapes.rows(length)[0], length)

    def _compute_max_room(self, length: int) -> int:
        return self._shapes.capacity(length, self._shapes.rows(length)[0])

    def _prepare_examples(self, dataset: TextDataset, parts: Iterable[MicroBatch]) -> SiteExamples:
        parts = tuple(parts)
        examples = SiteExamples(dataset, pad_id=self._pad_id, shapes=self._shapes, device=self._model.device)
        if self._keeps_states:
            examples.cache_frozen_states(self._model, parts=parts, lenient=False)
        examples.cache_reference(self._model, parts=parts, lenient=False)
        return examples

    def measure_max_influence(self, max_grad_norm: float) -> float:
        """Measure the largest change of a contribution between a full and a smaller micro-batch, in clip norms."""
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

    def _iter_regrouped_parts(self, places: npt.NDArray[np.int64], length: int) -> Iterator[MicroBatch]:
        """Yield the same examples in other micro-batches.

        The longest example comes first in its own micro-batch. The other examples follow in reverse order, in
        micro-batches of all other numbers of rows.
        """
        most_rows, *fewer = self._shapes.rows(length)
        choices = fewer or [most_rows]
        yield MicroBatch(places[:1], choices[-1], length)
        places = places[:0:-1]
        while len(places):
            rows, *choices = choices if len(choices) > 1 else choices * 2
            room = self._shapes.capacity(length, rows)
            yield MicroBatch(places[:room].copy(), rows, length)
            places = places[room:]

    def measure_row_influence(self, max_grad_norm: float) -> float:
        """Return the largest difference, in clip norms, between one example's contributions in different rows.

        The longest example of each length, with all its tokens supervised, is copied to all rows. Every position that
        a kernel might round differently then holds a token, and only the row index differs between the copies.
        """
        parts = [
            self._make_full_part(np.arange(self._compute_max_room(length)), length) for length in self._shapes.lengths
        ]
        copied = [self._prepare_examples(self._make_copies(part.length), [part]) for part in parts]
        moved = 0.0
        with record_gradients(self._model) as gradients:
            for part, examples in zip(parts, copied, strict=True):
                added = self._compute_contributions(gradients, examples.batch(part), max_grad_norm)
                rows = torch.from_numpy(part.places)
                moved = max(moved, _compute_max_difference(added, rows, added, torch.zeros_like(rows)))
                self.tried()
        return moved

    def _compute_contributions(self, gradients: PerExampleGradients, batch: Batch, max_grad_norm: float) -> _Added:
        """Compute the gradients and clipped contributions of a micro-batch as in a training step."""
        there = gradients.compute_all_gradients(batch)
        chosen = {} if self._model.decided_by is None else {_DECIDED_BY: self._model.decided_by}
        added = (
            {name: tensor.cpu() for name, tensor in (there | chosen).items()},
            compute_clipped_contributions(there, max_grad_norm),
        )
        for tensors in added:
            self.see(tensors)
        return added

    def _make_copies(self, length: int) -> TextDataset:
        return _make_longest(self._model, self._shapes.compute_longest_record(length), self._draws).select_examples(
            [0] * self._compute_max_room(length)
        )


_Added: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Gradients of n examples by name, including the values that determine discrete choices, and the examples' clipped
contributions (`dp_step.compute_clipped_contributions`). All tensors are on the CPU.
"""


def _compute_max_difference(first: _Added, rows: torch.Tensor, second: _Added, others: torch.Tensor) -> float:
    """Return the largest difference, in clip norms, between two sets of contributions of the same examples.

    Args:
        first: the first set of gradients and contributions.
        rows: the row indices of the examples in `first`.
        second: the second set.
        others: the row indices of the examples in `second`.
    """
    (gradients, cells), (other_gradients, other_cells) = first, second
    squares = [(added[rows] - other_cells[name][others]).square().sum(dim=1) for name, added in cells.items()]
    moved = float(torch.stack(squares).sum(dim=0).sqrt().max()) / CLIP_NORM_CELLS
    differ = [name for name, value in gradients.items() if not torch.equal(value[rows], other_gradients[name][others])]
    if _DECIDED_BY in differ:
        return 1.0
    return max(moved, 1 / CLIP_NORM_CELLS) if differ else moved  # bits that clipping happens to hide here


def _make_longest(model: TaskModel, length: int, draws: np.random.Generator) -> TextDataset:
    """Make one dummy example in which every text has `length` tokens, all of them supervised."""
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


def iter_dummy_batches(
    model: TaskModel, shapes: Shapes, *, keeps_states: bool, pad_id: int
) -> Generator[tuple[Batch, Batch]]:
    """Yield two micro-batches of different dummy examples for each shape of a step: full, and half empty.

    The adapter has random values until the iterator is closed.
    """
    draws = np.random.default_rng()
    with use_random_adapter(model, draws):
        for length in shapes.lengths:
            longest = shapes.compute_longest_record(length)
            for rows in shapes.rows(length):
                room = shapes.capacity(length, rows)
                half = -(-room // 2)
                lengths = draws.integers(1, longest, size=room + half, endpoint=True).tolist()
                made_up = _make_dummy_examples(model, draw_text_lengths(lengths, model.spec.texts, draws), draws)
                parts = [
                    MicroBatch(np.arange(room), rows, length),
                    MicroBatch(np.arange(room, room + half), rows, length),
                ]
                examples = SiteExamples(made_up, pad_id=pad_id, shapes=shapes, device=model.device)
                if keeps_states:
                    examples.cache_frozen_states(model, parts=parts, lenient=False)
                examples.cache_reference(model, parts=parts, lenient=False)
                yield examples.batch(parts[0]), examples.batch(parts[1])


def draw_text_lengths(longest: list[int], texts: int, draws: np.random.Generator) -> list[int]:
    """Draw the text lengths of records with `texts` texts each.

    The index of the longest text changes from record to record.
    """
    records = ([length, *draws.integers(1, length, size=texts - 1, endpoint=True)] for length in longest)
    return [int(length) for place, lengths in enumerate(records) for length in np.roll(lengths, place % texts)]


def _make_generator(draws: np.random.Generator, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(draws.integers(1 << 62)))


def list_frozen_values(model: TaskModel) -> dict[str, torch.Tensor]:
    """Return a model's frozen parameters and saved buffers by name, such as Gemma 4's scale of each layer.

    The codes of four-bit layers are excluded.
    """
    frozen: dict[str, torch.Tensor] = {name: one for name, one in model.named_parameters() if not one.requires_grad}
    coded = {id(buffer) for layer in model.modules() if isinstance(layer, FourBit) for buffer in layer.buffers()}
    saved = model.base.state_dict(keep_vars=True)
    for name, buffer in model.base.named_buffers():
        if name in saved and buffer.is_floating_point() and id(buffer) not in coded:
            frozen[f"base.{name}"] = buffer
    return frozen


@contextmanager
def _randomize_weights(model: TaskModel, draws: np.random.Generator) -> Iterator[None]:
    """Replace the frozen weights by random weights, as in an untrained model, until the end of the block."""
    frozen = list_frozen_values(model)
    in_four_bits = [module for module in model.modules() if isinstance(module, FourBit)]
    replaced: list[torch.Tensor] = [*frozen.values(), *(buffer for layer in in_four_bits for buffer in layer.buffers())]
    # The copy is on the model's device if model and copy leave room for a step and its graphs.
    beside = model.device.type != "cpu" and 6 * measure_model_bytes(model) <= get_total_memory(model.device)
    kept = [tensor.detach().to(model.device if beside else "cpu", copy=True) for tensor in replaced]
    generators = {tensor.device: _make_generator(draws, tensor.device) for tensor in frozen.values()}
    try:
        with torch.no_grad():
            for name, tensor in frozen.items():
                tensor.normal_(generator=generators[tensor.device])
                if tensor.ndim > 1:
                    tensor.mul_(tensor.shape[-1] ** -0.5)
                else:
                    tensor.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
            for layer in in_four_bits:
                drawn = torch.empty(layer.shape, device=layer.codes.device)
                layer.store_weight(drawn.normal_(generator=generators[drawn.device]).mul_(layer.shape[-1] ** -0.5))
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(replaced, kept, strict=True):
                tensor.copy_(before)
