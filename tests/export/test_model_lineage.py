"""Lineage of exported models: runs on them inherit their privacy spending."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import RunConfig, read_saved_config
from fedtune.model.spec import ModelSpec
from fedtune.model.unsupported_models import OWED, check_content
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.selection import Selection, compute_search_cost
from fedtune.report.from_run import build_run_report
from fedtune.report.synthetic_card import describe_run
from fedtune.runs.environment import build_start_lineage
from fedtune.runs.lineage import PRIVATE_BASES, build_lineage, read_base_lineage, sum_start_losses, walk_lineage
from fedtune.runs.public_stage import build_public_stage_config
from fedtune.sites.run_records import find_card_path
from fedtune.spec import ConfigError

from ..conftest import REPOSITORY, edit_json, list_tiny_overrides, read_result, run_command, simulate

WRITER = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.max_length=128", "data.declared_sizes=40")
WRITER += ("federation.num_rounds=1", "training.local_steps=1")
UNKNOWN = dict.fromkeys(("digest", "from", "dataset", "unit", "delta", "epsilon"), "unknown")
DEBT = {"digest": "ab" * 32, "from": "a", "dataset": "b", "unit": "record", "delta": 1e-5, "epsilon": 2.0}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(*WRITER, into=tmp_path_factory.mktemp("first"), name="first")


@pytest.fixture(scope="module")
def merged_base(first_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_merged(first_run, tmp_path_factory.mktemp("merged") / "base")


@pytest.fixture(scope="module")
def second_run(merged_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on the merged base, and its output."""
    into = tmp_path_factory.mktemp("second")
    words = list_tiny_overrides(
        *WRITER, f"model.path='{merged_base}'", "tracking.progress=true", into=into, name="second"
    )
    return into / "second", run_command("simulate", *words).printed


def export_merged(run: Path, to: Path) -> Path:
    assert run_command("export", str(run), "--to", str(to), "--merge").code == 0
    return to


def read_mark(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())[OWED]


def read_lineage(run: Path) -> dict[str, Any]:
    """Return the lineage entry of a run, as a later run should report it."""
    result = read_result(run)
    spent = {key: result["privacy"][key] for key in ("unit", "delta", "epsilon")}
    fields = {"from": run.name, "dataset": result["provenance"]["dataset"]}
    return {"digest": result["adapter_digest"]} | fields | spent


def with_base(config: RunConfig, base: Path, **model: Any) -> RunConfig:
    return replace(config, model=replace(config.model, path=str(base), **model))


def test_run_on_a_merged_model_states_its_prior_spending(first_run: Path, merged_base: Path, second_run: Any) -> None:
    run, output = second_run
    assert read_mark(merged_base) == read_result(run)["provenance"]["start_adapter"] == read_lineage(first_run)
    epsilon = read_lineage(first_run)["epsilon"]
    assert (
        "starts from a base model derived from the adapter "
        f"{read_lineage(first_run)['digest'][:12]} of first; its training on" in output
    )
    report = json.loads((run / "report.json").read_text())
    expected = {("run" if key == "from" else key): value for key, value in read_lineage(first_run).items()}
    assert report["facts"]["provenance"]["start_adapter"] == expected | {"public": False}
    assert "began_in_an_adapter" in report["verdict"]["reasons"]
    assert run_command("report", "verify", str(run)).code == 0
    card = (run / "adapter" / "README.md").read_text()
    assert (
        f"of run first on {read_lineage(first_run)['dataset']}; by the lead's word its training spent "
        f"epsilon {format_epsilon(epsilon)}"
    ) in card.replace("\\", "")


