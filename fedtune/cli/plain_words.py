"""A site's policy and ledger events in plain words, for readers who did not write them."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.codec import decode
from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy import events as dp_events
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.verify import Verified
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import AT_ONCE, Policy
from fedtune.report.page.catalogue import catalogue
from fedtune.show import budget_text
from fedtune.show.budget_text import Amount, Differences, cap_text, mechanism_text, rounded_down
from fedtune.show.lines import printable
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, pairs, print_json, say, show
from fedtune.spec import ConfigError
from fedtune.words import counted, spoken, spoken_start, unbounded

if TYPE_CHECKING:  # it takes a while to import
    from jinja2 import Environment


def reason_text(reason: str) -> str:
    """Return the explanation of a site's refusal, worded as on a report's page."""
    return catalogue("en").texts["refusal"].get(reason, "for a reason that this version does not know")


def promise_text(unit: str, *, epsilon: float, delta: float) -> str:
    """Return the explanation of (epsilon, delta) for one unit, worded as on a report's page."""
    texts = catalogue("en")
    factor, addition = texts.figure(epsilon, "factor"), texts.figure(delta, "exact")
    return texts.text(f"promise.{unit}", factor=factor, delta=addition).unescape()


def event_text(event: Event) -> str:
    """Describe a ledger event in words."""
    detail = event.detail
    match event.kind:
        case Kind.PLAN:
            proposal = decode(Proposal, detail["proposal"])
            plan = proposal.plan
            spare = f" and {plan.spare_rounds} spare" if plan.spare_rounds else ""
            seeded = "; NO GUARANTEE: its noise comes from a seed" if proposal.seeded_noise else ""
            start = f"; it begins in the adapter {proposal.start_adapter[:16]}..." if proposal.start_adapter else ""
            what = f"{printable(proposal.task)} on {printable(proposal.dataset)}"
            each = f"{counted(plan.num_rounds, 'round')}{spare}, each {_mechanisms(dp_events.to_json(plan.event()))}"
            kept = f"the cost of all is set aside until {str(detail['expires'])[:10]}{start}{seeded}"
            return f"run accepted from lead {spoken_start(proposal.lead)}: {what}, {each}; {kept}"
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
            whose = f"population {printable(detail['population'])} of site {printable(detail['site'])}"
            promise = f"protects each {detail['unit']}, delta {detail['delta']:g}, filter order {detail['order']:g}"
            return f"ledger made for {whose}: {promise}"
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
            charged = f"charged what it lacked up to event {detail['end']} of the lost ledger"
            return f"a backup was put back; {charged}: {' and '.join(gap) or 'nothing'}"
        case "in_doubt":
            lacking = f"a receipt of this site's own knows event {detail['sequence']}, which is missing"
            return f"IN DOUBT: {lacking}; nothing is trained until the ledger is restored"
        case "approved" | "denied" as decided:
            who, ticket = printable(detail["by"]) or "a person at the site", printable(detail["ticket"])
            why = "; ".join(filter(None, (ticket and f"ticket {ticket}", printable(detail["why"]))))
            return f"{who} {decided} the run as it was proposed{why and f': {why}'}"
        case "frozen":
            return f"FROZEN, all training has ended: {printable(detail['why'])}"
        case other:
            return f"unknown note {printable(other)}"


def check_policy(file: Path, *, as_json: bool) -> None:
    """Print what the policy in `file` means, and whether the ledger that it names matches it.

    Raises:
        ConfigError: the ledger was made for other values than the policy's.
    """
    files = SiteFiles.of(file, may_be_unanswered=True)
    policy, amount = files.policy, budget_text.amount_of(files.policy)
    cautions = tuple(budget_text.cautions_of(policy, amount, folder=file.parent))
    if not as_json:  # first, since the ledger beside it may not be what it should be
        say(f"Policy of site {policy.site} ({file})", style="bold")
        headings = ("key", "value, and what it means")
        warnings = Section(counted(len(cautions), "warning"), headings, cautions, words={0, 1})
        meaning = _meaning(policy, amount, folder=file.parent)
        show([meaning, warnings if cautions else Section(notes=["No warnings."])])
    verified, differences = budget_text.beside_of(files)
    if as_json:
        ledger: dict[str, Any] | None = None
        if verified is not None:
            different = [{"key": key, "ledger": made, "policy": asked} for key, made, asked in differences]
            ledger = {**budget_text.identity_json(files.ledger, verified), "fits": not differences}
            ledger |= {"differences": different, "spending": spending_json(verified)}
        figures = {"schema_version": SCHEMA_VERSION, "path": str(file), "sha256": policy.digest()}
        warned = [{"key": key, "text": text} for key, text in cautions]
        print_json(figures | {"policy": policy.to_json(), "amount": amount, "warnings": warned, "ledger": ledger})
    else:
        _show_beside(files.ledger, verified, differences)
    for key, made_for, asked in differences:
        bound = f"does not fit ledger {files.ledger}, which was made for {made_for}; set it back"
        raise ConfigError(f"{file}: {key}", asked, bound)


