"""Membership inference on a finished run: loss, likelihood ratio to the base, and LiRA with head-only shadows.

LiRA (Carlini et al. 2022, arXiv 2112.03570) compares a record's score under the model with its scores under shadow
models that did and did not train on it.  Shadow models of the whole kind cost as many runs.  Here a shadow is a head
alone, a ridge classifier on the embeddings of the tuned model, fitted in closed form to a random half of all records:
a matrix product each.  What the adapter itself memorized is therefore calibrated by difficulty and not by example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np

from fedtune.lab.attack.target import Scored
from fedtune.lab.audit.guesses import Values
from fedtune.lab.audit.record_attack import FALSE_ALARMS, auroc, hit_rate
from fedtune.report.attacks import AttackFinding

_RIDGE = 1e-3  # of the mean eigenvalue, which keeps heads of few records finite
_LEAST_LOSS = 1e-12
_LARGEST_EXPONENT = 700.0  # e to it is still a number
GROUP = 20  # records of a site, of which an attacker guesses whether the site took part


@dataclass(frozen=True)
class Ranking:
    """A score by which an attacker ranks records; larger means "trained on"."""

    name: str
    members: Values
    others: Values


def rank_records(members: Scored, others: Scored, *, shadows: int, seed: int) -> list[Ranking]:
    """Compute every score that the task allows for members and non-members."""
    rankings = [
        Ranking("loss", -members.after, -others.after),
        Ranking("ratio to the base", members.gain, others.gain),
    ]
    if members.classes.min(initial=0) >= 0 and members.embeddings.shape[1]:
        scores = compute_lira_scores(members, others, shadows=shadows, seed=seed)
        count = len(members.after)
        rankings.append(Ranking("LiRA, head-only shadows", scores[:count], scores[count:]))
    return rankings


def compute_lira_scores(members: Scored, others: Scored, *, shadows: int, seed: int) -> Values:
    """Compute the LiRA score of each record, members first.

    Every shadow is fitted to a random half of all records, so each record is in about half of them.  A record's
    difficulty is the middle between its mean margins under the shadows with it and without it.  The score is how far
    its margin under the attacked model lies above what a line, fitted over all records, expects at that difficulty:
    the likelihood ratio if one record moves its own margin about as far as another.

    Args:
        members: the records that were trained on.
        others: the others; the attacker does not know which are which, and neither does this function use it.
        shadows: number of heads.
        seed: of the halves.
    """
    embeddings = np.concatenate([members.embeddings, others.embeddings]).astype(np.float64)
    embeddings = np.concatenate([embeddings, np.ones((len(embeddings), 1))], axis=1)
    classes = np.concatenate([members.classes, others.classes])
    answers = np.eye(int(classes.max()) + 1)[classes]
    ridge = _RIDGE * np.trace(embeddings.T @ embeddings) / embeddings.shape[1]
    draws, margins = np.random.default_rng(seed), np.zeros((shadows, len(classes)))
    inside = np.zeros((shadows, len(classes)), dtype=bool)
    for shadow in range(shadows):
        inside[shadow] = draws.random(len(classes)) < 0.5
        own = embeddings[inside[shadow]]
        head = np.linalg.solve(own.T @ own + ridge * np.eye(own.shape[1]), own.T @ answers[inside[shadow]])
        margins[shadow] = _compute_margins(embeddings @ head, classes)
    times_in = np.maximum(1, inside.sum(axis=0))
    times_out = np.maximum(1, (~inside).sum(axis=0))
    middle = ((margins * inside).sum(axis=0) / times_in + (margins * ~inside).sum(axis=0) / times_out) / 2
    losses = np.clip(np.concatenate([members.after, others.after]), _LEAST_LOSS, _LARGEST_EXPONENT)
    own_margins: Values = -np.log(np.expm1(losses))  # log p / (1 - p) of the true class
    if np.ptp(middle) == 0:
        return own_margins
    slope, offset = np.polyfit(middle, own_margins, 1)
    scores: Values = own_margins - offset - slope * middle
    return scores


def _compute_margins(outputs: Values, classes: np.ndarray) -> Values:
    """Return (records,) the output of the true class minus the largest other output."""
    rows = np.arange(len(classes))
    others = outputs.copy()
    others[rows, classes] = -np.inf
    margins: Values = outputs[rows, classes] - (others.max(axis=1) if outputs.shape[1] > 1 else 0.0)
    return margins


def describe_membership(rankings: Sequence[Ranking], *, confidence: float, ceiling: float | None) -> AttackFinding:
    """Describe the strongest of several membership attacks; its interval allows for the choice (Bonferroni)."""
    each = 1 - (1 - confidence) / len(rankings)
    areas = {one.name: auroc(one.members, one.others, confidence=each) for one in rankings}
    best = max(rankings, key=lambda one: areas[one.name][0])
    area, low, high = areas[best.name]
    figures: dict[str, float | None] = {f"auroc by {name}": found[0] for name, found in areas.items()}
    for share in FALSE_ALARMS:
        found = hit_rate(best.members, best.others, false_alarms=share, confidence=each)
        figures[f"found at {share:.1%} false alarms"] = None if found is None else found[0]
    said = f"Of one record that was trained on and one that was not, the attack by {best.name} picks the right one "
    said += f"{round(100 * area)} times out of 100 (guessing: 50)"
    said += "; chance alone explains that." if low <= 0.5 else "; chance alone does not explain that."
    return AttackFinding(
        attack="membership",
        measure="AUROC",
        sentence=said,
        strength=area,
        low=low,
        high=high,
        guessing=0.5,
        ceiling=ceiling,
        figures=figures,
    )


def describe_site_inference(
    by_site: Mapping[str, Values], others: Values, *, protection: str, confidence: float
) -> AttackFinding:
    """Describe how well the model tells `GROUP` records of a site that took part from as many of nobody's.

    The attacker averages each group's gain (dataset inference; Maini, Yaghini and Papernot 2021, arXiv 2104.10706).

    Args:
        by_site: site -> (records,) gains of records that it trained on.
        others: (records,) gains of records that nobody trained on.
        protection: the sentence on what the guarantee says of sites.
        confidence: of the interval.
    """
    sites = [mean for gains in by_site.values() for mean in _average_groups(gains)]
    nobody = _average_groups(others)
    describe = partial(AttackFinding, attack="site", measure=f"AUROC of {GROUP} records", guessing=0.5, ceiling=1.0)
    if len(nobody) < 2 or len(sites) < 2:
        few = f" No attack was made: it needs at least {2 * GROUP} records of each group."
        return describe(sentence=protection + few)
    area, low, high = auroc(np.array(sites), np.array(nobody), confidence=confidence)
    said = f" From {GROUP} records the model tells a site that took part {round(100 * area)} times out of 100."
    return describe(sentence=protection + said, strength=area, low=low, high=high)


def _average_groups(gains: Values) -> list[float]:
    whole = len(gains) // GROUP * GROUP
    return [float(mean) for mean in gains[:whole].reshape(-1, GROUP).mean(axis=1)]


def describe_attribute(members: Scored, others: Scored, *, confidence: float) -> AttackFinding:
    """Describe how much better the model guesses the label of a record that it trained on than of another one.

    The attacker knows the rest of the record.  What it guesses as well of records that were never used, it has learned
    of people in general, and that is no leak of a record.
    """
    describe = partial(AttackFinding, attack="attribute", measure="labels guessed, members - others", guessing=0.0)
    if members.classes.min(initial=0) < 0:
        none = "Attribute inference was not made: this task has no label out of a declared set that could be guessed."
        return describe(sentence=none)
    rates = [float(np.mean(one.classes == one.predicted)) for one in (members, others)]
    variance = sum(
        rate * (1 - rate) / len(one.classes) + 1 / (4 * len(one.classes) ** 2)
        for rate, one in zip(rates, (members, others), strict=True)
    )
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    gap = rates[0] - rates[1]
    low, high = max(-1.0, gap - reach), min(1.0, gap + reach)
    said = f"Whoever knows a record but not its label guesses the label of {rates[0]:.1%} of the records that were "
    said += f"trained on, and of {rates[1]:.1%} of the others"
    said += "; the difference may be chance." if low <= 0 <= high else "; the difference is more than chance."
    figures: dict[str, float | None] = {"members": rates[0], "others": rates[1]}
    return describe(sentence=said, strength=gap, low=low, high=high, figures=figures)
