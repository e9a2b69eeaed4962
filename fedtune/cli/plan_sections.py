"""A plan in sections: what is known of a run's price, the same on the terminal and on the page."""

from __future__ import annotations

import dataclasses
import math

from rich.console import Console

from fedtune.cli.outlook import Outlook
from fedtune.cli.plain_words import reason_text
from fedtune.config import RunConfig
from fedtune.evaluation.groups import fewest_told
from fedtune.federation.planner import RoundPrice
from fedtune.federation.verdict import Verdict
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.release import METRICS
from fedtune.privacy.run_plan import Plan
from fedtune.show.budget_words import ABOUT_RDP, SEEDED, contribution, noise_words, signal_words, trust_words
from fedtune.show.lines import printable
from fedtune.show.sections import Section, pairs, say, show
from fedtune.words import counted, duration, size, spoken_start

NOT_PRIVATE = "No epsilon is promised: privacy=none adds no noise, and the sites' records are not protected."
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MOST_BAR = 60


def promise(outlook: Outlook) -> str:
    """The one sentence that matters most."""
    if not outlook.plan.private:
        return NOT_PRIVATE
    plan, price = outlook.plan, outlook.price
    rounds = counted(plan.num_rounds, "round") + (f" and {plan.spare_rounds} spare" if plan.spare_rounds else "")
    bound = f"epsilon at most {epsilon_text(price.epsilon)} at delta {plan.delta:g} for each {plan.unit}"
    return f"{SEEDED if not outlook.guaranteed else ''} After {rounds}: {bound}, at every site.".strip()


def _rates(config: RunConfig, plan: Plan) -> str:
    lora, head = config.training.peak_rates(clipped=plan.private)
    return f"{lora:g}" if head == lora else f"{lora:g} (head {head:g})"


def facts(outlook: Outlook) -> dict[str, str]:
    """The run in a few lines."""
    config, plan, price = outlook.config, outlook.plan, outlook.price
    found = {
        "model": config.model.path,
        **({"SHA-256": outlook.model_sha256} if outlook.model_sha256 else {}),
        "data": f"{config.data.dataset} at {counted(len(price.sites), 'site')}; no record was read",
        "training": f"{counted(plan.num_rounds, 'round')} of {counted(plan.local_steps, 'step')}, "
        f"sampling rate {plan.sampling_rate:.4g}, learning rate {_rates(config, plan)}",
        **({"contribution": contribution(plan)} if plan.unit == "user" else {}),
    }
    if plan.spare_rounds:
        found["training"] += f"; {counted(plan.spare_rounds, 'spare round')} paid for beforehand"
    if plan.private:
        how = f"the least for epsilon {config.privacy.epsilon:g}" if outlook.calibrated else "given"
        found["noise"] = f"{noise_words(plan)} ({how}), clip norm {plan.max_grad_norm:g}"
    if price.by_trust is not None:
        found["relies on"] = trust_words(price.by_trust)
    if plan.releases_metrics:
        found["scores"] = (
            f"{METRICS[plan.metrics].in_words} of held-out {plan.unit}s each round, noise multiplier "
            f"{plan.metrics_noise_multiplier:g}; every epsilon here pays for them"
        )
    if plan.metrics_groups:
        fewest = fewest_told(plan.metrics_noise_multiplier, len(price.sites))
        found["scores"] += (
            f"; by {counted(len(plan.metrics_groups), 'group')} and all others, of which those with fewer than about "
            f"{fewest:.0f} held-out {plan.unit}s over all sites are not told by themselves"
        )
    if outlook.signal_to_noise is not None and plan.private:
        found["signal"] = signal_words(outlook.signal_to_noise)
    if (sums := outlook.secure_sums) is not None:
        found["secure sums"] = (
            f"federation.aggregation=secure needs {sums.noise_in_average:.0%} of this noise in the average, as little "
            f"as with all records in one place, and takes {counted(sums.plan.num_rounds, 'round')} of one step"
        )
    return found | _solution(outlook)


