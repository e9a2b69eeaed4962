"""Plain-language descriptions of a site's policy and of ledger events."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.codec import decode
from fedtune.formatting import convert_none_to_infinite, flatten, format_key_start, group_hex, pluralize
from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy import events as dp_events
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.ledger.chain import Event, Kind
from fedtune.privacy.ledger.verify import VerifiedLedger
from fedtune.privacy.own_release import CHARGED_ONLY
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import IMMEDIATE_REPLY_RISK, Policy
from fedtune.report.page.translations import load_catalog
from fedtune.show import budget_text
from fedtune.show.budget_text import Amount, Differences, format_cap, format_mechanism, format_rounded_down
from fedtune.show.lines import to_printable
from fedtune.show.terminal_tables import Section, build_key_value_section, print_json, say, show
from fedtune.spec import ConfigError, format_value

if TYPE_CHECKING:  # it takes a while to import
    from jinja2 import Environment


def explain_refusal(reason: str) -> str:
    """Explain a refusal reason in the wording of the privacy report."""
    return load_catalog("en").texts["refusal"].get(reason, "for a reason unknown to this version")


def explain_guarantee(unit: str, *, epsilon: float, delta: float) -> str:
    """Return the explanation of (epsilon, delta) for one privacy unit, with the wording of the privacy report."""
    texts = load_catalog("en")
    factor, addition = texts.figure(epsilon, "factor"), texts.figure(delta, "exact")
    return texts.text(f"promise.{unit}", factor=factor, delta=addition).unescape()


def describe_event(event: Event, *, own: str = "") -> str:
    """Describe a ledger event in plain language.  `own` is the kind of a release that the site made itself."""
    detail = event.detail
    match event.kind:
        case Kind.PLAN:
            proposal = decode(Proposal, detail["proposal"])
            plan = proposal.plan
            spare = f" and {plan.spare_rounds} spare" if plan.spare_rounds else ""
            seeded = "; NO GUARANTEE: its noise is seeded" if proposal.seeded_noise else ""
            start = f"; starts from the adapter {proposal.start_adapter[:16]}..." if proposal.start_adapter else ""
            what = f"{to_printable(proposal.task)} on {to_printable(proposal.dataset)}"
            mechanisms = _describe_mechanisms(dp_events.to_json(plan.event()))
            each = f"{pluralize(plan.num_rounds, 'round')}{spare}, each {mechanisms}"
            kept = f"the cost of all rounds is reserved until {str(detail['expires'])[:10]}{start}{seeded}"
            if not proposal.lead:
                return f"release for the site's own use accepted: {what}, {mechanisms}"
            return f"run accepted from lead {format_key_start(proposal.lead)}: {what}, {each}; {kept}"
        case Kind.RESERVE:
            again = f", again (attempt {event.attempt})" if event.attempt > 1 else ""
            return f"charged{again}: {_describe_mechanisms(detail['event'])}"
        case Kind.COMMIT if own in CHARGED_ONLY:
            return "charge complete: other software computes the release"
        case Kind.COMMIT if own:
            return "result stored at the site"
        case Kind.COMMIT:
            return "reply stored, ready to send"
        case Kind.RELEASE if detail.get("what") != "offer":
            return f"released: {to_printable(detail.get('what'))}"
        case Kind.RELEASE:
            noise = detail["min_noise"]
            others = "no noise suffices" if noise is None else f"noise of at least {noise:g}"
            rounds = pluralize(detail["max_rounds"], "round")
            return f"sent a lead the limits for a run: up to {rounds}, or {others}"
        case Kind.REFUSAL:
            rule, requested, allowed = (detail.get(key) for key in ("reason", "requested", "allowed"))
            numbers = [f"requested {to_printable(requested, 40)}"] if requested is not None else []
            numbers += [f"allowed {to_printable(allowed)}"] if allowed is not None and rule != Reason.LEADS else []
            return f"refused: {explain_refusal(str(rule))} ({'; '.join([*numbers, f'rule {to_printable(rule)}'])})"
        case Kind.NOTE:
            return _describe_note(detail)


def _describe_mechanisms(data: object) -> str:
    parts = dp_events.count_mechanisms([dp_events.from_json(data)])
    return " and ".join(format_mechanism(part, count) for part, count in parts.items()) or "nothing"


def _describe_note(detail: dict[str, Any]) -> str:
    match detail["what"]:
        case "opened":
            whose = f"population {to_printable(detail['population'])} of site {to_printable(detail['site'])}"
            promise = f"protects each {detail['unit']}, delta {detail['delta']:g}, filter order {detail['order']:g}"
            return f"ledger created for {whose}: {promise}"
        case "policy":
            budget = detail["policy"]["budget"]
            most = budget["max_epsilon"]
            caps = ["no lifetime cap" if most is None else f"lifetime cap epsilon {most:g}"]
            for key, name in (("max_epsilon_per_run", "run"), ("max_epsilon_per_period", budget["period"])):
                caps += [] if budget[key] is None else [f"{budget[key]:g} a {name}"]
            return f"policy in force: {', '.join(caps)} (digest {detail['sha256'][:12]}...)"
        case "run_ended":
            return "run ended: its unspent reserve is released"
        case "date_confirmed":
            return "a person at the site confirmed the date, so a new budget period can begin"
        case "restored":
            gap = [format_mechanism(dp_events.from_json(data), count) for data, count in detail["gap"]]
            charged = f"charged for the missing events up to event {detail['end']} of the lost ledger"
            return f"a backup was restored; {charged}: {' and '.join(gap) or 'nothing'}"
        case "in_doubt":
            lacking = f"a receipt of this site refers to event {detail['sequence']}, which is missing"
            return f"IN DOUBT: {lacking}; training is not possible until the ledger is restored"
        case "approved" | "denied" as decided:
            who, ticket = to_printable(detail["by"]) or "a person at the site", to_printable(detail["ticket"])
            why = "; ".join(filter(None, (ticket and f"ticket {ticket}", to_printable(detail["why"]))))
            return f"{who} {decided} the run as it was proposed{why and f': {why}'}"
        case "frozen":
            return f"FROZEN, all training has ended: {to_printable(detail['why'])}"
        case other:
            return f"unknown note {to_printable(other)}"


def describe_policy_changes(events: Iterable[Event]) -> dict[int, str]:
    """Describe what each later policy of a ledger changed: event's sequence number -> settings, new and old values."""
    noted = (one for one in events if one.kind is Kind.NOTE and one.detail["what"] == "policy")
    policies = [(one.sequence, one.detail["policy"]) for one in noted]
    found = {}
    for (_, before), (sequence, after) in pairwise(policies):
        old, new = dict(flatten(before)), dict(flatten(after))
        changed = [key for key in old | new if old.get(key) != new.get(key)]
        values = (f"{key} = {format_value(new.get(key), 40)} (was {format_value(old.get(key), 40)})" for key in changed)
        found[sequence] = f"; changed: {to_printable('; '.join(values), 400)}"
    return found


