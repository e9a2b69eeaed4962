"""A ledger's events in words, for people who did not write them."""

from __future__ import annotations

from typing import Any

from fedtune.codec import decode
from fedtune.privacy import events as dp_events
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.promise import factor_in
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.report.page.catalogue import catalogue
from fedtune.show.budget_text import mechanism_text
from fedtune.show.lines import printable
from fedtune.words import counted, spoken_start


def reason_text(reason: str) -> str:
    """Why a site refused, in the words that a report's page has for it."""
    return catalogue("en").texts["refusal"].get(reason, "for a reason that this version does not know")


def promise_text(unit: str, *, epsilon: float, delta: float) -> str:
    """The promise of (epsilon, delta) to one unit, in the sentence that a report's page has for it."""
    texts = catalogue("en")
    factor, addition = texts.figure(epsilon, "factor"), texts.figure(delta, "exact")
    return texts.text(f"promise.{unit}", factor=factor, delta=addition).unescape()


def event_text(event: Event) -> str:
    """One event of a ledger in words."""
    detail = event.detail
    match event.kind:
        case Kind.PLAN:
            proposal = decode(Proposal, detail["proposal"])
            plan = proposal.plan.stronger(factor := factor_in(detail))
            more = f"; {factor:g} times the noise that was asked for" if factor != 1 else ""
            spare = f" and {plan.spare_rounds} spare" if plan.spare_rounds else ""
            seeded = "; NO GUARANTEE: its noise comes from a seed" if proposal.seeded_noise else ""
            start = f"; it begins in the adapter {proposal.start_adapter[:16]}..." if proposal.start_adapter else ""
            return (
                f"run accepted from lead {spoken_start(proposal.lead)}: {printable(proposal.task)} on "
                f"{printable(proposal.dataset)}, {counted(plan.num_rounds, 'round')}{spare}, each "
                f"{_mechanisms(dp_events.to_json(plan.event()))}; the cost of all is set aside until "
                f"{str(detail['expires'])[:10]}{start}{more}{seeded}"
            )
        case Kind.RESERVE:
            again = f", again (attempt {event.attempt})" if event.attempt > 1 else ""
            return f"charged{again}: {_mechanisms(detail['event'])}"
        case Kind.COMMIT:
            return "reply stored, may be sent"
        case Kind.RELEASE if detail.get("what") != "offer":
            return f"handed out: {printable(detail.get('what'))}"
        case Kind.RELEASE:
            noise = detail["least_noise"]
            others = "no noise would be enough" if noise is None else f"noise of at least {noise:g}"
            rounds = counted(detail["most_rounds"], "round")
            return f"told a lead what a run may ask for: up to {rounds}, or {others}"
        case Kind.REFUSAL:
            rule, asked, allowed = (detail.get(key) for key in ("reason", "asked", "allowed"))
            numbers = [f"asked for {printable(asked, 40)}"] if asked is not None else []
            numbers += [f"allowed {printable(allowed)}"] if allowed is not None and rule != Reason.LEADS else []
            return f"refused: {reason_text(str(rule))} ({'; '.join([*numbers, f'rule {printable(rule)}'])})"
        case Kind.NOTE:
            return _note_text(detail)


def _mechanisms(data: object) -> str:
    parts = dp_events.grouped([dp_events.from_json(data)])
    return " and ".join(mechanism_text(part, count) for part, count in parts.items()) or "nothing"


def _note_text(detail: dict[str, Any]) -> str:
    match detail["what"]:
        case "opened":
            return (
                f"ledger made for population {printable(detail['population'])} of site {printable(detail['site'])}: "
                f"protects each {detail['unit']}, delta {detail['delta']:g}, filter order {detail['order']:g}"
            )
        case "policy":
            budget = detail["policy"]["budget"]
            most = budget["max_epsilon"]
            caps = ["no lifetime cap" if most is None else f"lifetime cap epsilon {most:g}"]
            for key, name in (("max_epsilon_per_run", "run"), ("max_epsilon_per_period", budget["period"])):
                caps += [] if budget[key] is None else [f"{budget[key]:g} a {name}"]
            return f"policy in force: {', '.join(caps)} (digest {detail['sha256'][:12]}...)"
        case "run_ended":
            return "run over: what it had set aside and not spent is free again"
        case "date_confirmed":
            return "a person at the site confirmed the date, so that a new period of the budget may begin"
        case "restored":
            gap = [mechanism_text(dp_events.from_json(data), count) for data, count in detail["gap"]]
            return (
                f"a backup was put back; charged what it lacked up to event {detail['end']} of the "
                f"lost ledger: {' and '.join(gap) or 'nothing'}"
            )
        case "in_doubt":
            return (
                f"IN DOUBT: a receipt of this site's own knows event {detail['sequence']}, which is missing; "
                "nothing is trained until the ledger is restored"
            )
        case "approved":
            return "a person at the site approved the run as it was proposed"
        case "denied":
            return f"a person at the site denied the run as it was proposed: {printable(detail['why'])}"
        case "frozen":
            return f"FROZEN, all training has ended: {printable(detail['why'])}"
        case other:
            return f"unknown note {printable(other)}"
