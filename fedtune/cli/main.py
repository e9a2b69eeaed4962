"""The command `fedtune`: looks up a command's module, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from threading import Timer
from typing import Any, TextIO

# Flower reads it when it is imported: nothing is told to anybody outside the federation.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import click

from fedtune.cli.command import SETTINGS, InterruptTold, make_command, pause_garbage_collection
from fedtune.show.lines import wrap_text
from fedtune.spec import ConfigError, FedtuneError, full_disk

COMMANDS: Mapping[str, str] = {
    "data": "inspect your data, and write a first experiment for it",
    "simulate": "run a federation on this machine",
    "plan": "show what a run would cost, before any data is touched",
    "audit": "attack a run on this machine, to test its guarantee",
    "generate": "answer prompts with a finished run's model",
    "synthesize": "write synthetic records with a finished run's model",
    "choose": "select synthetic records by votes, or relabel them",
    "evaluate": "score a finished run's model next to its base",
    "compare": "compare base, each site alone, federated and pooled",
    "personalize": "train a personalized adapter, which stays at the site",
    "search": "search settings, at a cost that is known beforehand",
    "export": "write a run's model for others to load",
    "distil": "distill a run's model into a smaller one",
    "model-hash": "print the hash of a base model",
    "ledger": "read a site's ledger: what was spent, what is left",
    "report": "write or verify the privacy report of a run or a ledger",
    "site": "manage a site: its policy, its keys, its process",
    "provision": "set up a federation of real sites",
    "server": "run or back up a federation's server",
    "run": "run a federation over real sites",
    "flower-app": "write a bundle to run fedtune in an existing Flower federation",
}
"""Each is a module, imported when it is called, which holds a function of the command's name, or a group `app`."""
_MODULES = {"choose": "synthesize", "distil": "export"}
"""The module of each command whose name is not the module's."""
_LOADING_S = 0.5


class _Fedtune(click.Group):
    """The top-level command group; imports only the called command, since torch and Hydra take seconds to import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # Nobody waits at a terminal in silence while libraries load.
        timer = Timer(_LOADING_S, _print_message, ["loading libraries ..."])
        if sys.stderr.isatty():
            timer.start()
        try:
            with pause_garbage_collection():
                module = import_module(f"fedtune.cli.{_MODULES.get(cmd_name, cmd_name).replace('-', '_')}")
        finally:
            timer.cancel()
        found: click.Command = getattr(module, "app", None) or make_command(getattr(module, cmd_name.replace("-", "_")))
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


fedtune = _Fedtune(
    name="fedtune",
    help="Federated, differentially private fine-tuning with LoRA adapters.",
    epilog="fedtune COMMAND --help says more. Exit codes: 0 done, 2 wrong input, 3 refused, 1 anything else.",
    context_settings=SETTINGS,
    no_args_is_help=False,
)


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fedtune.version import build  # reads all files of the package

        click.echo(f"fedtune {build()}")
        context.exit()


_about: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _show_version}
fedtune = click.option("--version", **_about, help="Show the version and exit.")(fedtune)


def _print_message(message: str) -> None:
    """Print a message to standard error: wrapped on a terminal, in one line for a service's log."""
    text = f"fedtune: {message}"
    lines = wrap_text(text, width=shutil.get_terminal_size().columns) if sys.stderr.isatty() else [text]
    with suppress(OSError):  # there is nowhere else to say it
        sys.stderr.write("".join(f"{line}\n" for line in lines))


def _make_writable(stream: TextIO | None) -> TextIO:
    """Return a standard stream that accepts any text; characters missing in its encoding become question marks."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # None: the shell closed it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 3 refused, 1 anything else."""
    sys.stdout, sys.stderr = _make_writable(sys.stdout), _make_writable(sys.stderr)
    try:
        code = _run_command(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        pass
    except Exception as error:
        if (full := full_disk(error)) is None:
            raise
        _print_message(f"{full}; free some space, and run the command again")
    try:
        sys.stdout.flush()
    except OSError:  # what could not be printed is lost; or Python would try again, and say so on many lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _run_command(words: list[str]) -> int:
    try:
        os.getcwd()
    except OSError:
        _print_message("the working folder is gone or unreadable: change to another folder")
        return ConfigError.exit_code
    try:
        with fedtune.make_context("fedtune", words) as context:
            fedtune.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        asked = error.ctx.command_path if error.ctx else "fedtune"
        _print_message(f"{error.format_message().rstrip('.')} ({asked} --help says more)")
        return error.exit_code
    except FedtuneError as error:
        if isinstance(error, ConfigError) and full_disk(error):  # no value of a setting is wrong
            raise
        _print_message(str(error))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        if not isinstance(interrupt, InterruptTold):
            _print_message("interrupted")
        return 1
    return 0
