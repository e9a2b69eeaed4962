"""A comparison from one end to the other: by user, by a column that says the site, and after Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..conftest import command
from ..forked import Forked
from .test_user_level import arguments

pytestmark = pytest.mark.nightly

SHORT = ("federation.num_rounds=1", "training.local_steps=1", "tracking=quiet")


def test_users_are_drawn_with_all_their_records(tmp_path: Path) -> None:
    words = arguments(tmp_path, *SHORT, "data.test_rows=null", name="chat")
    told = json.loads(command("compare", *words, "--leave-out", "alone", "--generate", "3", "--json").printed)
    assert told["unit"] == "user"
    assert 10 < told["units"] < told["records"] / 2
    base, federated, pooled = told["models"]
    assert set(base["scores"]) == {"loss", "perplexity", "bleu", "rouge_l"}
    assert [model["name"] for model in (federated, pooled)] == ["federated", "pooled"]
    by_record = command("compare", federated["folder"], pooled["folder"], "--json")
    assert json.loads(by_record.out)["units"] == told["units"], "also of runs that are there"


def tickets(folder: Path) -> list[str]:
    """An experiment of two sites that a column tells apart, with a test file of its own."""
    rows = [
        {
            "text": f"ticket {number} about {('cards', 'loans')[number % 2]}",
            "label": ("a", "b")[number % 2],
            "office": ("north", "south", "abroad")[number % 5 % 3],
            "desk": number % 4 // 3,
        }
        for number in range(160)
    ]
    for name, chosen in (("train", rows[:100]), ("test", rows[100:])):
        kept = [row for row in chosen if name == "test" or row["office"] != "abroad"]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return [
        *("experiment=debug", "data=own", f"data.train_file='{folder}/train.jsonl'"),
        *(f"data.test_file='{folder}/test.jsonl'", "data.columns={text: text, label: label, site: office}"),
        *("data.labels=[a,b]", "data.declared_sizes=30", "data.max_length=16", "data.partition.kind=column"),
        *("data.partition.sites={north: 0, south: 1}", "federation.site_names=[north,south]"),
        *("privacy.noise_multiplier=4.0", "runtime.device=cpu", "runtime.num_threads=1"),
        *(f"tracking.output_dir='{folder}/runs'", "name=offices"),
        *SHORT,
    ]


def test_sites_are_told_by_the_column_that_dealt_them_out(tmp_path: Path) -> None:
    told = json.loads(command("compare", *tickets(tmp_path), "--by", "desk", "--smallest", "10", "--json").printed)
    by_site = {group["name"]: group["units"] for group in told["groups"]["by site"]["groups"]}
    assert by_site == {"north": 24, "south": 24, "(none)": 12}, "abroad is no site"
    assert [group["units"] for group in told["groups"]["by desk"]["groups"]] == [45, 15]
    pooled = next(model for model in told["models"] if model["name"] == "pooled")
    log = (Path(pooled["folder"]) / "run.json").read_text()
    assert list(json.loads(log)["privacy"]["sites"]) == ["all"]


def test_after_ctrl_c_the_command_that_is_named_goes_on(tmp_path: Path) -> None:
    words = tickets(tmp_path)
    words[words.index("federation.num_rounds=1")] = "federation.num_rounds=40"
    runs = tmp_path / "runs" / "offices"
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [sys.executable, "-m", "fedtune", "compare", *words, "--leave-out", "alone"]
    process = Forked(started, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    deadline = time.monotonic() + 120
    while not list(runs.glob("offices-federated/checkpoints/round-0003*")):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Continue with: fedtune compare" in " ".join(shown.split())
    assert not (runs / "offices-pooled").exists()
    done = len(list(runs.glob("offices-federated/checkpoints/*.safetensors")))
    again = command("compare", *words, "--leave-out", "alone", "--json")
    assert done > 0
    result = json.loads((runs / "offices-federated" / "run.json").read_text())
    assert [one["round"] for one in result["rounds"]] == list(range(1, 41))
    assert json.loads(again.printed)["models"][1]["name"] == "federated"
