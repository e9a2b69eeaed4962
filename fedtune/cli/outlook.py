"""Forecast of a run's privacy cost, bytes and time, computed and printed without reading data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli.command import Target
from fedtune.cli.plain_words import explain_refusal, render_page
from fedtune.config import RunConfig, parse
from fedtune.derived_settings import use_secure_aggregation
from fedtune.federation import planner, policy_dry_run
from fedtune.federation.calendar import describe_calendar, list_calendar_rows
from fedtune.federation.planner import Change, PlanCost, compute_signal_to_noise
from fedtune.federation.policy_dry_run import DryRun, find_strictest_dry_run
from fedtune.formatting import convert_to_jsonable, format_key_start, format_size, pluralize
from fedtune.lab.studies.trial_search import build_cost_section, check_trials
from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy.accountant import NEIGHBORING_RELATION, format_epsilon
from fedtune.privacy.keys import parse_public_key
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import compute_search_cost
from fedtune.show.budget_text import SEEDED, describe_contribution, describe_noise, describe_trust, explain_signal
from fedtune.show.lines import duration, to_printable
from fedtune.show.terminal_tables import Section, build_key_value_section, print_json, say, show
from fedtune.spec import ConfigError
from fedtune.tasks.inputs import get_input_for
from fedtune.version import __version__

if TYPE_CHECKING:
    from fedtune.federation.forecast import Forecast  # which imports torch


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanForecast:
    """Forecast of a run, computed without reading data."""

    config: RunConfig  # the run's settings; `price.plan` contains the solved value
    price: PlanCost
    solved: str | None  # "noise", "rounds" or "sampling_rate", if the plan was solved for it
    epsilon: float  # upper limit for the plans in `changes`
    changes: tuple[Change, ...]
    forecast: Forecast | None
    device: str
    verdicts: tuple[DryRun, ...]
    lead_assumed: bool  # each policy was evaluated for the first lead that it allows
    # hash of the base model; None: not pinned in the settings, and no model was loaded
    model_sha256: str | None = None
    # the same run with secure aggregation; None: already used, or not available
    secure_aggregation: Plan | None = None

    @property
    def plan(self) -> Plan:
        return self.price.plan

    @property
    def signal_to_noise(self) -> float | None:
        """Signal-to-noise ratio (`planner.compute_signal_to_noise`); None if the parameter count is unknown."""
        sizes = {name: site.declared_size for name, site in self.price.sites.items()}
        if self.forecast is None:
            return None
        return compute_signal_to_noise(self.plan, sizes, values=fmean(self.forecast.site_values.values()))

    @property
    def relative_secure_noise(self) -> float | None:
        """Noise in the average with secure aggregation, divided by the plan's noise; None without `secure_aggregation`.

        Equals the ratio of the noise multipliers, because every site's noise has the same weight in the average.  If
        all sites are summed, the noise equals that of central training on all records.
        """
        shared = self.secure_aggregation
        return None if shared is None else shared.noise_multiplier / self.plan.noise_multiplier

    @property
    def strictest(self) -> DryRun | None:
        """Dry run of the strictest site's policy; None without policies or without privacy."""
        return find_strictest_dry_run(self.verdicts) if self.verdicts and self.plan.private else None

    @property
    def calibrated(self) -> bool:
        return self.config.privacy.noise_multiplier is None and self.solved in (None, "noise")

    @property
    def guaranteed(self) -> bool:
        return self.plan.private and not self.config.runtime.seeded_noise

    def to_json(self) -> dict[str, Any]:
        """Convert the forecast to JSON values, with null for unbounded values."""
        config, price, plan = self.config, self.price, self.plan
        strictest, sums, ranks = self.strictest, self.secure_aggregation, config.federation.site_ranks
        common = {key: getattr(plan, key) for key in ("sampling_rate", "noise_multiplier")}
        common |= {key: getattr(price, key) for key in ("steps", "epsilon", "epsilon_rdp", "epsilon_filter")}
        figures: dict[str, Any] = convert_to_jsonable(
            {
                "fedtune_version": __version__,
                "run": config.name,
                "config_sha256": config.digest(),
                "model": config.model.path,
                "model_sha256": self.model_sha256,
                "dataset": config.data.dataset,
                "public_stage": config.public if config.public.train_file else None,
                "solved_for": self.solved,
                "target_epsilon": config.privacy.epsilon if plan.private else None,
                "guaranteed": self.guaranteed,
                "seeded_noise": config.runtime.seeded_noise,
                "neighboring_relation": NEIGHBORING_RELATION.name.lower(),
                "noise_calibrated": self.calibrated,
                **dataclasses.asdict(price),
                "sites": {
                    name: dataclasses.asdict(site) | common | ({"rank": ranks[name]} if config.federation.ranks else {})
                    for name, site in price.sites.items()
                },
                "steps": price.steps,
                "signal_to_noise": self.signal_to_noise,
                "what_if_epsilon": self.epsilon,
                "what_if": self.changes,
                "secure_aggregation": sums and {"plan": sums, "noise_in_average": self.relative_secure_noise},
                "forecast": self.forecast and dataclasses.asdict(self.forecast) | {"device": self.device},
                "lead_assumed": self.lead_assumed,
                "strictest_site": strictest.site if strictest else None,
                "epsilon_for_all_sites": strictest.max_accepted_epsilon if strictest else None,
                "policies": [one.to_json() for one in self.verdicts],
            }
        )
        return figures