def check_policy(file: Path, *, as_json: bool) -> None:
    """Explain the policy in `file`, and check that its ledger matches it.

    Raises:
        ConfigError: the ledger was created for different values than those in the policy.
    """
    files = SiteFiles.from_site_toml(file, may_be_unanswered=True)
    policy, amount = files.policy, budget_text.compute_amount(files.policy)
    from fedtune.sites.site_settings import read_site_settings  # pydantic takes a while to import

    machine = read_site_settings(file).machine
    cautions = tuple(budget_text.list_cautions(policy, amount, folder=file.parent))
    if not as_json:  # first, because the check of the ledger may raise an error
        say(f"Policy of site {policy.site} ({file})", style="bold")
        headings = ("key", "value, and what it means")
        warnings = Section(pluralize(len(cautions), "warning"), headings, cautions, words={0, 1})
        meaning = _build_policy_section(policy, amount, folder=file.parent)
        show([meaning, warnings if cautions else Section(notes=["No warnings."])])
    verified, differences = budget_text.compare_with_ledger(files)
    if as_json:
        ledger: dict[str, Any] | None = None
        if verified is not None:
            different = [{"key": key, "ledger": made, "policy": asked} for key, made, asked in differences]
            ledger = {**budget_text.convert_identity_to_json(files.ledger, verified), "fits": not differences}
            ledger |= {"differences": different, "spending": convert_spending_to_json(verified)}
        figures: dict[str, Any] = {"path": str(file), "sha256": policy.digest()}
        warned = [{"key": key, "text": text} for key, text in cautions]
        figures |= {"policy": policy.to_json(), "machine": machine, "amount": amount}
        print_json(figures | {"warnings": warned, "ledger": ledger})
    else:
        _print_ledger_summary(files.ledger, verified, differences)
    for key, made_for, asked in differences:
        bound = f"does not match ledger {files.ledger}, created for {made_for}; restore the old value"
        raise ConfigError(f"{file}: {key}", asked, bound)


