"""A plan's figures as sentences and tables, the same on the terminal and on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedtune.cli.plain_words import contribution, counted
from fedtune.cli.plan_outlook import Outlook
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.plan import Plan

NOT_PRIVATE = "No epsilon is promised: privacy=none adds no noise, and the sites' records are not protected."
SEEDED = "NO GUARANTEE: the noise would come from the configured seed, and who knows it can take the noise away."


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One table with what is to be said about it; a table without rows is not shown.

    Attributes:
        words: numbers of the columns that hold words, and stand on the left.
    """

    title: str
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    words: frozenset[int] = frozenset({0})
    notes: tuple[str, ...] = ()


def promise(outlook: Outlook) -> str:
    """The one sentence that matters most."""
    if not outlook.plan.private:
        return NOT_PRIVATE
    plan, price = outlook.plan, outlook.price
    rounds = counted(plan.num_rounds, "round") + (f" and {plan.spare_rounds} spare" if plan.spare_rounds else "")
    bound = f"epsilon at most {epsilon_text(price.epsilon)} at delta {plan.delta:g} for each {plan.unit}"
    return f"{SEEDED if not outlook.guaranteed else ''} After {rounds}: {bound}, at every site.".strip()


def facts(outlook: Outlook) -> dict[str, str]:
    """The run in a few lines."""
    config, plan, price = outlook.config, outlook.plan, outlook.price
    found = {
        "model": config.model.path,
        **({"SHA-256": outlook.model_sha256} if outlook.model_sha256 else {}),
        "data": f"{config.data.dataset} at {counted(len(price.sites), 'site')}; no record was read",
        "training": f"{counted(plan.num_rounds, 'round')} of {counted(plan.local_steps, 'step')}, "
        f"sampling rate {plan.sampling_rate:.4g}",
        **({"contribution": contribution(plan)} if plan.unit == "user" else {}),
    }
    if plan.spare_rounds:
        found["training"] += f"; {counted(plan.spare_rounds, 'spare round')} paid for beforehand"
    if plan.private:
        how = f"the least for epsilon {config.privacy.epsilon:g}" if outlook.calibrated else "given"
        found["noise"] = f"multiplier {plan.noise_multiplier:g} ({how}), clip norm {plan.max_grad_norm:g}"
    if plan.releases_metrics:
        noise = f"noise multiplier {plan.metrics_noise_multiplier:g}"
        found["scores"] = (
            f"noised scores of held-out {plan.unit}s each round, {noise}; every epsilon here pays for them"
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
    notes.append(f"delta x size: how many {plan.unit}s the guarantee may fail, at the very worst; keep it far below 1.")
    return tuple(notes)


def rounds(outlook: Outlook) -> Section:
    """Epsilon after each round."""
    price, plan = outlook.price, outlook.plan
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
        words=frozenset(),
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
        words=frozenset({0, 2}),
    )


def what_if(outlook: Outlook) -> Section:
    """What other plans would cost."""
    plan, price = outlook.plan, outlook.price
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
        rows=(planned, *rows) if rows else (),
        notes=(
            "A larger batch needs more noise in its sum but divides it by more, so its mean gradient can be better.",
        ),
    )


def bytes_and_time(outlook: Outlook) -> Section:
    """What a run moves and takes."""
    found, sites = outlook.forecast, outlook.price.sites
    if found is None:
        return Section(title="Bytes and time", notes=("Left out: no model was loaded.",))
    slowest = max(found.round_seconds, key=lambda site: found.round_seconds[site])
    each, total = bytes_text(found.bytes_each_way), bytes_text(found.bytes_total)
    step, one_round = duration(found.step_seconds[slowest]), duration(found.round_seconds[slowest])
    at = f" at {slowest}" if len(sites) > 1 else ""
    return Section(
        title="Bytes and time",
        headings=("what", "how much"),
        words=frozenset({0, 1}),
        rows=(
            ("adapter", f"{found.values:,} trained parameters, {each} each way for each site and round"),
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


def _full_users(plan: Plan) -> str:
    return f" and {counted(plan.records_per_user, 'record')} of each user" if plan.unit == "user" else ""


def bytes_text(count: float) -> str:
    """`1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `5 h`: about as exact as an upper estimate is."""
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rounds(outlook: Outlook) -> str:
    return counted(outlook.plan.num_rounds, "round")


def _batch(expected: float) -> str:
    return f"{expected:,.0f}" if expected >= 100 else f"{expected:.3g}"
