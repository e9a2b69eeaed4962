"""`fedtune ledger`: what a site's ledger says, verified before it is shown; and its repair after a backup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Argument, AsJson, Option, command, group
from fedtune.cli.ledger_sections import (
    by_arrival,
    charged_runs,
    each_run,
    entries,
    findings,
    lifetime,
    methods,
    moment,
    remarks,
    show_identity,
    show_made_up,
    show_verdict,
)
from fedtune.federation.run_folder import run_folders_near
from fedtune.ops.backup import anchors_at_hand, make_up_for
from fedtune.ops.files import act_as_owner
from fedtune.privacy.keys import SigningKey, check_public_key
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.verify import Verified, verify
from fedtune.privacy.site_files import SiteFiles
from fedtune.show.budget_text import identity_json, verification_json
from fedtune.show.terminal_tables import Section, json_text, print_json, require_agreed, say, show, write_file
from fedtune.spec import ConfigError
from fedtune.words import counted

app = group(
    """\
Read a site's ledger, which records for ever what was done to the records of one population.

  fedtune ledger show ledger.db                           a line for each run, newest last
  fedtune ledger show ledger.db --rounds --last 20        each entry: rounds, refusals, changes of the policy
  fedtune ledger spent ledger.db                          what was spent, what is left
  fedtune ledger verify ledger.db --anchor anchor.json    was it changed, or an older copy put back?
  fedtune ledger export ledger.db --output ledger.json    everything, for an auditor
These write nothing into the ledger. PATH is the file, or a folder with a ledger.db in it.

  fedtune ledger anchor ledger.db --key site_key.pem --output anchor.json
  fedtune ledger restore --policy site.toml --anchor anchor.json
  fedtune ledger freeze --policy site.toml --why "consent withdrawn"
  fedtune ledger confirm-date --policy site.toml          after a jump of the clock, or a long time without a request
docs/site_policy.md explains backups, anchors and the figures.
"""
)

LedgerPath = Annotated[str, Argument("PATH", help="a ledger.db, or a folder that holds one")]
OwnLedger = Annotated[str | None, Argument("PATH", help="the policy's ledger; may be left out")]
PolicyFile = Annotated[Path, Option(metavar="FILE", help="the site's site.toml")]
AnchorFile = Annotated[Path | None, Option(metavar="FILE", help="an anchor file, kept outside the ledger")]
SiteKey = Annotated[str | None, Option(metavar="HEX", help="the site's public key, from a source you trust")]


@command(app, "what happened", name="show")
def show_events(
    path: LedgerPath,
    rounds: Annotated[bool, Option("each entry: rounds, refusals, changes of the policy")] = False,
    last: Annotated[int | None, Option(metavar="N", help="only the newest N lines")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a ledger's runs, oldest first, a line each; with --rounds or --json each entry of the ledger."""
    if last is not None and last < 1:
        raise ConfigError("--last", last, "must be at least 1")
    file = ledger_file(path)
    verified = verify(file)
    chosen = verified.events[-last:] if last else verified.events
    if as_json:
        print_json({**identity_json(file, verified), "events": chosen})
        return
    show_identity(file, verified)
    show([entries(verified, chosen) if rounds else charged_runs(verified, last=last)])


@command(app, "what was spent and what is left")
def spent(path: LedgerPath, as_json: AsJson = False) -> None:
    """Show what a ledger has spent: for its whole life, for the current period and for each run.

    The filter's figure holds even when every next run was chosen after seeing earlier results; caps use it.
    The PLD figure is smaller and a proof for each run alone. Every epsilon shown is rounded up.
    """
    from fedtune.report.from_ledger import lifetime_of, spending_json  # what other commands can do without

    file = ledger_file(path)
    verified = verify(file)
    if as_json:
        print_json({**identity_json(file, verified), **spending_json(verified)})
        return
    figures = lifetime_of(verified)
    show_identity(file, verified)
    show_verdict(verified.history, figures)
    runs = each_run(figures.runs, verified.history)
    sections = [lifetime(verified.history, figures), by_arrival(figures), methods(figures), runs]
    show([section for section in sections if section is not None])
    for remark in remarks(verified.history):
        say(remark)


@command(app, "was it changed or put back?", name="verify")
def check(path: LedgerPath, anchor: AnchorFile = None, site_key: SiteKey = None, as_json: AsJson = False) -> None:
    """Check that nobody without the site's key changed, deleted, inserted or reordered an event.

    An anchor, kept on another disk, also shows that none is missing at the end. Exit code 1 if anything does not fit.
    """
    file, verified = _verified(path, anchor=anchor, site_key=site_key)
    if as_json:
        print_json({**identity_json(file, verified), **verification_json(verified)})
        return
    show_identity(file, verified)
    checked, unchecked = findings(verified)
    show(
        [
            Section(title="Checked, and right:", notes=[f"- {text}" for text in checked]),
            Section(title="Not checked:", notes=[f"- {text}" for text in unchecked]),
        ],
    )
    last = verified.events[-1]
    say(f"Newest event: {last.sequence}, {moment(last)}, hash {last.hash}")