def show_outlook(console: Console, outlook: PlanForecast) -> None:
    """Print a run's privacy cost, the decision of each site's policy, alternative plans, bytes and time."""
    say(f"fedtune plan {outlook.config.name}", style="bold", console=console)
    plan, style = outlook.plan, "bold" if outlook.guaranteed else "bold yellow"
    promise = "No epsilon is promised: privacy=none adds no noise, and the sites' records are not protected."
    if plan.private:
        rounds = pluralize(plan.num_rounds, "round") + (f" and {plan.spare_rounds} spare" if plan.spare_rounds else "")
        bound = f"epsilon at most {format_epsilon(outlook.price.epsilon)} at delta {plan.delta:g} for each {plan.unit}"
        promise = f"{SEEDED if not outlook.guaranteed else ''} After {rounds}: {bound}, at every site.".strip()
    console.print(promise, style=style, markup=False, highlight=False)
    show(_iter_sections(outlook), console=console)


def _iter_sections(outlook: PlanForecast) -> Iterator[Section]:
    """Yield the tables of a forecast: settings, sites, epsilon, alternative plans, bytes and time, and policies."""
    plan, price, ratio = outlook.plan, outlook.price, outlook.signal_to_noise
    rate, head_rate = outlook.config.training.compute_peak_rates(clipped=plan.private)
    settings = render_page(
        "plan",
        outlook=outlook,
        sites=price.sites,
        rate=rate,
        head_rate=head_rate,
        contribution=describe_contribution(plan) if plan.unit == "user" else "",
        noise=describe_noise(plan),
        trust=describe_trust(price.by_trust) if price.by_trust is not None else "",
        signal=explain_signal(ratio, outlook.config.task) if ratio is not None and plan.private else "",
    )
    yield build_key_value_section(settings)
    rows = list[tuple[str, ...]]()
    for name, site in price.sites.items():
        batch = f"{site.expected_batch:,.0f}" if site.expected_batch >= 100 else f"{site.expected_batch:.3g}"
        failures = f"{site.expected_failures:.3g}" if plan.private else "-"
        rows.append((name, f"{site.declared_size:,}", f"{site.weight:.0%}", batch, failures))
    headings: tuple[str, ...] = ("site", "declared\nsize", "weight", "mean\nbatch", "delta\nx size")
    yield Section("Sites", headings, rows, notes=list(_list_site_notes(outlook)))
    rows, notes = [], []
    for one in price.rounds:
        epsilons = map(format_epsilon, (one.pld, one.rdp, one.filter))
        rows.append((f"{one.round:,}{'*' if one.spare else ''}", f"{one.steps:,}", *epsilons))
    if any(one.spare for one in price.rounds):
        notes.append("* a spare round: charged only if an interrupted round is repeated.")
    if 0 < len(price.rounds) < plan.max_rounds:
        notes.append(f"{len(price.rounds)} of {plan.max_rounds:,} rounds are shown.")
    headings = ("round", "steps", "PLD", "RDP", "filter")
    yield Section("Epsilon after each round", headings, rows, words=(), notes=notes)
    if plan.private:
        cap = f"the smallest lifetime cap that fits the plan (order {price.filter_order:g})"
        other = "a ledger with an order fixed for other runs spends more of its cap"
        anew = "WRONG for the run: one round only, as if the privacy engine were rebuilt every round"
        rows = [
            ("PLD", format_epsilon(price.epsilon), "the run's epsilon: a bound for a plan that is fixed in advance"),
            ("RDP", format_epsilon(price.epsilon_rdp), "a looser bound, as an independent check"),
            ("Renyi filter", format_epsilon(price.epsilon_filter), f"{cap}; {other}"),
            ("restarted each round", format_epsilon(price.epsilon_of_one_round), anew),
        ]
        headings = ("accountant", "epsilon", "meaning")
        yield Section("Epsilon of the whole run by accountant", headings, rows, words={0, 2})
    if runs := price.calendar:
        title, *notes = describe_calendar(plan)
        headings = ("run", "admits", "epsilon of\nthe run", "oldest\nafter it", "newest\nafter it")
        yield Section(title, headings, list(list_calendar_rows(plan, runs)), words={1}, notes=notes)
    if outlook.changes:
        yield _build_alternatives_section(outlook)
    if outlook.forecast is None:
        yield Section("Bytes and time", notes=("Not shown: no model was loaded. Add --time to load it.",))
    else:
        yield _build_resources_section(outlook, outlook.forecast)
    for verdict in outlook.verdicts:
        yield _build_policy_section(verdict, outlook)
    if outlook.strictest is not None:
        yield Section(notes=[_describe_strictest_site(outlook, outlook.strictest)])


