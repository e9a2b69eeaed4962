"""Checks of a site's own files: certificate, policy, base models, data, ledger and budget."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.data.bad_rows import Faults
from fedtune.data.formats import describe_path
from fedtune.data.records import iter_usable_records
from fedtune.data.values import SEVERAL_USERS
from fedtune.federation import policy_dry_run
from fedtune.federation.policy_dry_run import DryRun
from fedtune.formatting import format_key_start
from fedtune.ops.doctor.check import (
    REFUSED,
    DoctorCheck,
    PrivateLog,
    build_check_from_error,
    build_failed_check,
    build_passed_check,
    build_skipped_check,
    build_warning,
)
from fedtune.ops.kits.certificates import SOON_DAYS, check_private
from fedtune.ops.kits.kit_file import Kit, find_model_store_path, require_model_reader
from fedtune.ops.kits.models import (
    find_installed_model,
    install_model,
    is_built_in_model,
    list_license_files,
    verify_model,
)
from fedtune.privacy import accountant, events
from fedtune.privacy.ledger import run_acceptance
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.history import History
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.privacy.release import Reason, Refused, format_requested_and_allowed
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Dataset, Policy
from fedtune.sites.shared_settings import derive_settings_for_own_site
from fedtune.spec import ConfigError, DataError, RunError
from fedtune.tasks.registry import TASKS, find_task

_PAGE = "docs/site_policy.md"
FEW, MANY = 0.5, 2.0
"""Bounds for the number of records (or users) divided by the declared size, outside of which the doctor warns."""
FEW_DATED = 0.5  # fraction of users with a readable date of arrival, below which the doctor warns


def check_site_certificate(kit: Kit, now: datetime) -> DoctorCheck:
    """Check the site's certificate: key, issuer and days until it expires."""
    name = "certificate"
    try:
        certificate = kit.check_certificate(now)
    except ConfigError as error:
        fix = "Unzip the kit made from this folder's join_request.json, or send the lead that request again."
        return build_check_from_error(name, error, fix=fix)
    validity = f"valid until {certificate.not_after:%Y-%m-%d}, {certificate.count_days_left(now)} days from now"
    if certificate.count_days_left(now) < SOON_DAYS:
        fix = f"Ask the lead for a new kit (`fedtune provision renew-site {kit.site}`), and unzip it here."
        return build_warning(name, validity, fix=fix)
    return build_passed_check(name, f"belongs to this site's key; {validity}")


def check_matching_names(kit: Kit, policy: Policy) -> DoctorCheck:
    """Check that the kit and the policy name the same site."""
    if kit.site == policy.site:
        return build_passed_check("site's name", f"{policy.site}, in kit and policy")
    problem = f"the kit is for {kit.site}, but the policy is for {policy.site}"
    return build_failed_check("site's name", problem, fix="Use the kit for this policy's site.")


def check_lead(kit: Kit, policy: Policy) -> DoctorCheck:
    """Check that the policy allows runs of the federation's lead."""
    name = "lead"
    if kit.lead in policy.allow.leads:
        return build_passed_check(name, f"the kit's lead {format_key_start(kit.lead)} is one of the policy's leads")
    line = ", ".join(f'"{key}"' for key in (*policy.allow.leads, kit.lead))
    problem = f"the policy does not allow the kit's lead {format_key_start(kit.lead)}: all of its requests are refused"
    return build_failed_check(name, problem, fix=f"If this is the lead's key, add under [allow]: leads = [{line}]")


def check_base_models(kit: Kit, policy: Policy) -> Iterator[DoctorCheck]:
    """Check that each base model in the policy is installed and unchanged, by hashing its files."""
    known = {model.sha256: model for model in kit.model}
    for sha256 in policy.allow.base_models:
        name = f"base model {known[sha256].name}" if sha256 in known else f"base model {sha256[:12]}"
        if sha256 == UNVERIFIED:
            finding = "the policy accepts runs that do not name their model"
            fix = 'Remove "unverified" from allow.base_models, except in a test federation.'
            yield build_warning(name, finding, fix=fix)
        elif sha256 not in known and not find_model_store_path(kit.folder, sha256).is_dir():
            finding = "the policy allows it, but no run of this federation may use it"
            yield build_warning(name, finding, fix="Remove it from allow.base_models, or ask the lead to add it.")
        else:
            yield _check_installed(kit, sha256, name=name, license=known[sha256].license if sha256 in known else "")
    for model in kit.model:
        if model.sha256 not in policy.allow.base_models:
            finding = f"runs may use it, but the policy does not allow it (SHA-256 {model.sha256})"
            yield build_passed_check(f"base model {model.name}", finding)
    if not policy.allow.base_models:
        finding = "the policy allows no base model, so every request is refused"
        fix = "Add the SHA-256 of each model that you accept to allow.base_models in site.toml."
        yield build_failed_check("base models", finding, fix=fix)


