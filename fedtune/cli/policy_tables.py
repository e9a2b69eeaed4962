"""What a policy means, for people who are to sign it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli import ledger_json
from fedtune.cli.ledger_tables import rounded_down
from fedtune.cli.plain_words import cap_text, counted, odds_text, printable
from fedtune.cli.policy_check import Amount, Beside, Caution
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.policy import AT_ONCE, Policy


def show_policy(console: Console, file: Path, policy: Policy, amount: Amount) -> None:
    """Every rule as a sentence."""
    console.print(Text(f"Policy of site {policy.site} ({file})\n", style="bold"), soft_wrap=True)
    table = Table(show_header=False, show_lines=True)
    table.add_column("about", min_width=10, style="bold")
    table.add_column("meaning", overflow="fold", ratio=1)
    for about, sentences in (
        ("whose records", _whose(policy)),
        ("who may ask", _who(policy)),
        ("for what", _for_what(policy)),
        ("limits of a run", _limits(policy)),
        ("budget", _budget(policy)),
        ("which comes to", _comes_to(policy, amount)),
        ("what leaves", _leaves(policy)),
        ("what you state", _stated(policy)),
        ("files", _files(policy, file.parent)),
    ):
        table.add_row(about, Text("\n".join(sentences), overflow="fold"))
    console.print(table)


def show_cautions(console: Console, cautions: Sequence[Caution]) -> None:
    """What to think twice about."""
    if not cautions:
        console.print("\nNo warnings.")
        return
    table = Table(title=f"\n{counted(len(cautions), 'warning')}", title_justify="left", title_style="bold yellow")
    table.add_column("key", overflow="fold")
    table.add_column("value, and what it means", ratio=1)
    for caution in cautions:
        table.add_row(Text(caution.key), Text(caution.text))
    console.print(table)


def show_beside(console: Console, beside: Beside) -> None:
    """What the policy's ledger says."""
    console.print()
    if beside.verified is None:
        console.print(Text(f"No ledger yet at {beside.path}; it is made when the site starts."), soft_wrap=True)
        return
    figures = ledger_json.figures_of(beside.verified)
    left = ledger_json.epsilon_left(beside.verified.history)
    runs = ledger_json.reference_runs_left(beside.verified.history)
    fits = "" if runs is None else f", enough for {counted(runs, 'run')} like the reference"
    console.print(
        Text(
            f"Ledger {beside.path}: spent epsilon {epsilon_text(figures.epsilon)} of {cap_text(figures.max_epsilon)}, "
            f"left for new runs {rounded_down(left)}{fits}."
        ),
        soft_wrap=True,
    )
    if figures.frozen:
        console.print("It is FROZEN: this population takes part in nothing any more.")
    if not ledger_json.has_guarantee(figures):
        console.print("[bold yellow]NO GUARANTEE:[/bold yellow] some of its runs had no noise, or noise from a seed.")
    if beside.differences:
        console.print("[bold yellow]It does not fit this policy:[/bold yellow] the site would not start.")
        for key, made_for, asked in beside.differences:
            console.print(Text(f"  {key}: made for {printable(made_for)}, the policy says {printable(asked)}"))


def _whose(policy: Policy) -> Iterator[str]:
    unit = policy.population.unit
    yield f"The population {policy.population.name}; all its data sets share one budget."
    if unit == "record":
        yield "Protected is each single record. A person with several records is protected less: the epsilons add up."
    else:
        yield "Protected is each person with all records of theirs here. Each record must name its one person."
        yield f"A step looks at no more than {counted(policy.limits.max_records_per_user, 'record')} of one person."
    for dataset in policy.dataset:
        yield f"Data set {dataset.id}: published as {counted(dataset.declared_size, unit)}, whatever the true number."


def _who(policy: Policy) -> Iterator[str]:
    leads = policy.allow.leads
    if not leads:
        yield "Nobody: no lead is listed."
        return
    yield f"Only {counted(len(leads), 'lead')}, whose requests must be signed with the key"
    yield from leads


def _for_what(policy: Policy) -> Iterator[str]:
    allow = policy.allow
    yield f"Tasks: {_listed(allow.tasks)}."
    yield f"Adapters up to rank {allow.max_rank} on the model's parts {_listed(allow.target_modules)}."
    yield "The task head may be trained, too." if allow.train_head else "No task head."
    models = [model if len(model) <= 16 else f"{model[:16]}..." for model in allow.base_models]
    yield f"Base models, by the SHA-256 of their weights: {_listed(models)}"


