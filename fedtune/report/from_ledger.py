"""The source data of a ledger's report: one site's view of all its runs over the years, read from verified events.

If the ledger does not verify, its events are used up to the first inconsistent one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path

from fedtune.codec import require
from fedtune.config import AboutSpec
from fedtune.formatting import convert_infinite_to_none
from fedtune.privacy.events import Charge
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import Event, Head, Kind
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.privacy.policy_file import decode_policy_json
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Budget, Policy
from fedtune.report.derive import ledger_figures
from fedtune.report.derive.dpia_fields import format_rank
from fedtune.report.facts import (
    ApprovedBudget,
    Cap,
    ChargedRounds,
    LedgerFacts,
    Lifetime,
    Provenance,
    Release,
    RunInLedger,
    Verification,
)
from fedtune.report.model import Report
from fedtune.report.verify_report import derive_report
from fedtune.sites.site_settings import read_site_settings
from fedtune.spec import ConfigError, RunError

MAX_STEPS = 400  # charged rounds that a report lists separately; above it, charges are grouped by run and month


def build_ledger_report(site_toml_or_ledger: Path, *, anchor: Path | None = None) -> Report:
    """Build the report of a ledger, as of its newest event.

    Guarantee: the report contains no information about the records except what was released; record fingerprints stay
    in the ledger. The report of a ledger that does not verify says so and states no guarantee. If a `site.toml` is
    given, the site's key and anchor are used when they are available.

    Raises:
        RunError: the ledger cannot be read at all.
        ConfigError: a file is missing, invalid, or belongs to a different site.
    """
    files = SiteFiles.from_site_toml(site_toml_or_ledger) if site_toml_or_ledger.suffix == ".toml" else None
    ledger = files.ledger if files else site_toml_or_ledger
    require("ledger", str(ledger), ledger.is_file(), "does not exist: pass the path of an existing ledger")
    if anchor is None and files and files.anchor and files.anchor.is_file():
        anchor = files.anchor
    head, own = Head.read(anchor) if anchor else None, files.policy if files else None
    about = read_site_settings(files.site_toml).about if files else None
    verified, problem = None, ""
    try:
        verified = verify(ledger, anchor=head, site_key=files.public_key if files else None)
        events, history = verified.events, verified.history
    except RunError as error:
        events, history = _read_consistent_events(ledger)
        problem = str(error).replace(str(ledger), ledger.name)  # a report contains no local paths
    for name, made_for, says in history.opening.list_differences(own) if own else []:
        bound = f"must be {made_for!r}, for which {ledger} was created"
        raise ConfigError(name, says, bound).in_file(site_toml_or_ledger)
    return derive_report(
        collect_ledger_facts(events, history, verified=verified, problem=problem, own=own, about=about, most=MAX_STEPS)
    )


def _read_consistent_events(ledger: Path) -> tuple[tuple[Event, ...], History]:
    """Return the events before the first inconsistent event, without verifying signatures.

    Raises:
        RunError: the first two events are already inconsistent.
    """
    with store.open_for_reading(ledger) as file:
        events = store.read_events(file)
    history = History()
    for number, event in enumerate(events):
        try:
            history.apply_event(event)
        except RunError:
            if number < 2:
                raise
            return tuple(events[:number]), history
    if len(events) < 2:
        raise RunError(f"ledger {ledger} is empty")
    return tuple(events), history


def compute_lifetime_budget(verified: VerifiedLedger) -> Lifetime:
    """Compute a ledger's lifetime budget, over all runs, as of now, or as of its newest event if that is later."""
    history = verified.history
    # With one charge per run and month, because the budget does not need each round.
    facts = collect_ledger_facts(verified.events, history, verified=verified, most=0, now=history.now())
    return ledger_figures.compute_lifetime(facts)