def _check_installed(kit: Kit, sha256: str, *, name: str, license: str) -> DoctorCheck:
    place = find_model_store_path(kit.folder, sha256)
    if not place.is_dir():
        if is_built_in_model(sha256):
            return build_passed_check(name, "a tiny random model for tests, which needs no installation")
        fix = "Get its files and run `fedtune site doctor ... --import-model PATH`, with the folder or GGUF file."
        return build_failed_check(name, f"is not installed (SHA-256 {sha256})", fix=fix)
    try:
        verify_model(kit.folder, sha256)
    except (ConfigError, OSError) as error:
        why = "its files cannot be read" if isinstance(error, OSError) else error.bound
        fix = "Import it again with `fedtune site doctor ... --import-model PATH`, and find the cause of the change."
        return build_failed_check(name, f"in {place}: {why}", fix=fix)
    try:
        require_model_reader(kit.folder, sha256)
    except ConfigError as error:
        fix = "Install the package named here in the environment of the site's process."
        return build_check_from_error(name, error, fix=fix)
    papers = ", ".join(list_license_files(kit.folder, sha256)) or "no license file is installed"
    if not license:
        fix = "Remove it from allow.base_models, or ask the lead to add it to the federation."
        return build_warning(name, "installed and unchanged, but no run of this federation may use it", fix=fix)
    return build_passed_check(name, f"installed and unchanged; license {license} ({papers})")


def import_base_model(model: Path, kit: Kit) -> DoctorCheck:
    """Install a base model with `install_model` and report the result."""
    installed, is_new = install_model(model, kit)
    state = "is installed now" if is_new else "was already installed, and is unchanged"
    place = find_model_store_path(kit.folder, installed.sha256)
    return build_passed_check("import", f"{installed.name} {state}, in {place}")


def measure_largest_model_bytes(kit: Kit, policy: Policy) -> int | None:
    """Return the size in bytes of the largest installed base model; None if no model is installed."""
    sizes = []
    for sha256 in policy.allow.base_models:
        try:
            sizes.append(sum(file.stat().st_size for file in find_installed_model(kit.folder, sha256).iterdir()))
        except (ConfigError, OSError):
            continue
    return max(sizes, default=None)


def check_data_sets(policy: Policy, folder: Path, log: PrivateLog) -> Iterator[DoctorCheck]:
    """Check that the tasks in the policy are installed and that every record of each data set can be read."""
    for task in policy.allow.tasks:
        if find_task(task) is None:
            fix = "Install its package in the environment of the site's process, or take it out of allow.tasks."
            yield build_failed_check(f"task {task}", "is not installed at this site", fix=fix)
    for dataset in policy.dataset:
        yield _check_data_set(dataset, folder, policy, log=log)