def test_lineage_keeps_every_prior_run_once(first_run: Any, merged_base: Any, second_run: Any, tmp_path: Path) -> None:
    run = second_run[0]
    both = read_lineage(run) | {"start_adapter": read_lineage(first_run)}
    assert read_mark(export_merged(run, tmp_path / "again")) == both
    config = read_saved_config(run)
    digest = read_lineage(run)["digest"]
    both_runs = build_start_lineage(with_base(config, merged_base, adapter=str(run), adapter_sha256=digest)) or {}
    assert both_runs == both | {"head": None}, "an adapter on a base that owes"
    alone = shutil.copytree(run / "adapter", tmp_path / "handed" / "on")
    copy = build_start_lineage(with_base(config, merged_base, adapter=str(alone), adapter_sha256=digest)) or {}
    assert (copy["epsilon"], copy["start_adapter"]) == ("unknown", read_lineage(first_run))
    edited = shutil.copytree(run, tmp_path / "silent")
    edit_json(edited / "run.json", provenance=read_result(run)["provenance"] | {"start_adapter": None})
    assert build_start_lineage(with_base(config, merged_base, adapter=str(edited), adapter_sha256=digest)) == both_runs


def test_exported_search_trial_inherits_the_search_cost(first_run: Path, tmp_path: Path) -> None:
    picked, plan = shutil.copytree(first_run, tmp_path / "first"), read_saved_config(first_run).plan()
    fields: Any = {"search": "s", "method": "grid", "primary_metric": "loss", "score": 0.5}
    cost = compute_search_cost([plan] * 3)
    (picked / "selection.json").write_text(json.dumps(asdict(Selection.from_cost(cost, [plan] * 3, **fields))))
    assert cost.epsilon > read_lineage(first_run)["epsilon"]
    mark = read_mark(export_merged(picked, tmp_path / "base"))
    assert (mark["epsilon"], mark["delta"]) == (cost.epsilon, cost.delta)


@pytest.mark.parametrize(
    "mark",
    [
        *(None, 5, "text", [], {}, [DEBT], {"public": True}, DEBT | {"epsilon": "0"}, DEBT | {"epsilon": -1.0}),
        *(DEBT | {"epsilon": 2}, DEBT | {"epsilon": True}, DEBT | {"delta": None}, DEBT | {"delta": 1.0}),
        *({key: value for key, value in DEBT.items() if key != gone} for gone in DEBT),
        *(DEBT | {"start_adapter": 5}, DEBT | {"start_adapter": DEBT | {"unit": ["record"]}}),
    ],
)
def test_damaged_lineage_mark_counts_as_unknown_spending(second_run: Any, tmp_path: Path, mark: Any) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps({OWED: mark}))
    start = build_start_lineage(with_base(read_saved_config(second_run[0]), folder)) or {}
    assert sum_start_losses(start)[1] is None
    assert start == UNKNOWN or (start, start["start_adapter"]) == (DEBT | {"start_adapter": UNKNOWN}, UNKNOWN)
    (folder / "config.json").write_text('{"fedtune_owed": ')
    assert read_base_lineage(ModelSpec(path=str(folder))) == [UNKNOWN]
    (folder / "config.json").write_text("{}")
    assert read_base_lineage(ModelSpec(path=str(folder))) == []


@pytest.mark.nightly
def test_run_on_a_base_with_a_damaged_mark_reports_it(merged_base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(merged_base, tmp_path / "base"))
    edit_json(other / "config.json", **{OWED: {"epsilon": "none"}})
    run = simulate(*WRITER, f"model.path='{other}'", "tracking.progress=true", into=tmp_path, name="later")
    assert read_result(run)["provenance"]["start_adapter"] == UNKNOWN
    assert "what its training spent is not known" in (run / "adapter" / "README.md").read_text()
    assert run_command("report", "verify", str(run)).code == 0


def test_long_lineage_is_truncated_to_the_size_limit(merged_base: Path) -> None:
    debts = [DEBT | {"epsilon": float(number)} for number in range(60)]
    fields = json.loads((merged_base / "config.json").read_text()) | {OWED: build_lineage(debts)}
    check_content("config.json", json.dumps(fields).encode(), folder="base")
    truncated = [*walk_lineage(fields[OWED])]
    assert truncated == [*debts[:23], UNKNOWN]
    assert build_lineage([*debts[:2], *debts[:2]]) == debts[0] | {"start_adapter": debts[1]}