def _meaning(policy: Policy, amount: Amount, *, folder: Path) -> Section:
    shown = [model if len(model) <= 16 else f"{model[:16]}..." for model in policy.allow.base_models]
    said = filled(
        "policy",
        policy=policy,
        amount=amount,
        folder=folder,
        models=shown,
        promised=promise_text(policy.population.unit, epsilon=policy.budget.max_epsilon, delta=policy.budget.delta),
        no_adapter=NO_ADAPTER,
        at_once=AT_ONCE,
    )
    return pairs({about: f"{text}\n" for about, text in said.items()})


def filled(page: str, **values: object) -> dict[str, str]:
    """Render a page of templates/ as a mapping from headings to texts.

    A line indented once starts a new line of the text; a line indented further continues it.
    """
    said: dict[str, str] = {}
    for line in _templates().get_template(f"{page}.j2").render(**values).split("\n"):
        if not line.startswith("  "):
            name = line.removesuffix(":")
        elif line.startswith("    "):
            said[name] = said.get(name, "") + line[3:]
        else:
            said[name] = f"{said[name]}\n{line[2:]}" if name in said else line[2:]
    return said


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        finalize=lambda value: str(value).replace("\n", " "),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["unbounded"] = math.inf
    made.filters |= {"g": "{:g}".format, "counted": counted, "cap": cap_text, "epsilon": epsilon_text}
    made.filters |= {"printable": printable, "spoken": spoken}
    return made


def _show_beside(ledger: Path, verified: Verified | None, differences: Differences) -> None:
    from fedtune.report.from_ledger import lifetime_of

    say("")
    if verified is None:
        say(f"No ledger yet at {ledger}; it is made when the site starts.")
        return
    figures, cap = lifetime_of(verified), verified.history.cap
    runs = figures.reference_runs_left
    fits = "" if runs is None else f", enough for {counted(runs, 'run')} like the reference"
    left = f"left for new runs {rounded_down(unbounded(figures.left))}{fits}"
    say(f"Ledger {ledger}: spent epsilon {epsilon_text(figures.epsilon)} of {cap_text(cap)}, {left}.")
    if figures.frozen:
        say("It is FROZEN: all training on this population has ended for ever.")
    if not figures.has_guarantee:
        say("NO GUARANTEE: some of its runs had no noise, or noise from a seed.", style="bold yellow")
    if differences:
        say("It does not fit this policy: the site would not start.", style="bold yellow")
        for key, made_for, asked in differences:
            say(f"  {key}: made for {printable(made_for)}, the policy says {printable(asked)}")


def spending_json(verified: Verified) -> dict[str, Any]:
    """Return a ledger's spending under stable JSON keys, with each run's noise and trust assumptions."""
    from fedtune.report.from_ledger import lifetime_of  # what other commands can do without

    life, runs = lifetime_of(verified), verified.history.runs
    rows = []
    for run in life.runs:
        plan = runs[run.run].plan
        by_trust = plan.by_trust(run.rounds) if run.rounds else None
        of_plan = {"noise_multiplier": plan.counted_noise, "sampling_rate": plan.sampling_rate, "by_trust": by_trust}
        rows.append(asdict(run) | of_plan)
    more = {"max_epsilon": verified.history.cap, "guarantee": life.has_guarantee, "runs": rows}
    return {key: value for key, value in asdict(life).items() if key != "cohorts" or value is not None} | more
