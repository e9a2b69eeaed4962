"""`fedtune ledger`: the arguments of its commands; `ledger_commands` does what they say.

Nothing here is slow to import, since every `fedtune --help` reads it.
"""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Read a site's ledger, which records for ever what was done to the records of one population.

  fedtune ledger show ledger.db --last 20                 what happened, newest last
  fedtune ledger spent ledger.db                          what was spent, what is left
  fedtune ledger verify ledger.db --anchor anchor.json    was it changed, was it put back?
  fedtune ledger export ledger.db --output ledger.json    everything, for an auditor
These four write nothing into the ledger. PATH is the file, or a folder with a ledger.db in it.

  fedtune ledger anchor ledger.db --key site_key.pem --output anchor.json
  fedtune ledger restore --policy site.toml --anchor anchor.json
  fedtune ledger freeze --policy site.toml --why "consent withdrawn"
docs/site_policy.md explains backups, anchors and the figures.
"""

_SHOW = "Show a ledger's events as a table, oldest first."
_SPENT = """\
Show what a ledger has spent: for its whole life, for the current period and for each run.

The filter's figure holds even when every next run was chosen after seeing earlier results; caps use it.
The PLD figure is smaller and a proof for each run alone. Every epsilon shown is rounded up.
"""
_VERIFY = """\
Check that nobody without the site's key changed, deleted, inserted or reordered an event.

An anchor, kept on another disk, also shows that none is missing at the end. Exit code 1 if anything does not fit.
"""
_EXPORT = "Write a ledger's events, figures and verification as one JSON file."
_ANCHOR = """\
Write the ledger's newest head, signed, into an anchor file: keep it on another disk or machine.

An anchor already there must be one that the ledger still contains; otherwise the ledger was put back.
"""
_RESTORE = """\
After a backup of a ledger was put back: charge what the anchor knows and the backup lacks.

Stop training, copy the backup to the place that the policy names, run this, start again.
"""
_FREEZE = """\
Take the population of a ledger out of all training, for ever. There is no way back.

Nothing that was released before is undone by it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands under `fedtune ledger`."""
    commands = parser.add_subparsers(dest="ledger_command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=help, description=description, formatter_class=raw)

    show = command("show", "what happened", _SHOW)
    spent = command("spent", "what was spent and what is left", _SPENT)
    verify = command("verify", "was it changed or put back?", _VERIFY)
    export = command("export", "everything as JSON", _EXPORT)
    anchor = command("anchor", "write a signed head, to be kept elsewhere", _ANCHOR)
    restore = command("restore", "continue from a backup", _RESTORE)
    freeze = command("freeze", "take part in nothing any more", _FREEZE)

    for reading in (show, spent, verify, export, anchor):
        reading.add_argument("path", metavar="PATH", help="a ledger.db, or a folder that holds one")
    for changing in (restore, freeze):
        changing.add_argument("path", metavar="PATH", nargs="?", help="the policy's ledger; may be left out")
        changing.add_argument("--policy", required=True, metavar="FILE", help="the site's site.toml")
    for answering in (show, spent, verify):
        answering.add_argument("--json", action="store_true", help="for machines")
    show.add_argument("--last", type=int, metavar="N", help="only the newest N events")
    for checking in (verify, export):
        checking.add_argument("--anchor", metavar="FILE", help="an anchor file, kept outside the ledger")
        checking.add_argument("--site-key", metavar="HEX", help="the site's public key, from a source you trust")
    export.add_argument("--output", metavar="FILE", help="a new file (default: print)")
    anchor.add_argument("--key", required=True, metavar="FILE", help="the site's private key, site_key.pem")
    anchor.add_argument("--output", required=True, metavar="FILE", help="where the anchor is kept")
    restore.add_argument("--anchor", metavar="FILE", help="the newest anchor (default: the policy's own)")
    freeze.add_argument("--why", required=True, metavar="TEXT", help="the reason; the ledger keeps it")


def run(options: argparse.Namespace) -> None:
    """Run one of them.

    Raises:
        ConfigError: a file that was named is missing, or cannot be what it should be.
        RunError: a ledger cannot be trusted.
    """
    from fedtune.cli import ledger_commands  # the accountants take most of a second to import

    ledger_commands.COMMANDS[options.ledger_command](options)
