"""Shell completion: its table, click's protocol in a subprocess, and bash."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fedtune.api.config_groups import list_config_groups, list_options
from fedtune.api.experiment_file import compose_default_settings
from fedtune.cli.main import COMMANDS, COMPLETIONS, fedtune
from fedtune.config import PATHS
from fedtune.formatting import flatten
from fedtune.tasks.registry import TASKS
from fedtune.training.algorithms.algorithm_registry import ALGORITHMS
from fedtune.version import find_config_folder

from ..conftest import REPOSITORY, run_python
from . import snapshots


def iter_leaves(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from iter_leaves(command, *path, name)
        elif command is not None:
            yield " ".join((*path, name)), command


def describe_kind(param: click.Parameter) -> str | list[str] | None:
    """Describe a parameter's values for the completion table; None if they cannot be completed."""
    metavar = param.metavar or ""
    if "KEY=VALUE" in metavar:
        return "setting"
    if isinstance(param.type, click.Choice):
        return [*param.type.choices]
    if isinstance(param.type, click.Path):
        return "file" if param.type.file_okay else "folder"
    if isinstance(param, click.Option) and param.is_flag:
        return "flag"
    return "file" if metavar in ("FILE", "RUN") else None


def build_table() -> str:
    """Build the content of conf/completions.json, one line per command."""
    lines, commands = [], dict(iter_leaves(fedtune))
    for path, command in commands.items():
        options = [one for one in command.params if isinstance(one, click.Option)]
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        entry = {
            "help": COMMANDS.get(path) or command.short_help,
            "argument": next((describe_kind(one) for one in reversed(arguments) if describe_kind(one)), None),
            "options": [[one.opts, describe_kind(one), one.help] for one in options],
        }
        lines.append(f"  {json.dumps(path)}: {json.dumps(entry)}")
    keys = [f"{key}=" for key in sorted({key for key, _ in flatten(compose_default_settings())} | PATHS)]
    options = {group: list_options(group) for group in list_config_groups()} | {"task": sorted(TASKS)}
    options["federation.algorithm"] = [*ALGORITHMS]
    keys += [f"{group}={option}" for group, names in options.items() for option in names]
    settings = json.dumps(keys)
    return '{\n "commands": {\n' + ",\n".join(lines) + f'\n }},\n "settings": {settings}\n}}\n'


def test_completion_table_matches_the_commands_and_settings() -> None:
    snapshots.check_text(str(find_config_folder() / COMPLETIONS), build_table())


CASES: dict[str, tuple[list[str], set[str]]] = {
    "fedtune si": (["simulate", "site"], set()),
    "fedtune site pa": (["pause"], set()),
    "fedtune simulate --eps": (["--epsilon"], set()),
    "fedtune export runs/a --form": (["--format"], set()),
    "fedtune export runs/a --format on": (["onnx"], set()),
    "fedtune export runs/a --format=on": (["onnx"], set()),
    "fedtune simulate experiment=de": (["experiment=debug", "experiment=debug_users"], set()),
    "fedtune simulate seed=1 privacy=": (["privacy=dp_sgd", "privacy=none"], set()),
    "fedtune plan privacy.eps": (["privacy.epsilon="], set()),
    "fedtune plan task=ord": (["task=ordinal"], set()),
    "fedtune report build ru": ([], {"file"}),
    "fedtune run experiment=tic": (["experiment=tickets.yaml"], set()),
    "fedtune search tic": (["tickets.yaml"], set()),
    "fedtune data check tic": (["tickets.yaml"], set()),
    "fedtune audit data.train_file=re": (["data.train_file=records.csv"], set()),
    "fedtune audit data.train_file=own/": (["data.train_file=own/inner.csv"], set()),
    "fedtune evaluate ru": ([], {"file"}),
}
RUN = """
import io, json, os, sys
from contextlib import redirect_stdout
from fedtune.cli.main import main

answers = {}
for line, shells in json.loads(sys.stdin.read()).items():
    for shell, variables in shells.items():
        os.environ.update(variables, _FEDTUNE_COMPLETE=f"{shell}_complete")
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as out:
            assert main([]) == 0
            answers[f"{shell} {line}"] = out.buffer.getvalue().decode().splitlines()
slow = ("torch", "hydra", "omegaconf", "numpy", "pydantic", "rich", "huggingface_hub", "yaml", "fedtune.config")
print(json.dumps([answers, [name for name in slow if name in sys.modules]]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tickets.yaml", "records.csv", "own/inner.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_completion_covers_commands_options_settings_and_files(folder: Path) -> None:
    requests = {}
    for line in CASES:
        words = line.split()
        requests[line] = {shell: {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} for shell in ("bash", "zsh")}
        requests[line]["fish"] = {"COMP_WORDS": line, "COMP_CWORD": words[-1]}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    answers, slow = json.loads(run_python("-c", RUN, input=json.dumps(requests), cwd=folder, env=environment))
    assert slow == []
    for line, (values, kinds) in CASES.items():
        word = line.split()[-1]
        expected = [*(f"plain,{value}" for value in values), *(f"{kind},{word}" for kind in kinds)]
        assert answers[f"bash {line}"] == expected
        zsh = answers[f"zsh {line}"]
        assert [",".join(item) for item in zip(zsh[::3], zsh[1::3], strict=True)] == expected
        assert [answer.partition("\t")[0] for answer in answers[f"fish {line}"]] == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_script_completes_in_bash(folder: Path) -> None:
    command = folder / "bin" / "fedtune"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m fedtune "$@"\n')
    command.chmod(0o755)
    script = """
    eval "$(_FEDTUNE_COMPLETE=bash_source fedtune)"
    complete -p fedtune
    shown() {
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="${*}" COMPREPLY=()
        COMP_LINE=${COMP_LINE// = /=} COMP_LINE=${COMP_LINE/ =/=} COMP_POINT=1000
        _fedtune_completion fedtune 2> /dev/null
        printf '%s\n' "${COMPREPLY[@]}"
    }
    shown fedtune simulate experiment = debug_
    shown fedtune simulate seed = 1 privacy =
    shown fedtune export runs/a --format = on
    shown fedtune simulate privacy.eps
    shown fedtune site pa
    """
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    run = {"capture_output": True, "text": True, "cwd": folder, "env": environment, "timeout": 120}
    done = subprocess.run(["bash", "--norc", "-c", script], check=True, **run)
    declared, *completed = done.stdout.splitlines()
    assert declared == "complete -o default -o nosort -F _fedtune_completion fedtune"
    assert completed == ["debug_users", "dp_sgd", "none", "onnx", "privacy.epsilon=", "pause"]
