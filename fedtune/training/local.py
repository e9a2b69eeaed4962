"""Local training: a site's part of a round, from the received adapter to the adapter that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank
from fedtune.model.spec import LoraSpec
from fedtune.privacy.distributed_noise import add_noise_share
from fedtune.privacy.mechanism import draw_poisson_sample
from fedtune.privacy.randomness import Randomness, RandomStream
from fedtune.privacy.run_plan import Plan
from fedtune.tasks.task_model import TaskModel
from fedtune.training.algorithms.fedavg import FEDAVG
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm, NoisedGradient, SiteRound
from fedtune.training.captured import choose_sum_batch
from fedtune.training.dp_step import Correction, Records, sum_sampled_gradients, take_dp_sgd_step
from fedtune.training.examples import Units
from fedtune.training.optimizer import compute_round_factors, make_optimizer, set_learning_rate
from fedtune.training.per_example import record_gradients
from fedtune.training.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class TrainingRound:
    """Inputs of one round of local training except the model, the adapter and the privacy units."""

    site: str
    round: int  # from 1; selects the learning rates in the schedule
    attempt: int  # from 1; a retry draws fresh noise
    plan: Plan  # the run's plan, which determines the training and the charge
    training: TrainingSpec
    declared_size: int
    max_adapter_value: float  # the site's limit on absolute values of the adapter, enforced after each step
    algorithm: LocalAlgorithm = FEDAVG
    sent: Arrays = field(default_factory=dict)  # the algorithm's arrays, received with the adapter
    state: Arrays = field(default_factory=dict)  # the algorithm's state at this site; empty for a stateless algorithm
    rank: int | None = None  # the number of LoRA's pairs that train at this site; None: all


def train_round(
    model: TaskModel, adapter: Adapter, units: Units, work: TrainingRound, *, randomness: Randomness
) -> tuple[Adapter, Arrays]:
    """Train `adapter` on a site's `units` for one round of `work.plan`.

    The received adapter and the adapter after each step are clamped to the site's limit on absolute values, so that no
    received or trained value can stop the run and rounding error stays small. Clamping does not depend on any record.

    Returns:
        The adapter, which may be released, in the shapes of `cut_to_rank`, and the algorithm's state for the site's
        next round.

    Guarantee: with noise, both results are post-processing of `work.plan.event()` on the units of `work.plan.unit`, of
    the received adapter and arrays, and of the earlier state. Without noise there is no guarantee.
    """
    assert work.plan.shared is None, "a single noise share does not protect a site's own release"
    frozen = list_frozen_tensors(model.spec.lora, work.algorithm, model.trainable(), round=work.round, sent=work.sent)
    with model.freeze_tensors(frozen, rank=work.rank):
        parameters, records, sampling, noise = _prepare_round(model, adapter, units, work, randomness)
        optimizer = make_optimizer(parameters, work.training, clipped=work.plan.private)
        half = SiteHalf(work, parameters) if work.algorithm.corrects_gradients else None
        correct = None if half is None else half.correct

        def take_steps(step: Callable[[], None]) -> None:
            for factor in compute_round_factors(work.training, work.plan, round=work.round):
                set_learning_rate(optimizer, factor)
                step()
                clamp_parameters(parameters, work.max_adapter_value)

        if work.plan.private:
            with record_gradients(model) as gradients:
                take_steps(
                    lambda: take_dp_sgd_step(
                        units.convert_gradients(gradients),
                        records,
                        work.plan,
                        parameters=parameters,
                        optimizer=optimizer,
                        sampling=sampling,
                        noise=noise,
                        correct=correct,
                    )
                )
        else:
            take_steps(
                lambda: take_plain_step(
                    model,
                    units,
                    records,
                    work.plan,
                    parameters=parameters,
                    optimizer=optimizer,
                    sampling=sampling,
                    correct=correct,
                )
            )
    trained = Adapter(cut_to_rank(Adapter.from_task_model(model).tensors, work.rank))
    return trained, {} if half is None else half.compute_next_state()


class SiteHalf:
    """The site side of a federated algorithm in one round.

    It corrects each noised gradient, and sums the noised gradients for the algorithm's next state.

    Args:
        work: the round, with the algorithm, the received arrays and the site's state.
        parameters: the trained tensors, at their values from the start of the round.
    """

    def __init__(self, work: TrainingRound, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._algorithm, self._parameters, self._steps = work.algorithm, parameters, work.plan.local_steps
        self._at = SiteRound(adapter=self._copy_weights(), sent=work.sent, state=work.state)
        self._sums: dict[str, npt.NDArray[np.float32]] = {}

    def _copy_weights(self) -> Arrays:
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._parameters.items()}

    def correct(self, gradient: NoisedGradient) -> Arrays:
        """Correct a noised gradient for the optimizer's step, and add it to the round's sum."""
        if self._algorithm.keeps_state:
            for name, value in gradient.values.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        return self._algorithm.correct_gradient(gradient, self._copy_weights(), self._at)

    def compute_next_state(self) -> Arrays:
        """Return the algorithm's state at this site after the last step of the round."""
        steps = np.float32(self._steps)
        mean = NoisedGradient({name: total / steps for name, total in self._sums.items()})
        return self._algorithm.compute_next_state(mean, self._at)


