"""Scores by group are those of exactly the run's model, in every command that reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.report.from_run import build_run_report
from fedtune.report.group_scores import GroupScore, read_group_scores
from fedtune.spec import ConfigError

GROUP = {
    "name": "a",
    "units": 20,
    "scores": {"base": {"value": 0.5}, "run": {"value": 0.7}},
    "gaps": {"base": {"value": 0.1}, "run": {"value": -0.2}},
}


def tell(digest: str | None, **changes: Any) -> dict[str, Any]:
    """What `fedtune compare --by ward --json` prints, with a changed group."""
    models = [{"name": "base"}, {"name": "run", "adapter_digest": digest, "folder": "elsewhere"}]
    groups = {"by ward": {"groups": [{**GROUP, **changes}]}}
    return {"models": models, "primary_metric": "accuracy", "groups": groups}


def read(path: Path) -> tuple[GroupScore, ...]:
    return read_group_scores(path, adapter_digest="ab", primary_metric="accuracy", key="--groups", bound="must fit")


def test_group_scores_are_read_only_from_comparisons_of_this_model(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(tell("ab")))
    assert read(file) == (GroupScore("by ward", "a", 20, 0.7, -0.2),)
    undefined = tell("ab", scores={"run": {"value": None}}, gaps={"run": {"value": None}})
    file.write_text(json.dumps(undefined))
    assert read(file) == (GroupScore("by ward", "a", 20, None, None),)
    values: list[Any] = ["0.9", float("nan"), 10**400, True, [1], {}]
    changed = [tell("ab", **{field: {"run": {"value": value}}}) for value in values for field in ("scores", "gaps")]
    changed += [tell("ab", units=value) for value in ("20", 20.0, None, True)]
    changed += [tell("ab") | {"primary_metric": "loss"}, tell("ab") | {"groups": {"by ward": {}}}]
    for entries in (*map(tell, ("cd", "", None)), *changed):
        file.write_text(json.dumps(entries))
        with pytest.raises(ConfigError, match="--groups"):
            read(file)
    for number in ("1e999", 100_000 * "["):
        file.write_text(json.dumps(tell("ab")).replace("-0.2", number))
        with pytest.raises(ConfigError, match="--groups"):
            read(file)
    with pytest.raises(ConfigError, match="readable"):
        read(tmp_path / "absent.json")


def test_report_finds_group_scores_by_the_digest_of_its_adapter(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(run_folder, folder)
    digest = json.loads((folder / "run.json").read_text())["adapter_digest"]
    (tmp_path / "compare.json").write_text(json.dumps(tell(digest)))
    assert build_run_report(folder).facts.group_scores == {"by ward: a": 0.7}, "wherever the folder was compared"
    another_model = tell("cd")
    another_model["models"][1]["folder"] = str(folder)
    for entries in (another_model, tell(digest, scores={"run": {"value": float("nan")}})):
        (tmp_path / "compare.json").write_text(json.dumps(entries))
        assert build_run_report(folder).facts.group_scores == {}, "another model, or no number"
