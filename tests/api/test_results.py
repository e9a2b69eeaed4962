"""Results of a finished run in Python: predictions, models, charts, tables and exceptions."""

import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas
import pytest
import torch
from peft import PeftModel

import fedtune
from fedtune.api import public
from fedtune.api.compared_models import ComparedModels
from fedtune.api.compose import compose_recipe
from fedtune.evaluation.bootstrap import Estimate

from ..conftest import REPOSITORY
from .test_public import make_tiny_settings

CARD, MONEY = "I lost my card", "Where is my money?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    return fedtune.simulate("debug", make_tiny_settings(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def causal_lm_run(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    """A finished run of a language model."""
    rows = [{"prompt": f"number {number}", "completion": f"answer {number % 3} "} for number in range(60)]
    settings = {"model": "random_llama", "lora": "all_linear", "data.max_length": 16, "federation.num_rounds": 1}
    settings |= {"training.local_steps": 1, "training.ignore_weak_signal": True, "privacy.noise_multiplier": 4.0}
    settings |= {"data.chat_template": "none", "lora.layers": None, "runtime.num_threads": 1, "runtime.device": "cpu"}
    settings |= {"tracking.output_dir": tmp_path_factory.mktemp("causal_lm"), "name": "run"}
    settings |= {"data.columns": {"prompt": "prompt", "completion": "completion"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it has no test records
        return fedtune.simulate("own_text", settings | {"data.test_fraction": 0.0}, sites={"one": rows, "two": rows})


@pytest.mark.parametrize(
    "data",
    [
        [CARD, MONEY],
        (CARD, MONEY),
        iter([CARD, MONEY]),
        np.array([CARD, MONEY]),
        pandas.Series([CARD, MONEY]),
        pandas.DataFrame({"text": [CARD, MONEY], "other": [1, 2]}),
        [{"text": CARD}, {"text": MONEY}],
        {"text": [CARD, MONEY]},
    ],
    ids=lambda data: type(data).__name__,
)
def test_predict_accepts_texts_and_table_rows(run: fedtune.Run, data: Any) -> None:
    assert run.predict(data) == [run.predict(CARD)[0], run.predict(MONEY)[0]]


def test_predict_proba_returns_one_column_per_label(run: fedtune.Run) -> None:
    probabilities = run.predict_proba([CARD, MONEY])
    labels = run.config.data.labels
    assert probabilities.shape == (2, len(labels))
    assert probabilities.sum(axis=1) == pytest.approx([1.0, 1.0])
    (best, *_), *_ = run.predict(CARD)  # type: ignore[misc]
    assert labels[probabilities[0].argmax()] == best["label"]
    assert run.predict_proba([]).shape == (0, len(labels))
    with pytest.raises(fedtune.DataError, match=r"data:1, column 'text' = 'absent'"):
        run.predict([{"body": CARD}])


def test_evaluate_scores_in_memory_records_like_a_file(run: fedtune.Run, tmp_path: Path) -> None:
    labels, columns = run.config.data.labels, run.config.data.columns
    labels_by_text = {f"question {number}": labels[number % 3] for number in range(12)}
    frame = pandas.DataFrame({columns["text"]: labels_by_text.keys(), columns["label"]: labels_by_text.values()})
    comparison = fedtune.compare({"a<b": run}, frame)
    correct = [labels[row.argmax()] for row in run.predict_proba(frame)] == frame[columns["label"]]
    assert comparison.estimate("a<b", "accuracy").value == pytest.approx(correct.mean())
    assert run.evaluate(frame).estimate("tuned", "accuracy") == comparison.estimate("a<b", "accuracy")
    assert "a&lt;b" in comparison._repr_html_()
    assert "a&lt;b" in comparison.plot("accuracy").svg
    assert_drawing(comparison.plot())


def assert_drawing(figure: Any) -> None:
    assert ElementTree.fromstring(figure._repr_svg_()).tag.endswith("svg")


def test_plot_returns_the_charts_of_the_report(run: fedtune.Run, tmp_path: Path) -> None:
    page = (run.folder / "report.html").read_text()
    assert run.plot().svg in page
    assert run.plot("epsilon_spent").svg in page
    scale = run.report().scale()
    assert_drawing(scale)
    assert scale.save(tmp_path / "label.svg").read_text() == scale.svg
    with pytest.raises(ValueError, match=r"path = .*must end in \.svg"):
        scale.save(tmp_path / "label.png")
    with pytest.raises(ValueError, match="chart = 'nonsense': must be one of utility"):
        run.plot("nonsense")  # type: ignore[arg-type]


def test_comparison_plot_leaves_out_values_that_are_not_finite(
    run: fedtune.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = fedtune.compare({"tuned": run})
    assert_drawing(comparison.plot())
    finite = comparison.plot("loss").svg
    monkeypatch.setattr(ComparedModels, "estimate", lambda *_: Estimate(1.0, math.nan, math.inf))
    assert_drawing(comparison.plot("loss"))
    assert comparison.plot("loss").svg != finite


def test_html_tables_are_short_and_escaped(run: fedtune.Run, tmp_path: Path) -> None:
    ledger = fedtune.Ledger(run.folder / "sites" / "site-1" / "ledger.db")
    displayed = (run, run.report(), ledger, fedtune.plan(run.config), fedtune.verify(run.folder))
    for value in displayed:
        html = value._repr_html_()  # type: ignore[attr-defined]
        assert ElementTree.fromstring(html).tag == "table"
        assert len(html) < 3000
    assert f"epsilon</td><td>{run.privacy.epsilon:.2f}"[:-1] in run._repr_html_()
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    assert "not finished" in fedtune.load(tmp_path)._repr_html_()


def test_report_checks_print_names_and_states(run: fedtune.Run) -> None:
    checks = fedtune.verify(run.folder)
    assert len(repr(checks).splitlines()) == len(checks)
    assert re.search(r"^figures +passed +Each epsilon", str(checks), re.MULTILINE)


def test_peft_model_generates_text_with_transformers(causal_lm_run: fedtune.Run) -> None:
    model, tokenizer = causal_lm_run.model()
    assert isinstance(model, PeftModel)
    prompt = tokenizer("number 5", return_tensors="pt")
    ids = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    (generated,) = model.generate(**ids, max_new_tokens=5, do_sample=False).tolist()
    with torch.no_grad():
        likeliest = int(model(**ids).logits[0, -1].argmax())
    prompt_length = ids["input_ids"].shape[1]
    assert 0 < len(generated) - prompt_length <= 5
    assert generated[prompt_length] == likeliest
    with pytest.raises(ValueError, match="task = 'causal_lm': predicts no label or number"):
        causal_lm_run.predict("number 5")
    with pytest.raises(ValueError, match="task = 'causal_lm': predicts no probabilities of labels"):
        causal_lm_run.predict_proba("number 5")


def test_merged_model_runs_in_a_transformers_pipeline(causal_lm_run: fedtune.Run) -> None:
    merged, tokenizer = causal_lm_run.model("merged")
    model, _ = causal_lm_run.model()
    ids = tokenizer("number 5", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
    with pytest.raises(ValueError, match=r"form = 'sentence-transformers': must be one of peft, merged"):
        causal_lm_run.model("sentence-transformers")
    with pytest.raises(ValueError, match=r"form = 'onnx': must be one of peft, merged, sentence-transformers"):
        causal_lm_run.model("onnx")  # type: ignore[arg-type]


def test_sentence_transformer_export_predicts_the_same_labels(run: fedtune.Run) -> None:
    pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = run.model("sentence-transformers")
        scores = model.encode([CARD, MONEY])
    assert scores.argmax(axis=1).tolist() == run.predict_proba([CARD, MONEY]).argmax(axis=1).tolist()
    assert tokenizer(CARD)["input_ids"]


def test_export_method_writes_the_same_files_as_the_command(run: fedtune.Run, tmp_path: Path) -> None:
    files = run.export(tmp_path / "written")
    assert {"adapter_config.json", "README.md", "head.safetensors"} <= {path.name for path in files}
    for options, message in (
        ({"format": "merged"}, "format = 'merged': must be one of peft, sentence-transformers, onnx"),
        ({"int8": True}, "^int8: requires the format onnx"),
    ):
        with pytest.raises(ValueError, match=message):
            run.export(tmp_path / "other", **options)  # type: ignore[arg-type]
    for target, message in (
        (run.adapter / "adapter", "^to = .*must be outside the run's adapter"),
        (tmp_path / "adapter", "^to = .*the run's own folder"),
        (tmp_path / "written", "^to = .*already exists"),
    ):
        with pytest.raises(ValueError, match=message):
            run.export(target)
    with pytest.raises(ValueError, match=r"^int8: requires the format onnx"):
        run.distill(tmp_path / "student", texts="unread.txt", int8=True)


def test_exceptions_are_exported_at_top_level() -> None:
    with pytest.raises(fedtune.ConfigError) as caught:
        fedtune.plan("debug", {"privacy.epsilon": -1})
    assert isinstance(caught.value, fedtune.FedtuneError)
    assert issubclass(fedtune.DataError, fedtune.ConfigError)
    assert issubclass(fedtune.StuckError, fedtune.RunError)
    assert issubclass(fedtune.RefusedError, fedtune.FedtuneError)
    assert {"FedtuneError", "simulate"} <= set(dir(fedtune))
    assert "sites: " in str(fedtune.simulate.__doc__)


def test_run_config_survives_pickling() -> None:
    config = compose_recipe("debug")
    assert pickle.loads(pickle.dumps(config)) == config


class Shell:
    """Stub of IPython in a notebook kernel."""

    kernel = object()

    def __init__(self) -> None:
        self.shown = list[str]()

    def display(self, html: str, *, display_id: bool) -> SimpleNamespace:
        return SimpleNamespace(update=self.shown.append)


def test_progress_true_shows_a_bar_in_notebooks(monkeypatch: pytest.MonkeyPatch, run: fedtune.Run) -> None:
    assert not public.is_notebook()
    shell = Shell()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    library = SimpleNamespace(display=shell.display, HTML=str)
    monkeypatch.setitem(sys.modules, "IPython.display", library)  # type: ignore[arg-type]
    assert public.is_notebook()
    update: Callable[[fedtune.Progress], None] = public.make_notebook_bar()
    update(fedtune.Progress(stage="loading <model>"))
    update(fedtune.Progress(stage="round", done=1, total=2, round=run.rounds[0]))
    assert shell.shown[0] == '<progress value="0" max="1"></progress> loading &lt;model&gt;'
    assert re.match(r'<progress value="1" max="2"></progress> round 1 of 2: accuracy 0\.\d{4}', shell.shown[1])


SCRIPT = """\
import fedtune

rows = [{"text": "a", "label": "x"}]
run = fedtune.simulate("debug", {"privacy.epsilon": 3}, sites={"a": rows, "b": rows}, progress=True)
answers: list[object] = run.predict(rows)
chances = run.predict_proba("a").shape
model, tokenizer = run.model()
run.plot().save("plot.svg")
print(run.privacy.epsilon, run.evaluate(rows).plot(), fedtune.verify(run.folder), chances)
"""


@pytest.mark.nightly
def test_user_script_passes_strict_mypy(tmp_path: Path) -> None:
    from mypy import api

    (tmp_path / "script.py").write_text(SCRIPT)
    settings = ["--config-file", str(REPOSITORY / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    out, err, code = api.run(["--strict", *settings, str(tmp_path / "script.py")])
    assert (code, err) == (0, ""), out
