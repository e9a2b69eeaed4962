"""Entry point of the `fedtune` command: dispatch, error messages, exit codes and shell completion.

Shell completion reads conf/completions.json, because importing the command modules takes seconds.
`FEDTUNE_WRITE_SNAPSHOTS=1 pytest tests/cli/test_completion.py` writes that file.
"""

from __future__ import annotations

import glob
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from threading import Timer
from typing import Any, TextIO, cast

# Disable Flower's telemetry; Flower reads the variable on import.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    shell_complete,
    split_arg_string,
)

from fedtune.cli.command import SETTINGS, ReportedInterrupt, is_experiment_file, make_command, pause_garbage_collection
from fedtune.show.lines import wrap_text
from fedtune.spec import ConfigError, FedtuneError, describe_full_disk, format_value
from fedtune.version import find_config_folder

COMMANDS: Mapping[str, str] = {
    "data": "inspect data files, and write a first experiment",
    "simulate": "run a federation on this machine",
    "plan": "forecast a run's privacy cost without reading data",
    "audit": "test a run's guarantee empirically, with canaries",
    "attack": "run known privacy attacks on a finished run",
    "generate": "generate text or predict with a finished run's model",
    "synthesize": "generate synthetic records, or select them by votes",
    "evaluate": "score a finished run's model and its base model",
    "compare": "compare base, single-site, federated and pooled training",
    "personalize": "train a personalized adapter, which stays at the site",
    "search": "search hyperparameters with a fixed privacy cost",
    "export": "export a run's model in a standard format",
    "distill": "distill a run's model into a smaller model",
    "model-hash": "print the hash of a base model",
    "ledger": "read a site's ledger: spent and remaining epsilon",
    "report": "write or verify the privacy report of a run or a ledger",
    "gate": "check by rules whether a run's model may be released",
    "site": "manage a site: its policy, its keys, its process",
    "provision": "set up a federation of real sites",
    "server": "run or back up a federation's server",
    "run": "run a federation over real sites",
    "flower-app": "write a bundle to run fedtune in an existing Flower federation",
}
"""One-line help by command.  The command's module defines a function with the command's name, or a group `app`."""
_MODULES = {"distill": "export", "gate": "release_gate"}
"""Modules of the commands whose name differs from the module's name."""
_LOADING_S = 0.5


