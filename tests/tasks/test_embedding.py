"""Embedding task: accepted records, losses, scores, and complete runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedtune.data import Record, TextDataset, collate
from fedtune.data.spec import DataSpec
from fedtune.evaluation.scoring import compute_unit_scores, evaluate_examples
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.embedding import PairSettings, rank_own_positives
from fedtune.tasks.registry import get_task
from fedtune.tasks.task_model import TaskModel

from ..conftest import read_result, run_command, simulate
from ..data.conftest import make_data_spec
from ..model.conftest import make_batch, make_trained

TASK = get_task("embedding")
SCORED = {"text": "a", "other": "b", "target": "s"}
PAIRS = {"anchor": "a", "positive": "p"}
TRIPLETS = {**PAIRS, "negative": "n"}
WORDS = ("card", "lost", "where", "name", "place", "there", "is", "my")


def make_settings(columns: dict[str, str], *, bounds: tuple[float, float] | None = None) -> DataSpec:
    bounds = bounds or ((0.0, 1.0) if "target" in columns else None)
    return make_data_spec(columns=columns, target_range=bounds)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            {"negatives": "batch"},
            "negatives = 'batch': couples records: a record's gradient would depend on the other sampled",
        ),
        ({"negatives": ()}, "negatives = []: must be a list of at least one text"),
        ({"negatives": ("a", "a")}, "negatives = 'a': is declared twice"),
        ({"margin": 0.0}, "margin = 0.0: must be a finite number greater than 0"),
        ({"margin": 2.5}, "margin = 2.5: must be at most 2"),
    ],
)
def test_invalid_pair_settings_are_refused(pairs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PairSettings(**pairs)
    assert str(caught.value).startswith(message)


def test_layout_determines_text_count_and_primary_metric() -> None:
    for columns, pairs, texts, judge in (
        (SCORED, {}, 2, "spearman"),
        (TRIPLETS, {}, 3, "ndcg_at_10"),
        (PAIRS, {"negatives": ("a",)}, 3, "ndcg_at_10"),
    ):
        data, task = make_settings(columns), TASK.with_settings(pairs)
        task.check_own(data)
        task.check_data(data)
        assert (task.count_texts_per_record(data), task.primary_metric_for(data), set(task.columns(data))) == (
            texts,
            judge,
            set(columns),
        )


def make_scored_records(*scores: str) -> list[Record]:
    return [Record({"text": f"my card {index}", "other": "is lost", "target": one}) for index, one in enumerate(scores)]


def test_scores_are_scaled_to_cosines_and_out_of_range_records_skipped(encoder_tokenizer: Any) -> None:
    data = make_settings(SCORED, bounds=(1.0, 5.0))
    dataset = TASK.tokenize(make_scored_records("1.0", "3.0", "5.0"), encoder_tokenizer, data=data)
    assert (len(dataset), dataset.texts, dataset.targets.tolist()) == (3, 2, [0.0, 0.5, 1.0])
    assert [ids.tolist()[0] for ids in dataset.input_ids] == [2] * 6, "each text must start with its own first token"
    assert dataset.lengths.tolist() == [5, 5, 5]
    assert dataset.num_tokens == 3 * (5 + 4)
    for score in ("0.9", "5.1", "-3.0"):
        assert [TASK.record_validator(data)(target) is None for target in make_scored_records("1.0", score, "5.0")] == [
            True,
            False,
            True,
        ]
        with pytest.raises(DataError, match=r"must be in data\.target_range: 1 to 5") as caught:
            TASK.tokenize(make_scored_records(score), encoder_tokenizer, data=data)
        assert score not in str(caught.value)
    records = [*make_scored_records("0.5", "0.5"), Record({"text": "my", "other": "\ud800", "target": "0.5"})]
    dataset = TASK.tokenize(records, encoder_tokenizer, data=make_settings(SCORED), lenient_within=99)
    assert np.isnan(dataset.targets).tolist() == [False, False, True], "an unencodable text must have no target"
    assert [len(ids) for ids in dataset.input_ids[-2:]] == [3, 1]


def test_listed_negative_depends_only_on_its_record(encoder_tokenizer: Any) -> None:
    texts = ("where is", "a place", "my name", "lost there")
    data, task = make_settings(PAIRS), TASK.with_settings({"negatives": texts, "margin": 0.4})
    records = [Record({"anchor": f"my card {word}", "positive": "is lost"}) for word in WORDS]
    dataset = task.tokenize(records, encoder_tokenizer, data=data)
    negatives = [ids.tolist() for ids in dataset.input_ids[2::3]]
    encoded = [encoder_tokenizer(text)["input_ids"] for text in texts]
    assert all(ids in encoded for ids in negatives)
    assert len({tuple(ids) for ids in negatives}) > 1
    assert dataset.targets.tolist() == pytest.approx([0.4] * len(WORDS))
    for index in range(len(WORDS)):
        alone_dataset = task.tokenize([records[index]], encoder_tokenizer, data=data)
        assert alone_dataset.input_ids[2].tolist() == negatives[index]


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_embedding_losses_match_their_textbook_definitions(kind: str) -> None:
    model, batch = make_trained("random:bert", kind), make_batch(kind)
    losses, embeddings = model.losses(batch), model.logits(batch)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
    for index in range(4):
        first, *rest = embeddings[index * batch.texts : (index + 1) * batch.texts]
        cosines = [torch.nn.functional.cosine_similarity(first, second, dim=0) for second in rest]
        wanted = batch.targets[index]
        expected = (cosines[0] - wanted) ** 2 if kind == "pairs" else (wanted - cosines[0] + cosines[1]).relu()
        torch.testing.assert_close(losses[index], expected, rtol=1e-5, atol=1e-6)


def make_dataset(model: TaskModel, count: int, *, texts: int) -> TextDataset:
    draws = np.random.default_rng(3)
    ids = model.generate_dummies(draws.integers(2, 9, size=count * texts).tolist(), draws)
    return TextDataset(ids, draws.random(count).astype(np.float32), texts)


def test_pair_scores_do_not_depend_on_batching() -> None:
    model = make_trained("random:bert", "pairs")
    dataset = make_dataset(model, 30, texts=2)
    found = [evaluate_examples(model, dataset, pad_id=0, max_tokens=max_tokens) for max_tokens in (1, 60, 9000)]
    scores = TASK.scores(found[0], spec=model.spec)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(found[0]["cosine"], dataset.targets).statistic)
    for second in found[1:]:
        np.testing.assert_allclose(second["cosine"], found[0]["cosine"], rtol=1e-4, atol=1e-5)


def test_triplet_scores_rank_each_positive_among_all() -> None:
    model = make_trained("random:bert", "triplets")
    dataset = make_dataset(model, 40, texts=3)
    figures = evaluate_examples(model, dataset, pad_id=0, max_tokens=200)
    assert {name: values.shape for name, values in figures.items()} == dict.fromkeys(("loss", "nearer", "rank"), (40,))
    with torch.no_grad():
        each = torch.cat([model.logits(collate(dataset, [index], pad_id=0)) for index in range(40)]).double().numpy()
    cosines = each[0::3] @ each[1::3].T
    expected = [1 + int((row > row[index] + 1e-6).sum()) for index, row in enumerate(cosines)]
    assert figures["rank"].tolist() == expected
    scores = TASK.scores(figures, spec=model.spec)
    assert scores["recall_at_1"] == np.mean(np.array(expected) == 1)
    assert scores["recall_at_10"] == np.mean(np.array(expected) <= 10)
    gains = [1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in expected]
    assert scores["ndcg_at_10"] == pytest.approx(np.mean(gains))
    assert scores["nearer"] == np.mean((each[0::3] * each[1::3]).sum(1) > (each[0::3] * each[2::3]).sum(1))


def test_identical_embeddings_rank_in_the_middle() -> None:
    identical = np.full((101, 4), 0.5)
    assert rank_own_positives(identical, identical).tolist() == [51.0] * 101
    distinct = np.eye(300)  # more than one ranking block
    assert rank_own_positives(distinct, distinct).tolist() == [1.0] * 300
    broken = distinct.copy()
    broken[0] = np.nan
    assert rank_own_positives(broken, distinct)[:2].tolist() == [np.inf, 1.0]


@pytest.mark.parametrize(("kind", "texts"), [("pairs", 2), ("triplets", 3)])
def test_unit_score_is_between_0_and_1_and_independent(kind: str, texts: int) -> None:
    model = make_trained("random:bert", kind)
    dataset = make_dataset(model, 9, texts=texts)
    scores = compute_unit_scores(model, dataset, pad_id=0)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.array_equal(scores[2:4], compute_unit_scores(model, dataset.select_examples([2, 3]), pad_id=0))
    if kind == "pairs":
        cosine = evaluate_examples(model, dataset, pad_id=0, max_tokens=1)["cosine"]
        np.testing.assert_allclose(scores, np.maximum(0, 1 - np.abs(cosine - dataset.targets)), atol=1e-5)


ROWS = [
    {"a": f"where is my {WORDS[n % 8]} {n}", "b": f"my {WORDS[n % 5]} is {n}", "s": n % 6, "p": f"{n} there", "n": "no"}
    for n in range(80)
]
LAYOUTS = {
    "scored": ("data.columns={text: a, other: b, target: s}", "data.target_range=[0,5]"),
    "triplets": ("data.columns={anchor: a, positive: p, negative: n}",),
    "listed": ("data.columns={anchor: a, positive: p}", "task_settings.negatives=[no way, not here, never]"),
}


def simulate_pairs(folder: Path, layout: str, *overrides: str) -> list[str]:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        *("experiment=own_pairs", "model=random_bert", "lora=all_linear", f"data.train_file='{file}'"),
        *("data.declared_sizes=25", "data.train_fraction=1.0", "data.test_fraction=0.2"),
        *("data.validation_fraction=0.1", "federation.num_sites=2", "federation.num_rounds=2"),
        "training.local_steps=2",
        *LAYOUTS[layout],
        *overrides,
    ]


@pytest.mark.nightly
@pytest.mark.by_day("listed-extra3")
@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        *(("scored", ()), ("scored", ("privacy=none",))),
        ("triplets", ("data.heldout_fraction=0.2", "privacy.metrics=noised")),
        ("listed", ("lora=last_layer", "lora.target_modules=all-linear")),
    ],
)
def test_embedding_run_reports_its_metrics_and_can_start_another_run(
    tmp_path: Path, layout: str, extra: tuple[str, ...]
) -> None:
    folder = simulate(*simulate_pairs(tmp_path, layout, *extra), into=tmp_path)
    result = read_result(folder)
    assert result["task"] == "embedding"
    names = (
        {"spearman", "loss"} if layout == "scored" else {"ndcg_at_10", "recall_at_1", "recall_at_10", "nearer", "loss"}
    )
    assert set(result["final"]["metrics"]) == names
    assert result["final"]["metrics"] != result["final"]["metrics_before"]
    assert (result["privacy"]["epsilon"] is None) == ("privacy=none" in extra)
    assert not any(target["failed_sites"] for target in result["rounds"])
    assert not (folder / "adapter" / "head.safetensors").exists()
    assert run_command("report", str(folder)).code == 0
    output = run_command("evaluate", str(folder), "--data", str(tmp_path / "pairs.jsonl"), "--json").printed
    assert names <= set(output.replace('"', " ").split())
    output = run_command("compare", str(folder), "--data", str(tmp_path / "pairs.jsonl"), "--json").printed
    assert json.loads(output)["primary_metric"] == ("spearman" if layout == "scored" else "ndcg_at_10")
    message = "task = 'embedding': has no output for a prompt: use fedtune evaluate for its scores"
    assert run_command("generate", str(folder), "--prompt", "where").failed() == message
    assert run_command("plan", *simulate_pairs(tmp_path, layout, "name=p")).printed
    refused = run_command("simulate", *simulate_pairs(tmp_path, "listed", "task_settings.negatives=batch", "name=x"))
    assert refused.failed().startswith("task_settings.negatives = 'batch': couples records")
    if layout == "scored" and not extra:  # another layout may start from its adapter
        assert json.loads((folder / "adapter" / "fedtune.json").read_text())["texts"] == 2
        continued = simulate(
            *simulate_pairs(tmp_path, "triplets", f"model.adapter='{folder}'"), into=tmp_path, name="again"
        )
        assert read_result(continued)["final"]["metrics"]["ndcg_at_10"] >= 0
