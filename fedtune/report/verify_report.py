"""Derivation of a report from its source data, and verification that a report is consistent with its source data.

Verification derives all values again with the same functions and compares them; the tests also compute each epsilon
with an independent program. The last digits may differ on another machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

from fedtune.federation.early_stopping import is_budget_used_up
from fedtune.federation.lead import find_invalid_field
from fedtune.federation.replies import NOT_SUMMED
from fedtune.formatting import convert_infinite_to_none, convert_none_to_infinite
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.dp_library import DpEvent, GaussianDpEvent, LaplaceDpEvent, NonPrivateDpEvent
from fedtune.privacy.mechanism import MIN_SAMPLING_RATE
from fedtune.privacy.selection import MAX_TRIALS
from fedtune.report.derive import dpia_fields, ledger_figures, profile, run_figures
from fedtune.report.derive.verdicts import exceeds_cap, find_audit_problems
from fedtune.report.facts import Cap, Facts, LedgerFacts, RunFacts, SiteFacts, SiteStatement
from fedtune.report.model import Problem, Report, to_json
from fedtune.spec import ConfigError

TOLERANCE = 1e-6  # relative tolerance upwards; downwards only `_LAST_DIGITS`
_LAST_DIGITS = 1e-9
_FFT_ROUNDING = 5e-15
"""Absolute rounding error of delta: distributions are composed by FFT, which processors round differently.  At delta
1e-10, the smallest on a curve, epsilon differed by a relative 1.3e-6; larger deltas differ less."""
_MAX_BUCKETS = 5e7
"""Largest number of PLD buckets of one distribution, and of all single mechanisms in a report: a few minutes of work.
A ledger of 200 runs with different plans and noised scores stays below it; a run has one plan."""
_MAX_COMPOSED = 2 * _MAX_BUCKETS  # buckets for composing all mechanisms, which is faster than building distributions
_MAX_ORDER = 1e4
_MAX_ROWS = 500_000  # a page with this number of rows takes a third of a gigabyte
_MAX_CANARIES = 10_000_000  # a million canaries take about a second
_BUCKETS_OF_ANY = 3e4  # fixed cost of a mechanism, in buckets: about 0.1 s

Charges = Counter[DpEvent]


def derive_report(facts: Facts) -> Report:
    """Derive a report from its source data; equal data give equal bytes on one machine."""
    report = derive_figures(facts)
    sites = (replace(site, meaning=profile.round_up_figures(site.meaning)) for site in report.sites)
    report = replace(report, sites=tuple(sites))
    return replace(report, cells=dpia_fields.build_report_cells(report))


def derive_figures(facts: Facts) -> Report:
    """Derive a report without its DPIA fields, and with unrounded attack bounds."""
    if isinstance(facts, RunFacts):
        return run_figures.derive_run_report(facts)
    return ledger_figures.derive_ledger_report(facts)


def problems(report: Report) -> list[Problem]:
    """List the contradictions within a report's source data or, if there are none, the values that do not follow from
    the data.

    An epsilon in the report may exceed the derived one by a relative error of 1e-6, but may not be below it.
    """
    facts = report.facts
    try:
        of_kind = _check_run_facts(facts) if isinstance(facts, RunFacts) else _check_ledger_facts(facts)
        denied = [*_check_cell_settings(facts), *map(Problem._make, of_kind)]
        if found := denied or [*_check_amount_of_work(facts)] or [*_check_selection(facts)]:
            return found
        again = derive_figures(facts)
        again = replace(again, cells=dpia_fields.build_report_cells(again), signature=report.signature)
        return [*_find_differences("", to_json(report), to_json(again)), *find_audit_problems(again)]
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:  # ValueError: a value out of its range
        return [Problem("facts", "figures", f"an error while computing them: {error}")]


def _check_cell_settings(facts: Facts) -> Iterator[Problem]:
    for key, value in facts.settings.items():
        if key not in dpia_fields.SETTINGS:
            yield Problem("settings", key, f"one of {', '.join(sorted(dpia_fields.SETTINGS))}")
        elif isinstance(value, int | float) != (dpia_fields.KINDS.get(key) in ("count", "number")):
            yield Problem(f"settings.{key}", value, "a number exactly for numeric settings")


def _check_amount_of_work(facts: Facts) -> Iterator[Problem]:
    """Yield a problem if verification would take hours, since even a small file can list many different mechanisms."""
    if isinstance(facts, RunFacts):
        canaries = sum(bound.canaries for bound in facts.audit.bounds) if facts.audit else 0
        for count, most, what in (
            (len(facts.sites) * len(facts.rounds), _MAX_ROWS, "table rows (sites times rounds)"),
            (canaries, _MAX_CANARIES, "canaries"),
        ):
            if count > most:
                yield Problem("facts", f"{count} {what}", f"at most {most}, the limit for verification")
                return
    parts = list(_list_compositions(facts))
    for event, count in (one for charged, _, _ in parts for one in charged.items()):
        rate, gaussian = profile.split_sampling(event)
        fine = isinstance(event, NonPrivateDpEvent)
        if isinstance(gaussian, GaussianDpEvent) or isinstance(event, LaplaceDpEvent):
            fine = rate >= MIN_SAMPLING_RATE and gaussian.noise_multiplier <= 1e6 and count <= 10**9
        if not fine or _estimate_buckets(event) > _MAX_BUCKETS:  # unrealistic, or hours of work
            said = f"{count} x {events.to_json(event)}"
            raise ConfigError("event", said, "must be a mechanism whose epsilon can be computed")
    single = {(interval, event) for charged, interval, _ in parts for event in charged}
    work = sum(_BUCKETS_OF_ANY * len(charged) * times for charged, _, times in parts)
    work += sum(_estimate_buckets(event) * accountant.FINE / interval for interval, event in single)
    too_much, composed = work > _MAX_BUCKETS, 0.0
    for charged, interval, times in [] if too_much else parts:  # if `too_much`, even the widths would take long
        noisy = {one: count for one, count in charged.items() if not isinstance(one, NonPrivateDpEvent)}
        width = convert_none_to_infinite(profile.epsilon_rdp(noisy, 1e-12)) / interval  # of the largest loss, about
        composed += width * len(charged) * times
        too_much = too_much or width > _MAX_BUCKETS or composed > _MAX_COMPOSED
    if too_much:
        yield Problem("facts", f"{len(single)} different mechanisms", "fewer: verifying them would take hours")


def _list_compositions(facts: Facts) -> Iterator[tuple[Charges, float, int]]:
    """Yield each composition that verification computes, with its PLD bucket width and the number of computations."""
    if isinstance(facts, RunFacts):
        # The whole plan, and the charges of each site at the end and after earlier rounds.
        most = facts.plan.max_rounds
        for rounds in {most, *map(facts.count_charged_rounds, facts.sites)}:
            yield events.count_mechanisms([facts.plan.event(rounds=rounds)]), accountant.FINE, 4
        if facts.selection:
            yield profile.parse_charges(facts.selection.charges), accountant.FINE, 1
    else:
        whole = events.count_mechanisms([entry.plan.full_event for entry in facts.runs])
        # Each run and each plan is also computed separately.
        yield ledger_figures.find_largest_charges(facts) | whole, accountant.COARSE, 3


def _estimate_buckets(event: DpEvent) -> float:
    """Estimate the number of buckets in a mechanism's privacy loss distribution on the fine grid."""
    _, gaussian = profile.split_sampling(event)
    sigma = getattr(gaussian, "noise_multiplier", float("inf"))  # of Laplace noise there are fewer
    return float(10 / sigma + 1 / sigma**2) / accountant.FINE