def _solution(outlook: Outlook) -> dict[str, str]:
    """What was solved for, and the settings that use it."""
    plan, target = outlook.plan, f"epsilon {outlook.config.privacy.epsilon:g}"
    noise = f"privacy.noise_multiplier={plan.noise_multiplier:g}"
    match outlook.solved:
        case "noise":
            return {"solved": f"{plan.noise_multiplier:g} is the least noise for {target}", "use it": noise}
        case "rounds":
            most = f"{counted(plan.num_rounds, 'round')} of {counted(plan.local_steps, 'step')}"
            return {
                "solved": f"{most} is the most within {target}",
                "use it": f"federation.num_rounds={plan.num_rounds} {noise}",
            }
        case "sampling_rate":
            return {
                "solved": f"{plan.sampling_rate:g} is the largest sampling rate within {target}",
                "use it": f"privacy.sampling_rate={plan.sampling_rate:g} {noise}",
            }
    return {}


def sites(outlook: Outlook) -> Section:
    """What each site contributes and spends."""
    price, plan = outlook.price, outlook.plan
    rows = tuple(
        (
            name,
            f"{site.declared_size:,}",
            f"{site.weight:.0%}",
            _batch(site.expected_batch),
            f"{price.steps:,}",
            f"{site.expected_failures:.3g}" if plan.private else "-",
            *(
                epsilon_text(value) if plan.private else "none"
                for value in (price.epsilon, price.epsilon_rdp, price.epsilon_filter)
            ),
        )
        for name, site in price.sites.items()
    )
    return Section(
        title="Sites",
        headings=(
            "site",
            "declared\nsize",
            "weight",
            "mean\nbatch",
            "steps",
            "delta\nx size",
            "epsilon\nPLD",
            "epsilon\nRDP",
            "epsilon\nfilter",
        ),
        rows=rows,
        notes=_about_sites(outlook),
    )


def _about_sites(outlook: Outlook) -> tuple[str, ...]:
    price, plan = outlook.price, outlook.plan
    if not plan.private:
        return ("Nothing bounds epsilon at any site.",)
    notes = ["Rate, noise and steps are common to all sites, so epsilon is the same at each that takes every round."]
    size = price.sites[price.largest[0]].declared_size
    bound = f"delta must stay below 1 / {size:,} = {1 / size:.3g}"
    if len(price.sites) == 1:
        notes.append(f"There is one site: {bound}.")
    elif len(price.largest) == len(price.sites):
        notes.append(f"None dominates: all declare {size:,}, so {bound}.")
    else:
        who = ", ".join(price.largest)
        verb = "dominates" if len(price.largest) == 1 else "dominate"
        notes.append(f"{who} {verb}: most weight in the average, most expected failures, and {bound}.")
        noisiest = min(price.sites, key=lambda name: price.sites[name].declared_size)
        ratio = price.sites[noisiest].step_noise / price.sites[price.largest[0]].step_noise
        notes.append(f"The mean gradient of {noisiest} is the noisiest: {ratio:.3g} times the noise of {who}.")
    notes.append(
        f"delta x size: for how many {plan.unit}s, at most and on average, something may come out that could not "
        "without them; keep it far below 1."
    )
    notes.append(ABOUT_RDP.format(counts="epsilon by PLD"))
    notes.append("Epsilon by the filter is what the plan takes of a lifetime cap in a site's policy.")
    return tuple(notes)


def rounds(outlook: Outlook) -> Section:
    """Epsilon after each round."""
    price, plan = outlook.price, outlook.plan
    if not price.rounds:
        return Section()
    rows = tuple(
        (
            f"{one.round:,}{'*' if one.spare else ''}",
            f"{one.steps:,}",
            *(epsilon_text(value) for value in (one.pld, one.rdp, one.filter)),
        )
        for one in price.rounds
    )
    notes = []
    if any(one.spare for one in price.rounds):
        notes.append("* a spare round: charged only when an interrupted one is tried again.")
    if len(price.rounds) < plan.most_rounds:
        notes.append(f"{len(price.rounds)} of {plan.most_rounds:,} rounds are shown.")
    return Section(
        title="Epsilon after each round",
        headings=("round", "steps", "PLD", "RDP", "filter"),
        rows=rows,
        words=(),
        notes=tuple(notes),
    )