def test_run_on_synthetic_records_inherits_their_spending(first_run: Path, tmp_path: Path) -> None:
    texts = Path(shutil.copy(REPOSITORY / read_saved_config(first_run).data.train_file, tmp_path))
    card = {"sha256": hashlib.sha256(texts.read_bytes()).hexdigest()}
    card["runs"] = [describe_run(build_run_report(first_run), read_lineage(first_run)["digest"])]
    find_card_path(texts, ".json").write_text(json.dumps(card))
    owed = read_lineage(first_run) | {"dataset": "unknown"}
    words = [*WRITER, f"data.train_file='{texts}'", "tracking.progress=true"]
    output = run_command("simulate", *list_tiny_overrides(*words, into=tmp_path, name="run")).printed
    run = tmp_path / "run"
    assert read_result(run)["provenance"]["start_adapter"] == owed
    assert (
        f"starts from a base model derived from the adapter {owed['digest'][:12]} of first; its training spent epsilon"
        in output
    )
    assert run_command("report", "verify", str(run)).code == 0
    config = read_saved_config(run)
    public = replace(config, public=replace(config.public, train_file=str(texts)))
    with pytest.raises(ConfigError, match=r"data.train_file = .* must contain a run's own records"):
        build_public_stage_config(public)
    for damaged in ({"sha256": "0" * 64}, {"runs": []}, {"runs": [{}]}, {"runs": 5}):
        find_card_path(texts, ".json").write_text(json.dumps(card | damaged))
        assert build_start_lineage(config) == UNKNOWN
    find_card_path(texts, ".json").unlink()
    assert build_start_lineage(config) is None


def test_public_stage_is_refused_on_a_base_with_prior_spending(second_run: Any, merged_base: Path) -> None:
    config = read_saved_config(second_run[0])
    config = replace(config, public=replace(config.public, train_file="public.jsonl"))
    with pytest.raises(ConfigError, match=r"model.path = .*: must have no lineage with public.train_file"):
        build_public_stage_config(config)
    stage = with_base(
        config, merged_base, adapter=str(second_run[0]), adapter_sha256=read_lineage(second_run[0])["digest"]
    )
    with pytest.raises(ConfigError, match="it was trained on other records"):
        build_start_lineage(stage)


def test_private_base_adds_its_stated_spending(second_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text('{"model_type": "vaultgemma"}')
    stated = PRIVATE_BASES["vaultgemma"]
    assert (stated["epsilon"], stated["delta"], stated["unit"]) == (2.0, 1.1e-10, "sequence of 1,024 tokens")
    assert build_start_lineage(with_base(read_saved_config(second_run[0]), folder)) == stated
    (folder / "config.json").write_text(json.dumps({"model_type": "vaultgemma", OWED: DEBT}))
    assert read_base_lineage(ModelSpec(path=str(folder))) == [DEBT, stated], "an exported model owes both"
    (folder / "config.json").write_text(json.dumps({"model_type": "vaultgemma", OWED: build_lineage([DEBT, stated])}))
    assert read_base_lineage(ModelSpec(path=str(folder))) == [DEBT, stated], "the statement counts once"


def test_pre_training_of_a_base_is_last_and_adds_nothing_to_the_runs_after_it() -> None:
    stated, other = PRIVATE_BASES["vaultgemma"], DEBT | {"digest": "cd" * 32}
    start = build_lineage([stated, DEBT, stated, other])
    assert start == DEBT | {"start_adapter": other | {"start_adapter": stated}}
    assert sum_start_losses(start) == (4.0, 2e-5)
    between = DEBT | {"start_adapter": {**stated, "start_adapter": other}}
    assert sum_start_losses(between) == (4.0, 2e-5), "runs before pre-training in an older record"
    for edited in ({"epsilon": 0.5}, {"unit": "user"}, {"delta": 0.0}):
        assert sum_start_losses(DEBT | {"start_adapter": {**stated, **edited}}) == (None, None)
