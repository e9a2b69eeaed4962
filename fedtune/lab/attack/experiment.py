"""All attacks on a finished run, from its folder to `attack.json` and `attack.html` beside its report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np

from fedtune.config import RunConfig
from fedtune.lab.attack import extraction, guarantee, membership
from fedtune.lab.attack.target import Scored, Target, fit_to_minutes
from fedtune.privacy.run_plan import Plan
from fedtune.report.attacks import AttackFinding, RunAttacks, write_findings
from fedtune.report.derive import profile
from fedtune.report.from_run import read_run

CONFIDENCE = 0.95
SHADOWS = 32


def attack_run(
    config: RunConfig,
    adapter: Path,
    folder: Path,
    *,
    members: str | None = None,
    others: str | None = None,
    secrets: Path | None = None,
    minutes: float = 10.0,
    shadows: int = SHADOWS,
    tell: Callable[[str], None] = lambda text: None,
) -> RunAttacks:
    """Attack a finished run by all the names that its task allows, and write what was found into its folder.

    The figures come from exact scores of private records: no guarantee covers them, and no site runs this code.

    Args:
        config: of the run.
        adapter: the folder of its adapter.
        folder: the run folder.
        members: a file of records that were trained on; None: those of the simulation.
        others: a file of records that were not; None: held-out records, else the lead's test records.
        secrets: JSON lines of planted secrets, see `extraction.read_secrets`; None: none were planted.
        minutes: the time that scoring may take; groups of records are shrunk to fit.
        shadows: number of head-only shadow models.
        tell: told the price before the attacks, and each attack as it begins.

    Raises:
        ConfigError: the run's records are not on this machine, or too few.
        DataError: a file cannot be read.
    """
    began, plan = time.monotonic(), read_run(folder).plan
    target = Target(config, adapter, members=members, others=others)
    planted = None if secrets is None else extraction.read_secrets(secrets, target)
    fit_to_minutes(target, minutes=minutes, shadows=shadows, tell=tell)
    spent = profile.count_charged_events(plan, plan.most_rounds) if plan.private else None
    by_site = {site: target.score_records(records) for site, records in target.members.items() if records}
    outside = target.score_records(target.others)
    inside = _join(list(by_site.values()))
    tell("attacking membership, sites, and what could be rebuilt")
    rankings = membership.rank_records(inside, outside, shadows=shadows, seed=config.seed)
    protection = guarantee.describe_site_protection(plan, min(len(one.after) for one in by_site.values()))
    findings = [
        membership.describe_membership(
            rankings,
            confidence=CONFIDENCE,
            ceiling=None if spent is None else guarantee.bound_membership_auroc(spent),
        ),
        membership.describe_site_inference(
            {site: one.gain for site, one in by_site.items()},
            outside.gain,
            protection=protection,
            confidence=CONFIDENCE,
        ),
        guarantee.describe_reconstruction(plan),
    ]
    tell("attacking texts and labels")
    findings += _extract(target, planted)
    findings.append(membership.describe_attribute(inside, outside, confidence=CONFIDENCE))
    found = RunAttacks(
        run=config.name or folder.name,
        adapter_sha256=_hash_folder(adapter),
        epsilon=_whole_epsilon(plan),
        delta=plan.delta,
        confidence=CONFIDENCE,
        seconds=time.monotonic() - began,
        findings=tuple(findings),
    )
    write_findings(found, folder)
    return found


def _extract(target: Target, planted: list[extraction.PlantedSecret] | None) -> list[AttackFinding]:
    findings = []
    if planted is not None:
        draws = np.random.default_rng(target.config.seed)
        ranks = [extraction.rank_secret(secret, target, draws) for secret in planted]
        findings.append(extraction.describe_exposure(ranks, confidence=CONFIDENCE))
    if target.config.bound_task.predicts_tokens:
        findings.append(extraction.describe_decoding(target, confidence=CONFIDENCE))
    elif planted is None:
        none = f"Extraction cannot be done: a model for the task {target.config.task} writes no text."
        findings.append(AttackFinding(attack="extraction", measure="texts written word for word", sentence=none))
    return findings


def _join(groups: list[Scored]) -> Scored:
    return Scored(*(np.concatenate([getattr(one, field.name) for one in groups]) for field in fields(Scored)))


def _whole_epsilon(plan: Plan) -> float | None:
    if not plan.private:
        return None
    return profile.epsilon_pld(profile.count_charged_events(plan, plan.most_rounds), plan.delta)


def _hash_folder(adapter: Path) -> str:
    """Hash the files of an adapter by name and content."""
    digest = hashlib.sha256()
    for path in sorted(adapter.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