_Found = tuple[str, object, object]


def _check_run_facts(facts: RunFacts) -> Iterator[_Found]:
    plan, names = facts.plan, [site.site for site in facts.sites]
    if not names or len(set(names)) < len(names):
        yield "sites", ", ".join(names), "at least one site, without duplicates"
    if plan.private and facts.target_epsilon is None:
        yield "target_epsilon", None, "a number, because the plan is private"
    if facts.randomness == "seeded" and not facts.seeded_noise:
        yield "seeded_noise", False, "true, as recorded by the training process"
    numbers = [result.round for result in facts.rounds]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > plan.max_rounds:
        yield "rounds", ", ".join(map(str, numbers)), f"at most {plan.max_rounds} rounds, numbered from 1 without gaps"
    everybody = set(names)
    for result in facts.rounds:
        place, told = f"rounds.{result.round}", {*result.sites, *result.failed_sites}
        if told != everybody:
            yield place, ", ".join(sorted(told)), "an update or a reason for its absence from each site of the run"
        lost = plan.shared and NOT_SUMMED in result.failed_sites.values()
        if not (result.sites or lost or (result is facts.rounds[-1] and is_budget_used_up(facts.rounds))):
            yield place, "no update", "at least one, because a round without updates does not count"
    if (facts.final or facts.detail) and not (facts.finished and any(result.sites for result in facts.rounds)):
        yield "rounds", facts.progress, "a finished run with an adapter, because the report has final scores"
    runtime, receipts = facts.settings.get("runtime"), [site.receipt for site in facts.sites if site.receipt]
    if runtime not in dpia_fields.TRANSPORT:
        yield "settings.runtime", runtime, f"one of {', '.join(dpia_fields.TRANSPORT)}"
    elif any(receipt.simulated == facts.deployed for receipt in receipts):
        yield "settings.runtime", runtime, "the runtime in each site's signed receipt (simulated or real)"
    if any(receipt.seeded_noise for receipt in receipts) > facts.seeded_noise:
        yield "seeded_noise", False, "true, as in a site's signed receipt"
    yield from _check_sent_settings(facts)
    if facts.files and not facts.finished:
        yield "files", ", ".join(facts.files), "no files, because the run is not finished"
    if facts.attacks and facts.attacks.adapter_sha256 != facts.adapter_digest:
        yield "attacks.adapter_sha256", facts.attacks.adapter_sha256, facts.adapter_digest
    if facts.deployed and (facts.sampling, facts.randomness, facts.inexact_gradients) != (None, None, None):
        yield "settings.runtime", runtime, "a simulation, because real sites report no sampling or policies to the lead"
    if shared := plan.shared:
        if shared.num_sites != len(names):
            yield "plan.shared.num_sites", shared.num_sites, len(names)
        most = min((len(result.sites) for result in facts.rounds if result.sites), default=shared.num_sites)
        if shared.threshold > most:
            yield "plan.shared.threshold", shared.threshold, f"at most {most}"
    if facts.held_out and not plan.releases_metrics:
        yield "held_out", facts.held_out[-1].run, "no scores, because the plan releases none"
    if late := [result.ended for result in facts.rounds if result.ended > (facts.date or "")]:
        yield "date", facts.date, f"a time no earlier than {max(late)}, when a round ended"
    for site in facts.sites:
        for key, said, bound in _check_site_facts(facts, site):
            yield f"sites.{site.site}.{key}", said, bound


