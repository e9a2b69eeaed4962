"""All attacks on a finished run, with the results in `attack.json` and `attack.html` in the run folder.

Each result is compared with the bound of the guarantee, which follows from the mechanism's trade-off curve. A
membership attack with false positive rate a has a true positive rate of at most B(a), computed by
`report.derive.profile.bound_hit_rate`. The same curve bounds reconstruction: a guess of one of N equally likely secrets
is correct with probability 1 / N without the record, and at most B(1 / N) with the record. `fedtune gate` uses the same
function, `profile.bound_secret_chance`. All bounds hold for an attacker who knows everything except the one record or
person.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedtune.config import RunConfig
from fedtune.federation.run_folder import RunFolder
from fedtune.lab.attack import known_attacks
from fedtune.lab.attack.known_attacks import CONFIDENCE
from fedtune.lab.attack.target import ScoredRecords, Target
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.privacy.events import Spent
from fedtune.privacy.run_plan import Plan
from fedtune.report.attacks import AttackFinding, RunAttacks
from fedtune.report.derive import profile
from fedtune.report.from_run import read_run
from fedtune.report.page.render import write_attacks

CANDIDATES = (100, 10_000, 1_000_000)
"""Numbers of candidate secrets: two digits, four digits, and six digits or a date of birth with a sex."""
_SHOWN = 10_000
_RATES = (0.0, *(10.0**-power for power in range(6, 2, -1)), 0.003, 0.01, 0.03, *(n / 20 for n in range(2, 21)))
"""False positive rates at which the curve is evaluated; in between it is bounded by a step function."""


def attack_run(
    config: RunConfig,
    adapter: Path,
    folder: Path,
    *,
    members: str | None,
    others: str | None,
    secrets: Path | None,
    minutes: float,
    shadows: int,
    tell: Callable[[str], None],
) -> RunAttacks:
    """Run all attacks that the task supports on a finished run, and write the results to its folder.

    Guarantee: none; the figures are exact scores of private records.  Sites never run this code.

    Args:
        config: the run's configuration.
        adapter: the adapter's folder.
        folder: the run folder.
        members: a file of training records; None: the simulation's records.
        others: a file of non-members; None: held-out records, otherwise the lead's test records.
        secrets: a JSON Lines file of planted secrets (`known_attacks.read_secrets`); None: no planted secrets.
        minutes: time limit for scoring; the groups of records are subsampled to fit.
        shadows: number of head-only shadow models.
        tell: callback for messages: the cost in advance, and the start of each attack.

    Raises:
        ConfigError: the run's records are not on this machine, or too few.
        DataError: a file cannot be read.
    """
    began, plan = time.monotonic(), read_run(folder).plan
    target = Target(config, adapter, members=members, others=others)
    planted = None if secrets is None else known_attacks.read_secrets(secrets, target)
    target.fit_to_minutes(minutes, shadows=shadows, tell=tell)
    spent = profile.count_charged_events(plan, plan.max_rounds) if plan.private else None
    by_site = {site: target.score_records(records) for site, records in target.members.items() if records}
    outside = target.score_records(target.others)
    columns = ([getattr(group, field.name) for group in by_site.values()] for field in fields(ScoredRecords))
    inside = ScoredRecords(*map(np.concatenate, columns))
    tell("running membership and site inference, and reconstruction from one update")
    rankings = known_attacks.rank_records(inside, outside, shadows=shadows, seed=config.seed)
    gains = {site: one.gain for site, one in by_site.items()}
    findings = [
        known_attacks.describe_membership(rankings, ceiling=None if spent is None else bound_membership_auroc(spent)),
        known_attacks.describe_site_inference(gains, outside.gain, unit=plan.unit),
        known_attacks.describe_picked_records(target, plan),
        describe_reconstruction(plan, keeps_state=config.federation.bound_algorithm.keeps_state),
    ]
    tell("running extraction and attribute inference")
    findings += _extract(target, planted)
    findings.append(known_attacks.describe_attribute(inside, outside))
    found = RunAttacks(
        run=config.name or folder.name,
        adapter_sha256=compute_adapter_digest(RunFolder(folder).adapter),
        epsilon=None if spent is None else profile.epsilon_pld(spent, plan.delta),
        delta=plan.delta,
        confidence=CONFIDENCE,
        seconds=time.monotonic() - began,
        findings=tuple(findings),
    )
    write_attacks(folder, found)
    return found


def _extract(target: Target, planted: list[known_attacks.PlantedSecret] | None) -> list[AttackFinding]:
    findings = []
    if planted is not None:
        draws = np.random.default_rng(target.config.seed)
        ranks = [known_attacks.rank_secret(secret, target, draws) for secret in planted]
        findings.append(known_attacks.describe_exposure(ranks))
        if target.config.bound_task.predicts_tokens:
            findings.append(known_attacks.describe_written_secrets(planted, target))
    if target.config.bound_task.predicts_tokens:
        findings.append(known_attacks.describe_decoding(target))
    elif planted is None:
        none = f"Extraction is not possible, because a model for the task {target.config.task} generates no text."
        findings.append(AttackFinding(attack="extraction", measure="written_answers", sentence=none, applies=False))
    return findings


def bound_membership_auroc(spent: Spent) -> float | None:
    """Compute an upper bound on the AUROC of every membership attack on the mechanism; None: unbounded."""
    found = [profile.bound_hit_rate(spent, false_positive_rate=rate) for rate in _RATES[1:]]
    if any(rate is None for rate in found):
        return None
    steps = zip(pairwise(_RATES), found, strict=True)
    return min(1.0, sum((right - left) * (rate or 0.0) for (left, right), rate in steps))


def bound_reconstruction(plan: Plan, *, rounds: int) -> dict[int, float]:
    """Compute upper bounds on the probability of reconstructing one of N equally likely secrets from `rounds` rounds.

    Returns:
        The bound by N.
    """
    spent = profile.count_charged_events(plan, rounds)
    epsilon = profile.epsilon_pld(spent, plan.delta)
    bound = partial(profile.bound_secret_chance, spent, epsilon=epsilon, delta=plan.delta)
    return {count: bound(candidates=count) for count in CANDIDATES}


def describe_reconstruction(plan: Plan, *, keeps_state: bool) -> AttackFinding:
    """Describe the reconstruction bounds for the final model and for a single update of a site.

    No attack is run: the run folder contains no single updates, and the bound holds for every attack.

    Args:
        plan: the run's plan.
        keeps_state: whether the algorithm keeps a state at the sites. A single update then depends on earlier rounds,
            too, and has the bound of the whole run.
    """
    unit = "person" if plan.unit == "user" else "record"
    describe = partial(AttackFinding, attack="reconstruction", measure="secret_of_10000", guessing=1 / _SHOWN)
    if not plan.private:
        none = "The run has no privacy guarantee, so records can be reconstructed from an update."
        return describe(sentence=none)
    in_update = plan.max_rounds if keeps_state else 1
    whole, one = (bound_reconstruction(plan, rounds=rounds) for rounds in (plan.max_rounds, in_update))
    figures: dict[str, float | None] = {f"run_1_in_{count}": chance for count, chance in whole.items()}
    figures |= {f"update_1_in_{count}": chance for count, chance in one.items()}
    told = [
        f"{_format_chance(bounds[_SHOWN])} from {what}"
        for bounds, what in ((one, "one update of a site"), (whole, "everything that the run released"))
    ]
    said = f"A secret of one {unit} with {_SHOWN:,} equally likely values is reconstructed with probability at most "
    said += f"{' and '.join(told)}; random guessing has {_format_chance(1 / _SHOWN)}."
    return describe(sentence=said, ceiling=whole[_SHOWN], figures=figures)


def _format_chance(chance: float) -> str:
    return f"{100 * chance:.2g} %"
