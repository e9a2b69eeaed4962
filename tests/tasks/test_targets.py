"""Pooled tasks beyond single labels: targets, losses, answers and scores."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedtune.data import Record, TextDataset
from fedtune.data.records import make_validator
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.pooled import compute_binary_losses
from fedtune.tasks.registry import TASKS, get_task

from ..cases import read_cases
from ..data.conftest import make_data_spec

LABELS = ("low", "mid", "high")
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -0.2, -0.1], [0.3, 0.2, 4.0]])


def make_data(task: str, **overrides: Any) -> DataSpec:
    roles = {"multi_label": "labels", "ordinal": "label", "regression": "target"}
    columns = {"text": "t", roles[task]: "a"}
    answers = {"target_range": (1.0, 5.0)} if task == "regression" else {"labels": LABELS}
    return make_data_spec(**({"columns": columns} | answers | overrides))


def make_spec(task: str, *, labels: tuple[str, ...] = LABELS) -> TaskModelSpec:
    bounds = (1.0, 5.0) if task == "regression" else None
    answers: Any = {"labels": () if task == "regression" else labels, "target_range": bounds}
    return TaskModelSpec(model=ModelSpec(path="random:bert"), lora=LoraSpec(), task=task, **answers)


def tokenize_answers(task: str, answers: list[str], tokenizer: Any, **given: Any) -> TextDataset:
    settings = make_data(task, **given)
    role = next(iter(get_task(task).answers))
    records = [Record({"text": "where is my card", role: one}, "a.csv", line) for line, one in enumerate(answers, 2)]
    return get_task(task).tokenize(records, tokenizer, data=settings)


def test_multi_label_records_have_any_number_of_declared_labels(encoder_tokenizer: Any) -> None:
    answers = ["mid;high", '["high","low"]', "[]", " low ;; low "]
    targets = tokenize_answers("multi_label", answers, encoder_tokenizer).targets
    assert np.asarray(targets).tolist() == [[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert (
        np.asarray(tokenize_answers("multi_label", ["mid|low"], encoder_tokenizer, label_separator="|").targets).sum()
        == 2
    )
    labels = tuple(f"label {number}" for number in range(1_000))
    dataset = tokenize_answers("multi_label", ["label 7", "label 9"], encoder_tokenizer, labels=labels)
    assert np.asarray(dataset.targets).nbytes == 2 * 1_000, "labels must be stored as one byte each"
    with pytest.raises(ConfigError, match=r"labels = 1001: must be at most 1000 for task multi_label"):
        get_task("multi_label").check_data(make_data("multi_label", labels=(*labels, "one more")))


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        (
            "multi_label",
            "mid;secret",
            r"a\.csv:2, labels = 'not declared': must be one of the 3 labels in data\.labels: low",
        ),
        ("ordinal", "secret", r"a\.csv:2, label = 'not declared': must be one of the 3"),
        ("regression", "5.5", r"a\.csv:2, target = 'outside the range': must be in data\.target_range: 1 to 5"),
    ],
)
def test_records_with_undeclared_labels_are_skipped_and_not_quoted(
    encoder_tokenizer: Any, task: str, answer: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tokenize_answers(task, [answer, answer], encoder_tokenizer)
    assert "secret" not in str(caught.value)
    fault = get_task(task).record_validator(make_data(task))
    role = next(iter(get_task(task).answers))
    assert fault(Record({"text": "a", role: answer})) is not None
    assert fault(Record({"text": "a", role: "2.5" if task == "regression" else "mid"})) is None
    # If an error of fedtune itself ended a site's answer, the answer would reveal the record.
    error = make_validator(lambda record: record.fields["nothing"])(Record({"text": "secret"}, "a.csv", 3))
    assert str(error) == "a.csv:3, record = 'KeyError': must be a readable record"


@pytest.mark.parametrize("task", ["multi_label", "ordinal", "regression"])
def test_empty_data_and_token_free_texts_have_zero_loss(encoder_tokenizer: Any, task: str) -> None:
    assert len(tokenize_answers(task, [], encoder_tokenizer)) == 0
    settings, role = make_data(task), next(iter(get_task(task).answers))
    record = Record({"text": "where", role: "2.5" if task == "regression" else "mid"})
    lenient = get_task(task).tokenize([record], encoder_tokenizer, data=settings, lenient_within=1)
    assert (np.asarray(lenient.targets) == UNSUPERVISED).all()
    logits = LOGITS[:1, : get_task(task).num_outputs(make_spec(task))].clone().requires_grad_()  # type: ignore[attr-defined]
    loss = get_task(task).loss(logits, torch.from_numpy(np.asarray(lenient.targets)), spec=make_spec(task))  # type: ignore[attr-defined]
    loss.sum().backward()
    assert loss.tolist() == [0]
    assert not logits.grad.any()


def test_multi_label_and_ordinal_losses_match_their_definitions() -> None:
    targets = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]])
    expected = functional.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none").mean(dim=1)
    torch.testing.assert_close(TASKS["multi_label"].loss(LOGITS, targets, spec=make_spec("multi_label")), expected)  # type: ignore[attr-defined]
    spec = make_spec("ordinal", labels=("a", "b", "c", "d"))
    logits = torch.tensor([[4.0, -4.0, -4.0]] * 4)  # predicts b
    losses = TASKS["ordinal"].loss(logits, torch.arange(4), spec=spec)  # type: ignore[attr-defined]
    cumulative = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    expected = functional.binary_cross_entropy_with_logits(logits, cumulative, reduction="none").mean(dim=1)
    torch.testing.assert_close(losses, expected)
    assert losses[1] < losses[0] < losses[3]
    assert losses[1] < losses[2] < losses[3]


def test_ordinal_probabilities_sum_to_one_and_the_median_is_predicted() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(3)) * 3  # in random order
    predictions = TASKS["ordinal"].predictions(logits, spec=make_spec("ordinal", labels=tuple("abcdef")))  # type: ignore[attr-defined]
    chances, predicted = predictions["probabilities"], predictions["predicted"]
    assert (chances >= 0).all()
    torch.testing.assert_close(chances.sum(dim=1), torch.ones(200))
    lower = torch.cat([torch.zeros(200, 1), chances.cumsum(dim=1)], dim=1)
    rows = torch.arange(200)
    assert (lower[rows, predicted] <= 0.5 + 1e-6).all()
    assert (lower[rows, predicted + 1] >= 0.5 - 1e-6).all()
    start = TASKS["ordinal"].compute_initial_head_rows(torch.eye(3))  # type: ignore[attr-defined]
    assert start.shape == (2, 3)
    torch.testing.assert_close(start.norm(dim=1), torch.ones(2))
    assert (start[:, 0] < 0).all(), "the lowest label must be below all thresholds"
    assert (start[:, 2] > 0).all(), "the highest label must be above all thresholds"


def test_regression_targets_are_scaled_to_their_range(encoder_tokenizer: Any) -> None:
    task, spec = TASKS["regression"], make_spec("regression")
    targets = torch.from_numpy(np.asarray(tokenize_answers("regression", ["1", "3.0", "5"], encoder_tokenizer).targets))
    assert targets.tolist() == [-1, 0, 1]
    logits = torch.tensor([[0.0], [0.5], [7.0]])
    assert task.loss(logits, targets, spec=spec).tolist() == [1, 0.25, 36]  # type: ignore[attr-defined]
    assert task.predictions(logits, spec=spec)["predicted"].tolist() == [3, 4, 5], "clamped to the range"  # type: ignore[attr-defined]
    assert task.compute_exported_output(logits, spec=spec).flatten().tolist() == [3, 4, 17]
    assert task.true_values(targets, spec=spec).tolist() == [1, 3, 5]  # type: ignore[attr-defined]
    assert task.answer(torch.tensor([0.25]), spec=spec) == ("3.5", {"number": 3.5})


@pytest.mark.parametrize(
    ("task", "logits", "text", "ref"),
    [
        ("multi_label", [2.0, -1.0, 0.5], "low 0.881, high 0.622", ["low", "high"]),
        ("multi_label", [-2.0, -1.0, -1.5], "none (mid 0.269)", []),
        ("ordinal", [2.0, -1.0], "mid 0.612 (high 0.269, low 0.119)", ["mid", "high", "low"]),
        ("classification", [2.0, -1.0, 0.5], "low 0.786 (high 0.175, mid 0.039)", ["low", "high", "mid"]),
    ],
)
def test_logits_are_converted_to_labeled_answers(task: str, logits: list[float], text: str, ref: list[str]) -> None:
    predictions, objects = TASKS[task].answer(torch.tensor(logits), spec=make_spec(task))
    assert predictions == text
    assert [answer["label"] for answer in objects] == ref  # type: ignore[attr-defined]


@pytest.mark.parametrize(("task", "logits", "target", "score"), read_cases(__file__, "unit_scores"))
def test_unit_score_matches_expected_values_between_0_and_1(
    task: str, logits: list[float], target: Any, score: float
) -> None:
    model: Any = SimpleNamespace(spec=make_spec(task), logits=lambda batch: torch.tensor([logits]))
    batch: Any = SimpleNamespace(targets=torch.tensor([target]))
    assert TASKS[task].score_unit(model, batch) == pytest.approx(score)


def test_majority_baseline_is_the_best_constant_prediction() -> None:
    draws = np.random.default_rng(2)
    ids = tuple(np.array([5], dtype=np.int32) for _ in range(40))
    marks = (draws.random((40, 3)) < [0.6, 0.3, 0.1]).astype(np.float32)
    sets = [np.array([bits >> k & 1 for k in range(3)], dtype=bool) for bits in range(1, 8)]
    task = TASKS["multi_label"]
    figures = [{"loss": np.zeros(40), "truth": marks, "probabilities": np.tile(one, (40, 1)) * 1.0} for one in sets]
    best = max(task.scores(one, spec=make_spec("multi_label"))["micro_f1"] for one in figures)
    assert task.majority_baseline(TextDataset(ids, marks)) == pytest.approx(best)

    numbers = draws.uniform(-1, 1, size=40).astype(np.float32)
    least = min(float(np.square(numbers - one).mean()) for one in np.linspace(-1, 1, 4001))
    assert TASKS["regression"].majority_baseline(TextDataset(ids, numbers)) == pytest.approx(least, abs=1e-6)
    assert TASKS["ordinal"].majority_baseline(TextDataset(ids, np.zeros(40, dtype=np.int64))) == 0


def test_final_scores_and_details_match_manual_calculations() -> None:
    of_number = {"truth": np.array([1.0, 2, 5]), "predicted": np.array([1.0, 4, 5]), "loss": np.array([0.0, 1, 0])}
    scores = TASKS["regression"].compute_final_scores(of_number, spec=make_spec("regression"))
    expected = {"mae": 2 / 3, "rmse": np.sqrt(4 / 3), "spearman": 1.0}
    assert {name: scores[name] for name in expected} == pytest.approx(expected), "in the target's own unit"
    assert TASKS["regression"].detail(of_number, spec=make_spec("regression")) is None
    task, spec = TASKS["ordinal"], make_spec("ordinal")
    predictions = task.predictions(LOGITS[:, :2], spec=spec)  # type: ignore[attr-defined]
    figures = {name: answer.numpy().astype(np.float64) for name, answer in predictions.items()}
    figures |= {"truth": np.array([1.0, 0, 1]), "loss": np.array([0.1, 0.2, 0.3])}
    scores = task.compute_final_scores(figures, spec=spec)
    assert list(scores) == ["quadratic_kappa", "accuracy", "mae", "auroc", "ece", "loss"]
    assert (scores["accuracy"], scores["mae"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    detail = task.detail(figures, spec=spec)
    assert detail is not None
    assert [(answer.label, answer.support) for answer in detail.classes] == [("low", 1), ("mid", 2), ("high", 0)]
    assert sum(answer.count for answer in detail.reliability) == 3
    first = min(float(predictions["probabilities"][row, int(predictions["predicted"][row])]) for row in range(3))
    assert detail.reliability[0].confidence == pytest.approx(first), "not of the likeliest class"


@pytest.mark.parametrize("task", ["regression", "survival", "token_classification"])
@pytest.mark.parametrize("head", [HeadSpec(center=True), HeadSpec(init="label_names"), HeadSpec(label_texts=("a",))])
def test_label_based_head_settings_are_refused_for_unlabeled_heads(task: str, head: HeadSpec) -> None:
    spec = TaskModelSpec(model=ModelSpec(path="m"), lora=LoraSpec(), task=task, head=head, labels=("a",))
    with pytest.raises(ConfigError, match=rf"^head\..* for {task}, w"):
        get_task(task).check_model(spec)


def test_binary_losses_are_bitwise_equal_across_rows() -> None:
    draws = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 37, generator=draws) * 4
    marks = torch.randint(0, 2, (9, 37), generator=draws, dtype=torch.int8)
    for row in range(9):
        single = logits[row : row + 1].clone().requires_grad_()
        batched = logits.clone().requires_grad_()
        compute_binary_losses(single, marks[row : row + 1]).sum().backward()
        compute_binary_losses(batched, marks).sum().backward()
        assert torch.equal(single.grad[0], batched.grad[row])  # type: ignore[index]
        assert torch.equal(
            compute_binary_losses(single, marks[row : row + 1])[0], compute_binary_losses(batched, marks)[row]
        )