def accountants(outlook: Outlook) -> Section:
    """What each accountant would have said of the whole run."""
    price = outlook.price
    if not outlook.plan.private:
        return Section(title="What each accountant would say")
    rows = (
        ("PLD", epsilon_text(price.epsilon), "the run's figure: a bound for a plan that was fixed beforehand"),
        ("RDP", epsilon_text(price.epsilon_rdp), "a looser bound on the same, kept as an independent check"),
        (
            "Renyi filter",
            epsilon_text(price.epsilon_filter),
            f"the least lifetime cap with room for the plan (order {price.filter_order:g}); a ledger whose order was "
            "fixed for other runs takes more of its cap",
        ),
        (
            "starts anew each round",
            epsilon_text(price.epsilon_of_one_round),
            "WRONG for the run: one round only, as where the privacy engine is built again every round",
        ),
    )
    return Section(
        title="What each accountant would say of the whole run",
        headings=("accountant", "epsilon", "what it is"),
        rows=rows,
        words={0, 2},
    )


def what_if(outlook: Outlook) -> Section:
    """What other plans would cost."""
    plan, price = outlook.plan, outlook.price
    if not outlook.changes:
        return Section()
    planned = ("as planned", f"{plan.noise_multiplier:.4f}", "100%", epsilon_text(price.epsilon))
    rows = tuple(
        (
            change.what,
            "none suffices" if change.noise_needed is None else f"{change.noise_needed:.4f}",
            "-" if change.step_noise is None else f"{change.step_noise:.0%}",
            epsilon_text(change.same_noise_epsilon),
        )
        for change in outlook.changes
    )
    kept = f"{outlook.epsilon:.4g}"
    return Section(
        title="What if",
        headings=(
            "change",
            f"noise multiplier\nfor epsilon {kept}",
            "noise in a\nmean gradient",
            "epsilon at\nthis noise",
        ),
        rows=(planned, *rows),
        notes=(
            "A larger batch needs more noise in its sum but divides it by more, so its mean gradient can be better.",
        ),
    )


def bytes_and_time(outlook: Outlook) -> Section:
    """What a run moves and takes."""
    found, sites = outlook.forecast, outlook.price.sites
    if found is None:
        return Section(title="Bytes and time", notes=("Left out: no model was loaded. --time loads it.",))
    slowest = max(found.round_seconds, key=lambda site: found.round_seconds[site])
    down, up, total = size(found.bytes_down), size(found.bytes_up), size(found.bytes_total)
    step, one_round = duration(found.step_seconds[slowest]), duration(found.round_seconds[slowest])
    at = f" at {slowest}" if len(sites) > 1 else ""
    return Section(
        title="Bytes and time",
        headings=("what", "how much"),
        words={0, 1},
        rows=(
            ("adapter", f"{found.values:,} trained parameters, {_ways(down, up)} for each site and round"),
            ("the model", f"{size(found.model_bytes)} of memory"),
            ("whole run", f"{total} both ways for {counted(len(sites), 'site')} and {_rounds(outlook)}"),
            ("a step", f"at most about {step}{at}"),
            ("a round", f"at most about {one_round}{at}"),
            (
                "all training",
                f"at most about {duration(found.seconds_one_after_another)} where one machine is all sites",
            ),
        ),
        notes=(
            f"Times are for this machine ({outlook.device}) with every example at its full "
            f"{outlook.config.data.max_length} tokens{_full_users(outlook.plan)}; evaluation and start-up come on top.",
        ),
    )


def _ways(down: str, up: str) -> str:
    return f"{down} each way" if down == up else f"{down} down and {up} up"


def _full_users(plan: Plan) -> str:
    return f" and {counted(plan.records_per_user, 'record')} of each user" if plan.unit == "user" else ""


def _rounds(outlook: Outlook) -> str:
    return counted(outlook.plan.num_rounds, "round")


def _batch(expected: float) -> str:
    return f"{expected:,.0f}" if expected >= 100 else f"{expected:.3g}"


