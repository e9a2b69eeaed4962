"""Whether a site's ledger can be trained with, what its budget leaves, and what it would say to a run."""

from __future__ import annotations

import dataclasses
import fcntl
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.deploy.doctor.check import REFUSED, Check, failed, from_error, ok, skipped, warning
from fedtune.deploy.kits.certificates import check_private
from fedtune.deploy.kits.kit import Kit
from fedtune.federation import verdict
from fedtune.federation.verdict import BrokenRule, Verdict
from fedtune.model.spec import RANDOM
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import spending
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.history import History
from fedtune.privacy.plan import Plan
from fedtune.privacy.policy import Policy
from fedtune.privacy.release import Reason, asked_and_allowed
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, RunError

_PAGE = "docs/site_policy.md"


def ledger(files: SiteFiles) -> tuple[Check, History | None]:
    """Whether the ledger is whole, this site's, and fit to train with; its history where it is."""
    name = "ledger"
    if closed := next(_closed(files), None):
        return closed, None
    try:
        verified = files.verified()
        if verified is None and files.anchor is not None and files.anchor.is_file():
            newest = Head.read(files.anchor).sequence
            raise RunError(f"{files.ledger} is missing, and its anchor knows {newest} events")
    except (RunError, ConfigError) as error:
        fix = f"Train nothing, and restore it as {_PAGE} says; a new ledger would spend the budget twice."
        return failed(name, str(error), fix=fix), None
    if verified is None:
        return ok(name, "none yet; it is made when the site starts"), History.before(files.policy)
    history = verified.history
    if wrong := next(_unfit(files, history), None):
        return wrong, None
    rollback = "as far as its anchor" if verified.rollback_excluded else "though without an anchor's word"
    return ok(name, f"whole and signed, {rollback}"), history


def _closed(files: SiteFiles) -> Iterator[Check]:
    """A file that is there, and that this account may not read or write: nothing is wrong with what it holds."""
    for path in (files.ledger, *([files.anchor] if files.anchor is not None else [])):
        if os.path.lexists(path) and not os.access(path, os.R_OK | os.W_OK):
            found = f"this account may not read or write {path}: nothing is trained"
            yield failed("ledger", found, fix="Give it to the account of the site's process, as the lines `files` say.")


def _unfit(files: SiteFiles, history: History) -> Iterator[Check]:
    """Why nothing would be trained with a ledger that is whole."""
    name = "ledger"
    for key, made_for, says in history.opened.differences(files.policy):
        fix = f"Set {key} in site.toml back; to change it, make a new ledger."
        yield failed(name, f"was made for {key} = {made_for}, and the policy says {says}", fix=fix)
    if files.anchor is not None and not files.anchor.is_file() and history.charged():
        fix = f"Bring the anchor back, or make a new one with `fedtune ledger anchor` ({_PAGE})."
        yield failed(name, "its anchor is missing, and something was charged: nothing is trained", fix=fix)
    if history.in_doubt is not None:
        fix = f"Restore the newest backup and run `fedtune ledger restore` ({_PAGE})."
        found = f"in doubt: a receipt knows event {history.in_doubt.sequence}, which it lacks; nothing is trained"
        yield failed(name, found, fix=fix)
    if history.frozen:
        fix = "There is no way back, and that was meant; ask the lead to revoke this site if nothing else is to come."
        yield failed(name, "frozen: all training on this population has ended for ever", fix=fix)


def site_key(files: SiteFiles, history: History | None) -> Check:
    """Whether the key that signs the ledger is there, private, and the ledger's own."""
    name, path = "site key", files.site_key
    if not path.is_file():
        if not files.ledger.is_file():
            return ok(name, "none yet; it is made with the ledger")
        fix = "Restore it from its backup: the ledger needs the key that it was made with."
        return failed(name, f"{path} is missing", fix=fix)
    try:
        public = SigningKey.load(path).public
        check_private(path)
    except ConfigError as error:
        return from_error(name, error, fix="Restore it from its backup.")
    if history is not None and history.length and history.opened.site_key != public:
        fix = "Restore the key that the ledger was made with from its backup."
        return failed(name, f"{path} is not the key that the ledger was made with", fix=fix)
    return ok(name, f"{public[:16]}..., readable by its owner alone")


def serving(files: SiteFiles, *, state: Path) -> Check:
    """Whether a process trains with the ledger now: it holds a lock beside it.

    Args:
        files: of the site.
        state: the folder in which a site's commands leave word for its process.
    """
    name, lock = "serving", files.ledger.with_name(f"{files.ledger.name}.serving")
    if (state / "left").exists():
        fix = f"Remove {state / 'left'} if this site is to take part again."
        return warning(name, "this site has left the federation, and would not start", fix=fix)
    served = False
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # held for no longer than it takes to ask
    except BlockingIOError:
        served = True
    except FileNotFoundError:
        pass  # no lock was ever taken
    except OSError:
        return skipped(name, f"this account may not open {lock}")
    if (state / "paused").exists():
        return warning(name, "this site is paused: it trains nothing", fix="`fedtune site resume --kit DIR` goes on.")
    return ok(name, "a process of this site is serving" if served else "no process of this site is serving now")


