"""`fedtune site score`: a final adapter on the records that a site held out from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.data.load import own_records
from fedtune.privacy.keys import SigningKey

from ..conftest import command, files_in


@pytest.fixture
def here(joined: Any, finished: Path) -> Any:
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


def test_the_records_are_those_held_out_by_the_sites_own_key(here: Any) -> None:
    before = files_in(here.folder)
    out = command("site", "score", "first", *here.words, "--by", "ward", "--smallest", "10", "--json").printed
    told = json.loads(out)
    from fedtune.config import saved_config
    from fedtune.tasks.registry import task_named

    key = SigningKey.load(here.folder / "site_key.pem").secret("held-out split")
    data = saved_config(here.folder / "kit" / "adapters" / "first").data
    fault = task_named("classification").fault(data)
    expected = own_records(data, columns=dict(data.columns), fault=fault, key=key).heldout
    assert told["records"] == len(expected) > 30
    assert [model["name"] for model in told["models"]] == ["base", "tuned"]
    groups = told["groups"]["by ward"]["groups"]
    assert {group["name"] for group in groups} == {"w0", "w1"}
    assert sum(group["units"] for group in groups) == len(expected)
    assert files_in(here.folder) == before, "nothing is charged, and nothing is written"
    # For people, in words.
    out = command("site", "score", "first", *here.words).printed
    assert "Tuned " in out
    assert "Cost" not in out, "the site knows no run.json"


def test_what_cannot_be_scored_is_said(here: Any) -> None:
    assert 'is kept (final_adapter = "keep"): first' in command("site", "score", "second", *here.words).failed()
    path = here.folder / "kit" / "adapters" / "first" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["data"]["heldout_fraction"] = 0.0
    path.write_text(yaml.safe_dump(settings))
    assert command("site", "score", "first", *here.words).failed().split(":")[0] == "data.heldout_fraction = 0"
    assert command("site", "score", "first", *here.words, "--smallest", "3").code == 2


def test_the_own_adapter_is_made_at_the_site_and_noted_beside_its_ledger(here: Any) -> None:
    before = files_in(here.folder)
    out = command("site", "personalise", "first", *here.words, "--json").printed
    told = json.loads(out)["sites"]["north"]
    folder = here.folder / "kit" / "private_to_north" / "first"
    assert (told["folder"], set(told["values"])) == (str(folder), {"base", "alone", "shared", "own"})
    assert told["scored_records_were_trained_on"] is False
    noted = json.loads((here.folder / "own_adapters.json").read_text())
    assert [set(one) for one in noted] == [{"run", "made"}], "no digest, no score"
    after = files_in(here.folder)
    assert {name: after[name] for name in before} == before, "the ledger and the kept adapter stay as they are"
    again = command("site", "personalise", "first", *here.words, "--json")
    assert json.loads(again.out) == {**json.loads(out)}, "the same records give the same adapter"
