"""What a ledger's events say, in words for people who did not write them."""

from __future__ import annotations

import math
from typing import Any

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent

from fedtune.federation.planner import LEAST_SIGNAL
from fedtune.privacy import events as dp_events
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.distributed_noise import Epsilons
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.run_plan import Plan
from fedtune.report.page.catalogue import catalogue
from fedtune.show.lines import printable
from fedtune.words import counted, spoken_start


def reason_text(reason: str) -> str:
    """Why a site refused, in the words that a report's page has for it."""
    return catalogue("en").texts["refusal"].get(reason, "for a reason that this version does not know")


def promise_text(unit: str, *, epsilon: float, delta: float) -> str:
    """What (epsilon, delta) promises to one unit, in the sentence that a report's page has for it."""
    texts = catalogue("en")
    factor, addition = texts.figure(epsilon, "factor"), texts.figure(delta, "exact")
    return texts.text(f"promise.{unit}", factor=factor, delta=addition).unescape()


def rounded_down(epsilon: float) -> str:
    """An epsilon that is left, in three decimals."""
    return "unbounded" if math.isinf(epsilon) else f"{math.floor(epsilon * 1000) / 1000:.3f}"


def cap_text(cap: float | None) -> str:
    """A cap as the policy has it."""
    return "no cap" if cap is None or math.isinf(cap) else f"at most {cap:g}"


def noise_words(plan: Plan) -> str:
    """The plan's noise; of secure sums each site's share, and with how many of them a step counts."""
    if (shared := plan.shared) is None:
        return f"multiplier {plan.noise_multiplier:g}"
    less = f", less {shared.colluders} that may collude" if shared.colluders else ""
    return (
        f"multiplier {plan.noise_multiplier:g} at each site, {plan.counted_noise:.4g} in a secure sum of at least "
        f"{shared.threshold} of {counted(shared.num_sites, 'site')}{less}"
    )


def trust_words(by_trust: Epsilons) -> str:
    """Whom an epsilon relies on, where several sites make the noise together."""
    return (
        f"epsilon {epsilon_text(by_trust.server_alone)} against the server alone, "
        f"{epsilon_text(by_trust.with_colluders)} with as many colluding sites as planned for, "
        f"{epsilon_text(by_trust.with_all_others)} if all other sites collude"
    )


ABOUT_RDP = (
    "Epsilon by RDP bounds the same loss by an older method. That method is less exact, so its figure is larger as a "
    "rule. It is a check: the figure that counts is {counts}, and nothing is spent in addition."
)
"""What stands beside an epsilon by RDP; `counts` names the other figure."""
WEAK_SIGNAL = 1.0
"""Below it, noise moves the adapter further than all records together can; docs/planning.md has the runs behind it."""


def signal_words(ratio: float) -> str:
    """What a run's signal-to-noise ratio, `planner.signal_to_noise`, means for it."""
    times = f"noise moves the adapter {1 / max(ratio, 1e-99):.3g} times as far as all records together can"
    if ratio < LEAST_SIGNAL:
        return f"{times}: nothing is likely to be learnt; a run wants training.go_on_without_signal=true"
    if ratio < WEAK_SIGNAL:
        return f"{times}: this run is likely to learn little, and costs its epsilon all the same"
    return f"records can move the adapter at most {ratio:.2g} times as far as noise does"


def contribution(plan: Plan) -> str:
    """What one user adds to a step of a plan whose unit is that."""
    most = counted(plan.records_per_user, "record")
    return f"of each user at most {most} in a step, their mean gradient clipped once; sizes count users"


def mechanism_text(event: DpEvent, count: int) -> str:
    """`count` equal mechanisms, such as the noisy steps of a round."""
    match event:
        case PoissonSampledDpEvent():
            rate, noise = event.sampling_probability, event.event.noise_multiplier
            return f"{counted(count, 'noisy step')} (rate {rate:g}, noise {noise:g})"
        case GaussianDpEvent():
            return f"{counted(count, 'noised score')} (noise {event.noise_multiplier:g})"
        case _:
            return f"{counted(count, 'round')} WITHOUT NOISE"


def event_text(event: Event) -> str:
    """What one event of a ledger says."""
    detail = event.detail
    match event.kind:
        case Kind.PLAN:
            return _accepted(detail)
        case Kind.RESERVE:
            again = f", again (attempt {event.attempt})" if event.attempt > 1 else ""
            return f"charged{again}: {_mechanisms(detail['event'])}"
        case Kind.COMMIT:
            return "reply stored, may be sent"
        case Kind.RELEASE:
            return _offered(detail)
        case Kind.REFUSAL:
            return _refused(detail)
        case Kind.NOTE:
            return _noted(detail)


def _accepted(detail: dict[str, Any]) -> str:
    proposal = Proposal.from_json(detail["proposal"])
    plan = proposal.plan
    spare = f" and {plan.spare_rounds} spare" if plan.spare_rounds else ""
    seeded = "; NO GUARANTEE: its noise comes from a seed" if proposal.seeded_noise else ""
    start = f"; it begins in the adapter {proposal.start_adapter[:16]}..." if proposal.start_adapter else ""
    return (
        f"run accepted from lead {spoken_start(proposal.lead)}: {printable(proposal.task)} on "
        f"{printable(proposal.dataset)}, {counted(plan.num_rounds, 'round')}{spare}, each "
        f"{_mechanisms(dp_events.to_json(plan.event()))}; the cost of all is set aside until "
        f"{str(detail['expires'])[:10]}{start}{seeded}"
    )


def _mechanisms(data: object) -> str:
    parts = dp_events.grouped([dp_events.from_json(data)])
    return " and ".join(mechanism_text(part, count) for part, count in parts.items()) or "nothing"


def _refused(detail: dict[str, Any]) -> str:
    rule, asked, allowed = (detail.get(key) for key in ("reason", "asked", "allowed"))
    numbers = [f"asked for {printable(asked, 40)}"] if asked is not None else []
    numbers += [f"allowed {printable(allowed)}"] if allowed is not None and rule != Reason.LEADS else []
    return f"refused: {reason_text(str(rule))} ({'; '.join([*numbers, f'rule {printable(rule)}'])})"


def _offered(detail: dict[str, Any]) -> str:
    if detail.get("what") != "offer":
        return f"handed out: {printable(detail.get('what'))}"
    noise = detail["least_noise"]
    others = "no noise would be enough" if noise is None else f"noise of at least {noise:g}"
    return f"told a lead what a run may ask for: up to {counted(detail['most_rounds'], 'round')}, or {others}"


def _noted(detail: dict[str, Any]) -> str:
    match detail["what"]:
        case "opened":
            return (
                f"ledger made for population {printable(detail['population'])} of site {printable(detail['site'])}: "
                f"protects each {detail['unit']}, delta {detail['delta']:g}, filter order {detail['order']:g}"
            )
        case "policy":
            return f"policy in force: {_caps(detail['policy']['budget'])} (digest {detail['sha256'][:12]}...)"
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


def _caps(budget: dict[str, Any]) -> str:
    lifetime = "no lifetime cap" if budget["max_epsilon"] is None else f"lifetime cap epsilon {budget['max_epsilon']:g}"
    others = [
        f"{budget[key]:g} a {name}"
        for key, name in (("max_epsilon_per_run", "run"), ("max_epsilon_per_period", budget["period"]))
        if budget[key] is not None
    ]
    return ", ".join([lifetime, *others])