def _check_sent_settings(facts: RunFacts) -> Iterator[_Found]:
    """Compare the report's sites, data and model with the settings whose digest is part of the run's name."""
    digest = hashlib.sha256(facts.sent.encode()).hexdigest() if facts.deployed else facts.provenance.config_sha256 or ""
    if facts.sent and not facts.deployed:
        yield "sent", "settings", "no settings, because a simulation does not send them"
    if facts.deployed and not facts.sent:  # after a change of settings, the report states no guarantee
        yield from [("sent", "nothing", "the settings that the sites received")] if facts.unchanged else []
    elif facts.run != f"{facts.name}-{digest[:32]}":
        yield "run", facts.run, f"{facts.name}-{digest[:32]}, the name derived from the run's settings"
    elif facts.deployed:
        sent = facts.parse_sent_settings()
        data, federation, made = sent["data"], sent["federation"], facts.provenance
        names, sizes = federation["site_names"], data["declared_sizes"]
        started = sent["model"]["adapter_sha256"], sent["privacy"], "public" in sent
        sizes = sizes if isinstance(sizes, list) else [sizes] * len(names)
        active = federation["participants"] or names
        declared = {name: size for name, size in zip(names, sizes, strict=True) if name in active}
        for where, said, asked in (
            ("sites", dict(facts.declared_sizes), declared),
            ("target_epsilon", facts.target_epsilon, sent["privacy"]["epsilon"] if facts.plan.private else None),
            ("provenance.model_sha256", made.model_sha256, sent["model"]["sha256"]),
            ("provenance.dataset", made.dataset, data["dataset"]),
            ("provenance.task", made.task, sent["task"]),
            *dpia_fields.compare_start(made.start_adapter, *started),
        ):
            if said != asked:
                yield where, said, asked