def _list_site_notes(outlook: PlanForecast) -> Iterator[str]:
    price, plan = outlook.price, outlook.plan
    if not plan.private:
        yield "Epsilon is unbounded at every site."
        return
    yield "Rate, noise and steps are common to all sites, so epsilon is the same at each site that joins every round."
    largest = price.largest[0]
    size = price.sites[largest].declared_size
    bound = f"delta must stay below 1 / {size:,} = {1 / size:.3g}"
    if len(price.sites) == 1:
        yield f"There is one site: {bound}."
    elif len(price.largest) == len(price.sites):
        yield f"No site dominates: all declare {size:,}, so {bound}."
    else:
        who = ", ".join(price.largest)
        verb = "dominates" if len(price.largest) == 1 else "dominate"
        yield f"{who} {verb}: the largest weight in the average, the most expected failures, and {bound}."
        noisiest = min(price.sites, key=lambda name: price.sites[name].declared_size)
        ratio = price.sites[noisiest].step_noise / price.sites[largest].step_noise
        yield f"The mean gradient of {noisiest} is the noisiest: {ratio:.3g} times the noise of {who}."
    given_away = f"upper bound on the expected number of {plan.unit}s with a leak that only they could explain"
    yield f"delta x size: {given_away}. Keep it far below 1."


def _build_alternatives_section(outlook: PlanForecast) -> Section:
    epsilon = format_epsilon(outlook.price.epsilon_of_all_runs)
    rows = [("as planned", f"{outlook.plan.noise_multiplier:.4f}", "100%", epsilon)]
    for change in outlook.changes:
        needed = "none suffices" if change.noise_needed is None else f"{change.noise_needed:.4f}"
        noise = "-" if change.step_noise is None else f"{change.step_noise:.0%}"
        rows.append((change.what, needed, noise, format_epsilon(change.same_noise_epsilon)))
    noise = f"noise multiplier\nfor epsilon {outlook.epsilon:.4g}"
    headings = ("change", noise, "noise in a\nmean gradient", "epsilon at\nthis noise")
    title = "What if" if outlook.plan.runs == 1 else f"What if: epsilon of all {outlook.plan.runs} runs"
    note = "A larger batch requires more noise in its sum, but its mean gradient can still be less noisy."
    return Section(title, headings, rows, notes=[note])


def _build_resources_section(outlook: PlanForecast, found: Forecast) -> Section:
    plan, num_sites = outlook.plan, len(outlook.price.sites)
    slowest = max(found.round_seconds, key=lambda site: found.round_seconds[site])
    ways = f"{format_size(found.bytes_down)} down and {format_size(found.bytes_up)} up"
    at = f" at {slowest}" if num_sites > 1 else ""
    users = f" and {pluralize(plan.records_per_user, 'record')} of each user" if plan.unit == "user" else ""
    data, trained = outlook.config.data, "the head" if outlook.config.lora.kind == NO_ADAPTER else "adapter"
    full = f"at its full {data.max_length} tokens" if get_input_for(data).modality is None else "of this size"
    whole = f"{pluralize(num_sites, 'site')} and {pluralize(plan.num_rounds, 'round')}"
    alone = duration(found.seconds_one_after_another)
    rows = (
        (trained, f"{found.values:,} trained parameters, {ways} for each site and round"),
        ("the model", f"{format_size(found.model_bytes)} of memory"),
        ("whole run", f"{format_size(found.bytes_total)} both ways for {whole}"),
        ("a step", f"at most about {duration(found.step_seconds[slowest])}{at}"),
        ("a round", f"at most about {duration(found.round_seconds[slowest])}{at}"),
        ("all training", f"at most about {alone} if one machine simulates all sites"),
    )
    machine = f"Times are for this machine ({outlook.device}) with every example {full}{users}"
    notes = [f"{machine}. They do not include evaluation and start-up."]
    return Section("Bytes and time", ("item", "estimate"), rows, words={0, 1}, notes=notes)


