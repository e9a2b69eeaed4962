"""Attacks on membership, sites and labels: power against memorization, and no false positives."""

import numpy as np
import pytest

from fedtune.lab.attack.known_attacks import (
    GROUP,
    describe_attribute,
    describe_membership,
    describe_site_inference,
    rank_records,
)
from fedtune.lab.attack.target import ScoredRecords
from fedtune.lab.audit.record_attack import estimate_auroc

CLASSES, WIDTH = 4, 12


def score_records(count: int, *, memorized: float, hardness: float = 2.0, seed: int) -> ScoredRecords:
    """Return scores of records with very different difficulty; `memorized` is added to members' margins."""
    draws = np.random.default_rng(seed)
    classes = draws.integers(CLASSES, size=count)
    embeddings = draws.normal(size=(count, WIDTH)) + 1.5 * np.eye(WIDTH)[classes]
    others = np.where(np.eye(WIDTH, dtype=bool)[classes], -np.inf, embeddings)[:, :CLASSES]
    difficulty = hardness * (embeddings[np.arange(count), classes] - others.max(axis=1))
    margins = difficulty + memorized + 0.3 * draws.normal(size=count)
    losses = np.log1p(np.exp(-margins))
    predicted = np.where(margins > 0, classes, (classes + 1) % CLASSES)
    before = np.log1p(np.exp(-difficulty)) + 0.1
    return ScoredRecords(before, losses, embeddings.astype(np.float32), classes, predicted)


def test_lira_beats_the_loss_attack_on_records_of_varying_difficulty() -> None:
    members, others = (score_records(400, memorized=gain, seed=seed) for seed, gain in ((0, 0.5), (1, 0.0)))
    rankings = rank_records(members, others, shadows=16, seed=0)
    areas = {scores.name: estimate_auroc(scores.members, scores.others, confidence=0.95)[0] for scores in rankings}
    assert areas["loss"] < 0.6
    assert areas["LiRA, head-only shadows"] > areas["loss"] + 0.05


def test_membership_attack_without_memorization_has_auroc_one_half() -> None:
    members, others = (score_records(400, memorized=0.0, seed=seed) for seed in (2, 3))
    attack = describe_membership(rank_records(members, others, shadows=16, seed=0), ceiling=0.9)
    assert attack.low is not None
    assert attack.high is not None
    assert attack.low <= 0.5 <= attack.high
    assert (attack.guessing, attack.ceiling) == (0.5, 0.9)
    assert "this may be chance" in attack.sentence


def test_membership_attack_detects_full_memorization() -> None:
    members, others = (score_records(200, memorized=gain, seed=seed) for seed, gain in ((4, 6.0), (5, 0.0)))
    attack = describe_membership(rank_records(members, others, shadows=8, seed=0), ceiling=None)
    assert attack.strength is not None
    assert attack.strength > 0.9
    assert "more than chance" in attack.sentence


def test_membership_attack_without_classes_uses_only_losses() -> None:
    plain = [
        ScoredRecords(one.before, one.after, one.embeddings[:, :0], np.full(50, -1), np.full(50, -1))
        for one in (score_records(50, memorized=0.0, seed=seed) for seed in (6, 7))
    ]
    assert [one.name for one in rank_records(*plain, shadows=4, seed=0)] == ["loss", "ratio to the base"]
    assert "no declared label set" in describe_attribute(*plain).sentence


@pytest.mark.parametrize(("memorized", "detected"), [(2.0, True), (0.0, False)])
def test_site_inference_uses_the_mean_gain_of_site_records(memorized: float, detected: bool) -> None:
    sites = {
        site: score_records(10 * GROUP, memorized=memorized, seed=seed).gain for seed, site in ((8, "a"), (9, "b"))
    }
    others = score_records(10 * GROUP, memorized=0.0, seed=10).gain
    attack = describe_site_inference(sites, others, unit="record")
    assert attack.low is not None
    assert (attack.low > 0.5) == detected
    assert attack.sentence.startswith("The participation of a site is never protected")
    few = describe_site_inference({"a": others[:5]}, others[:5], unit="record")
    assert (few.strength, few.low) == (None, None)
    assert f"at least {2 * GROUP} records" in few.sentence


def test_attribute_inference_succeeds_only_with_memorization() -> None:
    members, others = (score_records(400, memorized=gain, seed=seed) for seed, gain in ((11, 3.0), (12, 0.0)))
    attack = describe_attribute(members, others)
    assert attack.low is not None
    assert attack.low > 0.15
    baseline = describe_attribute(others, others)
    assert baseline.strength == 0
    assert "may be chance" in baseline.sentence