def _check_site_facts(facts: RunFacts, site: SiteFacts) -> Iterator[_Found]:
    receipt, least = site.receipt, run_figures.compute_min_charged_rounds(facts, site)
    if receipt and (key := find_invalid_field(receipt, site=site.site, run=facts.run, plan=facts.plan)):
        yield f"receipt.{key}", getattr(receipt, key), "a value that the site signed for this run and its plan"
    if least > facts.count_charged_rounds(site):
        yield "receipt.charged_rounds", facts.count_charged_rounds(site), f"at least {least}, the updates from the site"
    if site.statement:
        for key, said, bound in _check_statement(facts, site, site.statement):
            yield f"statement.{key}", said, bound


def _check_statement(facts: RunFacts, site: SiteFacts, said: SiteStatement) -> Iterator[_Found]:
    """Yield the contradictions between a site's statement and the run's data about the site."""
    life, plan = said.lifetime, facts.plan
    if not 1 < life.order < _MAX_ORDER:
        yield "lifetime.order", life.order, f"a number above 1 and below {_MAX_ORDER:g}"
        return
    mine = [run.rounds for run in life.runs if run.run == facts.run]
    least = run_figures.compute_min_charged_rounds(facts, site)
    signed = site.receipt.site_key if site.receipt else None
    key = said.verification.site_key if said.verification else signed
    if signed is None or key != signed:
        yield "verification.site_key", key, f"the key of the site's receipt, {signed}"
    if len(mine) > 1 or (not mine and least) or sum(mine) > plan.max_rounds:
        yield "lifetime.runs", mine, f"{facts.run} once, with {least} to {plan.max_rounds} rounds"
    sent = sum(one.count for one in said.releases if one.kind == "update")
    if sent > sum(mine) or {one.run for one in said.releases} - {facts.run}:
        yield "releases", sent, f"at most {sum(mine)} updates, only in {facts.run}"
    if said.asserted and not facts.deployed:
        yield "asserted", ", ".join(said.asserted), "no assertions, because the site is simulated"
    # A site's last update follows the end of the previous round; clocks may differ by a day.
    starts = zip(["", *(one.ended for one in facts.rounds)], facts.rounds, strict=False)
    begun = max((start[:10] for start, one in starts if one.has_update_from(site.site)), default="")
    if begun and (said.date or "") < str(date.fromisoformat(begun) - timedelta(days=1)):
        yield "date", said.date, f"{begun} or later, the start of the site's last round"
    if run_figures.statement_agrees(facts, site, said):
        # The ledger's epsilon includes this run.
        charged = events.count_mechanisms([plan.event(rounds=max(mine, default=0))])
        alone = convert_infinite_to_none(filter.epsilon_filter(charged, order=life.order, delta=plan.delta))
        if exceeds_cap(alone, life.epsilon):
            yield "lifetime.epsilon", life.epsilon, f"at least {alone}, the epsilon of this run alone"
    if not life.seeded and (seeded := [one.run for one in life.runs if one.seeded_noise]):
        yield "lifetime.seeded", False, ", ".join(seeded)
    yield from _check_caps_and_entries(said, life.caps, said.charges)