@command(app, "everything as JSON")
def export(
    path: LedgerPath,
    anchor: AnchorFile = None,
    site_key: SiteKey = None,
    output: Annotated[Path | None, Option(metavar="FILE", help="a new file (default: print)")] = None,
) -> None:
    """Write a ledger's events, figures and verification as one JSON file."""
    from fedtune.report.from_ledger import spending_json

    if output is not None and output.exists():  # it might be the ledger, or the key
        raise ConfigError("--output", str(output), "exists already; choose a new file")
    file, verified = _verified(path, anchor=anchor, site_key=site_key)
    whole = {
        **identity_json(file, verified),
        "head": verified.events[-1],
        "verification": verification_json(verified),
        "spending": spending_json(verified),
        "events": verified.events,
    }
    if output is None:
        print_json(whole)
        return
    write_file(output, json_text(whole), option="--output")
    say(f"{counted(len(verified.events), 'event')} of {file} written to {output}")


@command(app, "write a signed head, to be kept elsewhere", name="anchor")
def write_anchor(
    path: LedgerPath,
    key: Annotated[Path, Option(metavar="FILE", help="the site's private key, site_key.pem")],
    output: Annotated[Path, Option(metavar="FILE", help="where the anchor is kept")],
) -> None:
    """Write the ledger's newest head, signed, into an anchor file: keep it on another disk or machine.

    If the file exists, the ledger must contain its anchor; otherwise an older ledger was put back.
    """
    file, own = ledger_file(path), SigningKey.load(key)
    before = Head.read(output) if output.exists() else None
    verified = verify(file, anchor=before, site_key=own.public)
    write_file(output, verified.history.head(own).to_bytes(), option="--output")
    say(f"{output} now vouches for {file} up to event {len(verified.events)}. Keep it on another disk or machine.")


@command(app, "continue from a backup")
def restore(
    policy: PolicyFile,
    path: OwnLedger = None,
    anchor: Annotated[Path | None, Option("the newest anchor (default: the policy's own)", metavar="FILE")] = None,
) -> None:
    """Charge what the anchor knows and a restored backup lacks.

    Stop training, copy the backup to the place that the policy names, run this, start again.
    """
    site = _own_site(policy, path)
    anchors = anchors_at_hand(site, anchor)
    made_up = make_up_for(site.ledger, site, anchors)
    if made_up.last is not None and site.anchor is not None:
        write_file(site.anchor, made_up.ledger.head().to_bytes(), option="anchor")
    made_up.require_sure()
    show_made_up(made_up, path=site.ledger, anchors=anchors)


@command(app, "end all training on a population")
def freeze(
    policy: PolicyFile,
    why: Annotated[str, Option(metavar="TEXT", help="the reason; the ledger keeps it")],
    path: OwnLedger = None,
) -> None:
    """Take the population of a ledger out of all training, for ever. There is no way back.

    It does not undo earlier releases.
    """
    if not why.strip():
        raise ConfigError("--why", why, "must say why; the ledger keeps it")
    site = _own_site(policy, path)
    verify(site.ledger)
    site.open().freeze(why)
    say(f"{site.ledger} is frozen: all training on this population has ended for ever.")


@command(app, "say that this machine's date is right", name="confirm-date")
def confirm_date(
    policy: PolicyFile,
    path: OwnLedger = None,
    yes: Annotated[bool, Option("do not ask")] = False,
) -> None:
    """Let the period of the budget begin that this machine's date is in.

    A clock that was set forward would open a new period, whose budget is unspent. So a site opens only the next one by
    itself, and only if the server's time is in it too; any other waits for this command. Compare the date with a clock
    that neither this machine nor the federation sets.
    """
    site = _own_site(policy, path)
    history = verify(site.ledger).history
    say(
        f"This machine's clock says {history.clock:%Y-%m-%d %H:%M} UTC; the ledger's newest event is of "
        f"{history.last_time:%Y-%m-%d %H:%M} UTC. This cannot be taken back."
    )
    if not yes:
        require_agreed("Is the date of this machine right?", otherwise="nothing is changed: the date is not confirmed")
    site.open().confirm_date()
    say("Noted in the ledger.")


def ledger_file(name: str) -> Path:
    """The ledger that a person means by PATH.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if (path / "ledger.db").is_file():
        return path / "ledger.db"
    found = ", ".join(str(file) for file in sorted(path.glob("sites/*/ledger.db")))
    bound = f"must be one of {found}" if found else f"must be a ledger.db, or a folder with one{run_folders_near(path)}"
    raise ConfigError("ledger", name, bound)


def _own_site(policy: Path, path: str | None) -> SiteFiles:
    """The site whose existing ledger is about to be changed."""
    files = SiteFiles.of(policy)
    # A ledger that does not exist would be made, and a copy beside the real one would be of no use.
    given = files.ledger if path is None else ledger_file(path)
    if not files.ledger.is_file() or not given.samefile(files.ledger):
        raise ConfigError("ledger", str(given), f"must be the policy's own ledger, {files.ledger}")
    act_as_owner(files.site_key, files.ledger)
    SigningKey.load(files.site_key)  # a missing one would be made
    return files


def _verified(path: str, *, anchor: Path | None, site_key: str | None) -> tuple[Path, Verified]:
    if site_key is not None:
        check_public_key("--site-key", site_key)
    file = ledger_file(path)
    return file, verify(file, anchor=None if anchor is None else Head.read(anchor), site_key=site_key)
