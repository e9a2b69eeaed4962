"""Distillation: agreement with the teacher, export without fedtune, cards and privacy cost."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import fedtune
from fedtune.config import read_saved_config
from fedtune.data.batching import collate
from fedtune.data.records import Record
from fedtune.export.onnx_graphs import load_graph
from fedtune.lab import distillation
from fedtune.lab.distillation import FEWEST
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.model.base_model import load_tokenizer
from fedtune.model.spec import ModelSpec
from fedtune.model.unsupported_models import OWED
from fedtune.privacy.accountant import format_epsilon
from fedtune.report.synthetic_card import compose_losses, describe_run, find_card_path
from fedtune.runs.environment import build_start_lineage
from fedtune.runs.lineage import sum_start_losses
from fedtune.sites.run_records import RunRecords
from fedtune.spec import RUN_SCHEMA
from fedtune.tasks.saved import SavedAdapter, load_task_model

from ..cli import snapshots
from ..conftest import edit_json, read_result, run_command, simulate
from ..export.conftest import run_elsewhere, write_price_overrides

Taught = tuple[Path, dict[str, Any]]
"""Folder of a student, and the command's output."""

WORDS = ["my card", "a transfer", "the cash machine", "top up", "exchange rate", "a refund", "my PIN", "this account"]
ASKED = ["is late", "failed again", "was declined", "is pending", "has a fee", "is wrong", "went missing"]
TEXTS = [f"{start} {word} {end}" for start in ("Why", "Help,", "Since May") for word in WORDS for end in ASKED]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny multi-label classifier."""
    head = ("head.center=true", "head.init=label_names", "training.learning_rate=0.1")
    return simulate(*head, into=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "public_*.txt"
    file.write_text("\n\n".join(TEXTS) + "\n")
    return file


@pytest.fixture(scope="module")
def distill_student(
    finished: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Taught]]:
    """Return a function that distills a student of the finished run."""
    pytest.importorskip("sentence_transformers", reason="the extra `export` is not installed")

    def distill(*words: str) -> Taught:
        out = tmp_path_factory.mktemp("students") / "student"
        summary = run_command("distill", str(finished), "--texts", str(texts), "--to", str(out), *words, "--json")
        return out, json.loads(summary.printed)["distilled"]

    with pytest.MonkeyPatch.context() as patched:
        # A model this narrow, with weights this wide, learns little at the rates of real ones.
        patched.setattr(distillation, "_RATE", 5e-3)
        patched.setattr(distillation, "_HEAD_RATE", 5e-2)
        yield distill


@pytest.fixture(scope="module")
def taught_student(distill_student: Any) -> Taught:
    return distill_student("--passes", "40")  # type: ignore[no-any-return]


def compute_teacher_logits(run: Path) -> torch.Tensor:
    """Compute the teacher's logits for the texts."""
    config, model = read_saved_config(run), load_task_model(run / "adapter")
    tokenizer = load_tokenizer(config.model)
    records = [model.task.without_answer(Record({"text": text}), config.data) for text in TEXTS]
    rows = model.task.tokenize(records, tokenizer, data=config.data)
    with torch.no_grad():
        return model.logits(collate(rows, range(len(rows)), pad_id=tokenizer.pad_token_id))