class _Fedtune(click.Group):
    """Top-level command group that imports only the called command's module, because torch and Hydra take seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # Slow imports print a message on a terminal.
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
    epilog="fedtune COMMAND --help describes a command. Exit codes: 0 success, 2 invalid input, 3 refused, 1 error.",
    context_settings=SETTINGS,
    no_args_is_help=False,
)


_COMPLETE = "_FEDTUNE_COMPLETE"  # click's variable: bash_source, zsh_source, fish_source, or ..._complete
COMPLETIONS = "completions.json"
_BASH_VALUE = """\
[[ $value == *[=/] ]] && compopt -o nospace
            [[ = == @(${COMP_WORDS[COMP_CWORD]}|${COMP_WORDS[COMP_CWORD-1]}) ]] && value=${value#*=}"""


class _Setting(click.ParamType):  # type: ignore[type-arg]  # not generic in every supported click
    """Parameter type of an override: KEY=VALUE, or an experiment file."""

    name = "setting"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        key, equals, start = incomplete.rpartition("=")
        found = [word for word in self._words if word.startswith(incomplete) and word != incomplete]
        takes_experiment = key in ("", "experiment")
        for path in sorted(glob.glob(f"{glob.escape(start)}*")) if takes_experiment or not found else ():
            if (is_folder := os.path.isdir(path)) or not takes_experiment or is_experiment_file(path):
                found.append(f"{key}{equals}{path}{'/' * is_folder}")
        return [CompletionItem(word) for word in found]


@add_completion_class
class _Bash(BashComplete):
    """Completion for bash, which splits words at `=` and appends a space after a completed word by default."""

    source_template = (
        BashComplete.source_template.replace("${COMP_WORDS[*]}", "${COMP_LINE:0:$COMP_POINT}")
        .replace("COMPREPLY+=($value)", f"{_BASH_VALUE}\n            COMPREPLY+=($value)")
        .replace("complete -o nosort", "complete -o nosort -o default")
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        _, *words = split_arg_string(line) + [""] * line.endswith(" ")
        return words[:-1], words[-1]


@add_completion_class
class _Zsh(ZshComplete):
    """Completion for zsh, without a space after a completed key, so that its value can follow."""

    source_template = ZshComplete.source_template.replace("compadd -U", "compadd -S '' -U")


def _print_completions(instruction: str) -> int:
    """Print the shell's completion script, or the completions of its command line."""
    known = json.loads((find_config_folder() / COMPLETIONS).read_text(encoding="utf-8"))
    types = {"file": click.Path(), "folder": click.Path(file_okay=False), "setting": _Setting(known["settings"])}
    tree = click.Group("fedtune", params=list(fedtune.params), context_settings=SETTINGS)
    for path, about in known["commands"].items():
        *groups, name = path.split()
        parent = tree
        for group in groups:
            parent.commands.setdefault(group, click.Group(group, short_help=COMMANDS.get(group)))
            parent = cast(click.Group, parent.commands[group])
        params: list[click.Parameter] = []
        for names, values, help in about["options"]:
            kind = click.Choice(values) if isinstance(values, list) else types.get(values)
            params.append(click.Option(names, type=kind, is_flag=values == "flag", help=help))
        if (kind := types.get(about["argument"])) is not None:
            params.append(click.Argument(["words"], nargs=-1, type=kind))
        parent.add_command(click.Command(name, params=params, short_help=about["help"], context_settings=SETTINGS))
    return shell_complete(tree, {}, "fedtune", _COMPLETE, instruction)


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fedtune.version import build  # reads all files of the package

        click.echo(f"fedtune {build()}")
        context.exit()


_about: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _show_version}
fedtune = click.option("--version", **_about, help="Show the version and exit.")(fedtune)


def _print_message(message: str) -> None:
    """Print a message to standard error, wrapped on a terminal and as a single line in a service's log."""
    text = f"fedtune: {message}"
    lines = wrap_text(text, width=shutil.get_terminal_size().columns) if sys.stderr.isatty() else [text]
    with suppress(OSError):  # standard error is closed or full
        sys.stderr.write("".join(f"{line}\n" for line in lines))


def _make_writable(stream: TextIO | None) -> TextIO:
    """Make a stream replace characters outside its encoding by question marks; return a null stream for None."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # None: the shell closed it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 success, 2 invalid input, 3 refused by a policy or budget, 1 any other error.
    """
    sys.stdout, sys.stderr = _make_writable(sys.stdout), _make_writable(sys.stderr)
    try:
        code = _run_command(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        pass
    except Exception as error:
        if (full := describe_full_disk(error)) is None:
            raise
        _print_message(f"{full}: free some space and run the command again")
    try:
        sys.stdout.flush()
    except OSError:  # discard the output; otherwise Python flushes again at exit and prints a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _run_command(words: list[str]) -> int:
    if instruction := os.environ.get(_COMPLETE):
        return _print_completions(instruction)
    try:
        os.getcwd()
    except OSError:
        _print_message("the working directory was deleted or is unreadable: change to another directory")
        return ConfigError.exit_code
    try:
        with fedtune.make_context("fedtune", words) as context:
            fedtune.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        asked = error.ctx.command_path if error.ctx else "fedtune"
        _print_message(f"{error.format_message().rstrip('.')} (see {asked} --help)")
        return error.exit_code
    except FedtuneError as error:
        if isinstance(error, ConfigError) and describe_full_disk(error):  # the cause is the full disk, not the setting
            raise
        _print_message(str(error))
        return error.exit_code
    except OSError as error:
        if error.filename is None or describe_full_disk(error):  # without a file, it is a bug of our own
            raise
        _print_message(f"{format_value(str(error.filename))}: cannot be used ({error.strerror})")
        return ConfigError.exit_code
    except KeyboardInterrupt as interrupt:
        if not isinstance(interrupt, ReportedInterrupt):
            _print_message("interrupted")
        return 1
    return 0
