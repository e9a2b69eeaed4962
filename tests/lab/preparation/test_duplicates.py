"""Duplicates, near-duplicates and common word sequences."""

import random
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedtune.data.records import Record
from fedtune.lab.preparation import duplicates
from fedtune.lab.preparation.duplicates import Earlier, Likeness, Near, Words, compare_records, find_longest_runs
from fedtune.tasks.registry import TASKS

from ...cases import read_cases

TURNS = '[{"role":"user","content":"b"}]'


class Reader:
    """Adds texts to the index of earlier records with increasing line numbers."""

    def __init__(self) -> None:
        self.earlier, self._line = Earlier(alike=True), 0

    def __call__(self, text: str, label: str = "a", *, use: str = "train") -> dict[Likeness, list[int]]:
        self._line += 1
        record = Record({"text": text, "label": label}, "file", self._line)
        return {kind: [twin.line for twin in twins] for kind, twins in self.earlier.find_twins(record, use).items()}


def make_sentence(seed: int) -> str:
    draws = random.Random(seed)
    return " ".join("".join(draws.choices("abcdefghijklmnop", k=6)) for _ in range(20))


def test_whitespace_variants_are_equal_and_extensions_are_similar() -> None:
    reader, text = Reader(), make_sentence(1)
    assert reader(text) == {"same": [], "alike": []}
    assert reader(f"  {text.replace(' ', '  ')}\n") == {"same": [1], "alike": [1]}
    assert reader(f"{text} Indeed") == {"same": [], "alike": [1]}
    assert reader(make_sentence(2)) == {"same": [], "alike": []}


@pytest.mark.parametrize("name", TASKS)
def test_records_differing_in_any_role_are_distinct(name: str) -> None:
    for layout in TASKS[name].layouts:
        first = Record(dict.fromkeys(layout, TURNS))
        for role in layout:
            different = Record({**first.fields, role: TURNS.replace("b", "c")})
            assert (different.full_text, different.target_key) != (first.full_text, first.target_key), role


def test_records_differing_in_a_feature_are_distinct() -> None:
    rows = [("", "1"), ("1", ""), ("a b", "c"), ("a", "b c")]
    assert len({Record({"feature:a": a, "feature:b": b, "label": "x"}).full_text for a, b in rows}) == len(rows)


def test_first_occurrence_is_tracked_per_use_and_label() -> None:
    reader, text = Reader(), make_sentence(1)
    reader(text)
    assert reader(text, "b")["same"] == [1]
    assert reader(text, use="test")["same"] == [1, 2]
    assert reader(text, use="test")["same"] == [1, 2, 3]


def test_texts_with_ninety_percent_overlap_are_near_duplicates() -> None:
    reader, matches = Reader(), 0
    for seed in range(100):
        words = make_sentence(seed).split()
        reader(" ".join(words))
        matches += bool(reader(" ".join([*words[:-1], "changed"]))["alike"])
    assert matches >= 95


def test_duplicate_search_uses_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_SAME", 3)
    monkeypatch.setattr(duplicates, "MAX_ALIKE", 2)
    reader = Reader()
    for seed in range(5):
        assert reader.earlier.is_full == (seed >= 2)
        reader(make_sentence(seed))
    assert reader(make_sentence(1)) == {"same": [2], "alike": [2]}
    assert reader(make_sentence(4)) == {"same": [], "alike": []}


def test_dropped_record_is_not_added_to_the_index() -> None:
    earlier, match = Earlier(alike=True), Record({"text": make_sentence(1)}, "file", 1)
    for _ in range(2):
        assert earlier.find_twins(match, keep=False) == {"same": (), "alike": ()}


# The longest run of words, exactly; and personal details.

PARTS = st.lists(st.lists(st.sampled_from("abc"), max_size=8), max_size=3)
"""Strategy for records with repeated words."""


def join_parts(parts: list[list[str]]) -> Words:
    return [word for part in parts for word in (*part, None)]