def _check_data_set(dataset: Dataset, folder: Path, policy: Policy, *, log: PrivateLog) -> DoctorCheck:
    tasks, unit = policy.allow.tasks, policy.population.unit
    name, block = f"data {dataset.id}", f"[[dataset]] {dataset.id} in site.toml"
    if not dataset.path:
        return build_failed_check(name, "has no file", fix=f"Set `path` in {block}.")
    path = folder / dataset.path
    if other := describe_path(path):
        problem = f"is {other}" if path.exists() else "its file is missing, or this account cannot read it"
        fix = f"Set `path` in {block} to one file of records, or to a folder of a saved Hugging Face set."
        return build_failed_check(name, problem, fix=fix)
    known = [task for task in tasks if task in TASKS]  # the check of the tasks has loaded those of installed packages
    served = {task for task in known if any({*roles} <= {*dataset.columns} for roles in TASKS[task].layouts)}
    if not served:
        every = [(task, roles) for task in known for roles in TASKS[task].layouts]
        texts = [pair for pair in every if not any(pair[0] == task and {*pair[1]} < {*roles} for task, roles in every)]
        expected = " or ".join(f"{', '.join(roles)} ({task})" for task, roles in texts)
        fix = f"Set `columns` in {block} so that each role has its column: {expected or 'of a task in allow.tasks'}."
        return build_failed_check(name, "its columns do not match the roles of any allowed task", fix=fix)
    try:
        count, num_dated, unreadable, is_much = _count_units(path, dataset, unit=unit)
    except DataError as error:
        finding, fix = _explain_unreadable_file(error, dataset, name=name, block=block, log=log, is_whole=True)
        return build_failed_check(name, finding, fix=fix)
    if unreadable:
        finding, fix = _explain_unreadable_file(unreadable, dataset, name=name, block=block, log=log)
        if is_much:
            return build_failed_check(name, finding, fix=fix)
    if not count:
        return build_failed_check(name, "contains no record", fix=f"Set `path` in {block} to the file of records.")
    if count < dataset.min_units:
        fix = f"Wait for more records, lower min_units in {block}, or take the data set out of site.toml."
        return build_failed_check(name, f"fewer {unit}s than min_units", fix=fix)
    if unreadable:
        return build_warning(name, f"{finding}; runs skip such records", fix=fix)
    if policy.population.arrivals and num_dated < FEW_DATED * count:
        whose = "fewer than half of the users have" if num_dated else "no user has"
        problem = f"every record can be read; {whose} a readable date in column {dataset.columns['arrival']!r}"
        fix = "Write the dates as 2026-03-14 or 2026-03 before the first run that admits cohorts."
        return build_warning(name, f"{problem} (users without a date belong to the oldest cohort)", fix=fix)
    lacking = ", ".join(task for task in tasks if task not in served)
    return _compare_declared_size(name, count / dataset.declared_size, units=f"{unit}s", lacking=lacking, block=block)


