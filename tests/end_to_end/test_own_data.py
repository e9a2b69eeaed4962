"""The recipe of experiment=own_data on a small problem: the run ends, and what it learnt is of use."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..conftest import REPOSITORY, command, result_of

pytestmark = pytest.mark.nightly

BANKING = REPOSITORY / "simulations" / "data" / "banking77"
LABELS = ("card_arrival", "card_linking", "exchange_rate", "top_up_failed")
SITES, RECORDS, TEST_ROWS = 2, 100, 80
MOST_CHARACTERS, MOST_TOKENS = 50, 16
# 80 rows of which nine in ten are right before training: two standard errors are 0.07.
MARGIN = 0.07


def cut(name: str, most: int) -> list[dict[str, str]]:
    """The first so many rows with one of the labels and few words, which cost little."""
    with gzip.open(BANKING / name, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = (row for row in rows if row["label"] in LABELS and len(row["text"]) <= MOST_CHARACTERS)
    kept = sorted(short, key=lambda row: row["text"])
    assert len(kept) >= most
    return kept[:most]


@pytest.fixture
def five_lines(tmp_path: Path) -> list[str]:
    """The command of docs/own_data.md on few rows.  The noise of epsilon 3 is given, which saves its search."""
    for name, rows in (("train", cut("train.jsonl.gz", SITES * RECORDS)), ("test", cut("test.jsonl.gz", TEST_ROWS))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("simulate", "experiment=own_data", "name=small", f"data.train_file='{tmp_path / 'train.jsonl'}'"),
        *(f"data.test_file='{tmp_path / 'test.jsonl'}'", f"data.labels=[{','.join(LABELS)}]"),
        *(f"data.declared_sizes={RECORDS}", f"data.max_length={MOST_TOKENS}", "runtime.micro_batch_tokens=256"),
        *(f"federation.num_sites={SITES}", "privacy.epsilon=3", "privacy.noise_multiplier=3.1665"),
        *(f"tracking.output_dir='{tmp_path}'", "tracking=quiet", "runtime.device=cpu", "runtime.num_threads=1"),
    ]


def test_few_labels_and_small_sites_end_with_something_learnt(five_lines: list[str], tmp_path: Path) -> None:
    assert command(*five_lines).code == 0
    result = result_of(tmp_path / "small")
    assert [site["rounds"] for site in result["privacy"]["sites"].values()] == [10] * SITES
    assert not any(one["failed_sites"] for one in result["rounds"])

    before, after = (result["final"][key]["accuracy"] for key in ("metrics_before", "metrics"))
    labels = Counter(row["label"] for row in cut("test.jsonl.gz", TEST_ROWS))
    majority = max(labels.values()) / TEST_ROWS
    assert after >= before - MARGIN
    assert after > majority + MARGIN
    # Half of what a site's own policy allows, so that nothing is refused for the adapter that comes back.
    files = (tmp_path / "small" / "adapter").glob("*.safetensors")
    assert max(np.abs(tensor).max() for file in files for tensor in load_file(file).values()) < 2.5