def list_word_runs(words: Words) -> set[tuple[str | None, ...]]:
    """Return all word sequences within the texts."""
    parts = [tuple(part) for at_break, part in groupby(words, key=lambda word: word is None) if not at_break]
    return {part[a:b] for part in parts for a in range(len(part)) for b in range(a + 1, len(part) + 1)}


@given(st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=4))
@example([[list("ab")], [list("b")]], [[list("ab")]])
@example([[list("aabab")]], [[list("abaab")], [list("bab")]])
def test_longest_common_run_matches_brute_force(texts: list[list[list[str]]], others: list[list[list[str]]]) -> None:
    own = {str(number): join_parts(parts) for number, parts in enumerate(others)}
    every = [join_parts(parts) or [None] for parts in texts]
    matches = list(find_longest_runs(every, own.items()))
    assert len(matches) == len(every)
    for text, (words, end, index) in zip(every, matches, strict=True):
        shared = list_word_runs(text) & {run for different in own.values() for run in list_word_runs(different)}
        assert words == max(map(len, shared), default=0)
        if words:
            assert tuple(text[end - words : end]) in shared & list_word_runs(own[index])


def record(text: str, line: int = 1, *, file: str = "own", **more: str) -> Record:
    return Record({"text": text, **more}, file, line)


def find_near(text: str, *others: str) -> Near:
    """Compare a text with others, which have line numbers from 1."""
    (matches,) = compare_records(
        [record(text, 7, file="made")], [record(different, line) for line, different in enumerate(others, 1)]
    )
    return matches


@pytest.mark.parametrize(
    ("text", "different", "run"),
    [
        ("Don\u2019t PANIC, it's fine!", "so: dont\npanic its fine then", "dont panic its fine"),
        ("\uff23afe\u0301 au lait", "un caf\u00e9 au lait", "caf\u00e9 au lait"),
        ("\u6211\u7684\u5361\u4e22\u4e86", "\u4ed6\u7684\u5361\u5462", "\u7684 \u5361"),
        ("card_arrival 12-34", "Card arrival: 12/34", "card arrival 12 34"),
        ("\U0001f600 ...", "\U0001f600 ...", ""),
    ],
)
def test_word_comparison_ignores_case_punctuation_and_unicode_form(text: str, different: str, run: str) -> None:
    matches = find_near(text, "nothing of it", different)
    assert (matches.run, matches.words) == (run, len(run.split()))
    assert (matches.place, matches.of) == ("made:7", "own:2" if run else "")


def test_matches_are_sorted_by_run_length_with_their_share() -> None:
    made = [record("one two three", 1, file="made"), record("one two three four", 2, file="made", prompt="five six")]
    matches = compare_records(made, [record("one two three four five six")])
    assert [(match.place, match.words, match.share) for match in matches] == [("made:2", 4, 4 / 6), ("made:1", 3, 1.0)]


def test_exact_copies_rank_above_similar_texts() -> None:
    draws = random.Random(1)
    words = ["".join(draws.choices("abcdefgh", k=6)) for _ in range(40)]
    text = " ".join(words)
    made = [record(text, line, file="made") for line in (1, 2)] + [record("else entirely, with more words", 3)]
    matches = compare_records(made, [record(f"{text} Indeed.", 4), record(f" {text}\n", 5), record(f"{text} Yes.", 6)])
    assert [(match.likeness, match.twin) for match in matches] == [("same", "own:5"), ("same", "own:5"), ("", "")]
    assert (matches[2].words, matches[2].of) == (0, "")
    assert find_near(text, f"{text} Indeed.").likeness == "alike"


@pytest.mark.parametrize(("text", "others", "details"), read_cases(__file__, "details"))
def test_copied_details_are_found_despite_whitespace(text: str, others: list[str], details: list[list[object]]) -> None:
    assert [list(match) for match in find_near(text, *others).details] == details


def test_empty_inputs_have_no_matches() -> None:
    assert compare_records([], [record("a text")]) == []
    assert find_near("a text") == Near("made:7", 0, 0.0, "", "", "", "", [])
