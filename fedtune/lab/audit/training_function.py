"""A one-run audit of somebody else's training function: `fedtune.audit_training(train, data, ...)`.

The function may be anything that trains a model on arrays, such as a loop with Opacus as its tutorial has it.  The
audit gives the records one more column for each canary.  A canary is a record that is large in its own column and zero
elsewhere, so that only its own gradient, and noise, reach the model's weights for that column.  Its score is how much
the finished model answers its label there.  Nothing else of the function is looked at.

Two attackers guess, each with half of the error probability.  The first sees the model.  The second can also run the
function once more without any canary, and looks at the difference: with fresh noise that gains nothing, and with noise
from a generator that is seeded alike, it removes the noise.
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
"""From features (n, columns) to class scores (n, classes); a torch module is one, too."""
Train = Callable[[Floats, Integers], Predict]
"""From features (n, columns) and labels (n,) to a trained model."""

CANARY_SIZE = 1000.0  # of a canary's one value: its gradient is far beyond any clip norm
_EPSILONS = np.linspace(0.0, 20.0, 401)  # of the claim's privacy profile

_ATTACKS = ("model", "model beside a second training")


@spec
class TrainingAudit:
    """What an audit of a training function found; the figures are those of the stronger attacker.

    Attributes:
        claimed_epsilon: the epsilon of the claimed steps at `delta`.
        lower_bound: that any mechanism with these guesses has, with `confidence`.
        fdp_bound: that a Gaussian mechanism with these guesses has, with `confidence`.
        refuted: whether the guesses refute the claimed steps' own trade-off curve, with `confidence`.
        attack: what the stronger attacker saw.
        canaries: how many were tossed for.
        guesses: the number of guesses, fixed beforehand.
        right: the number of right guesses.
        delta: at which each epsilon is stated.
        confidence: of the verdict over both attackers.
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
        verdict = (
            "REFUTED: the implementation or the claim is wrong" if self.refuted else "not refuted; this is no proof"
        )
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
    """Audit a training function that claims DP-SGD with Poisson sampling, by planting canaries in its records.

    The function is called twice.  It must accept any number of columns, and train on records as they come.  It should
    begin at fixed weights, such as zeros: random ones hide the canaries from this attacker, and protect nobody.

    What it can find depends on the claim.  With the defaults, noise at half is found nearly always if the claim is that
    of a Gaussian mechanism with a noise multiplier of 0.7 to 1.4 (noise_multiplier / sqrt(steps) at sampling rate 1).

    Guarantee: if the function is what it claims, the audit refutes it with probability at most 1 - `confidence`.

    Args:
        train: from features (n, columns) float32 and labels (n,) int64 to a model: a function from features to class
            scores (n, classes), or a torch module.
        data: features (n, columns) and labels (n,) of ordinary records, of at least two classes from 0 on.
        noise_multiplier: the claim: noise of a step's sum, in clip norms.
        sampling_rate: the claim: the chance of a record to be in a step.
        steps: the claim: number of steps.
        delta: at which epsilon is stated.
        canaries: number of canaries, each put in by its own fair coin; a column each.
        guesses: number of guesses of each attacker; None: a fifth of the canaries.
        confidence: of the verdict.
        seed: of the coins.

    Raises:
        ConfigError: a setting or the data cannot be used, or the model's scores have another form.

    >>> audit_training(train, (x, y), noise_multiplier=1.0, sampling_rate=0.1, steps=40).refuted  # doctest: +SKIP
    False
    """
    check_positive("noise_multiplier", noise_multiplier)
    check_fraction("sampling_rate", sampling_rate, one=True)
    check_at_least("steps", steps, 1)
    check_at_least("canaries", canaries, 20)
    check_fraction("delta", delta)
    check_fraction("confidence", confidence)
    guesses = max(1, canaries // 5) if guesses is None else guesses
    if not 1 <= guesses <= canaries:
        raise ConfigError("guesses", guesses, f"must be in [1, {canaries}], at most one for each canary")
    features, labels = _read_records(data)
    draws = np.random.default_rng(seed)
    inserted = draws.random(canaries) < 0.5
    classes = draws.integers(int(labels.max()) + 1, size=canaries)
    planted = _plant_canaries(features, inserted)
    both = np.concatenate([labels, classes])
    first = _score_canaries(train(planted, both), classes, columns=features.shape[1])
    # As many records, so that a generator that is seeded alike draws alike; the canaries' rows are zero.
    nothing = _plant_canaries(features, np.zeros_like(inserted))
    second = _score_canaries(train(nothing, both), classes, columns=features.shape[1])
    event = build_dp_sgd_event(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
    curve = compose_pld(tuple(count_mechanisms([event]).items()), COARSE)
    deltas, each = np.array([curve.delta(epsilon) for epsilon in _EPSILONS]), (1 - confidence) / len(_ATTACKS)
    found = []
    for attack, scores in zip(_ATTACKS, (first, first - second), strict=True):
        counts = count_right_guesses(compute_centered_ranks(scores), inserted, guesses=guesses)
        refuted = refutes_profile(*counts, epsilons=_EPSILONS, deltas=deltas, error=each)
        found.append(
            TrainingAudit(
                claimed_epsilon=curve.epsilon(delta),
                lower_bound=compute_epsilon_lower_bound(*counts, delta=delta, confidence=1 - each),
                fdp_bound=compute_fdp_lower_bound(*counts, delta=delta, confidence=1 - each),
                refuted=refuted,
                attack=attack,
                canaries=canaries,
                guesses=guesses,
                right=counts[2],
                delta=delta,
                confidence=confidence,
            )
        )
    return max(found, key=lambda one: one.right)


def _read_records(data: tuple[npt.ArrayLike, npt.ArrayLike]) -> tuple[Floats, Integers]:
    features, labels = np.asarray(data[0], dtype=np.float32), np.asarray(data[1], dtype=np.int64)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        shapes = f"{features.shape} and {labels.shape}"
        raise ConfigError("data", shapes, "must be features (n, columns) and labels (n,), with at least one record")
    if labels.min() < 0 or labels.max() < 1:
        raise ConfigError("data", int(labels.min()), "must have labels from 0 on, of at least two classes")
    return features, labels


def _plant_canaries(features: Floats, inserted: npt.NDArray[np.bool_]) -> Floats:
    """Append a column and a row for each canary; the row of a canary that is left out is zero.

    A zero row is a record like any other, with a gradient for the bias alone: it says nothing of its canary.
    """
    count = len(inserted)
    wide = np.concatenate([features, np.zeros((len(features), count), dtype=np.float32)], axis=1)
    rows = np.zeros((count, wide.shape[1]), dtype=np.float32)
    rows[np.arange(count), features.shape[1] + np.arange(count)] = CANARY_SIZE * inserted
    return np.concatenate([wide, rows])


def _score_canaries(predict: Predict, classes: Integers, *, columns: int) -> Values:
    """Return (canaries,) how much the model answers each canary's label in its column, beyond the mean of all labels.

    Raises:
        ConfigError: the model's scores have another form.
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
    if hasattr(predict, "parameters"):  # a torch module, of which numpy arrays are no input
        import torch

        with torch.no_grad():
            own = next(iter(predict.parameters()))
            scores = predict(torch.from_numpy(features).to(own.device, own.dtype))
        return np.asarray(scores.detach().cpu().double().numpy())
    return np.asarray(predict(features), dtype=np.float64)
