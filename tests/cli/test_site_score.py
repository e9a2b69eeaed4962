"""`fedtune site score`: a final adapter on the records that a site held out from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.data.load import own_records
from fedtune.privacy.keys import SigningKey


@pytest.fixture
def here(joined: Callable[..., Any], finished: Path) -> Any:
    """A site that keeps the final adapter of `first`, and has records of two wards and some that cannot be used."""
    site = joined("north")
    labels = yaml.safe_load((finished / "config.yaml").read_text())["data"]["labels"]
    rows = [
        {"text": f"my card number {number} is late", "label": labels[number % 2], "ward": f"w{number % 3 // 2}"}
        for number in range(120)
    ]
    broken = ['{"text": 3, "label": "none"}', "no JSON at all", json.dumps({"text": "x", "label": "no such label"})]
    (site.folder / "letters.jsonl").write_text("\n".join([*map(json.dumps, rows), *broken]) + "\n")
    kept = site.folder / "kit" / "adapters" / "first"
    shutil.copytree(finished, kept, ignore=shutil.ignore_patterns("run.json", "report*", "checkpoints", "sites"))
    settings = yaml.safe_load((kept / "config.yaml").read_text())
    settings["data"] |= {"train_file": str(site.folder / "letters.jsonl"), "heldout_fraction": 0.5}
    (kept / "config.yaml").write_text(yaml.safe_dump(settings))
    return site


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_records_are_those_held_out_by_the_sites_own_key(here: Any, command: Any) -> None:
    before = contents(here.folder)
    outcome = command("site", "score", "first", *here.words, "--by", "ward", "--smallest", "10", "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    from fedtune.config import saved_config
    from fedtune.tasks import task_named

    key = SigningKey.load(here.folder / "site_key.pem").secret("held-out split")
    data = saved_config(here.folder / "kit" / "adapters" / "first").data
    fault = task_named("classification").fault(data)
    expected = own_records(data, columns=dict(data.columns), fault=fault, key=key).heldout
    assert told["records"] == len(expected) > 30
    assert [model["name"] for model in told["models"]] == ["base", "tuned"]
    groups = told["groups"]["by ward"]["groups"]
    assert {group["name"] for group in groups} == {"w0", "w1"}
    assert sum(group["units"] for group in groups) == len(expected)
    assert contents(here.folder) == before, "nothing is charged, and nothing is written"


def test_it_is_told_in_words(here: Any, command: Any) -> None:
    outcome = command("site", "score", "first", *here.words)
    assert outcome.code == 0, outcome.err
    assert "Tuned " in outcome.out
    assert "Cost" not in outcome.out, "the site knows no run.json"


def test_what_cannot_be_scored_is_said(here: Any, command: Any) -> None:
    missing = command("site", "score", "second", *here.words)
    assert (missing.code, 'is kept (final_adapter = "keep"): first' in missing.message) == (2, True)
    path = here.folder / "kit" / "adapters" / "first" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["data"]["heldout_fraction"] = 0.0
    path.write_text(yaml.safe_dump(settings))
    nothing = command("site", "score", "first", *here.words)
    assert (nothing.code, nothing.message.split(":")[0]) == (2, "data.heldout_fraction = 0")
    column = command("site", "score", "first", *here.words, "--smallest", "3")
    assert column.code == 2


def test_the_own_adapter_is_made_at_the_site_and_noted_beside_its_ledger(here: Any, command: Any) -> None:
    before = contents(here.folder)
    outcome = command("site", "personalise", "first", *here.words, "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)["sites"]["north"]
    folder = here.folder / "kit" / "private_to_north" / "first"
    assert (told["folder"], set(told["values"])) == (str(folder), {"base", "alone", "shared", "own"})
    assert told["scored_records_were_trained_on"] is False
    noted = json.loads((here.folder / "own_adapters.json").read_text())
    assert [set(one) for one in noted] == [{"run", "made"}], "no digest, no score"
    after = contents(here.folder)
    assert {name: after[name] for name in before} == before, "the ledger and the kept adapter stay as they are"
    again = command("site", "personalise", "first", *here.words, "--json")
    assert json.loads(again.out) == {**json.loads(outcome.out)}, "the same records give the same adapter"