def collect_ledger_facts(
    events: Sequence[Event],
    history: History,
    *,
    verified: VerifiedLedger | None,
    problem: str = "",
    own: Policy | None = None,
    about: AboutSpec | None = None,
    most: int,
    now: datetime | None = None,
) -> LedgerFacts:
    """Collect a ledger's report data from its consistent events and from the history that follows from them.

    Args:
        events: the ledger's events up to the first inconsistent one.
        history: the history that follows from the events.
        verified: the verified ledger; None: the ledger is inconsistent, or older than its anchor.
        problem: the reason why the ledger does not verify; empty if it verifies.
        own: the current policy, if it is available.
        about: the site's statements on purpose and release, if any.
        most: the largest number of rounds to list separately, as in `list_charges`.
        now: the date of the report; None: the time of the newest event.
    """
    now, noted = now or history.last_time, history.policy
    assert now is not None, "a ledger has events"
    assert noted is not None, "a ledger begins with its policy"
    budget = _compute_effective_budget(noted.budget, own.budget if own else None)
    simulated = ("simulated", "") in history.marks
    # A simulation notes that it is one, whatever the file says.
    own = own and replace(own, simulated=noted.simulated)
    run_caps = _map_cap_by_run(events)
    proposals = [run.proposal for run in history.runs.values() if run.proposal.lead]  # of training
    models = {proposal.base_model for proposal in proposals}
    settings = {
        "rank": dict.fromkeys(
            format_rank(one.adapter, one.find_rank(history.opening.site) or one.rank) for one in proposals
        ),
        "target_modules": dict.fromkeys(name for one in proposals for name in one.target_modules or ("none",)),
    }
    changes = [
        next(same) for _, same in groupby(history.policies, key=lambda policy: convert_infinite_to_none(policy[1]))
    ]
    caps = tuple(
        Cap(time=format_event_day(time), max_epsilon=convert_infinite_to_none(cap), charges_before=before)
        for time, cap, before in changes
    )
    opened, decided, cap = history.opening, history.decided, convert_infinite_to_none(budget.max_epsilon)
    return LedgerFacts(
        kind="ledger",
        site=opened.site,
        population=opened.population,
        date=now.date().isoformat(),
        unit=noted.population.unit,
        delta=history.delta,
        order=history.order,
        declared_size=noted.population_size,
        approved=ApprovedBudget(
            max_epsilon=cap,
            max_epsilon_per_run=budget.max_epsilon_per_run,
            max_epsilon_per_period=budget.max_epsilon_per_period,
            period=budget.period,
        ),
        reference=budget.reference,
        caps=caps,
        limits_loosened=tuple(sorted(day for kind, day in history.marks if kind == "limits_loosened")),
        runs=tuple(
            RunInLedger(
                run=name,
                lead=run.proposal.lead,
                dataset=run.proposal.dataset,
                state="open" if run.is_open(now) else "ended" if run.expires is None else "expired",
                plan=run.plan,
                lost_rounds=history.lost_runs.get(name, 0),
                max_epsilon=run_caps[name],
                seeded_noise=run.proposal.seeded_noise,
                base_model=run.proposal.base_model,
                release="" if run.proposal.lead else run.proposal.task,
                approvals=tuple(one for one in decided[run.proposal.digest()] if one["what"] == "approved"),
            )
            for name, run in history.runs.items()
        ),
        charges=list_charges(events, history, most=most),
        lost_seed=any(("seeded", "") in restored.marks for restored in history.restored),
        frozen=history.is_frozen,
        in_doubt=history.furthest_doubt is not None,
        simulated=simulated,
        inexact_gradients=("inexact_gradients", "") in history.marks,
        policy_noted=None if own is None else own.to_json() == noted.to_json(),
        policy_digest=own.digest() if own else "",
        verification=None
        if verified is None
        else Verification(
            num_events=len(verified.events),
            first=verified.events[0].hash,
            head=verified.history.hash,
            site_key=verified.site_key,
            key_expected=verified.key_expected,
            anchor_sequence=verified.anchor_sequence,
        ),
        problem=problem,
        releases=list_releases(events, history),
        # A simulated site has no staff who could state anything, so its policy's assertions do not count.
        asserted={} if simulated else asdict(noted.asserted),
        settings={name: ", ".join(said) for name, said in settings.items() if said},
        provenance=Provenance(  # events do not record the machine
            fedtune_version=" / ".join(dict.fromkeys(event.code for event in events)),
            model_sha256=models.pop() if len(models) == 1 and models != {UNVERIFIED} else None,
            dataset=", ".join(dataset.id for dataset in noted.dataset),
            task=", ".join(dict.fromkeys(proposal.task for proposal in proposals)) or None,
            libraries={},
            purpose=about.purpose if about else None,
            channel=(about.channel or None) if about else None,
            acceptable_use=(about.acceptable_use or None) if about else None,
        ),
        arrivals=opened.arrivals or None,
    )