def _build_policy_section(verdict: DryRun, outlook: PlanForecast) -> Section:
    rows = []
    for one in verdict.violations:
        asked, allowed = to_printable(one.requested or "-", 40), to_printable(one.allowed or "-", 60)
        rows.append((f"{explain_refusal(one.reason)} ({one.reason})", asked, allowed))
    lead = f"Requested by lead {format_key_start(verdict.lead)}"
    notes = [f"{lead} (assumed: --lead was not given)." if outlook.lead_assumed else lead]
    if verdict.committed_epsilon is not None and verdict.epsilon_after is not None:
        of = "no lifetime cap" if math.isinf(verdict.max_epsilon) else f"a lifetime cap of {verdict.max_epsilon:g}"
        ledger = "Its ledger" if verdict.ledger == "read" else "No ledger next to the policy. A new ledger"
        runs = verdict.remaining_runs
        left = "" if runs is None else f" Room now for {pluralize(runs, 'run')} like this one."
        taken, epsilon_after = format_epsilon(verdict.committed_epsilon), format_epsilon(verdict.epsilon_after)
        notes.append(f"{ledger}: epsilon {taken} spent, {epsilon_after} with this run, by the filter, and {of}.{left}")
    if rows:
        ways = [pluralize(verdict.max_rounds, "round")] if verdict.max_rounds else []
        ways += [f"noise multiplier {verdict.min_noise:g}"] if verdict.min_noise is not None else []
        accepted = f"Acceptable: {' or '.join(ways)}, with all other settings as planned."
        notes.append(accepted if ways else "Neither fewer rounds nor more noise alone would be accepted.")
    if verdict.note:
        notes.append(f"Note: {verdict.note}.")
    answer = "would accept the run" if verdict.allowed else "would refuse the run"
    title, headings = f"{verdict.site} {answer} ({verdict.policy})", ("violated rule", "requested", "allowed")
    return Section(title, headings, rows, words={0, 1, 2}, notes=notes)


def _describe_strictest_site(outlook: PlanForecast, strictest: DryRun) -> str:
    if strictest.max_accepted_epsilon is None:
        never = ", ".join(one.site for one in outlook.verdicts if one.max_accepted_epsilon is None)
        return f"Strictest: {never} would refuse this run at every epsilon because of the rules above."
    limit = strictest.limit
    why = "" if limit is None else f" ({limit.reason}: {to_printable(limit.allowed or '-', 60)})"
    everybody = "it accepts" if len(outlook.verdicts) == 1 else f"all {len(outlook.verdicts)} sites accept"
    most = f"{everybody} this run up to privacy.epsilon={strictest.max_accepted_epsilon:g}"
    return f"Strictest site: {strictest.site}{why}; {most}."