def list_frozen_tensors(
    lora: LoraSpec, algorithm: LocalAlgorithm, names: Iterable[str], *, round: int, sent: Arrays
) -> frozenset[str]:
    """Return the names of the adapter tensors that are frozen in a round. They depend on public values only."""
    names, part = list(names), lora.get_frozen_name_part(round)
    return algorithm.select_frozen_tensors(names, sent) | {name for name in names if part is not None and part in name}


def compute_round_share(
    model: TaskModel, adapter: Adapter, units: Units, work: TrainingRound, *, randomness: Randomness
) -> dict[str, npt.NDArray[np.int64]]:
    """Compute a site's input to one secure aggregation: its clipped gradient sum at `adapter` plus its noise share.

    The received adapter is clamped to the site's limit on absolute values, as in `train_round`.

    Returns:
        Integers in cells of 2**-cell_bits of the clip norm, with the adapter's names and shapes.

    Guarantee: an observer who sees the share only inside a sum with the shares of as many honest sites as the plan
    counts learns at most what `work.plan.event()` allows. Outside a sum, only the site's own noise share protects the
    result.
    """
    parameters, records, sampling, noise = _prepare_round(model, adapter, units, work, randomness)
    with record_gradients(model) as gradients:
        sums = sum_sampled_gradients(
            units.convert_gradients(gradients), records, work.plan, parameters=parameters, sampling=sampling
        )
    return add_noise_share({name: np.asarray(total) for name, total in sums.items()}, work.plan.secure_noise, noise)


def _prepare_round(
    model: TaskModel, adapter: Adapter, units: Units, work: TrainingRound, randomness: Randomness
) -> tuple[dict[str, torch.nn.Parameter], Records, RandomStream, RandomStream]:
    """Load the adapter, and return the trained parameters, the site's records, and the sampling and noise streams."""
    adapter.load_into(model)
    clamp_parameters(model.trainable(), work.max_adapter_value)
    parameters = model.list_active_parameters()
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert everything == {id(p) for p in parameters.values()}, "a trainable tensor is not clipped"
    # A site of a smaller rank clips, noises and steps views of these tensors.
    views = cut_to_rank(parameters, model.rank)
    parameters = {
        name: parameter if views[name] is parameter else torch.nn.Parameter(views[name].detach())
        for name, parameter in parameters.items()
    }
    purpose = (work.site, work.round, work.attempt)
    assert units.unit == work.plan.unit, "the sampled unit differs from the plan's privacy unit"
    sampling = randomness.stream(*purpose, "sampling")
    noise = randomness.stream(*purpose, "noise")
    # A separate stream, used in every step, selects the records of each sampled user.
    cut = units.make_batcher(randomness.stream(*purpose, "records"))
    records = Records(
        count=len(units),
        declared_size=work.declared_size,
        cut=cut,
        add_others=units.add_other_devices,
        sum_batch=choose_sum_batch(model),
    )
    return parameters, records, sampling, noise


def clamp_parameters(parameters: Mapping[str, torch.nn.Parameter], most: float) -> None:
    """Clamp every value to [-most, most], and replace NaN by 0.

    Guarantee: post-processing of values that were released or are about to be released.
    """
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.nan_to_num_(0.0, most, -most).clamp_(-most, most)


def take_plain_step(
    model: TaskModel,
    units: Units,
    records: Records,
    plan: Plan,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    sampling: RandomStream,
    correct: Correction | None = None,
) -> None:
    """Take an optimizer step on a Poisson sample without clipping and noise. Guarantee: none."""
    batches = records.cut(draw_poisson_sample(records.count, plan.sampling_rate, sampling))
    set_mean_gradient(model, units, batches, count=plan.sampling_rate * records.declared_size)
    whole = {name: value.grad for name, value in model.list_active_parameters().items() if value.grad is not None}
    for name, gradient in cut_to_rank(whole, model.rank).items():
        parameters[name].grad = gradient
    if correct is not None:
        correct_plain_gradient(parameters, correct)
    optimizer.step()


def set_mean_gradient(model: TaskModel, units: Units, batches: Iterable[Any], *, count: float) -> None:
    """Set the parameters' `.grad` to the gradient sum over the micro-batches, divided by `count`. Guarantee: none."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        units.add_plain_gradient(model, batch)
    for parameter in model.list_active_parameters().values():
        if parameter.grad is not None:
            parameter.grad /= count


def correct_plain_gradient(parameters: Mapping[str, torch.nn.Parameter], correct: Correction) -> None:
    """Replace the parameters' `.grad` by the algorithm's correction, in a run without noise. Guarantee: none."""
    gradients = {
        name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.cpu().numpy().copy()
        for name, parameter in parameters.items()
    }
    for name, value in correct(NoisedGradient(gradients)).items():
        parameters[name].grad = torch.from_numpy(value).to(parameters[name].device)
