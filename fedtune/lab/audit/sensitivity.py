"""Search for violations of the sensitivity bound: the largest change of a step's clean sum by one unit.

The accounting assumes that adding or removing a record (or user) changes a step's sum by at most the clip norm.  The
search looks for counterexamples with the training code itself, without a run, a ledger or private records.  It varies
everything that a malicious lead controls, the clip norm and the adapter within the site's bound (random, at the bound,
or by gradient ascent until attention saturates), and everything that a site's data may contain: the other records,
their number and lengths, and the additional unit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedtune.config import RunConfig
from fedtune.data import TextDataset
from fedtune.lab.audit.spec import AuditSpec
from fedtune.privacy.durable import write_durably
from fedtune.privacy.mechanism import GRID_BITS
from fedtune.privacy.site_policy import DEFAULT_MAX_ADAPTER_VALUE, compute_adapter_bound
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.virtual_site import fix_number_format
from fedtune.spec import spec
from fedtune.tasks.task_model import TaskModel
from fedtune.training import dp_step
from fedtune.training.batch_invariance import draw_text_lengths
from fedtune.training.examples import SiteExamples
from fedtune.training.local import clamp_parameters
from fedtune.training.per_example import record_gradients
from fedtune.training.users import UserExamples

FILE = "sensitivity.json"
_MAX_OTHERS = 40
_MAX_OF_A_USER = 4
_SMALLEST_LOG_NORM, _LARGEST_LOG_NORM = -18.0, 4.0  # powers of ten
_ASCENT_STEPS = 3

Integers = npt.NDArray[np.int64]


@spec
class Worst:
    """The result of a sensitivity search, with its worst case.

    Attributes:
        unit: "record" or "user".
        tries: number of cases.
        moved: largest change of a sum by one additional unit, in clip norms.
        exceeded: number of cases with a change above one clip norm, compared in integer arithmetic.
        others_moved: number of cases in which the change differed from the unit's own contribution in any grid cell.
        max_grad_norm: clip norm in the worst case.
        adapter: generation method of the adapter in the worst case.
        others: number of other units in the worst case.
    """

    unit: str
    tries: int
    moved: float
    exceeded: int
    others_moved: int
    max_grad_norm: float
    adapter: str
    others: int


def search_violations(config: RunConfig, audit: AuditSpec, folder: Path) -> Worst:
    """Run `audit.tries` random cases on the run's model, and write the result to `folder`.

    Raises:
        ConfigError: the model cannot be loaded or trained.
    """
    config = fix_number_format(config, folder)
    found = _Search(RunModel(LoadedModel(config), config)).run_cases(audit.tries)
    write_durably(folder / FILE, json.dumps(asdict(found), indent=1).encode() + b"\n")
    return found


class _Search:
    def __init__(self, shared: RunModel) -> None:
        self._shared, self._unit = shared, shared.config.privacy.unit
        self._bound = compute_adapter_bound(DEFAULT_MAX_ADAPTER_VALUE, shared.config.lora.scale)
        self._draws = np.random.default_rng(shared.config.seed)

    def run_cases(self, tries: int) -> Worst:
        with record_gradients(self._shared.model) as self._gradients:
            cases = [self._run_case() for _ in range(tries)]
        exceeded, others_moved = (sum(map(attrgetter(name), cases)) for name in ("exceeded", "others_moved"))
        worst = max(cases, key=attrgetter("moved"))
        return replace(worst, tries=tries, exceeded=exceeded, others_moved=others_moved)

    def _run_case(self) -> Worst:
        """Run a random case: other units, an additional unit, an adapter and a clip norm."""
        num_others = int(self._draws.integers(0, _MAX_OTHERS, endpoint=True))
        by_user, most = self._unit == "user", _MAX_OF_A_USER
        units = [int(self._draws.integers(1, most, endpoint=True)) if by_user else 1 for _ in range(num_others + 1)]
        # Mostly short records with some long records, or only long records.
        most = self._shared.config.data.max_length
        usual = max(1, int(most * self._draws.choice([0.1, 0.3, 1.0])))
        lengths = self._draws.integers(1, usual, size=sum(units), endpoint=True)
        lengths[self._draws.random(len(lengths)) < 0.1] = most
        dataset = generate_random_examples(self._shared.model, [int(length) for length in lengths], self._draws)
        examples = SiteExamples(dataset, pad_id=0, shapes=self._shared.loaded.shapes, device=self._shared.device)
        if self._shared.loaded.keeps_states:
            examples.cache_frozen_states(self._shared.model)
        examples.cache_reference(self._shared.model)
        adapter = self._fill_adapter(examples)
        max_grad_norm = float(10.0 ** self._draws.uniform(_SMALLEST_LOG_NORM, _LARGEST_LOG_NORM))

        summed = partial(self._clean_sum, examples, units, max_grad_norm)
        # Insert the additional unit at a random index, so that it changes rows, shapes and micro-batches.
        one_more = int(self._draws.integers(0, num_others, endpoint=True))
        everyone = list(range(num_others + 1))
        change = summed(everyone) - summed([unit for unit in everyone if unit != one_more])
        square = sum(int(value) ** 2 for value in change[change != 0])
        return Worst(
            unit=self._unit,
            tries=1,
            moved=math.sqrt(square) / 2.0**GRID_BITS,
            exceeded=int(square > 1 << 2 * GRID_BITS),
            others_moved=int(not np.array_equal(change, summed([one_more]))),
            max_grad_norm=max_grad_norm,
            adapter=adapter,
            others=num_others,
        )

    def _fill_adapter(self, examples: SiteExamples) -> str:
        """Fill the adapter with adversarial values, and return the name of the generation method."""
        how = str(self._draws.choice(["small", "random", "at the bound", "by ascent"]))
        parameters = self._shared.model.trainable()
        generator = torch.Generator().manual_seed(int(self._draws.integers(1 << 31)))
        scale = 0.05 if how == "small" else float(self._draws.uniform(0, 1)) * self._bound
        with torch.no_grad():
            for parameter in parameters.values():
                values = torch.randn(parameter.shape, generator=generator)
                chosen = values.sign() * self._bound if how == "at the bound" else values * scale
                parameter.copy_(chosen.to(parameter.device))
        # Ascend to large losses, where attention saturates and gradients are dominated by rounding.
        for _ in range(_ASCENT_STEPS if how == "by ascent" else 0):
            batch = next(iter(examples.cut(np.arange(min(8, len(examples)), dtype=np.int64))))
            slopes = {name: gradient.sum(dim=0) for name, gradient in self._gradients.compute_gradients(batch).items()}
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.add_(slopes[name].sign() * self._bound / _ASCENT_STEPS)
            clamp_parameters(parameters, self._bound)
        clamp_parameters(parameters, self._bound)
        return how

    def _clean_sum(self, examples: SiteExamples, units: list[int], max_grad_norm: float, chosen: list[int]) -> Integers:
        """Compute the clean sum of the chosen units in grid cells, with the training code."""
        sums = dp_step.make_zero_sums(self._shared.model.trainable())
        places = np.array(chosen, dtype=np.int64)
        if self._unit == "record":
            batches: Iterator[object] = iter(examples.cut(places))
            of_units: dp_step.UnitGradients = self._gradients
        else:
            users = np.split(np.arange(sum(units), dtype=np.int64), np.cumsum(units)[:-1])
            everyone = UserExamples(examples, users, most_records=_MAX_OF_A_USER, most_users=16)
            batches = everyone.batch_units([users[place] for place in chosen])
            of_units = everyone.convert_gradients(self._gradients)
        for batch in batches:
            dp_step.add_clipped(sums, of_units.compute_gradients(batch), max_grad_norm)
        return np.concatenate([total.cpu().numpy().ravel() for total in sums.values()])


def generate_random_examples(model: TaskModel, lengths: list[int], draws: np.random.Generator) -> TextDataset:
    """Generate random examples of the given lengths over the whole vocabulary.

    Some examples repeat a single token, the hardest case for attention.
    """
    input_ids = model.generate_dummies(draw_text_lengths(lengths, model.spec.texts, draws), draws)
    for ids in input_ids:
        if draws.random() < 0.2:
            ids[:] = ids[0]

    def first(length: int) -> int:
        return int(draws.integers(0, length, endpoint=True))  # `length`: no supervised position

    targets = model.task.dummy_targets(input_ids, spec=model.spec, draws=draws, first=first)
    return TextDataset(input_ids, targets, model.spec.texts)