def _count_units(path: Path, dataset: Dataset, *, unit: str) -> tuple[int, int, DataError | None, bool]:
    """Read every record of a data set.

    Returns the number of units, for users the number of users with a date, the error for the rows that runs skip, and
    whether these are a large part of the file.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    faults, dated, used = Faults(), dict[str, bool](), 0
    for record in iter_usable_records(path, dataset.columns, faults=faults, lenient=False):
        used += 1
        if unit == "user":
            user = record.fields["user"]
            dated[user] = dated.get(user, False) or bool(record.fields.get("arrival"))
    is_much = faults.summarize(used=used).exceeds_threshold
    return len(dated) if unit == "user" else used, sum(dated.values()), faults.build_error(), is_much


def _explain_unreadable_file(
    error: DataError, dataset: Dataset, *, name: str, block: str, log: PrivateLog, is_whole: bool = False
) -> tuple[str, str]:
    """Return the finding and the fix for a data file that is entirely unreadable (`is_whole`) or has unreadable
    records, without the text of the error.

    The text may reveal the number of records through a line number, or quote the first record as column names if the
    file has no header.
    """
    where = log.write_entry(f"{name}: {error}")
    if error.value == SEVERAL_USERS:
        fix = "Remove records of several users, or assign each to one user; an id must not contain , ; or |."
        return f"a record names several users{where}", fix
    # The key of the error contains the column's name in the policy, if the error is about a column.
    column = next((f"column {column!r}" for column in dataset.columns.values() if repr(column) in error.key), "")
    if error.value == "absent":
        fix = f"Name an existing column in `columns` of {block}; a CSV file must begin with a header."
        return f"{column} is not in every record{where}", fix
    if is_whole:
        fix = f"Set `path` in {block} to a file in UTF-8, of a type listed in docs/own_data.md."
        return f"the file cannot be read{where}", fix
    fix = "Fix or remove that record: each must be a complete JSON object or CSV row, in UTF-8, without blank values."
    return f"a record cannot be read{f' at {column}' if column else ''}{where}", fix


def _compare_declared_size(name: str, share: float, *, units: str, lacking: str, block: str) -> DoctorCheck:
    """Build the check that compares the number of records or users with the declared size, without exact numbers."""
    if share < FEW:
        fix = f"Check that the file is complete; otherwise declare a smaller size in {block}."
        return build_warning(name, f"every record can be read; far fewer {units} than the declared size", fix=fix)
    if share > MANY:
        fix = f"Check that it is the right file; otherwise declare a larger size in {block}."
        return build_warning(name, f"every record can be read; far more {units} than the declared size", fix=fix)
    finding = f"every record can be read; enough {units} for the declared size"
    if lacking:
        fix = f"Add the roles to `columns` in {block}, or take the task out of allow.tasks."
        return build_warning(name, f"{finding}; its columns do not match the roles of task {lacking}", fix=fix)
    return build_passed_check(name, finding)


def report_unexpected_error(name: str, error: Exception, log: PrivateLog) -> DoctorCheck:
    """Build the check for an unexpected error; the error's text goes to the private log, because it may contain
    records.
    """
    where = log.write_entry(f"{name}: {''.join(traceback.format_exception(error))}")
    problem = f"could not be checked ({type(error).__name__}){where}"
    fix = "Report this as a bug; read the text of the log before you share it."
    return build_failed_check(name, problem, fix=fix, exit_code=1)


def check_ledger_state(files: SiteFiles) -> tuple[DoctorCheck, History | None]:
    """Check that the ledger is intact, belongs to this site and can be charged; if so, also return its history."""
    name = "ledger"
    for path in (files.ledger, *([files.anchor] if files.anchor is not None else [])):
        if os.path.lexists(path) and not os.access(path, os.R_OK | os.W_OK):
            # A permission problem, not a damaged ledger.
            fix = "Give it to the account of the site's process (see the lines `files`)."
            problem = f"this account cannot read or write {path}, so training is not possible"
            return build_failed_check(name, problem, fix=fix), None
    try:
        verified = files.verify_ledger()
        if verified is None and files.anchor is not None and files.anchor.is_file():
            newest = Head.read(files.anchor).sequence
            raise RunError(f"{files.ledger} is missing, but its anchor covers {newest} events")
    except ConfigError as error:  # a ledger of another version: intact, and the error contains the remedy
        return build_check_from_error(name, error, fix=f"Do not train, and restore it as {_PAGE} describes."), None
    except RunError as error:
        fix = f"Do not train, and restore it as {_PAGE} describes; with a new ledger, the budget could be spent twice."
        return build_failed_check(name, str(error), fix=fix), None
    if verified is None:
        return build_passed_check(name, "no ledger yet; the first start creates it"), History.empty(files.policy)
    history = verified.history
    if wrong := next(_find_ledger_problems(files, history), None):
        return wrong, None
    rollback = "and covered by its anchor" if verified.anchor_sequence else "but not covered by an anchor"
    return build_passed_check(name, f"complete and signed, {rollback}"), history


def _find_ledger_problems(files: SiteFiles, history: History) -> Iterator[DoctorCheck]:
    """Yield the problems of an intact ledger that prevent training."""
    name = "ledger"
    for key, made_for, says in history.opening.list_differences(files.policy):
        fix = f"Restore the old value of {key} in site.toml: it is fixed for the ledger's lifetime."
        yield build_failed_check(name, f"was created for {key} = {made_for}, but the policy says {says}", fix=fix)
    if files.anchor is not None and not files.anchor.is_file() and history.count_total_charges():
        fix = f"Restore the anchor, or create a new one with `fedtune ledger anchor` ({_PAGE})."
        yield build_failed_check(name, "its anchor is missing although the ledger has charges", fix=fix)
    if history.furthest_doubt is not None:
        fix = f"Restore the newest backup and run `fedtune ledger restore` ({_PAGE})."
        problem = (
            f"in doubt: a receipt refers to event {history.furthest_doubt.sequence}, which the "
            "ledger lacks; training is not possible"
        )
        yield build_failed_check(name, problem, fix=fix)
    if history.is_frozen:
        fix = "This is permanent by design; ask the lead to revoke this site if it has no other population."
        yield build_failed_check(name, "frozen: all training on this population has ended permanently", fix=fix)


def check_site_key(files: SiteFiles, history: History | None) -> DoctorCheck:
    """Check that the site's signing key exists, is private, and is the ledger's original key."""
    name, path, command = "site key", files.site_key, files.policy.key_command
    if not (command or path.is_file()):
        if not files.ledger.is_file():
            return build_passed_check(name, "no key yet; it is created with the ledger")
        fix = "Restore it from its backup: the ledger needs its original key."
        return build_failed_check(name, f"{path} is missing", fix=fix)
    try:
        public = files.load_key().public
        if path.is_file():
            check_private(path)
    except ConfigError as error:
        return build_check_from_error(name, error, fix="Restore it from its backup, or fix the reported problem.")
    if history is not None and history.length and history.opening.site_key != public:
        fix = "Restore the ledger's original key from its backup."
        return build_failed_check(name, f"{command[0] if command else path} is not the ledger's original key", fix=fix)
    source = "printed by key_command" if command else "readable only by its owner"
    return build_passed_check(name, f"{format_key_start(public)}, {source}")


def check_serving(state: Path) -> DoctorCheck:
    """Check that the site is neither paused nor has left the federation, by the files in the folder `state`."""
    name = "serving"
    if (state / "left").exists():
        fix = f"Remove {state / 'left'} if this site should take part again."
        return build_warning(name, "this site has left the federation and will not start", fix=fix)
    if (state / "paused").exists():
        return build_warning(name, "this site is paused and does not train", fix="Run `fedtune site resume --kit DIR`.")
    return build_passed_check(name, "the site is not paused and has not left")


def check_budget(history: History, policy: Policy) -> DoctorCheck:
    """Check the remaining budget, and whether a run like the reference fits now."""
    name, cap = "budget", policy.budget.max_epsilon
    now = history.now()
    if history.seeded:
        fix = "Do not use it for real records; the mark in the ledger is permanent."
        return build_warning(name, "a run used seeded noise, so this ledger gives no privacy guarantee", fix=fix)
    if why := history.explain_pending_period():
        fix = "Compare this machine's date with another clock, then `fedtune ledger confirm-date`."
        return build_warning(name, why, fix=fix)
    if math.isinf(cap):
        epsilon = accountant.format_epsilon(history.epsilon(history.count_charges_and_reservations(now)))
        status = f"no lifetime cap, so the policy guarantees nothing; epsilon {epsilon} is spent"
        return build_warning(name, status, fix="Set budget.max_epsilon in site.toml before you train on real records.")
    reference = policy.budget.reference.event
    runs = run_acceptance.count_remaining_runs(history, policy, reference, now)
    room = f"room for {runs} run{'' if runs == 1 else 's'} like the policy's reference"
    whose = " in the most exposed cohort" if policy.population.arrivals else ""
    share = _format_cap_share(history, policy)
    status = f"{share} of the lifetime budget of epsilon {cap:g} is spent or reserved{whose}; {room}"
    try:
        run_acceptance.require_usable_ledger(history)
        run_acceptance.require_run_room(history, policy, reference, now)
    except Refused as refused:
        of_period = refused.reason is Reason.MAX_EPSILON_PER_PERIOD
        fix = "Wait for the next period, or plan" if of_period else "Plan runs without this site, or"
        fix += " smaller runs; raising the cap weakens its guarantee."
        why = f": {refused.reason} is {refused.allowed}" if of_period else ""
        return build_warning(name, f"{status}{why}", fix=fix)
    return build_passed_check(name, status)


def preview_run(config: RunConfig, *, kit: Kit, site_toml: Path, policy: Policy, history: History) -> DoctorCheck:
    """Predict the site's answer to a run and the cost of the run; nothing is written.

    Raises:
        ConfigError: no noise level satisfies the run's plan.
    """
    if config.model.sha256 is None and config.model.is_built_in:
        from fedtune.model.base_model import hash_model  # transformers takes seconds to import

        # The lead adds the hash to its request; the hash of a built-in model is known here as well.
        model = dataclasses.replace(config.model, sha256=hash_model(config.model))
        config = dataclasses.replace(config, model=model)
    plan, sizes = config.plan(), config.declared_sizes()
    proposal = config.proposal(lead=kit.lead, plan=plan)
    dry_run = policy_dry_run.dry_run(site_toml, proposal, declared_sizes=sizes)
    name = "run"
    if dry_run.violations:
        values = [(one.reason, format_requested_and_allowed(one.requested, one.allowed)) for one in dry_run.violations]
        rules = "; ".join(f"{rule} ({of_both})" if of_both else rule for rule, of_both in values)
        # Abbreviate keys and hashes.
        rules = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1...", rules)
        finding, fix = f"would be refused: {rules}", _suggest_alternative(dry_run, plan)
        if config.model.sha256 is None:
            fix = "Ask the lead for the SHA-256 of the run's base model, and add it here as model.sha256=HEX."
        return build_failed_check(name, finding, fix=fix, exit_code=REFUSED)
    who = " once a person at this site approves it" if policy.approval == "manual" else ""
    finding = f"would be accepted{who}; {_describe_cost(plan, history, policy)}"
    if policy.site not in sizes:
        fix = f"Ask the lead for the run's real settings: sites must include {policy.site}."
        return build_warning(name, f"{finding}, but the run does not name site {policy.site}", fix=fix)
    return build_passed_check(name, finding)


def check_run_records(config: RunConfig, *, policy: Policy, folder: Path, log: PrivateLog) -> Iterator[DoctorCheck]:
    """Check that a run with these settings can use the site's records; yield nothing if the policy does not list the
    run's data set.

    The number of records that the run would skip, such as those with an undeclared label, is in the private log alone.
    """
    if config.data.dataset not in {dataset.id for dataset in policy.dataset}:
        return
    config, name, faults = derive_settings_for_own_site(config, policy, folder=folder), "run's records", Faults()
    data, task, unit = config.data, config.bound_task, policy.population.unit
    columns, fault = task.columns(data, unit=unit), task.record_validator(data)
    try:
        used = sum(1 for _ in iter_usable_records(Path(data.train_file), columns, fault=fault, faults=faults))
    except DataError:  # reported by the check of the data set
        yield build_skipped_check(name, f"data {data.dataset} cannot be read")
        return
    if not faults:
        passed = build_passed_check(name, "the run can use every record")
        yield passed if used else build_skipped_check(name, f"data {data.dataset} contains no record")
        return
    where = log.write_entry(f"{name}: {faults.build_error()}")
    fix = "Compare labels, ranges and columns of the run's settings with the file (the log names the reasons)."
    if used and not faults.summarize(used=used).exceeds_threshold:
        yield build_warning(name, f"the run would skip a few records{where}", fix=fix)
    else:
        yield build_failed_check(name, f"the run would skip a large part of the records{where}", fix=fix)


def _suggest_alternative(dry_run: DryRun, plan: Plan) -> str:
    """Suggest a similar run that the site would accept."""
    ways = []
    if 0 < dry_run.max_rounds < plan.num_rounds:
        ways.append(f"{dry_run.max_rounds} of its {plan.num_rounds} rounds")
    if dry_run.min_noise is not None:
        ways.append(f"a noise multiplier of {dry_run.min_noise:g}")
    if ways:
        return f"Tell the lead that {' or '.join(ways)} would be accepted if all other settings stay unchanged."
    return "Tell the lead, or change these rules in site.toml if you agree to the run."


def _describe_cost(plan: Plan, history: History, policy: Policy) -> str:
    """Describe the epsilon of a run, and its share of the lifetime budget."""
    alone = accountant.epsilon_pld([plan.full_event], plan.delta, interval=accountant.COARSE)
    price = f"epsilon {accountant.format_epsilon(alone)} for the run alone"
    if math.isinf(policy.budget.max_epsilon):
        return f"{price}; there is no lifetime cap"
    before, after = _format_cap_share(history, policy), _format_cap_share(history, policy, also=plan)
    return f"{price}; lifetime budget {before} spent before, {after} after"


def _format_cap_share(history: History, policy: Policy, *, also: Plan | None = None) -> str:
    """Format the share of the lifetime cap's Renyi divergence that is charged, reserved, and used by `also`; finite
    caps only.

    The share is that of the cohort with the highest spending.  `also` is charged only to the cohorts that it admits.
    """
    now = history.now()
    taken = [history.count_charges_and_reservations(now)]
    if also is not None:
        added = events.count_mechanisms([also.full_event])
        taken += [
            history.count_charges_and_reservations(now, cohort) + added for cohort in history.cohorts(also.cohorts)
        ]
    share = run_acceptance.compute_spent_fraction(
        history, max(taken, key=history.divergence), cap=policy.budget.max_epsilon
    )
    assert share is not None, "a finite cap"
    return accountant.format_share(share)