def measure_difference(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean squared difference, relative to the variance over the texts."""
    return float((actual - reference).square().mean() / reference.var(dim=0).mean())


@pytest.mark.nightly
def test_exported_student_agrees_with_its_teacher(taught_student: Taught, distill_student: Any, finished: Path) -> None:
    folder, told = taught_student
    asked = {"format": "sentence-transformers", "texts": TEXTS}
    given = {str(one): {**asked, "folder": str(one)} for one in (distill_student("--passes", "1")[0], folder)}
    loaded, teacher = (
        json.loads(run_elsewhere(cwd=folder.parent, given=json.dumps(given))),
        compute_teacher_logits(finished),
    )
    before, after = (measure_difference(torch.tensor(one["logits"]), teacher) for one in loaded.values())
    assert after < before / 4, "it learns what the teacher says"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1, "half of two"
    assert (folder / "labels.txt").read_text().splitlines() == list(read_saved_config(finished).data.labels)
    (whole, small), scores = told["served"], told["scores"]
    assert (whole["file"], small["file"]) == ("teacher", "student")
    assert whole["bytes"] > small["bytes"] > 0
    assert small["scores"]["accuracy"] == scores["accuracy"]["tuned"]["value"]
    of_teacher = {name: one["base"]["value"] for name, one in scores.items()}
    assert of_teacher == pytest.approx(read_result(finished)["final"]["metrics"], abs=1e-4), "as in its run"
    test = RunRecords(read_saved_config(finished)).test
    assert test is not None
    assert (told["texts"], told["records"]) == (len(TEXTS), len(test.records))


def test_student_card_describes_its_texts_and_teacher(taught_student: Taught, finished: Path) -> None:
    folder, told = taught_student
    card = ModelCard.load(folder / "README.md")
    text = card.text.replace("\\", "")
    assert "(the lowest 1 of the base's 2 layers), trained without noise" in text
    assert f"{len(TEXTS)} texts of public_*.txt (SHA-256 {told['sha256']})" in text
    assert "Its teacher is a tuned model of random:bert." in text
    assert r"public\_\*.txt" in card.text, "a name is no markup"
    assert "## Privacy" in card.text
    shown = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert shown == {name: one["tuned"]["value"] for name, one in told["scores"].items()}, "not its teacher's"
    assert (folder / "label.svg").read_bytes() == (finished / "adapter" / "label.svg").read_bytes()


def write_card(file: Path, *others: Any, epsilon: float | None = 2.0, unit: str = "record", text: str = "") -> Path:
    """Write texts with the card of their run, as `fedtune synthesize` does."""
    file.write_text("".join(f"{line}\n" for line in TEXTS))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    run = {"run": "writer_2", "config_sha256": "0" * 64, "epsilon": epsilon, "delta": 1e-6, "unit": unit, "start": None}
    runs = [run | {"task": None, "verdict": "within", "adapter_digest": ""}, *others]
    summary = {"schema_version": RUN_SCHEMA, "file": file.name, "sha256": sha256, "figures": {}}
    summary |= {"runs": runs, "together": dict(zip(("epsilon", "delta"), compose_losses(runs), strict=True))}
    summary["made"] = {"rows": len(TEXTS), "prompts": 1, "missing": 0, "left_out": {}, "shares": "declared"}
    find_card_path(file, ".json").write_text(json.dumps(summary))
    file.write_text(file.read_text() + text)
    return file


@pytest.mark.parametrize("labeled", [False, True])
def test_student_card_adds_the_cost_of_synthetic_texts(
    finished: Path, distill_student: Any, tmp_path: Path, labeled: bool
) -> None:
    """A teacher that labeled the texts is in the card as well, and its cost counts once."""
    run = fedtune.load(finished)
    teacher = describe_run(run.report(), SavedAdapter.read(run.adapter).digest)
    (link := tmp_path / "link.txt").symlink_to(write_card(tmp_path / "texts.txt", *[teacher] * labeled))
    folder = distill_student("--passes", "1", "--texts", str(link))[0]
    text, own = ModelCard.load(folder / "README.md").text.replace("\\", ""), run.privacy
    assert own.epsilon is not None
    promised = f"{format_epsilon(2 + own.epsilon * labeled)} at delta {1e-6 + own.delta * labeled:f}"
    assert f"The card of these texts states epsilon {promised} for each record of the runs" in text
    (both,) = re.findall(r"\(writer_2[^)]*\)\. The student's total privacy loss is at most: epsilon (\S+) at", text)
    assert float(both) == pytest.approx(own.epsilon + 2, abs=2e-3)
    assert "as the person who provided them declared" not in text
    start = build_start_lineage(replace(run.config, model=ModelSpec(path=str(folder)))) or {}
    assert sum_start_losses(start) == pytest.approx((own.epsilon + 2, own.delta + 1e-6))
    assert (start["from"], start["start_adapter"]["from"]) == (run.config.name, "writer_2")
    assert not (folder / "label.svg").exists(), "it would say what its teacher owes"
    assert "label.svg" not in text


def test_run_on_a_student_inherits_the_spending_of_its_teacher(
    taught_student: Taught, finished: Path, tmp_path: Path
) -> None:
    later = simulate(f"model.path='{taught_student[0]}'", "federation.num_rounds=1", into=tmp_path, name="later")
    start, teacher_result = fedtune.load(later).result.provenance.start_adapter, fedtune.load(finished).result
    assert (start["digest"], start["epsilon"]) == (teacher_result.adapter_digest, teacher_result.privacy.epsilon)
    assert "start_adapter" not in start
    assert run_command("report", "verify", str(later)).code == 0
    assert f"of run {finished.name} on" in (later / "adapter" / "README.md").read_text()


@pytest.mark.nightly
def test_distillation_is_reproducible_by_seed(finished: Path, texts: Path, tmp_path: Path) -> None:
    words = ("distill", str(finished), "--texts", str(texts), "--passes", "1", "--to")
    summary = run_command(*words, str(tmp_path / "out"))
    lines = [line.split() for line in summary.printed.splitlines()]
    assert [line[0] for line in lines if line[:1] in (["teacher"], ["student"])] == ["teacher", "student"]
    assert ["metric", "teacher", "student", "difference", "95", "%", "interval", "student", "is"] in lines
    assert f"Distilled on {len(TEXTS)} texts." in summary.out
    assert fedtune.load(finished).distill(tmp_path / "again", texts=texts, passes=1).texts == len(TEXTS)
    assert run_command(*words, str(tmp_path / "other"), "--seed", "1").code == 0
    outputs = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again", "other")]
    assert outputs[0] == outputs[1] != outputs[2], "Python and the command line teach one student"


@snapshots.parametrize_mistakes("mistakes-distill")
def test_invalid_distillation_is_refused_without_files(finished: Path, texts: Path, tmp_path: Path, typed: str) -> None:
    config = read_saved_config(finished)
    # Of the training file, whatever the run uses of it.
    records = [record.fields["text"] for _, read in RunRecords(config).read_whole_files() for record in read]
    outputs = {"few": TEXTS[: FEWEST - 1], "part": records[: FEWEST + 1]}
    for name, lines in outputs.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{' '.join(line.split())}\n" for line in lines))
    paths = {name: str(tmp_path / f"{name}.txt") for name in outputs} | {"test": str(config.data.test_file)}
    faults: Any = {"none": {"epsilon": None}, "user": {"unit": "user"}, "changed": {"text": "one more\n"}}
    paths |= {name: str(write_card(tmp_path / f"{name}.txt", **fault)) for name, fault in faults.items()}
    (tmp_path / "renamed.jsonl").write_text("".join(json.dumps({"body": one}) + "\n" for one in outputs["part"]))
    (tmp_path / "brat").mkdir()
    (tmp_path / "brat" / "one.txt").write_text(TEXTS[0])
    (tmp_path / "brat" / "one.ann").touch()
    paths |= {"renamed": str(tmp_path / "renamed.jsonl"), "brat": str(tmp_path / "brat")}
    (owing := tmp_path / "owing").mkdir()
    (owing / "model.safetensors").touch()
    (owing / "config.json").write_text(json.dumps({OWED: None}))
    paths["owing"] = str(owing)
    words = [
        {"DEEP": "[" * 20_000}.get(word, paths.get(word.lower(), word) if word.isupper() else word)
        for word in shlex.split(typed)
    ]
    told = run_command("distill", str(finished), "--texts", str(texts), "--to", str(tmp_path / "new"), *words).failed()
    for name, path in paths.items():
        told = told.replace(path, name.upper())
    snapshots.check_message("mistakes-distill", typed, told)
    assert not (tmp_path / "new").exists()


def test_distillation_refuses_a_personalized_adapter(finished: Path, texts: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    edit_json(run / "adapter" / "fedtune.json", private_to="north")
    edit_json(run / "run.json", adapter_digest=compute_adapter_digest(run / "adapter"))
    summary = run_command("distill", str(run), "--texts", str(texts), "--to", str(tmp_path / "new"))
    assert "private to 'north'" in summary.failed()
    assert not (tmp_path / "new").exists()


@pytest.mark.nightly
def test_regression_run_is_distilled_to_an_int8_model_on_another_base(texts: Path, tmp_path: Path) -> None:
    run = simulate(*write_price_overrides(tmp_path), into=tmp_path)
    out, words = tmp_path / "new", ["--student", "random:llama", "--format", "onnx", "--int8", "--passes", "60"]
    summary = run_command("distill", str(run), "--texts", str(texts), "--to", str(out), *words, "--json")
    distilled = json.loads(summary.printed)["distilled"]
    assert (distilled["scores"], distilled["records"]) == ({}, 0), "the run keeps no test"
    assert [result["file"] for result in distilled["served"]] == ["teacher", "student", "model.onnx", "model.int8.onnx"]
    assert all(result["scores"] == {} for result in distilled["served"]), "made-up answers score nothing"
    card = ModelCard.load(out / "README.md")
    assert "on a base of its own, random:llama, SHA-256 " in card.text
    assert "base_model" not in card.data.to_dict()
    tokens = load_tokenizer(ModelSpec(path="random:llama"))(TEXTS, padding=True, return_tensors="pt")
    numbers = load_graph(out / "model.onnx")(**{name: tokens[name] for name in ("input_ids", "attention_mask")})
    model = load_task_model(run / "adapter")
    assert (
        measure_difference(numbers, model.task.compute_exported_output(compute_teacher_logits(run), spec=model.spec))
        < 0.9
    )