def budget(history: History, policy: Policy) -> Check:
    """What is left of the lifetime budget."""
    name, cap = "budget", policy.budget.max_epsilon
    now = history.now()
    taken = history.charged() + history.set_aside(now)
    if history.seeded:
        fix = "Keep real records out of it: it is marked for ever."
        return warning(name, "a run took its noise from a seed: this ledger promises nothing", fix=fix)
    epsilon = epsilon_text(filter.epsilon_filter(taken, order=history.order, delta=history.delta))
    if math.isinf(cap):
        found = f"no lifetime cap, and so no promise; epsilon {epsilon} is taken"
        return warning(name, found, fix="Set budget.max_epsilon in site.toml before real records are trained on.")
    runs = spending.runs_left(history, policy, policy.budget.reference_event(), now)
    room = f"room for {runs} run{'' if runs == 1 else 's'} like the policy's reference"
    found = f"{_percent(_share(history, policy))} of the lifetime budget taken (epsilon {epsilon} of {cap:g}); {room}"
    if not runs:
        fix = "Plan without this site, or for smaller runs; a cap that is raised promises less than it did."
        return warning(name, found, fix=fix)
    return ok(name, found)


def experiment(config: RunConfig, *, kit: Kit, site_toml: Path, policy: Policy, history: History) -> Check:
    """What the site would say to a run, and what the run would cost; nothing is written.

    Raises:
        ConfigError: no noise makes the run's plan.
    """
    config = _with_hash(config)
    plan, sizes = config.plan(), config.declared_sizes()
    proposal = config.proposal(lead=kit.lead, plan=plan)
    said = verdict.ask(site_toml, proposal, declared_sizes=sizes)
    broken = [*said.broken, *_declared_otherwise(policy, dataset=proposal.dataset, asked=sizes.get(policy.site))]
    name = "run"
    if broken:
        rules = "; ".join(map(_rule, broken))
        found, fix = f"would be refused: {rules}", _instead(said, plan, len(broken))
        if config.model.sha256 is None:
            fix = "Ask the lead for the SHA-256 of the run's base model, and add it here as model.sha256=HEX."
        return failed(name, found, fix=fix, exit_code=REFUSED)
    who = ", once a person here approves it" if policy.approval == "manual" else ""
    found = f"would be accepted{who}; {_price(plan, history, policy)}"
    if policy.site not in sizes:
        fix = f"Ask the lead for the run's real settings: it has to name {policy.site} in federation.site_names."
        return warning(name, f"{found}; but it names no site {policy.site}", fix=fix)
    return ok(name, found)


def _with_hash(config: RunConfig) -> RunConfig:
    """A run with its model's hash, which the lead adds before it asks, where that is known without the model."""
    if config.model.sha256 is not None or not config.model.path.startswith(RANDOM):
        return config
    from fedtune.model.base import model_sha256  # transformers takes seconds to import

    return dataclasses.replace(config, model=dataclasses.replace(config.model, sha256=model_sha256(config.model)))


def _declared_otherwise(policy: Policy, *, dataset: str, asked: int | None) -> Iterator[BrokenRule]:
    """A run that takes the site for another size than it declares is refused."""
    own = {one.id: one.declared_size for one in policy.dataset}.get(dataset)
    if own is not None and asked is not None and own != asked:
        yield BrokenRule(rule=Reason.DECLARED_SIZE.value, asked=str(asked), allowed=str(own))


def _instead(said: Verdict, plan: Plan, num_broken: int) -> str:
    """What would be accepted in place of a run that is not."""
    ways = []
    if num_broken == len(said.broken):
        if 0 < said.most_rounds < plan.num_rounds:
            ways.append(f"{said.most_rounds} of its {plan.num_rounds} rounds")
        if said.least_noise is not None:
            ways.append(f"a noise multiplier of {said.least_noise:g}")
    if ways:
        return f"Tell the lead that {' or '.join(ways)} would be accepted, all else as it is."
    return "Tell the lead, or change these rules in site.toml if you agree to the run."


def _price(plan: Plan, history: History, policy: Policy) -> str:
    """What a run costs alone, and of the lifetime budget."""
    alone = accountant.epsilon_pld([plan.whole], plan.delta, interval=accountant.COARSE)
    price = f"epsilon {epsilon_text(alone)} for the run alone"
    if math.isinf(policy.budget.max_epsilon):
        return f"{price}; there is no lifetime cap"
    before, after = _share(history, policy), _share(history, policy, also=plan)
    return f"{price}; lifetime budget {_percent(before)} taken before, {_percent(after)} after"


def _share(history: History, policy: Policy, *, also: Plan | None = None) -> float:
    """Part of the lifetime cap's divergence that is charged, set aside, and `also` asked for."""
    room = filter.most_divergence(policy.budget.max_epsilon, order=history.order, delta=history.delta)
    taken = history.charged() + history.set_aside(history.now())
    if also is not None:
        taken += events.grouped([also.whole])
    return history.divergence(taken) / room if room > 0 else 1.0


def _percent(share: float) -> str:
    return f"{math.ceil(share * 100 - 1e-9)} %" if math.isfinite(share) else "all"


def _rule(broken: BrokenRule) -> str:
    known = _short(asked_and_allowed(broken.asked, broken.allowed))
    return f"{broken.rule} ({known})" if known else broken.rule


def _short(text: str) -> str:
    """Values as they are, and of a key or a hash the beginning."""
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1...", text)
