"""`fedtune personalize`: personalized adapters, which no run can start from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..conftest import list_tiny_overrides, run_command


@pytest.fixture(scope="module")
def personalized_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run with personalized adapters, and the command's output; read-only."""
    run = tmp_path_factory.mktemp("own") / "one"
    shutil.copytree(finished_run, run)
    out = run_command("personalize", str(run), "--json").printed
    return run, json.loads(out)["sites"]


def find_own_adapter(run: Path) -> Path:
    return next(iter(sorted(run.glob("private_to_*"))))


def test_personalized_adapters_are_labeled_as_private_to_their_site(
    personalized_run: tuple[Path, dict[str, Any]], finished_run: Path
) -> None:
    run, sites = personalized_run
    assert {Path(entry["folder"]).name for entry in sites.values()} == {f"private_to_{site}" for site in sites}
    for site, entry in sites.items():
        assert set(entry["values"]) == {"base", "alone", "shared", "own"}
        for folder in (Path(entry["folder"]), Path(entry["folder"], "adapter")):
            card = (folder / "README.md").read_text()
            assert card.startswith(f"# Private to {site}: no guarantee")
            assert "](label.svg)" in card
            assert f"Private to {site}: no guarantee</text>" in (folder / "label.svg").read_text()
        (record,) = json.loads((run / "sites" / site / "own_adapters.json").read_text())
        assert set(record) == {"run", "made"}, "no digest, no score"
        ledger = Path("sites", site, "ledger.db")
        assert (run / ledger).read_bytes() == (finished_run / ledger).read_bytes(), "the ledger is unchanged"


def test_personalized_adapter_cannot_start_a_run_and_needs_export_consent(
    personalized_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    own, out, merged = find_own_adapter(personalized_run[0]), tmp_path / "out", tmp_path / "whole"
    refusal = "is private to 'site-1'"
    for folder in (own, own / "adapter"):
        message = run_command(
            "simulate", *list_tiny_overrides(into=tmp_path, name="two"), f"model.adapter={folder}"
        ).failed()
        assert refusal in message
    assert "is private to 'site-1'" in run_command("export", str(own), "--to", str(out)).failed()
    assert not any(tmp_path.iterdir()), "no files are left behind"
    assert run_command("export", str(own), "--to", str(out), "--private").code == 0
    assert (out / "README.md").read_text().startswith("# Private to site-1: no guarantee")
    assert "Private to site-1: no guarantee</text>" in (out / "label.svg").read_text()
    assert json.loads((out / "fedtune.json").read_text())["private_to"] == "site-1"
    # No run can start from the merged model, either.
    assert run_command("export", str(own), "--to", str(merged), "--private", "--merge").code == 0
    start = ("simulate", *list_tiny_overrides(into=tmp_path, name="three"), f"model.path={merged}")
    for command in (("model-hash", str(merged)), start):
        assert f"{refusal} and has no guarantee; start from another model" in run_command(*command).failed()


def test_personalized_adapter_works_in_generate_evaluate_and_compare(
    personalized_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    own = find_own_adapter(personalized_run[0])
    assert run_command("generate", str(own), "--prompt", "my card is late").code == 0
    rows = [{"text": f"my card {number} is late", "label": "card_arrival"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run_command("evaluate", str(own), "--data", str(tmp_path / "rows.jsonl"), "--json").code == 0
    # The comparison states that the personalized adapter has no guarantee.
    comparison = json.loads(run_command("compare", str(personalized_run[0]), str(own), "--json").printed)
    private = {model["name"]: model.get("private") for model in comparison["models"]}
    assert private == {"base": None, "one": True, "private_to_site-1": False}
    assert "No guarantee covers the scores of private_to_site-1" in comparison["verdict"][-1]


def test_unknown_site_is_refused_by_personalize(finished_run: Path) -> None:
    message = run_command("personalize", str(finished_run), "nowhere").failed()
    assert message == "SITE = 'nowhere': must be one of site-1, site-2"
    assert not list(finished_run.glob("private_to_*"))