def _check_selection(facts: Facts) -> Iterator[Problem]:
    """Compare the run's epsilon in the sites' statements with its plan, and check the figures of the hyperparameter
    search.
    """
    if not isinstance(facts, RunFacts):
        return
    plan, told = facts.plan, facts.selection
    for site in facts.sites:
        said, place = site.statement, f"sites.{site.site}.statement.lifetime.runs"
        for run in said.lifetime.runs if said and said.same_plan else ():
            for key, rounds in (("epsilon", run.rounds), ("planned_epsilon", plan.max_rounds)):
                if run.run == facts.run:
                    found = profile.epsilon_pld(profile.count_charged_events(plan, rounds), plan.delta)
                    yield from _find_differences(f"{place}.{key}", getattr(run, key), found)
    if told is None:
        return
    charged = profile.parse_charges(told.charges)
    if told.delta != plan.delta:
        yield Problem("selection.delta", told.delta, plan.delta)
    epsilon = convert_infinite_to_none(accountant.epsilon_pld(charged, told.delta))
    yield from _find_differences("selection.epsilon", told.epsilon, epsilon)
    if told.method not in ("grid", "random", "tpe"):
        yield Problem("selection.method", told.method, "grid, random or tpe")
    if not 1 <= told.trials <= min(sum(charged.values()), MAX_TRIALS):
        yield Problem("selection.trials", told.trials, f"1 to {MAX_TRIALS} trials, and no more than charged mechanisms")
    for site in facts.sites:
        if events.count_mechanisms([facts.plan.event(rounds=facts.count_charged_rounds(site))]) - charged:
            listed = "; ".join(f"{count} x {event}" for event, count in events.count_mechanisms_as_json(charged))
            yield Problem("selection.charges", listed, f"at least the charges of this run at {site.site}")


def _check_ledger_facts(facts: LedgerFacts) -> Iterator[_Found]:
    names = [entry.run for entry in facts.runs]
    if not 0 < facts.delta < 1:
        yield "delta", facts.delta, "a number between 0 and 1"
    if not 1 < facts.order < _MAX_ORDER:
        yield "order", facts.order, f"a number above 1 and below {_MAX_ORDER:g}"
    if "" in names or len(set(names)) < len(names):
        yield "runs", ", ".join(names), "unique run names"
    if others := sorted({entry.run for entry in facts.charges} - {"", *names}):
        yield "charges", others[0], "a run that the ledger accepted"
        return
    rounds = ledger_figures.count_rounds_by_run(facts)
    updates = Counter[str]()
    for release in facts.releases:
        updates[release.run] += release.count if release.kind == "update" else 0
    for name, plan in ledger_figures.map_plans_by_run(facts).items():
        if (plan.unit, plan.delta) != (facts.unit, facts.delta):
            yield f"runs.{name}.plan", f"{plan.unit}, {plan.delta}", f"{facts.unit}, {facts.delta}"
        if rounds[name] > plan.max_rounds:
            yield f"runs.{name}.plan", rounds[name], f"at most {plan.max_rounds}"
        if updates[name] > rounds[name]:
            yield "releases", updates[name], f"at most {rounds[name]}, the charged rounds of {name}"
    lost = [entry for entry in facts.charges if not entry.run]
    if not lost and (named := [entry.run for entry in facts.runs if entry.lost_rounds]):
        yield f"runs.{named[0]}.lost_rounds", "some", "0, because no entry charges for a lost branch"
    if any((entry.run == "") != (entry.entry is not None) or (entry.run and entry.lost) for entry in facts.charges):
        yield "charges", "a lost branch", "a lost branch without a run, and with the entry that charges for it"
    if bool(facts.problem) != (facts.verification is None):
        yield "problem", facts.problem, "a problem exactly if the ledger does not verify"
    if bool(facts.policy_digest) != (facts.policy_noted is not None):
        yield "policy_digest", facts.policy_digest, "a digest exactly if the policy was available"
    days = [*(entry.day[:10] for entry in facts.charges), facts.date[:10]]
    if any(later < day for day, later in pairwise(days)):
        yield "charges", "days", "days in order, not after the report's date"
    yield from _check_caps_and_entries(facts, facts.caps, ledger_figures.count_charges(facts))