def _compute_effective_budget(noted: Budget, own: Budget | None) -> Budget:
    """Return the ledger's recorded budget, with each cap lowered to the cap in the current policy.

    A site may lower a cap by editing its policy before the ledger records the change. This function never raises a cap.
    """
    if own is None:
        return noted
    # A cap on another period counts once the ledger has noted it, and until then the noted one does.
    period = own.period if noted.max_epsilon_per_period is None else noted.period
    of_run = (one.max_epsilon_per_run for one in (noted, own))
    of_period = (one.max_epsilon_per_period for one in (noted, own) if one.period == period)
    return replace(
        noted,
        max_epsilon=min(noted.max_epsilon, own.max_epsilon),
        max_epsilon_per_run=min((cap for cap in of_run if cap is not None), default=None),
        period=period,
        max_epsilon_per_period=min((cap for cap in of_period if cap is not None), default=None),
    )


def _map_cap_by_run(events: Sequence[Event]) -> dict[str, float | None]:
    """Return run -> the per-run cap that was in force when the run was accepted."""
    run_caps: dict[str, float | None] = {}
    budget = None
    for event in events:
        if event.kind is Kind.PLAN:
            run_caps[event.run] = budget.max_epsilon_per_run if budget else None
        elif event.kind is Kind.NOTE and event.detail["what"] == "policy":
            budget = decode_policy_json(event.detail["policy"]).budget
    return run_caps


def format_event_day(time: str) -> str:
    """Return the date of an event without its time, because a policy may hide the exact training times of its site."""
    return time[:10]


def list_charges(events: Sequence[Event], history: History, *, most: int) -> tuple[ChargedRounds, ...]:
    """List the charges in ledger order, one per round; above `most` rounds, one per run and month."""
    by_round = sum(event.kind is Kind.RESERVE for event in events) <= most
    restored, made = iter(history.restored), list[ChargedRounds]()
    for event in events:
        day = format_event_day(event.time)
        if event.kind is Kind.RESERVE:
            # A calendar period has whole months.
            alike = not by_round and made and (made[-1].run, made[-1].day[:7]) == (event.run, day[:7])
            rounds, shown = 1 + (made.pop().rounds if alike else 0), event.round if by_round else None
            made.append(ChargedRounds(run=event.run, rounds=rounds, round=shown, day=day))
        elif event.kind is Kind.NOTE and event.detail["what"] == "restored":
            back = next(restored)
            lost = tuple(Charge(event=charged, count=count) for charged, count in back.gap)
            found = ChargedRounds(run="", rounds=0, round=None, day=day, lost=lost, entry=event.sequence)
            if (people := back.arrivals) is not None:
                found = replace(found, lost_cohorts=people.ranges, lost_rows=people.lost_after is not None)
            made.append(found)
    return tuple(made)


def list_releases(events: Sequence[Event], history: History) -> tuple[Release, ...]:
    """List all releases and refusals of the site by run, kind and reason, in order of first occurrence.

    Refusals of runs that the ledger never accepted are counted together, because a requester may choose any run name.
    """
    groups = defaultdict[tuple[str, str, str | None], list[str]](list)
    unanswered: dict[tuple[str, int, int], str] = {}
    for event in events:
        run = event.run if event.run in history.runs else ""
        match event.kind:
            case Kind.RESERVE:
                unanswered[event.run, event.round, event.attempt] = event.time
            case Kind.COMMIT:
                unanswered.pop((event.run, event.round, event.attempt), None)
                kind = "update" if history.runs[event.run].proposal.lead else "own_release"
                groups[run, kind, None].append(event.time)
            case Kind.REFUSAL:
                groups[run, "refusal", str(event.detail["reason"])].append(event.time)
            case Kind.RELEASE:
                groups[run, str(event.detail.get("what", "offer")), None].append(event.time)
    for (name, _, _), time in unanswered.items():
        groups[name, "reservation_without_update", None].append(time)
    return tuple(
        Release(
            kind=kind,
            run=run,
            reason=reason,
            count=len(times),
            first=format_event_day(times[0]),
            last=format_event_day(times[-1]),
        )
        for (run, kind, reason), times in groups.items()
    )
