"""The two random steps of DP-SGD that must be right: who is sampled, and what noise is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedtune.privacy.randomness import RandomStream
from fedtune.spec import ConfigError, check_fraction, check_one_of, check_positive, spec


@spec
class PrivacySpec:
    """What a run promises each privacy unit, and how.

    Attributes:
        mechanism: "dp_sgd", or "none" for training without a guarantee.
        unit: what one (epsilon, delta) protects.
        epsilon: target over all rounds and steps of the run, at every site.
        delta: must stay below one over every site's declared size.
        noise_multiplier: noise standard deviation over clip norm; null: calibrated to the target.
        max_grad_norm: clip norm C, over all trainable tensors of one unit together.
        sampling_rate: probability with which a unit joins a step.
    """

    mechanism: Literal["dp_sgd", "none"] = "dp_sgd"
    unit: Literal["record", "user"] = "record"
    epsilon: float = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    sampling_rate: float = 0.2

    def __post_init__(self) -> None:
        check_one_of("mechanism", self.mechanism, ("dp_sgd", "none"))
        if self.unit != "record":
            raise ConfigError("unit", self.unit, "only 'record' is supported so far")
        check_positive("epsilon", self.epsilon)
        check_fraction("delta", self.delta)
        if self.noise_multiplier is not None:
            check_positive("noise_multiplier", self.noise_multiplier)
        check_positive("max_grad_norm", self.max_grad_norm)
        check_fraction("sampling_rate", self.sampling_rate, one=True)

    @property
    def private(self) -> bool:
        """Whether records are protected at all."""
        return self.mechanism == "dp_sgd"


def poisson_sample(num_units: int, sampling_rate: float, stream: RandomStream) -> npt.NDArray[np.int64]:
    """Indices of the units that join a step: each joins on its own, with probability `sampling_rate`.

    The size of the sample is random and may be zero; an empty step still adds noise and counts.
    """
    return np.flatnonzero(stream.bernoulli(num_units, sampling_rate))


def add_gaussian_noise(
    sums: Mapping[str, npt.NDArray[np.float64]],
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    stream: RandomStream,
) -> dict[str, npt.NDArray[np.float64]]:
    """The Gaussian mechanism on a sum of clipped contributions, once for each logical batch.

    Args:
        sums: tensors that together are the sum, over the sampled units, of vectors of L2 norm <= `max_grad_norm`.
        noise_multiplier: noise standard deviation in units of `max_grad_norm`.
        max_grad_norm: the clip norm C.
        stream: drawn from once for each value, in the order of `sums`.

    Guarantee: adding or removing one unit moves the joint sum by at most C in L2, so the result is one event
    `GaussianDpEvent(noise_multiplier)` for the sampled units.
    """
    scale = noise_multiplier * max_grad_norm
    return {name: total + scale * stream.normal(total.size).reshape(total.shape) for name, total in sums.items()}
