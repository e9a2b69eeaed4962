"""Black-box audit of a third-party DP-SGD training function: `fedtune.audit_training(train, data, ...)`.

The function may be any code that trains a model on arrays, such as a training loop with Opacus.  The audit adds one
feature column per canary.  A canary is a record with a large value in its own column and zeros elsewhere, so that only
its own gradient and noise reach the model's weights for this column.  The canary's score is the trained model's output
for the canary's label in this column.  The audit uses no other information about the function.

Two attackers guess, each with half of the error probability.  The first attacker sees the model.  The second attacker
also runs the function without canaries and sees the difference between the two models: fresh noise gives no advantage,
but noise from a generator with a fixed seed cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.evaluation.audit_bound import compute_epsilon_lower_bound
from fedtune.evaluation.fdp_bound import compute_fdp_lower_bound, refutes_profile
from fedtune.lab.audit.guesses import Values, compute_centered_ranks, count_right_guesses
from fedtune.privacy.accountant import COARSE, compose_pld
from fedtune.privacy.events import build_dp_sgd_event, count_mechanisms
from fedtune.spec import ConfigError, check_at_least, check_fraction, check_positive, spec

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Predict = Callable[[Floats], Any]
"""Function (or torch module) from features (n, columns) to class scores (n, classes)."""
Train = Callable[[Floats, Integers], Predict]
"""Function from features (n, columns) and labels (n,) to a trained model."""

CANARY_SIZE = 1000.0  # a canary's nonzero feature; its gradient is far above any clip norm
_EPSILONS = np.linspace(0.0, 20.0, 401)  # grid for the claim's privacy profile

_ATTACKS = ("model", "model beside a second training")


@spec
class TrainingAudit:
    """Result of auditing a training function; all figures are for the stronger of the two attackers.

    Attributes:
        claimed_epsilon: epsilon of the claimed steps at `delta`.
        lower_bound: lower bound on epsilon for any mechanism, at confidence level `confidence`.
        fdp_bound: lower bound on epsilon under the assumption of a Gaussian mechanism, at the same level.
        refuted: whether the guesses refute the trade-off curve of the claimed steps, at the same level.
        attack: the stronger attacker's view, the model or the difference of two models.
        canaries: number of canaries, inserted or not.
        guesses: number of guesses, fixed in advance.
        right: number of correct guesses.
        delta: delta of all epsilons.
        confidence: confidence level of the verdict over both attackers.
    """

    claimed_epsilon: float
    lower_bound: float
    fdp_bound: float
    refuted: bool
    attack: str
    canaries: int
    guesses: int
    right: int
    delta: float
    confidence: float

    def __str__(self) -> str:
        refuted = "REFUTED: the implementation or the claim is wrong"
        verdict = refuted if self.refuted else "not refuted; this is no proof"
        bounds = f"at least {self.lower_bound:.2f}, as a Gaussian mechanism at least {self.fdp_bound:.2f}"
        guesses = f"{self.right:,} of {self.guesses:,} guesses right, by the {self.attack}"
        return f"claimed epsilon {self.claimed_epsilon:.2f}, shown {bounds} ({guesses}): {verdict}"


def audit_training(
    train: Train,
    data: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float = 1e-5,
    canaries: int = 2000,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> TrainingAudit:
    """Audit a training function that claims DP-SGD with Poisson sampling, with canaries in its training data.

    >>> import fedtune
    >>> fedtune.audit_training(
    ...     train, (x, y), noise_multiplier=1.0, sampling_rate=0.1, steps=40
    ... ).refuted  # doctest: +SKIP
    False

    The function is called twice.  It must accept any number of columns, and train on the records without
    preprocessing.  It should start from fixed weights, such as zeros: random initial weights hide the canaries from
    this attacker without protecting records.

    The power depends on the claim.  With the defaults, half of the claimed noise is nearly always detected if the claim
    equals a Gaussian mechanism with a noise multiplier of 0.7 to 1.4 (noise_multiplier / sqrt(steps) at sampling rate
    1).

    Guarantee: the audit refutes a correct function with probability at most 1 - `confidence`.

    Args:
        train: function from features (n, columns) float32 and labels (n,) int64 to a model, which is a function from
            features to class scores (n, classes), or a torch module.
        data: features (n, columns) and labels (n,) of ordinary records, with at least two classes, numbered from 0.
        noise_multiplier: claimed standard deviation of the noise in a step's sum, in clip norms.
        sampling_rate: claimed probability of a record to be in a step.
        steps: claimed number of steps.
        delta: delta of all epsilons.
        canaries: number of canaries, each with its own column and inserted by a fair coin.
        guesses: number of guesses per attacker.  Default: a fifth of the canaries.
        confidence: confidence level of the verdict.
        seed: seed of the coins.

    Returns:
        The audit's result for the stronger attacker.

    Raises:
        ConfigError: a setting or the data cannot be used, or the model's scores have a wrong shape.
    """
    check_positive("noise_multiplier", noise_multiplier)
    check_fraction("sampling_rate", sampling_rate, one=True)
    check_at_least("steps", steps, 1)
    check_at_least("canaries", canaries, 20)
    check_fraction("delta", delta)
    check_fraction("confidence", confidence)
    guesses = max(1, canaries // 5) if guesses is None else guesses
    if not 1 <= guesses <= canaries:
        raise ConfigError("guesses", guesses, f"must be in [1, {canaries}], the number of canaries")
    features, labels = _read_records(data)
    draws = np.random.default_rng(seed)
    inserted = draws.random(canaries) < 0.5
    classes = draws.integers(int(labels.max()) + 1, size=canaries)
    planted = _plant_canaries(features, inserted)
    both = np.concatenate([labels, classes])
    first = _score_canaries(train(planted, both), classes, columns=features.shape[1])
    # Same number of records, so that a generator with a fixed seed repeats its noise; the canaries' rows are zero.
    nothing = _plant_canaries(features, np.zeros_like(inserted))
    second = _score_canaries(train(nothing, both), classes, columns=features.shape[1])
    event = build_dp_sgd_event(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
    curve = compose_pld(tuple(count_mechanisms([event]).items()), COARSE)
    deltas, each = np.array([curve.delta(epsilon) for epsilon in _EPSILONS]), (1 - confidence) / len(_ATTACKS)
    ranks = map(compute_centered_ranks, (first, first - second))
    found = {
        attack: count_right_guesses(evidence, inserted, guesses=guesses)
        for attack, evidence in zip(_ATTACKS, ranks, strict=True)
    }
    attack, counts = max(found.items(), key=lambda one: one[1][2])
    return TrainingAudit(
        claimed_epsilon=curve.epsilon(delta),
        lower_bound=compute_epsilon_lower_bound(*counts, delta=delta, confidence=1 - each),
        fdp_bound=compute_fdp_lower_bound(*counts, delta=delta, confidence=1 - each),
        refuted=refutes_profile(*counts, epsilons=_EPSILONS, deltas=deltas, error=each),
        attack=attack,
        canaries=canaries,
        guesses=guesses,
        right=counts[2],
        delta=delta,
        confidence=confidence,
    )


def _read_records(data: tuple[npt.ArrayLike, npt.ArrayLike]) -> tuple[Floats, Integers]:
    features, labels = np.asarray(data[0], dtype=np.float32), np.asarray(data[1], dtype=np.int64)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        shapes = f"{features.shape} and {labels.shape}"
        raise ConfigError("data", shapes, "must be features (n, columns) and labels (n,), with at least one record")
    if labels.min() < 0 or labels.max() < 1:
        raise ConfigError("data", int(labels.min()), "must have labels of at least two classes, numbered from 0")
    return features, labels


def _plant_canaries(features: Floats, inserted: npt.NDArray[np.bool_]) -> Floats:
    """Append a column and a row per canary; the row is zero if the canary is not inserted.

    A zero row has a gradient for the bias only, and therefore reveals nothing about its canary.
    """
    count = len(inserted)
    wide = np.concatenate([features, np.zeros((len(features), count), dtype=np.float32)], axis=1)
    rows = np.zeros((count, wide.shape[1]), dtype=np.float32)
    rows[np.arange(count), features.shape[1] + np.arange(count)] = CANARY_SIZE * inserted
    return np.concatenate([wide, rows])


def _score_canaries(predict: Predict, classes: Integers, *, columns: int) -> Values:
    """Compute scores (canaries,): the model's output for each canary's label in its column, minus the mean output.

    Raises:
        ConfigError: the model's scores have a wrong shape.
    """
    count = len(classes)
    probes = np.zeros((count, columns + count), dtype=np.float32)
    probes[np.arange(count), columns + np.arange(count)] = 1.0
    scores, nothing = (_predict(predict, rows) for rows in (probes, np.zeros_like(probes[:1])))
    if scores.ndim != 2 or len(scores) != count or scores.shape[1] <= classes.max():
        raise ConfigError("train", str(scores.shape), f"must return a model with scores ({count}, classes)")
    gained = scores - nothing
    found: Values = gained[np.arange(count), classes] - gained.mean(axis=1)
    return found


def _predict(predict: Any, features: Floats) -> Values:
    if hasattr(predict, "parameters"):  # torch modules do not accept NumPy arrays
        import torch

        with torch.no_grad():
            own = next(iter(predict.parameters()))
            scores = predict(torch.from_numpy(features).to(own.device, own.dtype))
        return np.asarray(scores.detach().cpu().double().numpy())
    return np.asarray(predict(features), dtype=np.float64)
