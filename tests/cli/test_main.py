from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune import __version__
from fedtune.cli.main import main
from fedtune.spec import RefusedError, RunError

REPOSITORY = Path(__file__).parents[2]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for command in ("simulate", "plan", "evaluate", "ledger", "site"):
        assert command in out


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("simulate", "resume="),
        ("plan", "key=value"),
        ("evaluate", "--data"),
        ("ledger", "fedtune ledger spent ledger.db"),
        ("ledger show", "--last"),
        ("ledger spent", "--json"),
        ("ledger verify", "--anchor"),
        ("ledger export", "--output"),
        ("ledger anchor", "--key"),
        ("ledger restore", "--policy"),
        ("ledger freeze", "--why"),
        ("site", "fedtune site check-policy site.toml"),
        ("site check-policy", "--json"),
        ("site template", "every key explained"),
        ("watch", "fedtune watch runs/"),
        ("audit", "fedtune audit"),
    ],
)
def test_each_command_explains_itself(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert word in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fedtune {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["simulate", "--nope"],
        ["simulate", "a=1", "--nope"],
        ["plan", "a=1", "--nope"],
        ["ledger"],
        ["ledger", "dance"],
        ["ledger", "show"],
        ["ledger", "show", "a", "b"],
        ["ledger", "show", "a", "--last", "many"],
        ["ledger", "freeze", "--policy", "site.toml"],
        ["site"],
        ["site", "check-policy"],
    ],
)
def test_a_wrong_command_line_is_exit_code_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["-m", "a=1", "b=2"], ["a=1", "-m", "b=2"], ["a=1", "b=2", "-m"], ["a=1", "--multirun", "b=2"]]
)
def test_overrides_may_stand_on_both_sides_of_the_sweep_flag(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("fedtune.cli.simulate.simulate", lambda overrides, multirun: seen.append((overrides, multirun)))
    assert main(["simulate", *arguments]) == 0
    assert seen == [(["a=1", "b=2"], True)]


def test_overrides_of_plan_may_stand_on_both_sides_of_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("fedtune.cli.plan.plan", lambda options: seen.append((options.overrides, options.json)))
    assert main(["plan", "a=1", "--json", "b=2"]) == 0
    assert seen == [(["a=1", "b=2"], True)]


@pytest.mark.parametrize(
    ("error", "code"), [(RunError("too few"), 1), (RefusedError("no budget"), 3), (KeyboardInterrupt(), 1)]
)
def test_each_kind_of_error_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **rest: object) -> None:
        raise error

    monkeypatch.setattr("fedtune.cli.simulate.simulate", fails)
    assert main(["simulate"]) == code
    assert capsys.readouterr().err == ("" if isinstance(error, KeyboardInterrupt) else f"fedtune: {error}\n")


def test_a_mistake_is_told_before_torch_and_flower_are_imported() -> None:
    code = (
        "import sys; from fedtune.cli.main import main; code = main(['simulate', 'privacy.epsilon=0']);"
        "print(code, 'flwr' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "2 False\n"
    assert done.stderr == "fedtune: privacy.epsilon = 0.0: must be a finite number greater than 0\n"


def test_the_status_of_a_run_and_a_mistake_in_one_wait_for_no_slow_import() -> None:
    code = (
        "import sys, fedtune.cli.run_status, fedtune.deploy.services.lead_service;"
        "print([name for name in ('torch', 'peft', 'flwr', 'opacus') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_help_waits_for_no_slow_import() -> None:
    code = (
        "import sys; from fedtune.cli.main import main\n"
        "try: main(['ledger', '--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'hydra', 'dp_accounting') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.endswith("\n[]\n")


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from fedtune.cli.main import main; sys.exit(main(['site', 'template']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_flowers_telemetry_is_off_unless_someone_turned_it_on() -> None:
    code = "import os; import fedtune.flower; print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    plain = {key: value for key, value in os.environ.items() if key != "FLWR_TELEMETRY_ENABLED"}
    for given, expected in (({}, "0\n"), ({"FLWR_TELEMETRY_ENABLED": "1"}, "1\n")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**plain, **given, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == expected
