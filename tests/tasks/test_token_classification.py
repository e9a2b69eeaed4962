"""Token classification: records, words and windows, loss, scores, and refusals."""

import itertools
import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedtune.data import Record, TextDataset, collate
from fedtune.data.records import parse_record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.evaluation.scoring import compute_unit_scores, evaluate_examples
from fedtune.model.base_model import load_tokenizer
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.measures import compute_recall_precision_f1, count_entities
from fedtune.tasks.registry import get_task
from fedtune.tasks.token_classification import (
    MAX_OUTSIDE,
    SPLIT_ODDS,
    SWITCH_COST,
    decode_entities,
    make_entity_reader,
    predict_entities,
)

from ..data.conftest import make_data_spec
from ..model.conftest import make_trained

TASK = get_task("token_classification")
LABELS = ("drug", "dose")
TAGGED, SPANNED = {"tokens": "w", "tags": "t"}, {"text": "w", "spans": "t"}
TOKENS = ["my", "card", "is", "lost", "there"]


def make_data(columns: dict[str, str] = TAGGED, **overrides: Any) -> DataSpec:
    return make_data_spec(**({"labels": LABELS, "columns": columns} | overrides))


def record(words: object, answer: object, columns: dict[str, str] = TAGGED) -> Record:
    return parse_record({"w": words, "t": answer}, columns, file="a.jsonl", line=3)


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (("B-drug", "I-drug", "O", "B-dose", "B-dose"), [(0, 2, 0), (3, 4, 1), (4, 5, 1)]),  # IOB2
        (("I-drug", "I-drug", "O", "I-dose", "B-dose"), [(0, 2, 0), (3, 4, 1), (4, 5, 1)]),  # IOB1
        (("B-drug", "L-drug", "L-drug", "U-dose", "I-dose"), [(0, 2, 0), (2, 3, 0), (3, 4, 1), (4, 5, 1)]),  # BILOU
        (("B-drug", "I-drug", "E-drug", "S-drug", "S-drug"), [(0, 3, 0), (3, 4, 0), (4, 5, 0)]),  # BIOES
        (("drug", "drug", "dose", "O", "dose"), [(0, 2, 0), (2, 3, 1), (4, 5, 1)]),  # no scheme
        (("B_drug", "I_dose", "I_dose", "O", "O"), [(0, 1, 0), (1, 3, 1)]),
    ],
)
def test_tag_schemes_decode_to_the_same_entities(tags: tuple[str, ...], entities: list[tuple[int, int, int]]) -> None:
    words = [f"w{index}" for index in range(len(tags))]
    _, marked = make_entity_reader(make_data())(record(words, [*tags]))
    assert [(first // 3, (end + 1) // 3, label) for first, end, label in marked] == entities
    # A declared label may start like a tag of a scheme.
    labels = ("S-protein", "M_protein", "U-boot", "drug")
    _, words_read = make_entity_reader(make_data(labels=labels))(
        record(TOKENS, ["S-protein", "S-protein", "M_protein", "S-drug", "U-boot"])
    )
    assert [labels[label] for *_, label in words_read] == ["S-protein", "M_protein", "drug", "U-boot"]


def test_tokens_are_joined_into_a_text_with_marked_spans() -> None:
    assert make_entity_reader(make_data())(record(["a b", "cd", ""], ["B-drug", "I-drug", "O"])) == (
        "a b cd ",
        [(0, 6, 0)],
    )
    spans = [{"start": 4, "end": 6, "label": "dose"}, {"start": 0, "end": 3, "label": "drug"}]
    data = make_data(SPANNED)
    assert make_entity_reader(data)(record("a b cd ", spans, SPANNED))[1] == [(0, 3, 0), (4, 6, 1)]
    assert make_entity_reader(data)(record("a b", "[]", SPANNED))[1] == []


@pytest.mark.parametrize(
    ("words", "answer", "columns", "message"),
    [
        (TOKENS, ["O"] * 4, TAGGED, "a.jsonl:3, tags = 'a different number of tags': must have one tag per token"),
        (["my"], ["B-secret"], TAGGED, "a.jsonl:3, tags = 'not declared': must be one of the 2 labels in data.labels"),
        (["my"], [" "], TAGGED, "a.jsonl:3, tags = 'a blank tag': must be O, or a type name"),
        (["my"], "B-drug I-drug", TAGGED, "a.jsonl:3, column 't' = 'text that is not a list': must be a list of texts"),
        ([], [], TAGGED, "a.jsonl:3, column 'w' = 'an empty list': must be a list of texts (role tokens)"),
        (["my", None], ["O", "O"], TAGGED, "a.jsonl:3, column 'w' = 'array': must be a list of texts (role tokens)"),
        (
            "my card",
            [[0, 8, "drug"]],
            SPANNED,
            "a.jsonl:3, spans = 'a span outside the text': must have 0 <= start < end",
        ),
        ("my card", [[2, 2, "drug"]], SPANNED, "a.jsonl:3, spans = 'a span outside the text': must have 0 <= start"),
        ("my card", [[0, 4, "drug"], [3, 7, "dose"]], SPANNED, "a.jsonl:3, spans = 'spans that overlap': must not"),
        ("my card", [[0, 2, "secret"]], SPANNED, "a.jsonl:3, spans = 'not declared': must be one of the 2"),
        (
            "my card",
            [{"start": 0, "end": 2}],
            SPANNED,
            "a.jsonl:3, column 't', span 1 = 'object': must have whole numbers start",
        ),
        (
            "my card",
            [[0, True, "drug"]],
            SPANNED,
            "a.jsonl:3, column 't', span 1 = 'array': must have whole numbers start",
        ),
        ("my card", "drug", SPANNED, "a.jsonl:3, column 't' = 'text that is not a list': must be a list of spans"),
    ],
)
def test_unusable_record_is_reported_without_its_text(
    words: object, answer: object, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        make_entity_reader(make_data(columns))(record(words, answer, columns))
    assert str(caught.value).startswith(message)
    assert not any(text in str(caught.value) for text in ("secret", "card", "drug I"))


def make_model_spec(labels: tuple[str, ...] = LABELS) -> TaskModelSpec:
    return TaskModelSpec(model=ModelSpec(path="random:bert"), lora=LoraSpec(), task=TASK.name, labels=labels)


def test_label_that_looks_like_a_tag_is_refused() -> None:
    for labels in (("B-drug",), ("O", "drug")):
        with pytest.raises(ConfigError, match=r"^data\.labels"):
            TASK.check_model(make_model_spec(labels))


def tokenize_records(*records: Record, tokenizer: Any, within: int | None = None, **overrides: Any) -> TextDataset:
    return TASK.tokenize(records, tokenizer, data=make_data(**overrides), lenient_within=within)


def test_first_token_of_a_word_carries_its_tag() -> None:
    tokenizer = load_tokenizer(ModelSpec(path="random:bert"))
    options = {"columns": SPANNED, "max_length": 40}
    text = "unbelievably sore-throat, aspirin"
    spans = [[13, 24, "drug"], [26, 33, "dose"]]
    dataset = tokenize_records(record(text, spans, SPANNED), tokenizer=tokenizer, **options)
    (targets,), (ids,) = dataset.targets, dataset.input_ids
    supervised_targets = [
        (str(tokenizer.convert_ids_to_tokens(int(item))), int(target))
        for item, target in zip(ids, targets, strict=True)
        if target != UNSUPERVISED
    ]
    assert [target for _, target in supervised_targets] == [0, 1, 2, 2, 0, 3]
    assert not any(token.startswith("##") for token, _ in supervised_targets)
    assert len(ids) > len(supervised_targets) + 2, "some words must have several tokens"


def test_windows_cover_each_word_once(encoder_tokenizer: Any) -> None:
    words = [f"w{index}" for index in range(40)]
    for count in range(1, 41):
        tags = ["B-drug" if index % 2 else "O" for index in range(count)]
        item = record(words[:count], tags)
        for max_length, windows, stride in ((8, 3, 2), (8, 2, 3), (12, 4, 0), (5, 8, 1), (3, 4, 0), (40, 1, 9)):
            options = {"max_length": max_length, "windows": windows, "stride": stride}
            dataset = tokenize_records(item, tokenizer=encoder_tokenizer, **options)
            assert (len(dataset), dataset.texts, len(dataset.input_ids)) == (1, windows, windows)
            assert dataset.lengths[0] <= max_length
            step = max_length - 2 - stride
            words_read = min(count, max_length - 2 + (windows - 1) * step)
            supervised_targets = [target for item in dataset.targets for target in item[item != UNSUPERVISED].tolist()]
            assert supervised_targets == [index % 2 for index in range(words_read)]
            for ids, targets in zip(dataset.input_ids, dataset.targets, strict=True):
                assert (ids[0], ids[-1]) == (2, 3) or targets.tolist() == [UNSUPERVISED]
    # Text in two windows is learned where it has more context.
    dataset = tokenize_records(
        record(words[:10], ["O"] * 10), tokenizer=encoder_tokenizer, max_length=9, windows=2, stride=3
    )
    first, second = ((targets != UNSUPERVISED).tolist() for targets in dataset.targets)
    assert first == [False, *[True] * 6, False, False]
    assert second == [False, False, False, *[True] * 4, False]


def test_unencodable_text_adds_no_targets_at_a_real_site(encoder_tokenizer: Any) -> None:
    malformed, plain = Record({"text": "\ud800", "spans": "[]"}), Record({"text": "my card", "spans": "[]"})
    blank = Record({"text": "\u00a0", "spans": "[]"})
    options = {"columns": SPANNED, "windows": 2}
    dataset = tokenize_records(malformed, plain, blank, tokenizer=encoder_tokenizer, within=258, **options)
    assert [int((item != UNSUPERVISED).sum()) for item in dataset.targets] == [0, 0, 2, 0, 0, 0]
    with pytest.raises(DataError, match="must contain a token of the tokenizer"):
        tokenize_records(blank, tokenizer=encoder_tokenizer, **options)


def test_loss_is_the_mean_over_words_of_all_windows(encoder_tokenizer: Any) -> None:
    model = make_trained("random:bert", TASK.name, texts=2)
    options = {"max_length": 8, "windows": 2, "stride": 2, "labels": model.spec.labels}
    tags = [f"B-{model.spec.labels[0]}", *["O"] * 8]
    records = [record([f"w{index}" for index in range(9)], tags), record(["w1"], tags[:1])]
    dataset = tokenize_records(*records, tokenizer=encoder_tokenizer, **options)
    batch = collate(dataset, [0, 1], pad_id=0)
    logits = model.logits(batch).log_softmax(dim=-1)
    expected = []
    for rows in ([0, 1], [2, 3]):
        learned = batch.targets[rows] != UNSUPERVISED
        expected.append(-logits[rows][learned].gather(1, batch.targets[rows][learned][:, None]).mean())
    torch.testing.assert_close(model.losses(batch), torch.stack(expected))
    hidden = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    scores = functional.linear(hidden, model.get_parameter("head.weight")) * 20 / hidden.shape[-1] ** 0.5
    torch.testing.assert_close(model.logits(batch), scores)  # the head reads each token independently
    assert [int((batch.targets[2 * one : 2 * one + 2] != UNSUPERVISED).sum()) for one in (0, 1)] == [9, 1]


COUNTED: list[tuple[Any, Any, Any, Any]] = [
    # true, predicted, strict counts, true entities matched, predicted entities that match
    ([(0, 2, 0)], [(0, 2, 0)], (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    ([(0, 2, 0)], [(0, 1, 0)], (1, 1, 0, 1, 1), (1, 1, 0, 1, 1)),
    ([(0, 2, 0)], [(0, 2, 1)], (1, 0, 0, 0, 0), (1, 1, 1, 1, 1)),
    ([(0, 4, 0)], [(0, 1, 0), (2, 3, 0)], (1, 2, 0, 1, 2), (1, 2, 0, 1, 2)),
    ([(0, 1, 0), (2, 3, 0)], [(0, 3, 0)], (2, 1, 0, 2, 1), (2, 1, 0, 2, 1)),
    ([(0, 2, 0)], [(2, 3, 0)], (1, 1, 0, 0, 0), (1, 1, 0, 0, 0)),
    ([], [(2, 3, 0)], (0, 1, 0, 0, 0), (0, 1, 0, 0, 0)),
]


def test_entity_counts_match_manual_counts_in_linear_time() -> None:
    for truth, predicted, of_label, every in COUNTED:
        counts = count_entities(truth, predicted, num_labels=2)
        assert counts.shape == (3, 5)
        assert (tuple(counts[0]), tuple(counts[2])) == (of_label, every)
    draws = np.random.default_rng(0)

    def draw_spans() -> list[tuple[int, int, int]]:
        firsts = draws.integers(0, 30, size=draws.integers(0, 9)).tolist()
        return [(first, first + int(draws.integers(1, 5)), int(draws.integers(2))) for first in firsts]

    for truth, predicted in ((draw_spans(), draw_spans()) for _ in range(300)):
        compute_all_gradients = count_entities(truth, predicted, num_labels=2)[2]
        met, right = (
            sum(any(one[0] < other[1] and other[0] < one[1] for other in others) for one in each)
            for each, others in ((truth, predicted), (predicted, truth))
        )
        assert (
            compute_all_gradients[0],
            compute_all_gradients[1],
            compute_all_gradients[3],
            compute_all_gradients[4],
        ) == (len(truth), len(predicted), met, right)
    start = time.process_time()
    many = [(index, index + 1, index % 2) for index in range(20_000)]
    assert count_entities(many, many[::2], num_labels=2)[2].tolist() == [20_000, 10_000, 10_000, 10_000, 10_000]
    assert time.process_time() - start < 3
    spans = [{"start": 3 * index, "end": 3 * index + 3, "labels": ["drug"]} for index in range(0, 400_000, 100)]
    of_units = record("a\U0001f600" * 400_000, spans, SPANNED)
    start = time.process_time()
    assert make_entity_reader(make_data(SPANNED))(of_units)[1][-1] == (2 * 399_900, 2 * 399_900 + 2, 0)
    assert time.process_time() - start < 3, "offsets in code units must be fast, too"


def test_entity_scores_match_their_counts() -> None:
    assert compute_recall_precision_f1(np.array([4.0, 2, 1, 3, 2]), 2, 2) == (0.25, 0.5, pytest.approx(1 / 3))
    assert compute_recall_precision_f1(np.array([4.0, 2, 1, 3, 2]), 3, 4) == (0.75, 1.0, pytest.approx(6 / 7))
    assert compute_recall_precision_f1(np.zeros(5), 2, 2) == (0.0, 0.0, 0.0)
    counts = np.zeros((2, 3, 5))
    counts[0] = [(2, 2, 1, 2, 2), (0, 0, 0, 0, 0), (2, 2, 1, 2, 2)]
    counts[1] = [(1, 0, 0, 0, 0), (1, 2, 1, 1, 1), (2, 2, 2, 2, 2)]
    entities = TASK.compute_final_scores({"entities": counts, "loss": np.array([1.0, 3.0])}, spec=make_model_spec())
    strict, overlap = ([f"{kind}_{rate}" for rate in ("f1", "precision", "recall")] for kind in ("strict", "overlap"))
    untyped = {"untyped_strict_f1": 0.75, "untyped_overlap_f1": 1.0}
    assert entities == dict.fromkeys(strict, 0.5) | dict.fromkeys(overlap, 0.75) | untyped | {"loss": 2.0}
    detail = TASK.detail({"entities": counts}, spec=make_model_spec())
    assert detail is not None
    assert [(item.label, item.precision, item.recall, item.support) for item in detail.classes] == [
        ("drug", 0.5, pytest.approx(1 / 3), 3),
        ("dose", 0.5, 1.0, 1),
    ]


def test_tags_are_decoded_into_entities() -> None:
    assert decode_entities([0, 2, 2, 0, 1, 2, 3, 4, 4, 2]) == [(1, 3, 0), (4, 6, 0), (6, 9, 1), (9, 10, 0)]


@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_predicted_boundaries_match_exhaustive_search(num_labels: int) -> None:
    draws = np.random.default_rng(num_labels)
    for num_words in (0, 1, 2, 7):
        for logits in 2 * draws.normal(size=(40, num_words, 1 + 2 * num_labels)):
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            begin, inside = shares[:, 1::2].sum(axis=1), shares[:, 2::2].sum(axis=1)
            outside = np.clip(shares[:, 0].mean() if num_words else 0.5, 0.5, MAX_OUTSIDE)
            odds = np.log((begin + inside) / shares[:, 0] * np.sqrt(outside / (1 - outside)))
            likeliest = max(
                itertools.product((0, 1), repeat=num_words),
                key=lambda states: states @ odds - SWITCH_COST * np.abs(np.diff((0, *states))).sum(),
            )
            starts = np.log(begin / inside) > SPLIT_ODDS
            tags = [state and (1 if starts[index] else 2) for index, state in enumerate(likeliest)]
            entities = predict_entities(logits)
            assert [span[:2] for span in entities] == [span[:2] for span in decode_entities(tags)]
            for first, end, label in entities:
                each_label = shares[first:end, 1:].reshape(end - first, num_labels, 2).sum(axis=(0, 2))
                assert label == each_label.argmax()


def test_an_unlikely_word_of_a_text_without_entities_is_not_predicted() -> None:
    logits = np.log([[1 - 4e-9, *[1e-9] * 4]] * 20)
    logits[7] = np.log([0.95, 0.02, 0.01, 0.01, 0.01])
    assert predict_entities(logits) == []


def test_words_of_different_labels_form_one_predicted_entity() -> None:
    logits = np.log([[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.2, 0.4], [0.1, 0.1, 0.3, 0.1, 0.4]])
    assert decode_entities(logits.argmax(axis=1).tolist()) == [(0, 1, 0), (1, 3, 1)]
    assert predict_entities(logits) == [(0, 3, 0)]
    assert predict_entities(np.full((3, 5), np.nan)) == [], "a diverged model must not raise an error"


def test_predicted_entities_are_merged_across_windows(encoder_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tags are equally likely, so all words form one entity, which the end of a window does not cut."""
    model = make_trained("random:bert", TASK.name, texts=2)
    labels = model.spec.labels
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
    tags = [f"B-{labels[0]}", *[f"I-{labels[0]}"] * 7]
    options = {"max_length": 8, "windows": 2, "stride": 2, "labels": labels}
    dataset = tokenize_records(
        record([f"w{index}" for index in range(8)], tags), tokenizer=encoder_tokenizer, **options
    )
    figures = evaluate_examples(model, dataset, pad_id=0, max_tokens=64)
    assert figures["entities"][0].tolist() == [[1] * 5, *[[0] * 5] * (len(labels) - 1), [1] * 5]
    assert compute_unit_scores(model, dataset, pad_id=0).tolist() == [1.0]
    assert TASK.majority_baseline(dataset) == 0.0
    outside = torch.nn.functional.one_hot(torch.zeros(2, 8, dtype=torch.int64), 1 + 2 * len(labels)).double()
    monkeypatch.setattr(model, "logits", lambda batch: 9 * outside[:, : batch.input_ids.shape[1]])
    empty = tokenize_records(record(["w1"], ["O"]), tokenizer=encoder_tokenizer, **options)
    assert compute_unit_scores(model, empty, pad_id=0).tolist() == [1.0]


@pytest.mark.parametrize("windows", [1, 2])
def test_overlapping_entities_in_one_word_train_once_and_count_twice(encoder_tokenizer: Any, windows: int) -> None:
    model = make_trained("random:bert", TASK.name, texts=windows)
    first, second, *_ = labels = model.spec.labels
    options = {"columns": SPANNED, "labels": labels, "windows": windows, "max_length": 8, "stride": 2}
    text, spans = "w1 w2 w3 w4 w5 w6 w7", [[3, 4, second], [4, 5, first], [6, 7, first], [7, 11, second]]
    data = tokenize_records(record(text, spans, SPANNED), tokenizer=encoder_tokenizer, **options)
    alone = tokenize_records(record(text, [spans[0], *spans[2:]], SPANNED), tokenizer=encoder_tokenizer, **options)
    assert [TASK.find_ignored_annotations(one, data=make_data(**options)) for one in (data, alone)] == [[True], [False]]
    batches = [collate(one, [0], pad_id=0) for one in (data, alone)]
    losses = [model.losses(batch) for batch in batches]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    counted = [TASK.outputs_per_example(model, batch)["entities"][0, :, 0].tolist() for batch in batches]
    assert (counted[0][:2], counted[0][-1]) == ([2, 2], 4)
    assert (counted[1][:2], counted[1][-1]) == ([1, 2], 3)
    many = record("a" * 90, [[index, index + 1, second] for index in range(90)], SPANNED)
    targets = tokenize_records(many, tokenizer=encoder_tokenizer, **options).targets
    assert max(int(row.max()) for row in targets) > 5 * 3**20, "many entities must fit into one target"


def test_predicted_entity_ends_with_its_word_despite_truncation() -> None:
    tokenizer = load_tokenizer(ModelSpec(path="random:bert"))
    text, model = "unbelievably sore aspirin", make_trained("random:bert", TASK.name)
    for max_length in range(4, 12):
        data = make_data(SPANNED, max_length=max_length, labels=model.spec.labels)
        prompt = TASK.without_answer(Record({"text": text}), data)
        (row,) = TASK.tokenize([prompt], tokenizer, data=data).targets
        logits = functional.one_hot(torch.ones(1, len(row), dtype=torch.long), 1 + 2 * len(model.spec.labels)).float()
        _, entities = TASK.answer_record(prompt, logits, tokenizer, data=data, spec=model.spec)
        words = text.split()[: len(entities)]  # type: ignore[arg-type]
        assert [item["text"] for item in entities] == words, max_length  # type: ignore[attr-defined]


def test_prompts_omit_answers_and_dummy_records_are_usable(encoder_tokenizer: Any) -> None:
    for columns, text, fields in (
        (TAGGED, "my card\nis", {"tokens": "my card\nis"}),
        (SPANNED, "my card", {"text": "my card"}),
    ):
        kwargs = make_data(columns)
        prompt = TASK.prompt_fields(text, kwargs, at="--prompt")
        assert prompt == fields
        assert set(TASK.list_input_columns(kwargs)) == set(fields)
        assert len(TASK.tokenize([TASK.without_answer(Record(prompt), kwargs)], encoder_tokenizer, data=kwargs)) == 1
        roles = TASK.list_required_roles(kwargs)
        dummy = {role: TASK.dummy_field(role, kwargs, draw=lambda count: count - 1) or "my card" for role in roles}
        assert TASK.record_validator(kwargs)(Record(dummy)) is None
        assert len(make_entity_reader(kwargs)(Record(dummy))[1]) == 1
    assert json.loads(dummy["spans"]) == [[0, 1, "dose"]]
