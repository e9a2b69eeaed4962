"""Gradient canaries: sampling, clipping, noise and steps as for records, without other effects."""

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fedtune.api.compose import compose_run
from fedtune.flower.simulation import simulate
from fedtune.lab.audit import gradient_attack
from fedtune.lab.audit.experiment import make_auditable, run_audit
from fedtune.lab.audit.gradient_attack import Canaries, CanaryBatch, CanaryUserBatch, GradientAttack, Tally
from fedtune.lab.audit.spec import AuditSpec
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import compute_cell_width
from fedtune.privacy.randomness import SeededRandomness
from fedtune.sites.virtual_site import Participants
from fedtune.training import dp_step
from fedtune.training.examples import SiteExamples

from ...builders import round_request
from .conftest import BY_USER, Break


@pytest.fixture(scope="module")
def make_participants(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that creates the participants of a tiny run; read-only."""

    @cache
    def make(*overrides: str) -> Participants:
        into = tmp_path_factory.mktemp("runs")
        return Participants(compose_run(tiny("runtime.seeded_noise=true", *overrides, into=into)), into / "run")

    return make


def train(participants: Participants, site: str = "site-1", round: int = 1) -> Adapter:
    proposal = participants.config.proposal(lead=participants.sites.lead_key().public, plan=participants.plan)
    start = participants.shared.initial_adapter
    request = round_request(proposal, round=round, site=site, adapter_digest=start.digest())
    return participants.work[site].run_round(request, start, 1, fingerprint_key=b"k" * 32).adapter


def watch_canaries(run: Participants, canaries: int) -> Any:
    """Train a round with canaries at the first site, and return their scores."""
    attack = GradientAttack(run, AuditSpec(canaries=canaries), ["site-1"])
    with attack.observe_steps():
        train(run)
    return attack.planted["site-1"]


@pytest.mark.by_day("user")
@pytest.mark.parametrize("by_unit", [(), BY_USER], ids=["record", "user"])
def test_each_canary_draw_adds_exactly_the_clip_norm(
    make_participants: Any, inject_fault: Break, by_unit: tuple[str, ...]
) -> None:
    inject_fault("no noise")
    run = make_participants(*by_unit, "privacy.sampling_rate=1.0", "privacy.max_grad_norm=0.3")
    planted = watch_canaries(run, 200)
    steps = run.plan.local_steps
    assert planted.tally.steps == steps
    assert 60 < planted.inserted.sum() < 140
    # In clip norms: one for each step where a canary is in; elsewhere nothing, since records are subtracted.
    expected = np.zeros_like(planted.tally.total)
    expected[planted.coordinates[planted.inserted]] = steps
    assert planted.tally.total == pytest.approx(expected, abs=1e-4)
    if by_unit:  # three records of a user that are clipped one by one show
        inject_fault("clipping by record")
        planted = watch_canaries(run, 50)
        assert planted.tally.total[planted.coordinates[planted.inserted]] == pytest.approx(3.0 * steps, abs=1e-4)


def test_canary_records_are_batched_like_user_records() -> None:
    parts = list(CanaryUserBatch([np.full(3, 7), np.full(3, 5)], NoRecords()).parts())
    assert [part.coordinates.tolist() for part, _, _ in parts if isinstance(part, CanaryBatch)] == [[7, 5]] * 3
    assert all(users.tolist() == [0, 1] and shares.tolist() == [1 / 3] * 2 for _, users, shares in parts)


def test_noise_matches_the_plan_in_every_direction(make_participants: Any) -> None:
    run = make_participants()
    planted = watch_canaries(run, 200)
    noise = np.delete(planted.tally.total, planted.coordinates)
    expected = run.plan.noise_multiplier * np.sqrt(run.plan.local_steps)
    # Five standard errors of a standard deviation.
    assert noise.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * len(noise)))


def test_canaries_are_sampled_like_records(make_participants: Any, inject_fault: Break) -> None:
    inject_fault("no noise")
    run = make_participants("privacy.sampling_rate=0.3", "training.local_steps=10", "privacy.noise_multiplier=8.0")
    planted = watch_canaries(run, 2000)
    sampled = planted.tally.total[planted.coordinates[planted.inserted]].round()
    expected, count = 10 * 0.3, int(planted.inserted.sum())
    assert sampled.mean() == pytest.approx(expected, abs=5 * np.sqrt(10 * 0.3 * 0.7 / count))
    assert sampled.var() == pytest.approx(10 * 0.3 * 0.7, rel=0.3)


@pytest.mark.nightly
@pytest.mark.by_day("record")
@pytest.mark.parametrize("by_unit", [(), BY_USER], ids=["record", "user"])
def test_audit_without_inserted_canaries_does_not_change_training(
    make_participants: Any, by_unit: tuple[str, ...]
) -> None:
    coins = (SeededRandomness(seed).stream("site-1", "audit", "coins").bernoulli(2, 0.5) for seed in range(50))
    run = make_participants(*by_unit, f"seed={next(seed for seed, both in enumerate(coins) if not both.any())}")
    attack = GradientAttack(run, AuditSpec(canaries=2), ["site-1"])
    assert not attack.planted["site-1"].inserted.any()
    with attack.observe_steps():
        audited = train(run)
    assert audited.digest() == train(run).digest()


def test_canary_coins_are_fresh_unless_seeded(make_participants: Any) -> None:
    def draw_coins(*overrides: str) -> list[bool]:
        attack = GradientAttack(make_participants(*overrides), AuditSpec(canaries=64), ["site-1"])
        return attack.planted["site-1"].inserted.tolist()

    assert draw_coins() == draw_coins()
    assert draw_coins("runtime.seeded_noise=false") != draw_coins("runtime.seeded_noise=false")


def test_optimizer_observation_ends_after_the_audit(make_participants: Any) -> None:
    run = make_participants()
    attack = GradientAttack(run, AuditSpec(canaries=10), ["site-1"])
    with attack.observe_steps():
        train(run)
        train(run, "site-2")  # has no canaries
    train(run)
    assert attack.planted["site-1"].tally.steps == run.plan.local_steps


def test_audited_run_is_charged_like_the_original(tiny: Any, tmp_path: Path) -> None:
    config, spec = compose_run(tiny(into=tmp_path)), AuditSpec(canaries=50)
    plain, audited = tmp_path / "plain", tmp_path / "audited"
    for folder in (plain, audited):
        folder.mkdir()
    privacy = run_audit(make_auditable(config, spec), audited, Mock(), spec=spec).privacy
    assert privacy == simulate(config, plain, Mock()).privacy


def test_15000_canaries_are_added_in_small_batches() -> None:
    parameters = {"a": torch.nn.Parameter(torch.zeros(384, 8)), "head.weight": torch.nn.Parameter(torch.zeros(77, 384))}
    size = sum(parameter.numel() for parameter in parameters.values())
    tally = Tally(max_grad_norm=2.0, denominator=1.0, total=np.zeros(size))
    coordinates = np.random.default_rng(0).permutation(size)[:15_000]
    canaries = Canaries(coordinates, np.ones(15_000, dtype=bool), gradient_attack.Observer(parameters), tally)
    examples = gradient_attack.CanaryExamples(NoRecords(), canaries)
    assert len(examples) == 15_000
    seen = np.zeros(size)
    for batch in examples.cut(np.arange(0, 15_000, 7)):
        assert isinstance(batch, CanaryBatch)
        gradients = canaries.compute_raw_gradients(batch)
        assert sum(gradient.numel() for gradient in gradients.values()) <= 2**23
        sums = dp_step.make_zero_sums(parameters)
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()], dim=1).norm(dim=1)
        assert torch.equal(norms, torch.full((len(batch),), gradient_attack.RAW_SIZE * 2.0))
        dp_step.add_clipped(sums, gradients, 2.0)
        added = np.concatenate([total.flatten().numpy() for total in sums.values()])
        assert added.max() <= 2**24, "in whole numbers: no canary is longer than a clip norm"
        seen += added * compute_cell_width(2.0)
    expected = np.zeros(size)
    expected[coordinates[np.arange(0, 15_000, 7)]] = 2.0
    assert seen == pytest.approx(expected, abs=1e-5)


class NoRecords(SiteExamples):
    def __init__(self) -> None: ...

    def __len__(self) -> int:
        return 0

    def cut(self, indices: Any) -> Any:
        assert len(indices) == 0
        return iter(())
