"""Records that say what earlier ones said."""

from __future__ import annotations

import random

import pytest

from fedtune.data.records import Record
from fedtune.preparation import duplicates
from fedtune.preparation.duplicates import Earlier, Likeness
from fedtune.tasks import TASKS

TURNS = '[{"role":"user","content":"b"}]'


class Reader:
    """Gives each text to the records so far, with the next line."""

    def __init__(self, *, alike: bool = True) -> None:
        self.earlier, self._line = Earlier(alike=alike), 0

    def __call__(self, text: str, label: str = "a", *, use: str = "train") -> dict[Likeness, list[int]]:
        self._line += 1
        record = Record({"text": text, "label": label}, "file", self._line)
        return {kind: [twin.line for twin in twins] for kind, twins in self.earlier.twins(record, use).items()}


def sentence(seed: int) -> str:
    draws = random.Random(seed)
    return " ".join("".join(draws.choices("abcdefghijklmnop", k=6)) for _ in range(20))


def test_the_same_but_for_spaces_is_the_same_and_one_word_more_is_alike() -> None:
    read, text = Reader(), sentence(1)
    assert read(text) == {"same": [], "alike": []}
    assert read(f"  {text.replace(' ', '  ')}\n") == {"same": [1], "alike": [1]}
    assert read(f"{text} Indeed") == {"same": [], "alike": [1]}
    assert read(sentence(2)) == {"same": [], "alike": []}


@pytest.mark.parametrize("name", TASKS)
def test_records_that_differ_in_any_role_of_a_task_are_not_the_same(name: str) -> None:
    for layout in TASKS[name].layouts:
        first = Record(dict.fromkeys(layout, TURNS))
        for role in layout:
            other = Record({**first.fields, role: TURNS.replace("b", "c")})
            assert (other.said, other.answer) != (first.said, first.answer), role


def test_records_that_differ_in_a_feature_are_not_the_same() -> None:
    rows = [("", "1"), ("1", ""), ("a b", "c"), ("a", "b c")]
    assert len({Record({"feature:a": a, "feature:b": b, "label": "x"}).said for a, b in rows}) == len(rows)


def test_each_use_and_label_has_a_first_one() -> None:
    read, text = Reader(), sentence(1)
    read(text)
    assert read(text, "b")["same"] == [1]
    assert read(text, use="test")["same"] == [1, 2]
    assert read(text, use="test")["same"] == [1, 2, 3]


def test_nearly_all_texts_that_share_nine_tenths_are_found() -> None:
    read, found = Reader(), 0
    for seed in range(100):
        words = sentence(seed).split()
        read(" ".join(words))
        found += bool(read(" ".join([*words[:-1], "changed"]))["alike"])
    assert found >= 95


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_SAME", 3)
    monkeypatch.setattr(duplicates, "MOST_ALIKE", 2)
    read = Reader()
    for seed in range(5):
        assert read.earlier.is_full == (seed >= 2)
        read(sentence(seed))
    assert read(sentence(1)) == {"same": [2], "alike": [2]}
    assert read(sentence(4)) == {"same": [], "alike": []}


def test_without_the_library_equal_records_are_still_found() -> None:
    read = Reader(alike=False)
    read(sentence(1))
    assert read(sentence(1)) == {"same": [1], "alike": []}


def test_a_record_that_is_not_kept_is_no_earlier_one() -> None:
    earlier, one = Earlier(alike=True), Record({"text": sentence(1)}, "file", 1)
    for _ in range(2):
        assert earlier.twins(one, keep=False) == {"same": (), "alike": ()}
