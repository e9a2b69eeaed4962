"""Every user error ends with exit code 2 and one line that names key, value and bound."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from ..cli import snapshots
from ..conftest import list_tiny_overrides, run_command


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """Run with an invalid setting and return the one-line error, after checking that no file was left behind."""

    def run(*overrides: str) -> str:
        runs = tmp_path / "runs"
        runs.mkdir(exist_ok=True)
        outcome = run_command("simulate", *list_tiny_overrides(*overrides, into=runs))
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.out + outcome.err
        assert list(runs.iterdir()) == []
        return str(outcome.message)

    return run


@snapshots.parametrize_mistakes("mistakes-settings")
def test_invalid_setting_is_named_with_its_key_value_and_bound(refuse: Callable[..., str], typed: str) -> None:
    """Covers each bound that no spec checks on its own."""
    snapshots.check_message("mistakes-settings", typed, refuse(*shlex.split(typed)))


GOOD = json.dumps({"text": "where is my card", "label": "card_arrival"})


@pytest.mark.parametrize(
    ("key", "line", "bound"),
    [
        ("train_file", '{"text": 3, "label": "card_arrival"}', "text"),
        ("validation_file", '{"txt": "a", "label": "card_arrival"}', "data.columns.text"),
        ("test_file", '{"text": "a", "label": "parking"}', "data.labels"),
    ],
)
def test_malformed_line_is_named_with_its_file_and_number(
    refuse: Callable[..., str], tmp_path: Path, key: str, line: str, bound: str
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    message = refuse(f"data.{key}={file}", "data.train_fraction=1.0", "federation.num_sites=1")
    assert f"{file}:2" in message
    assert bound in message


def test_evaluate_names_invalid_files_and_options(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a", "label": "parking"}\n')
    assert f"{file}:1" in run_command("evaluate", str(folder), "--data", str(file), "--device", "cpu").failed()
    outcome = run_command("evaluate", str(folder), "--data", str(tmp_path / "gone.csv"), "--device", "cpu")
    assert outcome.failed().startswith("--data = ")
    assert "config.yaml" in run_command("evaluate", str(tmp_path), "--data", str(file)).failed()