def print_outlook(
    overrides: Sequence[str],
    target: Target | None,
    *,
    policies: Sequence[Path],
    lead: str | None,
    time: bool,
    trials: int | None,
    as_json: bool,
) -> None:
    """Compute and print the forecast of a run.  The arguments are those of `fedtune plan`.

    Raises:
        ConfigError: a setting, a policy or an argument is invalid, or no solution exists for the target.
    """
    if trials is not None:
        check_trials(trials)
    lead = parse_public_key("--lead", lead)
    # Without --lead, each policy is evaluated for the first lead that it allows.
    leads = {path: lead or next(iter(read_policy(path).allow.leads), "nobody") for path in policies}
    with Console(stderr=True).status("Computing the cost ..."):
        config, planned = _solve_plan(overrides, target, for_real_sites=bool(policies))
        # For given noise, use its epsilon.  For calibrated noise, epsilon is just below the target, so use the target.
        given = config.privacy.noise_multiplier is not None or target in ("rounds", "sampling_rate")
        epsilon = planner.compute_target_epsilon(planned) if given and planned.private else config.privacy.epsilon
        forecast, device = _forecast_resources(config, planned) if time else (None, "")
        # Sites identify the base model by this hash: the one pinned in the settings, or else that of its files.
        sha256, sizes = config.model.sha256, config.declared_sizes()
        if sha256 is None and time:
            from fedtune.model.base_model import hash_model  # transformers takes seconds to import

            sha256 = hash_model(config.model)
        ask = partial(policy_dry_run.dry_run, declared_sizes=sizes, find_most_epsilon=planned.private)
        outlook = PlanForecast(
            config=config,
            price=planner.compute_cost(planned, sizes, before=config.federation.renewal),
            solved=target,
            epsilon=epsilon,
            changes=planner.compute_alternatives(planned, epsilon=epsilon) if planned.private else (),
            forecast=forecast,
            device=device,
            verdicts=tuple(ask(path, config.proposal(lead=asks, plan=planned)) for path, asks in leads.items()),
            lead_assumed=lead is None,
            model_sha256=sha256,
            secure_aggregation=_plan_secure_aggregation(config, planned, epsilon),
        )
        searched = None if trials is None else compute_search_cost([planned] * trials)
    figures = outlook.to_json() | ({} if searched is None else {"search": convert_to_jsonable(searched)})
    if as_json:
        print_json(figures)
        return
    show_outlook(Console(), outlook)
    if searched is not None:
        show([build_cost_section(searched, seeded_noise=config.runtime.seeded_noise)])


def _plan_secure_aggregation(config: RunConfig, planned: Plan, epsilon: float) -> Plan | None:
    """Plan the same run with secure aggregation; None if the run already uses it, or other settings exclude it."""
    if not planned.private or planned.shared is not None:
        return None
    settings = config.to_json()
    settings["privacy"] |= {"noise_multiplier": None, "epsilon": epsilon, "sampling_rate": planned.sampling_rate}
    settings["federation"] |= {"num_rounds": planned.num_rounds}
    try:
        return parse(use_secure_aggregation(settings)).plan()
    except ConfigError:
        return None


def _solve_plan(overrides: Sequence[str], target: Target | None, *, for_real_sites: bool) -> tuple[RunConfig, Plan]:
    compose = partial(compose_run, for_real_sites=for_real_sites)
    if target is None:
        config = compose(overrides)
        return config, config.plan()
    config = compose([*overrides, "privacy.noise_multiplier=null"])
    epsilon = config.privacy.epsilon
    if not config.privacy.private:
        raise ConfigError("--target", target, "requires a run with privacy")
    if target == "noise":
        return config, config.plan()
    # The noise is given here: compose with an epsilon that every noise satisfies.  Composition refuses this epsilon if
    # no noise is given; the message below explains that.
    try:
        known = compose([*overrides, "privacy.epsilon=1.0e9"]).plan()
    except ConfigError as error:
        if error.key != "privacy.epsilon":
            raise
        raise ConfigError("privacy.noise_multiplier", None, f"is required to solve for {target}") from None
    if target == "rounds":
        return config, planner.solve_rounds(known, epsilon=epsilon)
    one_record = 1 / max(config.declared_sizes().values())  # at smaller rates most batches would be empty
    return config, planner.solve_sampling_rate(known, epsilon=epsilon, least=one_record)


def _forecast_resources(config: RunConfig, plan: Plan) -> tuple[Forecast, str]:
    """Forecast the bytes and the time of a run, and return the forecast with its device type."""
    # Imported late: torch and transformers take seconds, and an invalid override should fail immediately.
    from fedtune.federation.forecast import forecast
    from fedtune.ops.round_bytes import estimate_round_bytes
    from fedtune.sites.virtual_site import fix_number_format
    from fedtune.tasks.task_model import build_task_model
    from fedtune.training.machine import prepare_model, resolve_device

    config = fix_number_format(config, Path(config.tracking.output_dir) / config.name)
    runtime, length = config.runtime, config.data.max_length
    # A plan for a GPU can be made on a machine without one.
    device = resolve_device(runtime.device, must_exist=False)
    model = prepare_model(lambda: build_task_model(config.task_model(), device=device), runtime, max_length=length)
    sizes, traffic = config.declared_sizes(), estimate_round_bytes(config, plan, model)
    ranks = config.federation.site_ranks
    made = forecast(plan, model, declared_sizes=sizes, ranks=ranks, max_length=length, runtime=runtime, traffic=traffic)
    return made, device.type
