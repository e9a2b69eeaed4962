"""The commands of `fedtune site` that change something: join, start, approve, pause, leave."""

from __future__ import annotations

import argparse
import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedtune.cli.plain_words import REASONS, counted, printable
from fedtune.deploy.kits import Kit
from fedtune.deploy.site_state import Pending, SiteState
from fedtune.federation.verdict import BrokenRule, Verdict, ask
from fedtune.privacy.accountant import epsilon_pld, epsilon_text
from fedtune.privacy.release import Reason
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, RefusedError, RunError


def run(options: argparse.Namespace) -> None:
    """Run the command that the arguments name."""
    match options.site_command:
        case "init":
            _init(Path(options.site), out=Path(options.out) if options.out else None)
        case "start":
            _start(options)
        case "approve":
            _approve(options)
        case "pause":
            SiteState.of(_kit(options).folder).set_paused(True)
            sys.stdout.write("Paused: every request is answered with 'paused'. A round that has begun is finished.\n")
        case "resume":
            SiteState.of(_kit(options).folder).set_paused(False)
            sys.stdout.write("The site takes part again.\n")
        case _:
            kit = _kit(options)
            _leave(kit, _files(Path(options.site), kit))


def _kit(options: argparse.Namespace) -> Kit:
    return Kit.read(Path(options.kit), kind="site")


def _files(site_toml: Path, kit: Kit) -> SiteFiles:
    """The site's files, which must be those of the site whose kit it is."""
    files = SiteFiles.of(site_toml)
    if files.policy.site != kit.site:
        error = ConfigError("site", files.policy.site, f"must be {kit.site}, as in the kit")
        raise error.in_file(site_toml)
    return files


def _init(site_toml: Path, *, out: Path | None) -> None:
    from fedtune.deploy.join import next_steps, site_init

    sys.stdout.write(next_steps(site_init(site_toml, out=out)))


def _start(options: argparse.Namespace) -> None:
    kit = _kit(options)
    from fedtune.deploy.health import Health, serve_health
    from fedtune.deploy.logs import configure_logs
    from fedtune.deploy.site_service import SiteService  # torch and Flower take seconds to import

    os.umask(0o077)  # what the process writes is for its own account alone
    configure_logs(options.log_level)
    health = Health()
    with ExitStack() as stack:
        if options.health:
            stack.enter_context(serve_health(options.health, health, anywhere=options.health_anywhere))
        SiteService(kit=kit, site_toml=Path(options.site), health=health).run()


def _approve(options: argparse.Namespace) -> None:
    """List what waits, or approve one run after showing its price."""
    kit, site_toml, console = _kit(options), Path(options.site), Console()
    state = SiteState.of(kit.folder)
    waiting = state.waiting()
    if options.run is None:
        console.print(_waiting_table(waiting) if waiting else "No run waits for approval.")
        return
    found = [pending for pending in waiting if pending.proposal.run == options.run]
    if not found:
        names = ", ".join(pending.proposal.run for pending in waiting) or "none"
        raise ConfigError("RUN", options.run, f"must be a run that waits for approval: {names}")
    files = _files(site_toml, kit)
    verdict = ask(site_toml, found[0].proposal, declared_sizes={})
    console.print(_price_table(found[0], verdict))
    if verdict.ledger == "in doubt":
        raise RunError(verdict.note)
    if not verdict.allowed:
        raise RefusedError(f"policy or budget refuse this run: {_broken(verdict)}")
    if not options.yes and not _agreed():
        console.print("Not approved.")
        return
    files.open().approve(found[0].proposal)
    state.forget(options.run)
    console.print("Approved, and noted in the ledger. It begins with the lead's next request.")


def _agreed() -> bool:
    sys.stdout.write("Let it start? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _waiting_table(waiting: list[Pending]) -> Table:
    names = [printable(pending.proposal.run) for pending in waiting]
    # Whole, however narrow the terminal: a person has to type it.
    run = Column("run", no_wrap=True, min_width=max(map(len, names)))
    table = Table(run, "since", "data set", "epsilon", "asked by lead")
    for name, pending in zip(names, waiting, strict=True):
        asked = pending.proposal
        words = (name, pending.since, printable(asked.dataset), _price(pending), f"{asked.lead[:16]}...")
        table.add_row(*map(escape, words))  # brackets that come from a lead are no markup
    return table


def _price(pending: Pending) -> str:
    plan = pending.proposal.plan
    return epsilon_text(epsilon_pld([plan.whole], plan.delta) if plan.private else math.inf)


def _price_table(pending: Pending, verdict: Verdict) -> Table:
    """What the run would do, and cost."""
    asked, plan = pending.proposal, pending.proposal.plan
    cap = "no lifetime cap" if math.isinf(verdict.max_epsilon) else f"the lifetime cap is {verdict.max_epsilon:g}"
    rows = {
        "run": printable(asked.run),
        "asked by": f"{asked.lead}, for {counted(asked.num_sites, 'site')} as it says",
        "trains": f"{printable(asked.task)} on {printable(asked.dataset)}",
        "base model": printable(asked.base_model, 64),
        "rounds": f"up to {plan.most_rounds}, of {counted(plan.local_steps, 'noisy step')} each",
        "mechanism": f"noise multiplier {plan.noise_multiplier:g}, clip norm {plan.max_grad_norm:g}, "
        f"sampling rate {plan.sampling_rate:g}",
        "releases": "updates and noised scores" if plan.releases_metrics else "updates",
        "price": f"epsilon {_price(pending)} at delta {plan.delta:g}, for the whole run",
        "lifetime": f"epsilon {epsilon_text(verdict.taken)} is taken, {epsilon_text(verdict.would_be)} with this run, "
        f"by the filter; {cap}",
    }
    table = Table(show_header=False)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    return table


def _broken(verdict: Verdict) -> str:
    return "; ".join(REASONS[Reason(one.rule)] + _numbers(one) for one in verdict.broken)


def _numbers(rule: BrokenRule) -> str:
    numbers = {"asked": rule.asked, "allowed": rule.allowed}
    known = ", ".join(f"{word} {value}" for word, value in numbers.items() if value is not None)
    return f" ({known})" if known else ""


def _leave(kit: Kit, files: SiteFiles) -> None:
    """End what is open, and keep the process from starting again."""
    ledger = files.open()
    open_runs = [name for name, run in ledger.history.runs.items() if run.is_open(ledger.history.now())]
    for name in open_runs:
        ledger.end(name)
    state = SiteState.of(kit.folder)
    state.left.touch()
    sys.stdout.write(
        f"{kit.site} has left {kit.federation}; {counted(len(open_runs), 'open run')} ended, and what they had set "
        "aside is free.\nA running `fedtune site start` stops by itself. Ask the lead to shut the site out:\n"
        f"  fedtune provision revoke-site {kit.site}\n"
        f"Keep {files.ledger} and {files.site_key}: they show what was spent. To come back, remove {state.left}.\n"
    )
