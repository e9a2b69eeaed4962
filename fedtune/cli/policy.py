"""`fedtune site check-policy`: what a policy means, for people who are to sign it, and the ledger beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.cli.plain_words import promise_text
from fedtune.model.spec import NO_ADAPTER
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import AT_ONCE, Policy
from fedtune.report.from_ledger import lifetime_of, spending_json
from fedtune.show.budget_text import (
    Amount,
    Beside,
    Caution,
    amount_of,
    beside_of,
    cap_text,
    cautions_of,
    identity_json,
    rounded_down,
)
from fedtune.show.lines import printable
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, pairs, print_json, say, show
from fedtune.spec import ConfigError
from fedtune.words import counted, unbounded


def check_policy(file: Path, *, as_json: bool) -> None:
    """Print what the policy in `file` means.

    Raises:
        ConfigError: the policy is wrong, or its ledger was made for something else.
        RunError: its ledger cannot be trusted.
    """
    files = SiteFiles.of(file)
    policy, amount = files.policy, amount_of(files.policy)
    cautions = tuple(cautions_of(policy, amount, folder=file.parent))
    if not as_json:  # first, since the ledger beside it may not be what it should be
        say(f"Policy of site {policy.site} ({file})", style="bold")
        warnings = Section(
            title=counted(len(cautions), "warning"),
            headings=("key", "value, and what it means"),
            rows=[(caution.key, caution.text) for caution in cautions],
            words={0, 1},
        )
        meaning = _meaning(policy, amount, folder=file.parent)
        show(Console(), [meaning, warnings if cautions else Section(notes=["No warnings."])])
    beside = beside_of(files)
    if as_json:
        print_json(_to_json(policy, file, amount, cautions, beside))
    else:
        _show_beside(beside)
    for key, made_for, asked in beside.differences:
        bound = f"does not fit ledger {beside.path}, which was made for {made_for}; set it back"
        raise ConfigError(f"{file}: {key}", asked, bound)


def _to_json(
    policy: Policy, file: Path, amount: Amount, cautions: tuple[Caution, ...], beside: Beside
) -> dict[str, Any]:
    ledger: dict[str, Any] | None = None
    if beside.verified is not None:
        ledger = {
            **identity_json(beside.path, beside.verified),
            "fits": not beside.differences,
            "differences": [{"key": key, "ledger": made, "policy": asked} for key, made, asked in beside.differences],
            "spending": spending_json(beside.verified),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(file),
        "sha256": policy.digest(),
        "policy": policy.to_json(),
        "amount": amount,
        "warnings": cautions,
        "ledger": ledger,
    }


def _meaning(policy: Policy, amount: Amount, *, folder: Path) -> Section:
    """Every rule as a sentence."""
    told = {
        "whose records": _whose(policy),
        "who may ask": _who(policy),
        "for what": _for_what(policy),
        "limits of a run": _limits(policy),
        "budget": _budget(policy),
        "which comes to": _comes_to(policy, amount),
        "what leaves": _leaves(policy),
        "what you state": _stated(policy),
        "files": _files(policy, folder),
    }
    return pairs({about: "\n".join(sentences) + "\n" for about, sentences in told.items()})


def _show_beside(beside: Beside) -> None:
    say("")
    if beside.verified is None:
        say(f"No ledger yet at {beside.path}; it is made when the site starts.")
        return
    figures, cap = lifetime_of(beside.verified), beside.verified.history.cap
    runs = figures.reference_runs_left
    fits = "" if runs is None else f", enough for {counted(runs, 'run')} like the reference"
    say(
        f"Ledger {beside.path}: spent epsilon {epsilon_text(figures.epsilon)} of {cap_text(cap)}, "
        f"left for new runs {rounded_down(unbounded(figures.left))}{fits}."
    )
    if figures.frozen:
        say("It is FROZEN: all training on this population has ended for ever.")
    if not figures.has_guarantee:
        say("NO GUARANTEE: some of its runs had no noise, or noise from a seed.", style="bold yellow")
    if beside.differences:
        say("It does not fit this policy: the site would not start.", style="bold yellow")
        for key, made_for, asked in beside.differences:
            say(f"  {key}: made for {printable(made_for)}, the policy says {printable(asked)}")


def _whose(policy: Policy) -> Iterator[str]:
    unit = policy.population.unit
    yield f"The population {policy.population.name}; all its data sets share one budget."
    if unit == "record":
        yield "Protected is each single record. A person with several records is protected less: the epsilons add up."
    else:
        yield "Protected is each person with all records of theirs here. Each record must name its one person."
        yield f"A step looks at no more than {counted(policy.limits.max_records_per_user, 'record')} of one person."
    if calendar := policy.population.arrivals:
        yield f"People arrive by the {calendar}: a run charges only those who came in a {calendar} that it admits, and"
        yield f"the budget below is that of each {calendar}'s people. When somebody came is this site's word."
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
    if adapters := [one for one in allow.adapters if one != NO_ADAPTER]:
        parts = _listed(allow.target_modules)
        yield f"Adapters ({_listed(adapters)}) up to rank {allow.max_rank} on the model's parts {parts}."
    if NO_ADAPTER in allow.adapters:
        yield "A model without a base, which is its head alone."
    yield "The task head may be trained, too." if allow.train_head else "No task head."
    models = [model if len(model) <= 16 else f"{model[:16]}..." for model in allow.base_models]
    yield f"Base models, by the SHA-256 of their weights: {_listed(models)}"


def _limits(policy: Policy) -> Iterator[str]:
    limits = policy.limits
    unit, steps = policy.population.unit, "noisy steps" if limits.min_noise_multiplier > 0 else "steps"
    yield f"Noise of at least {limits.min_noise_multiplier:g} times the most that one {unit} can move a step's sum."
    yield f"At most {limits.max_sampling_rate * 100:g} % of the declared size in a step."
    yield (
        f"At most {limits.max_rounds} rounds of {limits.max_local_steps} {steps}; clip norm from "
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
            f"For life: epsilon {budget.max_epsilon:g} at delta {budget.delta:g}, over all runs and leads. "
            f"{promise_text(policy.population.unit, epsilon=budget.max_epsilon, delta=budget.delta)}"
        )
    yield f"For one run: epsilon {cap_text(budget.max_epsilon_per_run)}."
    promise = policy.promise
    if promise.noise_factor != 1:
        yield f"Each run is trained with {promise.noise_factor:g} times the noise that it asks for."
    if not math.isinf(promise.epsilon_per_run):
        yield f"A run that would cost more than epsilon {promise.epsilon_per_run:g} gets as much noise as it takes."
    yield f"For one {budget.period} (UTC): epsilon {cap_text(budget.max_epsilon_per_period)}."


def _comes_to(policy: Policy, amount: Amount) -> Iterator[str]:
    reference = policy.budget.reference

    def fits(count: int) -> str:
        return f"{counted(count, 'such run')} {'fits' if count == 1 else 'fit'}"

    yield (
        f"A run like your reference ({reference.steps} noisy steps, sampling rate {reference.sampling_rate:g}, noise "
        f"multiplier {reference.noise_multiplier:g}) costs epsilon {epsilon_text(amount.reference_pld)} on its own "
        "(by PLD, a proof for one run alone)."
    )
    if amount.runs_in_lifetime is not None:
        yield f"{fits(amount.runs_in_lifetime)} into the lifetime cap, one after another."
    if amount.runs_in_period is not None:
        yield f"{fits(amount.runs_in_period)} into one {policy.budget.period}."
    yield (
        "Over all runs the site counts by a filter, which holds even when every next run is chosen after seeing "
        f"earlier results: {epsilon_text(amount.reference_filter)} after the first such run, of which "
        f"{epsilon_text(amount.fixed_part)} is a fixed part that is due only once. A ledger made with this policy "
        f"would fix the filter's order at {amount.order:g}."
    )


def _leaves(policy: Policy) -> Iterator[str]:
    releases = policy.releases
    yield "Updates: adapters with noise, paid for from the budget." if releases.updates else "No updates."
    yield {
        "none": "No scores of the site's records.",
        "noised": "Scores of held-out records, with noise and paid for, where a run plans for them.",
    }[releases.metrics]
    yield "Signed receipts and reasons of refusal, made from requests, policy and ledger alone."
    yield (
        f"Answers leave at multiples of {releases.reply_after_s:g} s after their request."
        if releases.reply_after_s
        else f"Answers leave at once: {AT_ONCE}."
    )
    yield "Never: records, their true number, exact scores, file names, error messages."


def _stated(policy: Policy) -> Iterator[str]:
    if policy.simulated:
        yield "Nothing: in a simulation nobody is asked. Reports assume that nobody is among two sites' records."
        return
    yield "No software can check this; reports show it as stated by the site."
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