def policies(outlook: Outlook) -> list[Section]:
    """What each site would say."""
    return [_policy(verdict, outlook) for verdict in outlook.verdicts]


def _policy(verdict: Verdict, outlook: Outlook) -> Section:
    rows = tuple(
        (
            f"{reason_text(one.rule)} ({one.rule})",
            printable(one.asked or "-", 40),
            printable(one.allowed or "-", 60),
        )
        for one in verdict.broken
    )
    answer = "would accept the run" if verdict.allowed else "would refuse the run"
    lead = f"Asked by lead {spoken_start(verdict.lead)}"
    notes = [f"{lead} (assumed: --lead was not given)." if outlook.lead_assumed else f"{lead}"]
    if verdict.taken is not None and verdict.would_be is not None:
        notes.append(_budget(verdict))
    if rows:
        notes.append(_remedy(verdict))
    if verdict.note:
        notes.append(f"Note: {verdict.note}.")
    return Section(
        title=f"{verdict.site} {answer} ({verdict.policy})",
        headings=("broken rule", "asked for", "allowed"),
        rows=rows,
        words={0, 1, 2},
        notes=tuple(notes),
    )


def _budget(verdict: Verdict) -> str:
    """How much of the lifetime budget is taken."""
    of = "no lifetime cap" if math.isinf(verdict.max_epsilon) else f"a lifetime cap of {verdict.max_epsilon:g}"
    ledger = "Its ledger" if verdict.ledger == "read" else "No ledger beside the policy; a new one"
    left = "" if verdict.runs_left is None else f" Room for {counted(verdict.runs_left, 'run')} like this one."
    taken, would_be = epsilon_text(verdict.taken), epsilon_text(verdict.would_be)
    return f"{ledger}: epsilon {taken} taken, {would_be} with this run, by the filter; {of}.{left}"


def _remedy(verdict: Verdict) -> str:
    """What would be accepted instead."""
    ways = []
    if verdict.most_rounds:
        ways.append(counted(verdict.most_rounds, "round"))
    if verdict.least_noise is not None:
        ways.append(f"noise multiplier {verdict.least_noise:g}")
    if not ways:
        return "Neither fewer rounds nor more noise alone would be accepted."
    return f"Would be accepted: {' or '.join(ways)}, all else as planned."


def show_outlook(console: Console, outlook: Outlook) -> None:
    """Print everything that is known of a run."""
    say(f"fedtune plan {outlook.config.name}", style="bold", console=console)
    console.print(
        promise(outlook), style="bold" if outlook.guaranteed else "bold yellow", markup=False, highlight=False
    )
    show(
        console,
        [
            pairs(facts(outlook)),
            sites(outlook),
            _with_bars(rounds(outlook), outlook, width=console.width),
            accountants(outlook),
            what_if(outlook),
            bytes_and_time(outlook),
            *policies(outlook),
        ],
    )


def _with_bars(section: Section, outlook: Outlook, *, width: int) -> Section:
    """The section with a bar a round, as wide as there is room: solid to PLD, light to RDP, a stroke at the filter."""
    if not section.rows:
        return section
    room = width - sum(max(map(len, column)) + 2 for column in zip(*section.rows, strict=True)) - 14
    one_to_one = outlook.price.rounds
    largest = max(max(one.pld, one.rdp, one.filter) for one in one_to_one)
    scale = (max(10, min(room, _MOST_BAR)) - 1) / largest
    bars = [_bar(one, scale=scale) for one in one_to_one]
    return dataclasses.replace(
        section,
        headings=(*section.headings, "█ PLD ░ to RDP │ filter"),
        rows=tuple((*row, bar) for row, bar in zip(section.rows, bars, strict=True)),
        words={*section.words, len(section.headings)},
        whole={*section.whole, len(section.headings)},
    )


def _bar(one: RoundPrice, *, scale: float) -> str:
    whole, eighths = divmod(round(one.pld * scale * 8), 8)
    bar = "█" * whole + (_EIGHTHS[eighths] if eighths else "")
    bar += "░" * (round(one.rdp * scale) - len(bar))
    return bar.ljust(round(one.filter * scale)) + "│"