def _check_caps_and_entries(ledger: LedgerFacts | SiteStatement, caps: Sequence[Cap], charges: int) -> Iterator[_Found]:
    """Yield the contradictions between the caps and the number of events in a ledger, or in a site's statement about
    it.
    """
    approved, found, places = ledger.approved, ledger.verification, [cap.charges_before for cap in caps]
    # A ledger starts with two notes, and each charge is an event.
    if found and (found.num_events < charges + 2 or (found.anchor_sequence or 0) > found.num_events):
        bound = f"at least {charges + 2}, and no fewer than the anchor covers"
        yield "verification.num_events", found.num_events, bound
    if not places or [0, *places, charges] != sorted([0, *places, charges]):
        yield "caps", ", ".join(map(str, places)), f"at least one cap, in order, at {charges} charges or fewer"
    for newest in caps[-1:]:
        # The current policy may contain a smaller cap that the ledger has not recorded yet.
        if exceeds_cap(approved.max_epsilon, newest.max_epsilon):
            yield "approved.max_epsilon", approved.max_epsilon, f"at most {newest.max_epsilon}, the cap in the ledger"


def _find_differences(where: str, said: Any, found: Any, *, under: float = _LAST_DIGITS) -> Iterator[Problem]:
    """Yield the differences between two JSON values; floats are upper bounds with a relative tolerance `under`
    downwards.
    """
    if isinstance(said, Mapping) and isinstance(found, Mapping) and said.keys() == found.keys():
        if "epsilon_pld" in said and "delta" in said:  # a point of a curve
            under = max(_LAST_DIGITS, _FFT_ROUNDING / max(found["delta"], min(profile.DELTAS)))
        for key in said:
            place = f"{where}.{key}" if where else key
            numbers = isinstance(said[key], int | float) and isinstance(found[key], int | float)
            if numbers and (key == "remaining_epsilon" or key.endswith("noise_multiplier")):
                difference = said[key] - found[key]  # rounded down, so that slightly less is accepted
                if not -TOLERANCE * max(1.0, found[key]) <= difference <= _LAST_DIGITS * found[key]:
                    yield Problem(place, said[key], found[key])
            else:
                allowed = under if key == "epsilon_pld" else _LAST_DIGITS
                yield from _find_differences(place, said[key], found[key], under=allowed)
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        # A list item is named by its site, code or run if that is unique in the list.
        kinds = ("site", "code", "run")
        parts = (part if isinstance(part, Mapping) else {} for part in found)
        names = [next((part[kind] for kind in kinds if kind in part), None) for part in parts]
        count = Counter(names)
        for number, (one, other) in enumerate(zip(said, found, strict=True)):
            name = names[number] if names[number] is not None and count[names[number]] == 1 else number
            yield from _find_differences(f"{where}.{name}", one, other)
    elif isinstance(said, float) and isinstance(found, float | int):
        if not -under * abs(found) <= said - found <= max(under, TOLERANCE) * abs(found):
            yield Problem(where, said, float(found))
    elif said != found:
        yield Problem(where, said, found)