def _build_policy_section(policy: Policy, amount: Amount, *, folder: Path) -> Section:
    budget, models = policy.budget, policy.allow.base_models
    shown = [model if len(model) <= 16 else f"{model[:16]}..." for model in models]
    said = render_page(
        "policy",
        policy=policy,
        amount=amount,
        folder=folder,
        models=shown,
        promised=explain_guarantee(policy.population.unit, epsilon=budget.max_epsilon, delta=budget.delta),
        no_adapter=NO_ADAPTER,
        at_once=IMMEDIATE_REPLY_RISK,
    )
    return build_key_value_section({about: f"{text}\n" for about, text in said.items()})


def render_page(page: str, **values: object) -> dict[str, str]:
    """Render a template of templates/ as a mapping from headings to texts.

    In the template, a line with one level of indentation starts a new line of the text, and deeper lines continue it.
    """
    said: dict[str, str] = {}
    for line in _load_templates().get_template(f"{page}.j2").render(**values).split("\n"):
        if not line.startswith("  "):
            name = line.removesuffix(":")
        elif line.startswith("    "):
            said[name] = said.get(name, "") + line[3:]
        else:
            said[name] = f"{said[name]}\n{line[2:]}" if name in said else line[2:]
    return said


@cache
def _load_templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        finalize=lambda value: str(value).replace("\n", " "),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["unbounded"] = math.inf
    made.filters |= {"g": "{:g}".format, "counted": pluralize, "cap": format_cap, "epsilon": format_epsilon}
    made.filters |= {"printable": to_printable, "group_hex": group_hex}
    return made


def _print_ledger_summary(ledger: Path, verified: VerifiedLedger | None, differences: Differences) -> None:
    from fedtune.report.from_ledger import compute_lifetime_budget

    say("")
    if verified is None:
        say(f"No ledger yet at {ledger}; it is created when the site starts.")
        return
    figures, cap = compute_lifetime_budget(verified), verified.history.cap
    runs = figures.reference_remaining_runs
    fits = "" if runs is None else f", enough for {pluralize(runs, 'run')} like the reference"
    left = f"left for new runs now {format_rounded_down(convert_none_to_infinite(figures.remaining_epsilon))}{fits}"
    say(f"Ledger {ledger}: spent epsilon {format_epsilon(figures.epsilon)} of {format_cap(cap)}, {left}.")
    if figures.frozen:
        say("It is FROZEN: all training on this population has ended permanently.")
    if not figures.has_guarantee:
        say("NO GUARANTEE: some runs had no noise, or seeded noise.", style="bold yellow")
    if differences:
        say("It does not match this policy: the site would not start.", style="bold yellow")
        for key, made_for, asked in differences:
            say(f"  {key}: created for {to_printable(made_for)}, but the policy has {to_printable(asked)}")


def convert_spending_to_json(verified: VerifiedLedger) -> dict[str, Any]:
    """Convert a ledger's spending to JSON values with stable keys, including each run's noise and trust assumptions."""
    from fedtune.report.from_ledger import compute_lifetime_budget  # slow to import

    life, runs = compute_lifetime_budget(verified), verified.history.runs
    rows = []
    for run in life.runs:
        plan = runs[run.run].plan
        by_trust = plan.compute_epsilons_by_trust(run.rounds) if run.rounds else None
        of_plan = {"noise_multiplier": plan.accounted_noise, "sampling_rate": plan.sampling_rate, "by_trust": by_trust}
        rows.append(asdict(run) | of_plan)
    more = {"max_epsilon": verified.history.cap, "guarantee": life.has_guarantee, "runs": rows}
    return {key: value for key, value in asdict(life).items() if key != "cohorts" or value is not None} | more
