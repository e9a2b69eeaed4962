"""The commands of `fedtune site` that change something: join, start, approve, pause, leave."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from fedtune.cli.plain_words import counted
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.services.site_state import SiteState
from fedtune.privacy.site_files import SiteFiles


def run(options: argparse.Namespace) -> None:
    """Run the command that the arguments name."""
    os.umask(0o077)  # what a site writes is for its own account alone
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
            _leave(kit, kit.site_files(Path(options.site)))


def _kit(options: argparse.Namespace) -> Kit:
    return Kit.read(Path(options.kit), kind="site")


def _init(site_toml: Path, *, out: Path | None) -> None:
    from fedtune.deploy.kits.members import next_steps, site_init

    sys.stdout.write(next_steps(site_init(site_toml, out=out)))


def _start(options: argparse.Namespace) -> None:
    kit = _kit(options)
    from fedtune.deploy.health import Health, serve_health
    from fedtune.deploy.logs import configure_logs
    from fedtune.deploy.services.site_service import SiteService  # torch and Flower take seconds to import

    configure_logs(options.log_level)
    health = Health()
    with ExitStack() as stack:
        if options.health:
            stack.enter_context(serve_health(options.health, health, anywhere=options.health_anywhere))
        SiteService(kit=kit, site_toml=Path(options.site), health=health).run()


def _approve(options: argparse.Namespace) -> None:
    from fedtune.cli.approve import approve, show_waiting

    kit, site_toml = _kit(options), Path(options.site)
    state, files = SiteState.of(kit.folder), kit.site_files(site_toml)
    if options.run is None:
        show_waiting(state)
    else:
        approve(state, options.run, site_toml=site_toml, files=files, yes=options.yes)


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
