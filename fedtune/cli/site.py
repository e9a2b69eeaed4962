"""`fedtune site`: the arguments of its commands; `policy_check` does the work.

Nothing here is slow to import, since every `fedtune --help` reads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
A site's own policy: what may happen to its records, whoever asks.

  fedtune site template > site.toml            a policy to start from, with every key explained
  fedtune site check-policy site.toml          what a policy means, in plain words
docs/site_policy.md says how to choose the numbers.
"""

_CHECK = """\
Read a policy strictly, and say what it means: who may ask, for what, how much may be spent, what leaves.

Warnings do not change the exit code. A key that is wrong, or a ledger that does not fit, is exit code 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands under `fedtune site`."""
    commands = parser.add_subparsers(dest="site_command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    check = commands.add_parser(
        "check-policy", help="what a policy means, in plain words", description=_CHECK, formatter_class=raw
    )
    check.add_argument("file", metavar="FILE", help="the site's site.toml")
    check.add_argument("--json", action="store_true", help="for machines")
    template = "Print a policy to start from, with every key explained."
    commands.add_parser("template", help="a policy to start from", description=template)


def run(options: argparse.Namespace) -> None:
    """Run one of them.

    Raises:
        ConfigError: the policy is wrong, or the ledger that it names belongs to another one.
        RunError: that ledger cannot be trusted.
    """
    if options.site_command == "template":
        sys.stdout.write(template_file().read_text(encoding="utf-8"))
        return
    from fedtune.cli.policy_check import check_policy  # the accountants take most of a second to import

    check_policy(Path(options.file), as_json=options.json)


def template_file() -> Path:
    """`conf/site.toml`, in a checkout or inside the installed package."""
    from fedtune.data.load import shipped_folders

    files = [folder / "conf" / "site.toml" for folder in shipped_folders()]
    return next(file for file in files if file.is_file())
