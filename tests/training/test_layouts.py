"""A step over the examples that records become, in each form that a layout gives them.

Per-example gradients are those of a loop, and the same bits in every company; so a record moves the sum by what it
adds, which test_exact_sum.py bounds.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedtune.data import Record, TextDataset
from fedtune.data.spec import DataSpec, PairsSpec
from fedtune.data.tokenise import UNSUPERVISED
from fedtune.tasks.base import Task
from fedtune.tasks.registry import task_named
from fedtune.tasks.task_model import TaskModel

from ..data.conftest import chat as turns_of
from ..data.conftest import in_json, make_tokenizer
from .conftest import LAST, examples_of, trained
from .test_companies import require_alone
from .test_dp_step import require_sums_of_a_loop

LONGEST = 14
RECORDS: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_name("layouts.yaml").read_text(encoding="utf-8")
)
OTHERS = {"labels": "multi_label", "tagged": "token_classification", "marked": "token_classification"}
"""Layouts of tasks with a head, by task; those not here or in `TEXTS` are a language model's.

Other heads read a text as that of several labels does: their losses are in test_feature_gradients.py and
test_companies.py.
"""
GIVEN: dict[str, dict[str, Any]] = {
    "chat": {"columns": {"messages": "m"}, "chat_template": "plain"},
    "text": {"columns": {"text": "t"}},
    "scored": {"columns": {"text": "t", "other": "o", "target": "s"}, "target_range": (0.0, 5.0)},
    "triplets": {"columns": {"anchor": "a", "positive": "p", "negative": "n"}, "pairs": PairsSpec(margin=1.5)},
    "prompted": {"columns": {"prompt": "p", "chosen": "c", "rejected": "r"}, "prompt_template": "is {prompt}"},
    "continued": {"columns": {"messages": "m", "chosen": "c", "rejected": "r"}, "chat_template": "plain"},
    "labels": {"columns": {"text": "t", "labels": "l"}, "labels": ("card", "lost", "place")},
    "tagged": {"columns": {"tokens": "t", "tags": "g"}, "labels": ("card", "lost", "place")},
    "marked": {"columns": {"text": "t", "spans": "s"}, "labels": ("card", "lost", "place"), "windows": 2, "stride": 4},
}
TEXTS = {"scored": 2, "triplets": 3, "marked": 2}
PREFERENCES = {"prompted": {"beta": 2.0}, "continued": {"beta": 2.0, "per_token": True}}
"""Layouts of task preference, and how it is to learn them."""
layouts = pytest.mark.parametrize("layout", GIVEN)
keeping = pytest.mark.parametrize("keeps", [False, True], ids=["whole", "kept states"])


def as_read(role: str, value: Any) -> str:
    """What turns say is in JSON."""
    turns = partial(turns_of, first="user" if role == "messages" else "assistant")
    return in_json(turns(*value)) if isinstance(value, list) else str(value)


def dataset_of(layout: str) -> TextDataset:
    """The records of a layout as a real site tokenises them."""
    data = DataSpec(dataset="d", train_file="f", declared_sizes=9, max_length=LONGEST, **GIVEN[layout])
    records = [Record({role: as_read(role, value) for role, value in one.items()}) for one in RECORDS[layout]]
    tokenizer = make_tokenizer(post="[CLS] $A")
    return task_of(layout).tokenise(records, tokenizer, data=data, lenient_within=258)


def task_of(layout: str) -> Task:
    if layout in PREFERENCES:
        return task_named("preference")
    return task_named(OTHERS.get(layout) or ("embedding" if layout in TEXTS else "causal_lm"))


def teaches_nothing(dataset: TextDataset, place: int) -> bool:
    if not isinstance(dataset.targets, tuple):
        return bool((np.isnan(dataset.targets[place]) | (dataset.targets[place] == UNSUPERVISED)).all())
    return all((dataset.targets[text] == UNSUPERVISED).all() for text in dataset.texts_of([place]))


def made(layout: str, *, keeps: bool, size: float = 0.2) -> TaskModel:
    path = "random:bert" if layout in OTHERS else "random:llama"
    settings = {"texts": TEXTS.get(layout, 1)} | ({"lora": LAST} if keeps else {})
    settings |= {"texts": 2, **PREFERENCES[layout]} if layout in PREFERENCES else {}
    model: TaskModel = trained(path, task_of(layout).name, size=size, **settings)
    return model


@layouts
def test_the_records_are_those_that_this_is_about(layout: str) -> None:
    dataset = dataset_of(layout)
    texts = 2 if layout in PREFERENCES else TEXTS.get(layout, 1)
    assert (dataset.texts, len(dataset)) == (texts, len(RECORDS[layout]))
    assert dataset.lengths.max() == LONGEST, "some are cut"
    if texts > 1 or layout == "chat":
        assert teaches_nothing(dataset, len(dataset) - 1), "one is none, or cannot be encoded"
    if layout == "chat":
        runs = [np.flatnonzero(np.diff(np.append(False, targets != UNSUPERVISED)) == 1) for targets in dataset.targets]
        assert max(map(len, runs)) > 2, "several answers"


@pytest.mark.by_day(
    *(f"{layout}-whole" for layout in ("chat", "scored", "labels", "tagged", "prompted")),
    "chat-kept states",
)
@keeping
@layouts
def test_the_clipped_sum_equals_a_loop(layout: str, keeps: bool) -> None:
    model, dataset = made(layout, keeps=keeps), dataset_of(layout)
    require_sums_of_a_loop(model, dataset, max_length=LONGEST, kept_by=model if keeps else None)


@pytest.mark.by_day("chat-whole", "scored-whole", "labels-whole", "prompted-whole", "chat-kept states")
@keeping
@layouts
def test_a_record_is_the_same_bit_for_bit_in_every_company(layout: str, keeps: bool) -> None:
    model = made(layout, keeps=keeps, size=5.0)
    require_alone(
        model, examples_of(dataset_of(layout), max_length=LONGEST, kept_by=model if keeps else None), companies=5
    )