def _limits(policy: Policy) -> Iterator[str]:
    limits = policy.limits
    unit = policy.population.unit
    yield f"Noise of at least {limits.min_noise_multiplier:g} times the most that one {unit} can move a step's sum."
    yield f"At most {limits.max_sampling_rate * 100:g} % of the declared size in a step."
    yield (
        f"At most {limits.max_rounds} rounds of {limits.max_local_steps} noisy steps; clip norm from "
        f"{limits.min_grad_norm:g} to {limits.max_grad_norm:g}."
    )
    yield f"Larger adapter values than {limits.max_adapter_value:g} are brought down to it, sent or trained."
    yield (
        "Machines whose per-example gradients are inexact are accepted: the bound on one "
        f"{unit}'s influence is then measured, not proved."
        if policy.allow.inexact_gradients
        else "A machine whose per-example gradients depend on the rest of the batch trains nothing."
    )
    yield f"An accepted run holds its budget for {limits.run_expires_after_days:g} days, unless it ends earlier."


def _budget(policy: Policy) -> Iterator[str]:
    budget = policy.budget
    if math.isinf(budget.max_epsilon):
        yield "For life: no cap. Nothing is promised."
    else:
        yield (
            f"For life: epsilon {budget.max_epsilon:g} at delta {budget.delta:g}, over all runs and leads. Whatever "
            f"anybody concludes from all that ever leaves, one {policy.population.unit} more or less changes the odds "
            f"of it at most {odds_text(budget.max_epsilon)}-fold, but for a probability of delta."
        )
    yield f"For one run: epsilon {cap_text(budget.max_epsilon_per_run)}."
    yield f"For one {budget.period} (UTC): epsilon {cap_text(budget.max_epsilon_per_period)}."


def _comes_to(policy: Policy, amount: Amount) -> Iterator[str]:
    reference = policy.budget.reference
    yield (
        f"A run like your reference ({reference.steps} noisy steps, sampling rate {reference.sampling_rate:g}, noise "
        f"multiplier {reference.noise_multiplier:g}) costs epsilon {epsilon_text(amount.reference_pld)} on its own "
        "(by PLD, a proof for one run alone)."
    )
    if amount.runs_in_lifetime is not None:
        yield f"{_runs(amount.runs_in_lifetime)} into the lifetime cap, one after another."
    if amount.runs_in_period is not None:
        yield f"{_runs(amount.runs_in_period)} into one {policy.budget.period}."
    yield (
        "Over all runs the site counts by a filter, which holds even when every next run is chosen after seeing "
        f"earlier results: {epsilon_text(amount.reference_filter)} after the first such run, of which "
        f"{epsilon_text(amount.fixed_part)} is a fixed part that is due only once. A ledger made with this policy "
        f"would fix the filter's order at {amount.order:g}."
    )


def _runs(count: int) -> str:
    return f"{counted(count, 'such run')} {'fits' if count == 1 else 'fit'}"


def _leaves(policy: Policy) -> Iterator[str]:
    releases = policy.releases
    yield "Updates: adapters with noise, paid for from the budget." if releases.updates else "No updates."
    yield (
        "Scores of held-out records, with noise and paid for, where a run plans for them."
        if releases.metrics == "noised"
        else "No scores of the site's records."
    )
    yield "Signed receipts and reasons of refusal, made from requests, policy and ledger alone."
    yield (
        f"Answers leave at multiples of {releases.reply_after_s:g} s after their request."
        if releases.reply_after_s
        else f"Answers leave at once: {AT_ONCE}."
    )
    yield "Never: records, their true number, exact scores, file names, error messages."


def _stated(policy: Policy) -> Iterator[str]:
    yield "No software can check this; reports show it as asserted by the site."
    yield (
        "Nobody of this population is among another site's records."
        if policy.asserted.no_person_at_another_site
        else "Some people of this population may be among other sites' records."
    )


def _files(policy: Policy, folder: Path) -> Iterator[str]:
    for name, file in (("ledger", policy.ledger), ("site key", policy.site_key), ("anchor", policy.anchor)):
        state = "" if (folder / file).is_file() else " (not there yet)"
        yield f"{name}: {folder / file}{state}" if file else f"{name}: none"
    for dataset in policy.dataset:
        state = "" if (folder / dataset.path).exists() else " (not found on this machine)"
        yield f"records of {dataset.id}: {dataset.path}{state}" if dataset.path else f"records of {dataset.id}: none"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
