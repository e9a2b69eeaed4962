"""The tensors of a round on their way to the sites, and the lead's half of the run's algorithm.

An algorithm may send arrays of its own with the adapter.  They travel as further tensors of the same record, so that
one digest in the signed request covers both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedtune.model.adapter import Adapter
from fedtune.privacy.run_plan import Plan
from fedtune.training.algorithms.base import Arrays, LocalAlgorithm, RoundOutcome
from fedtune.training.optimizer import round_factors
from fedtune.training.spec import TrainingSpec

_PREFIX = "algorithm/"  # no tensor of an adapter begins with it


def pack_adapter(adapter: Adapter, arrays: Arrays) -> Adapter:
    """Return the adapter together with the algorithm's arrays; the adapter itself if there are none."""
    own = {f"{_PREFIX}{name}": value for name, value in arrays.items()}
    return Adapter({**adapter.tensors, **own}) if own else adapter


def unpack_adapter(sent: Adapter) -> tuple[Adapter, Arrays]:
    """Return the adapter and the algorithm's arrays; the inverse of `pack_adapter`."""
    own = {name.removeprefix(_PREFIX): value for name, value in sent.tensors.items() if name.startswith(_PREFIX)}
    if not own:
        return sent, own
    return Adapter({name: value for name, value in sent.tensors.items() if not name.startswith(_PREFIX)}), own


def pack_initial(adapter: Adapter, algorithm: LocalAlgorithm) -> Adapter:
    """Return what round 1 of a run sends, whose names and shapes every round has."""
    return pack_adapter(adapter, algorithm.sent_arrays(algorithm.initial_arrays(adapter.tensors)))


def describe_outcome(
    average: Adapter,
    *,
    sent: Adapter,
    sites: Sequence[str],
    sizes: Mapping[str, int],
    training: TrainingSpec,
    plan: Plan,
    round: int,
    frozen: frozenset[str],
) -> RoundOutcome:
    """Describe a round to the lead's half of the algorithm, by public numbers alone.

    Args:
        average: the adapter that the server's strategy made of the updates.
        sent: the adapter that the sites were sent.
        sites: the sites with an update.
        sizes: the declared size of every site.
        training: how the sites stepped.
        plan: the run's plan.
        round: the number of the round.
        frozen: the tensors that did not train.
    """
    factors, total = round_factors(training, plan, round=round), sum(sizes[site] for site in sites)
    lora, head = training.compute_peak_rates(clipped=plan.private)
    step_sizes = {
        name: (head if name.startswith("head.") else lora) * sum(factors) for name in sent.tensors if name not in frozen
    }
    # A site's noise in one value of a step has this standard deviation over its declared size, its weight is that
    # size over the total, and the steps' noise adds up with the weights of their learning rates.
    of_step = plan.noise_multiplier * plan.max_grad_norm / plan.sampling_rate
    noise = of_step * math.sqrt(len(sites)) / total * math.hypot(*factors) / (sum(factors) or 1.0)
    return RoundOutcome(
        adapter=sent.tensors,
        average=average.tensors,
        step_sizes={name: size for name, size in step_sizes.items() if size > 0},
        share=total / sum(sizes.values()),
        noise=noise,
    )
