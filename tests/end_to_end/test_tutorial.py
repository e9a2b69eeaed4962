"""docs/tutorial.md and docs/other_tasks.md, executed line by line, on files that no other test reads."""

import gzip
import json
import re
import shlex
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..conftest import REPOSITORY, read_result, run_command

pytestmark = pytest.mark.nightly

EXAMPLES = REPOSITORY / "simulations" / "data" / "examples"
LABELS = {"card_arrival", "exchange_rate", "lost_or_stolen_card", "pending_cash_withdrawal", "request_refund"}


def list_commands(file: str) -> list[list[str]]:
    """List the pages' commands for one of the files, without the word fedtune."""
    page = "".join((REPOSITORY / "docs" / name).read_text() for name in ("tutorial.md", "other_tasks.md"))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    commands = [line for kind, block in blocks if not kind for line in block.replace("\\\n", "").splitlines()]
    name = file.partition(".")[0]
    mention = re.compile(rf"\b{name}\b")
    typed = [shlex.split(line, comments=True)[1:] for line in commands if line.startswith("fedtune ")]
    return [words for words in typed if mention.search(" ".join(words))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in EXAMPLES.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = {"data init", "data check", "simulate", "generate", "evaluate", "export"}
FILES = tomllib.loads(Path(__file__).with_name("example_runs.toml").read_text())


@pytest.mark.parametrize("file", [file.name for file in EXAMPLES.iterdir() if file.name != "README.md"])
def test_every_tutorial_command_succeeds_as_printed(folder: Path, file: str) -> None:
    outcomes = {}
    for words in list_commands(file):
        outcome = run_command(*words)
        assert outcome.code == 0, (words, outcome.err)
        outcomes[" ".join(words[:2]) if words[0] == "data" else words[0]] = outcome
    assert {"data init", "simulate", "evaluate"} <= set(outcomes) <= ALL
    name, answer = file.partition(".")[0], FILES[file]["answer"]
    result = json.loads((folder / "runs" / name / "run.json").read_text())
    assert set(FILES[file]["scores"]) <= set(result["final"]["metrics"])
    assert ("generate" in outcomes) == (answer != "")
    assert not answer or re.match(answer, outcomes["generate"].out), outcomes["generate"].out
    assert ("unit: user" in (folder / f"{name}.yaml").read_text()) == (name == "speeches")
    if file == "tickets.csv":
        assert "trained on records of this file" in " ".join(outcomes["evaluate"].out.split())
        assert set((folder / "tickets-model" / "labels.txt").read_text().split()) == LABELS


BANKING = REPOSITORY / "simulations" / "data" / "banking77"
FOUR_LABELS = ("card_arrival", "card_linking", "exchange_rate", "top_up_failed")
SITES, RECORDS, TEST_ROWS = 2, 100, 80
MAX_CHARACTERS, MAX_TOKENS = 50, 16
# With 80 rows, of which nine in ten are correct before training, two standard errors are 0.07.
MARGIN = 0.07


def read_rows(name: str, count: int) -> list[dict[str, str]]:
    """Return the first rows that have one of the labels and few words, for fast training."""
    with gzip.open(BANKING / name, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = (row for row in rows if row["label"] in FOUR_LABELS and len(row["text"]) <= MAX_CHARACTERS)
    sorted_rows = sorted(short, key=lambda row: row["text"])
    assert len(sorted_rows) >= count
    return sorted_rows[:count]


@pytest.fixture
def list_quick_start_commands(tmp_path: Path) -> list[str]:
    """List the command of docs/own_data.md for few rows, with given noise to skip the calibration."""
    for name, count in (("train", SITES * RECORDS), ("test", TEST_ROWS)):
        rows = (json.dumps(row) + "\n" for row in read_rows(f"{name}.jsonl.gz", count))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return [
        *("simulate", "experiment=own_data", "name=small", f"data.train_file='{tmp_path / 'train.jsonl'}'"),
        *(f"data.test_file='{tmp_path / 'test.jsonl'}'", f"data.labels=[{','.join(FOUR_LABELS)}]"),
        *(f"data.declared_sizes={RECORDS}", f"data.max_length={MAX_TOKENS}", "runtime.micro_batch_tokens=256"),
        *(f"federation.num_sites={SITES}", "privacy.epsilon=3", "privacy.noise_multiplier=3.1665"),
        *(f"tracking.output_dir='{tmp_path}'", "tracking=quiet", "runtime.device=cpu", "runtime.num_threads=1"),
    ]


def test_small_data_set_with_few_labels_is_learned(list_quick_start_commands: list[str], tmp_path: Path) -> None:
    assert run_command(*list_quick_start_commands).code == 0
    result = read_result(tmp_path / "small")
    assert [site["rounds"] for site in result["privacy"]["sites"].values()] == [10] * SITES
    assert not any(entry["failed_sites"] for entry in result["rounds"])

    before, after = (result["final"][key]["accuracy"] for key in ("metrics_before", "metrics"))
    labels = Counter(row["label"] for row in read_rows("test.jsonl.gz", TEST_ROWS))
    majority = max(labels.values()) / TEST_ROWS
    assert after >= before - MARGIN
    assert after > majority + MARGIN
    # Half of a site's limit on adapter values, so that the site accepts the adapter in the next round.
    files = (tmp_path / "small" / "adapter").glob("*.safetensors")
    assert max(np.abs(tensor).max() for file in files for tensor in load_file(file).values()) < 2.5
