"""`fedtune site`: the arguments of its commands; `site_commands`, `policy_check` and `doctor` do the work.

Nothing here is slow to import, since every `fedtune --help` reads it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fedtune.cli import doctor

DESCRIPTION = """\
A site of a federation: its policy, its keys, and the process that answers for it.

  fedtune site template > site.toml                       a policy to start from, with every key explained
  fedtune site check-policy site.toml                     what a policy means, in plain words
  fedtune site init --site site.toml                      make the site's keys, and a request to join
  fedtune site doctor --kit kit --site site.toml          what still stands in the way, and how to mend it
  fedtune site start --kit kit --site site.toml           take part, until stopped
  fedtune site approve [RUN] --kit kit --site site.toml   what a run would cost; let it start
  fedtune site pause | resume | leave --kit kit ...       take part in nothing for now; go on; leave for good
docs/adding_a_site.md goes through it; docs/site_policy.md says how to choose a policy's numbers.
"""

_CHECK = """\
Read a policy strictly, and say what it means: who may ask, for what, how much may be spent, what leaves.

Warnings do not change the exit code. A key that is wrong, or a ledger that does not fit, is exit code 2.
"""
_START = """\
Take part in the federation: poll its server, answer what policy and budget allow, keep the model warm.

Opens no port but a health endpoint, if asked for. Logs are JSON lines on stderr. SIGTERM or Ctrl-C ends it after the
round that it is in; a second one ends it at once, and the round stays charged.
"""
_APPROVE = """\
Show the runs that wait for approval and what they would cost, or let one start.

Needed where site.toml says approval = "manual". Nothing is done for a run before it is approved.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands under `fedtune site`."""
    commands = parser.add_subparsers(dest="site_command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description, formatter_class=raw)

    check = command("check-policy", "what a policy means, in plain words", _CHECK)
    check.add_argument("file", metavar="FILE", help="the site's site.toml")
    check.add_argument("--json", action="store_true", help="for machines")
    command("template", "a policy to start from", "Print a policy to start from, with every key explained.")
    init = command("init", "make the site's keys, and a request to join", "Keys are made here and never leave.")
    init.add_argument("--site", required=True, metavar="FILE", help="the site's site.toml")
    init.add_argument("--out", metavar="DIR", help="folder to make (default: kit, beside site.toml)")
    doctor.add_doctor_arguments(command("doctor", "what still stands in the way", doctor.DESCRIPTION))
    start = command("start", "take part, until stopped", _START)
    add_service_arguments(start)
    approve = command("approve", "what a run would cost; let it start", _APPROVE)
    approve.add_argument("run", nargs="?", metavar="RUN", help="the run to let start; without it, those that wait")
    approve.add_argument("--yes", action="store_true", help="do not ask")
    pause = command("pause", "take part in nothing for now", "Every request is answered with 'paused' until resume.")
    resume = command("resume", "go on after a pause", "Take part again.")
    leave = command("leave", "leave the federation", "Take part in nothing any more; what was spent stays on record.")
    for each in (start, approve, pause, resume, leave):
        each.add_argument("--kit", required=True, metavar="DIR", help="the site's kit")
    for each in (start, approve, leave):
        each.add_argument("--site", required=True, metavar="FILE", help="the site's site.toml")


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """What a site's and a server's process have in common."""
    parser.add_argument("--health", metavar="HOST:PORT", help="answer GET /health and /ready there; on loopback")
    parser.add_argument("--health-anywhere", action="store_true", help="--health may be reached from other machines")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def run(options: argparse.Namespace) -> None:
    """Run one of them.

    Raises:
        ConfigError: a file is wrong, or does not fit another.
        RunError: the ledger cannot be trusted.
        RefusedError: policy or budget refuse.
    """
    if options.site_command not in ("template", "check-policy"):  # these read, and are the person's own
        from fedtune.deploy.files import act_as_owner

        act_as_owner(*_own_places(options))
    match options.site_command:
        case "template":
            sys.stdout.write(template_file().read_text(encoding="utf-8"))
        case "check-policy":
            from fedtune.cli.policy_check import check_policy  # the accountants take most of a second to import

            check_policy(Path(options.file), as_json=options.json)
        case "doctor":
            doctor.doctor(options)
        case _:
            # No file of a model's can make a site ask a hub, whatever it says; read when the libraries are imported.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            from fedtune.cli import site_commands

            site_commands.run(options)


def _own_places(options: argparse.Namespace) -> tuple[Path, ...]:
    """What belongs to the account that the site's process runs as; before there is a kit, its folder to be."""
    if options.site_command == "init":
        folder = Path(options.out).absolute().parent if options.out else Path(options.site).absolute().parent
        return folder, *folder.parents
    return Path(options.kit) / "connection_key.pem", Path(options.kit)


def template_file() -> Path:
    """`conf/site.toml`, in a checkout or inside the installed package."""
    from fedtune.data.load import shipped_folders

    files = [folder / "conf" / "site.toml" for folder in shipped_folders()]
    return next(file for file in files if file.is_file())
