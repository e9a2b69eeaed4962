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
    run, told = personalized_run
    assert {Path(one["folder"]).name for one in told.values()} == {f"private_to_{site}" for site in told}
    for site, one in told.items():
        assert set(one["values"]) == {"base", "alone", "shared", "own"}
        for place in (Path(one["folder"]), Path(one["folder"], "adapter")):
            card = (place / "README.md").read_text()
            assert card.startswith(f"# Private to {site}: no guarantee")
            assert "](label.svg)" in card
            assert f"Private to {site}: no guarantee</text>" in (place / "label.svg").read_text()
        (noted,) = json.loads((run / "sites" / site / "own_adapters.json").read_text())
        assert set(noted) == {"run", "made"}, "no digest, no score"
        ledger = Path("sites", site, "ledger.db")
        assert (run / ledger).read_bytes() == (finished_run / ledger).read_bytes(), "nothing is charged or noted in it"


def test_personalized_adapter_cannot_start_a_run_and_needs_export_consent(
    personalized_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    own, out, whole = find_own_adapter(personalized_run[0]), tmp_path / "out", tmp_path / "whole"
    refused = "is private to 'site-1'"
    for folder in (own, own / "adapter"):
        message = run_command(
            "simulate", *list_tiny_overrides(into=tmp_path, name="two"), f"model.adapter={folder}"
        ).failed()
        assert refused in message
    assert "is private to 'site-1'" in run_command("export", str(own), "--to", str(out)).failed()
    assert not any(tmp_path.iterdir()), "nothing is half begun"
    assert run_command("export", str(own), "--to", str(out), "--private").code == 0
    assert (out / "README.md").read_text().startswith("# Private to site-1: no guarantee")
    assert "Private to site-1: no guarantee</text>" in (out / "label.svg").read_text()
    assert json.loads((out / "fedtune.json").read_text())["private_to"] == "site-1"
    # No run begins in it merged, either.
    assert run_command("export", str(own), "--to", str(whole), "--private", "--merge").code == 0
    begun = ("simulate", *list_tiny_overrides(into=tmp_path, name="three"), f"model.path={whole}")
    for asked in (("model-hash", str(whole)), begun):
        assert f"{refused} and has no guarantee; start from another model" in run_command(*asked).failed()


def test_personalized_adapter_works_in_generate_evaluate_and_compare(
    personalized_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    own = find_own_adapter(personalized_run[0])
    assert run_command("generate", str(own), "--prompt", "my card is late").code == 0
    rows = [{"text": f"my card {number} is late", "label": "card_arrival"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run_command("evaluate", str(own), "--data", str(tmp_path / "rows.jsonl"), "--json").code == 0
    # A comparison says that nothing protects it.
    found = json.loads(run_command("compare", str(personalized_run[0]), str(own), "--json").printed)
    private = {one["name"]: one.get("private") for one in found["models"]}
    assert private == {"base": None, "one": True, "private_to_site-1": False}
    assert "No guarantee covers the scores of private_to_site-1" in found["verdict"][-1]


def test_unknown_site_is_refused_by_personalize(finished_run: Path) -> None:
    refused = run_command("personalize", str(finished_run), "nowhere").failed()
    assert refused == "SITE = 'nowhere': must be one of site-1, site-2"
    assert not list(finished_run.glob("private_to_*"))
