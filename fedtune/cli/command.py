"""Declaration of commands as typed functions, with annotations for arguments and options.

`path: Annotated[Path, Argument("PATH")]` declares an argument, `last: Annotated[int | None, Option()] = None` an option
`--last`.  click converts the values to these types, and mypy checks their use.  Typer is not used because it loses the
help of arguments with click 8.5.  This module must not import slow libraries.
"""

from __future__ import annotations

import gc
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click

from fedtune.show.lines import wrap_text
from fedtune.spec import NOT_GIVEN, ConfigError, expand_home

if TYPE_CHECKING:
    from fedtune.show.terminal_tables import Section

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
_FIRST_COLUMN = 30
_ROOM_BESIDE = 32  # minimum width of the description column; otherwise descriptions go below
_FURTHER = 20  # a help line with more indentation continues the description of the example above

Function = TypeVar("Function", bound=Callable[..., None])


class ReportedInterrupt(KeyboardInterrupt):
    """An interrupt by Ctrl-C, after the command that resumes the run has been printed."""


_WITHOUT_EPSILON = ("privacy=none", "privacy.mechanism=none")  # overrides that conflict with --epsilon
_MAX_REASON = 300
_LARGE = 100  # number of new modules that indicates a large library, whose objects are never freed


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Disable garbage collection during large imports, and freeze the imported objects afterwards."""
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - known > _LARGE:
            gc.freeze()
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Argument:
    """A positional argument."""

    metavar: str
    help: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """A command-line option.  Its flag is the parameter's name, unless `names` is given.

    For a keyword parameter (`**options`), `names` lists its options without the leading dashes.
    """

    help: str = ""
    names: tuple[str, ...] = ()
    metavar: str | None = None


class SettingsArgument(Argument):
    """An argument for overrides in Hydra's grammar.  A command with this argument also has Hydra's printing options."""


Overrides = Annotated[tuple[str, ...], SettingsArgument("KEY=VALUE", help="settings to change, or an experiment file")]
Multirun = Annotated[bool, Option("run every combination of comma-separated values", names=("-m", "--multirun"))]
Renew = Annotated[Path | None, Option("start the run of the next period from this finished run", metavar="LAST_RUN")]
AsJson = Annotated[bool, Option("print JSON", names=("--json",))]
Language = Literal["en", "de"]
Target = Literal["noise", "rounds", "sampling_rate"]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], Option()]
Health = Annotated[
    str | None, Option("serve GET /health and GET /ready at this loopback address or unix:PATH", metavar="HOST:PORT")
]
Metrics = Annotated[
    str | None,
    Option("serve GET /metrics (Prometheus) at this loopback address, or write a .prom file", metavar="HOST:PORT"),
]
HealthAnywhere = Annotated[bool, Option("allow other machines to reach --health")]


def check_reason(option: str, given: str) -> None:
    """Check a text that the ledger will store; raise ConfigError unless it is a short, printable line."""
    if not (given.strip() and given.isprintable() and len(given) <= _MAX_REASON):
        raise ConfigError(option, given, f"must be one line of at most {_MAX_REASON} characters")


def print_answer(figures: Mapping[str, Any], sections: Iterable[Section], *, as_json: bool, heading: str = "") -> None:
    """Print a command's result as JSON or as tables.

    Args:
        figures: the result.
        sections: the tables, built lazily.
        as_json: whether to print JSON.
        heading: line above the tables.
    """
    from fedtune.show.terminal_tables import print_json, say, show  # rich takes a while to import

    if as_json:
        print_json(figures)
        return
    if heading:
        say(heading, style="bold")
    show(sections)


def build_resume_command(command: str, *words: str, name: str, options: Sequence[str]) -> str:
    """Return the command line that resumes a run, by repeating the command with the run's name."""
    named = [word for word in words if not word.startswith("name=")]
    return shlex.join(["fedtune", command, *named, f"name={name}", *options])


class _Argument(click.Argument):
    """A click argument with a help text, which click itself supports only for options."""

    def __init__(self, *declared: Any, about: Argument, **options: Any) -> None:
        super().__init__(*declared, **options)
        self.about = about


