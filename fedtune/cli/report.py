"""`fedtune report`: the arguments of its commands; `report_commands` does what they say.

Nothing here is slow to import, since every `fedtune --help` reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

DESCRIPTION = """\
Write the privacy report of a run, or of a site's ledger: what was promised, what is spent, what it means.

  fedtune report runs/tighter                        the lead's view of a run
  fedtune report site.toml --sign site_key.pem       a site's view over all its runs and years, signed
  fedtune report verify ledger.db.report/report.json --key HEX    was it changed? is epsilon right?
  fedtune report diff runs/tighter runs/looser       what changed in settings, privacy, utility, cost
  fedtune report schema                              the JSON schema of report.json

It writes report.html, which needs no network and prints well, and report.json with every figure in it; with --pdf a
report.pdf too. A run's report lies in its folder, a ledger's in a folder beside it that ends in .report.
"""

_BUILD = """\
Write report.html and report.json of a run folder or a ledger; the word `build` may be left out.

A ledger is verified first, with a site.toml also against the site's key and anchor. Nothing is written into it, and
nothing in the report tells more of the records than what was released.
"""
_VERIFY = """\
Check a report: its signature, its form, every epsilon again from the events in it, its verdict, its configuration.

Exit code 1 if anything differs. Without --key it is not checked whose signature it is; without a signature only what
can be computed again is checked.
"""
_DIFF = """\
Show what changed from one report to another: settings, privacy, utility and cost, with both values.

A and B are report.json files, or folders that hold one. Two runs are compared, or two reports of one ledger.
"""
_SCHEMA = """\
Print the JSON schema that every report.json of this version fits.
"""
_COMMANDS = ("build", "verify", "diff", "schema")


def with_command(arguments: Sequence[str]) -> list[str]:
    """`report PATH` as `report build PATH`; anything else unchanged."""
    said = list(arguments)
    if said[:1] == ["report"] and said[1:2] and said[1] not in (*_COMMANDS, "-h", "--help"):
        said.insert(1, "build")
    return said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands under `fedtune report`."""
    commands = parser.add_subparsers(dest="report_command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=help, description=description, formatter_class=raw)

    build = command("build", "write a report; the word may be left out", _BUILD)
    build.add_argument("path", metavar="PATH", help="a run folder, a ledger.db or its site.toml")
    build.add_argument("--output", metavar="DIR", help="where to write (default: the run folder, or <ledger>.report)")
    build.add_argument("--language", choices=("en", "de"), help="of the page (default: the run's setting, else en)")
    build.add_argument("--pdf", action="store_true", help="report.pdf too; needs pip install fedtune[pdf]")
    build.add_argument("--sign", metavar="KEY", help="sign it: the site's site_key.pem, or the lead's lead_key.pem")
    build.add_argument(
        "--site-report",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="signed report.json files that sites released for this run",
    )
    build.add_argument("--anchor", metavar="FILE", help="of a ledger: its anchor, which shows that no event is missing")

    verify = command("verify", "was it changed? is epsilon right?", _VERIFY)
    verify.add_argument("file", metavar="FILE", help="a report.json, or a folder that holds one")
    verify.add_argument("--key", metavar="HEX", help="the public key that must have signed it, from a source you trust")
    verify.add_argument("--config", metavar="SHA", help="the SHA-256 that the run's configuration must have")

    diff = command("diff", "what changed between two reports", _DIFF)
    diff.add_argument("before", metavar="A", help="a report.json, or a folder that holds one")
    diff.add_argument("after", metavar="B", help="another")
    command("schema", "the JSON schema of report.json", _SCHEMA)

    for answering in (verify, diff):
        answering.add_argument("--json", action="store_true", help="for machines")


def run(options: argparse.Namespace) -> None:
    """Run one of them.

    Raises:
        ConfigError: a file that was named is missing, or cannot be what it should be.
        RunError: a ledger or a report cannot be trusted.
    """
    from fedtune.cli import report_commands  # the accountants take most of a second to import

    report_commands.COMMANDS[options.report_command](options)