class Command(click.Command):
    """A click command that lists its arguments in the help, never wraps example lines, and names options in errors."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.  In a library's error about one of its parameters, name the option or argument instead."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            for one in self.params:
                if one.name == error.key:
                    option = one.make_metavar(ctx) if isinstance(one, click.Argument) else max(one.opts, key=len)
                    raise type(error)(option, error.value, error.bound, remedy=error.remedy) from error
            raise

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        said: list[str] = []
        for is_example, part in groupby(
            inspect.cleandoc(self.help or "").splitlines(), key=lambda line: line.startswith((" ", "fedtune "))
        ):
            lines = list(part)
            said += [""] if not is_example and lines[0] else []
            said += (_wrap_examples if is_example else _wrap_prose)(lines, formatter.width)
        formatter.write("".join(f"{line}\n" for line in said))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params = self.get_params(ctx)
        arguments = [(each.make_metavar(ctx), each.about.help) for each in params if isinstance(each, _Argument)]
        given = (each for each in params if isinstance(each, click.Option))
        options = [record for each in given if (record := each.get_help_record(ctx))]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=_FIRST_COLUMN)


def _wrap_prose(lines: Iterable[str], width: int) -> Iterator[str]:
    for is_said, part in groupby(lines, key=bool):
        paragraph = list(part)
        yield from wrap_text(" ".join(" ".join(paragraph).split()), width=width) if is_said else paragraph


def _wrap_examples(lines: Iterable[str], width: int) -> Iterator[str]:
    """Format examples with their descriptions in a second column, or below the commands if the terminal is narrow."""
    rows: list[list[str]] = []
    for line in lines:
        if rows and len(line) - len(line.lstrip()) >= _FURTHER:
            rows[-1][1] += f" {line.strip()}"
        else:
            rows.append([*re.split(r"(?<=\S) {2,}", line, maxsplit=1), ""][:2])
    beside = max(len(command) for command, _ in rows) + 2
    for command, does in rows:
        room = width - beside
        if room >= _ROOM_BESIDE:
            for number, part in enumerate(wrap_text(does, width=room)):
                yield f"{'' if number else command:<{beside}}{part}".rstrip()
        else:
            yield from wrap_text(command, width=width)
            yield from wrap_text(f"      {does}", width=width) if does else ()


SETTINGS_OPTIONS = (
    click.Option(["--epsilon"], metavar="NUMBER", help="short for privacy.epsilon=NUMBER"),
    click.Option(
        ["--config-dir", "-cd"],
        type=click.Path(exists=True, file_okay=False, resolve_path=True),
        metavar="DIR",
        help="a folder with additional config groups",
    ),
    click.Option(
        ["--cfg", "-c"], type=click.Choice(["job", "hydra", "all"]), help="print the settings without running"
    ),
    click.Option(["--resolve"], is_flag=True, help="with --cfg: resolve interpolations"),
    click.Option(["--package", "-p"], metavar="KEY", help="with --cfg: print only this part"),
    click.Option(
        ["--info"],
        is_flag=False,
        flag_value="all",
        type=click.Choice(["all", "defaults", "searchpath"]),
        help="print the sources of the settings without running",
    ),
)


class _ComposedCommand(Command):
    """A command whose arguments are overrides, with short forms, Hydra's options and a list of the config groups."""

    def invoke(self, ctx: click.Context) -> Any:
        epsilon, folder, cfg, resolve, package, info = (ctx.params.pop(str(one.name)) for one in SETTINGS_OPTIONS)
        settings = next(str(one.name) for one in self.params if isinstance(one, _Argument))
        ctx.params[settings] = _expand_short_forms(ctx.params[settings], epsilon)
        if folder is not None:
            ctx.params[settings] = (*ctx.params[settings], f"hydra.searchpath=['file://{folder}']")
        if cfg is None and info is None:
            if given := "--resolve" * resolve or "--package" * (package is not None):
                raise ConfigError(given, NOT_GIVEN if resolve else package, "requires --cfg job, hydra or all")
            return super().invoke(ctx)
        from fedtune.cli.run_settings import print_config  # Hydra and the accountants take seconds to import

        print_config(
            ctx.params[settings], kit=ctx.params.get("kit"), cfg=cfg, package=package, resolve=resolve, info=info
        )
        return None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        from fedtune.api.config_groups import list_config_groups, list_options

        with formatter.section("Groups (key=option)"):
            formatter.write_dl([(group, ", ".join(list_options(group))) for group in list_config_groups()])


def _expand_short_forms(words: Iterable[str], epsilon: str | None) -> tuple[str, ...]:
    """Replace an experiment file and `--epsilon` in a command line by the equivalent overrides.

    Raises:
        ConfigError: an override also sets epsilon, or turns privacy off.
    """
    named = [f"experiment={word}" if is_experiment_file(word) else word for word in words]
    if epsilon is None:
        return tuple(named)
    for word in named:
        if word in _WITHOUT_EPSILON or word.lstrip("+~").startswith("privacy.epsilon="):
            raise ConfigError("--epsilon", epsilon, f"conflicts with {word}: give only one of them")
    return (*named, f"privacy.epsilon={epsilon}")


def is_experiment_file(word: str) -> bool:
    """Whether a command-line word is the path of an experiment file."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


class Group(Command, click.Group):
    """A command with subcommands, listed in the order of their definition.

    `default` is the subcommand to run if the first word is not a subcommand: `report PATH` means `report build PATH`.
    """

    def __init__(self, *, default: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.default is not None and args and args[0] not in (*self.commands, "-h", "--help"):
            args.insert(0, self.default)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def group(help: str, *, default: str | None = None) -> Group:
    """Create a command group with the module's docstring as `help`.  The decorator `command` adds subcommands."""
    return Group(default=default, help=help, context_settings=SETTINGS, no_args_is_help=False)


def command(app: Group, summary: str, *, name: str | None = None) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as a subcommand of a group.

    The function's parameters become arguments and options, and its docstring the help text.  `summary` is its line in
    the group's help.
    """

    def add(function: Function) -> Function:
        app.add_command(make_command(function, name=name, summary=summary))
        return function

    return add


def make_command(function: Callable[..., None], *, name: str | None = None, summary: str = "") -> Command:
    """Build a click command from a typed function."""
    params = list(_build_click_parameters(function))
    is_composed = any(isinstance(one, _Argument) and isinstance(one.about, SettingsArgument) for one in params)
    return (_ComposedCommand if is_composed else Command)(
        name=name or function.__name__,
        callback=function,
        params=[*params, *(SETTINGS_OPTIONS if is_composed else ())],
        help=function.__doc__,
        short_help=summary,
        context_settings=SETTINGS,
    )


def _build_click_parameters(function: Callable[..., None]) -> Iterator[click.Parameter]:
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        hint, about = get_args(parameter.annotation)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # `names` lists one option each
            yield from (click.Option([f"--{one}"], metavar=about.metavar) for one in about.names)
            continue
        required = parameter.default is inspect.Parameter.empty
        several = get_origin(hint) is tuple
        kind = _choose_click_type(hint)
        given = {} if required or several else {"default": parameter.default}  # click treats None as a default
        if isinstance(about, Argument):
            nargs = -1 if several else 1
            shown = about.metavar if required else f"[{about.metavar}]"
            metavar = f"{shown}..." if several else shown
            yield _Argument([name], type=kind, nargs=nargs, required=required, metavar=metavar, about=about, **given)
            continue
        yield click.Option(
            [name, *(about.names or (f"--{name.replace('_', '-')}",))],
            type=kind,
            is_flag=hint is bool,
            multiple=several,
            required=required,
            show_default=bool(given.get("default")) and hint is not bool,
            metavar=about.metavar,
            help=about.help,
            **given,
        )


def _choose_click_type(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    return _HomePath(path_type=Path) if hint is Path else hint


class _HomePath(click.Path):
    """A path parameter that expands ~, because shells expand `--out ~/x` but not `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        key = param.human_readable_name if param is not None else "path"
        return super().convert(expand_home(value, key=key), param, ctx)
