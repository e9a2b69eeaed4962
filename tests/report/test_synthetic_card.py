"""The card of synthetic records: what a classifier of words learns from them, computed by hand, and sums."""

from typing import Any

import pytest

from fedtune.report.synthetic_card import classified, together

RED = [("a", "Red ball."), ("a", "red car"), ("a", "red sun")]
BLUE = [("b", "blue ball"), ("b", "Blue, sky")]


def test_a_classifier_of_words_is_multinomial_naive_bayes() -> None:
    """Six words: of a code with n of them, k times this one, it has a chance of (k + 1) / (n + 6)."""
    public = [
        ("a", "red sky"),  # a: 3/5 4/12 1/12 = 0.017, b: 2/5 1/10 2/10 = 0.008
        ("b", "blue car"),  # a: 3/5 1/12 2/12 = 0.008, b: 2/5 3/10 1/10 = 0.012
        ("b", "sky car car"),  # a: 3/5 1/12 2/12 2/12 = 0.0014, b: 2/5 2/10 1/10 1/10 = 0.0008: wrong
        ("c", "green ? hill"),  # a code that came once was not learnt, nor were its words
    ]
    learnt = [*BLUE, ("c", "green hill"), *RED]
    assert classified(learnt, public) == {"right": 2 / 4, "commonest": 1 / 4}
    # Each is tested alone.  Wrong is "blue ball" alone: a: 3/4 1/12 2/12 = 0.010, b: 1/4 2/8 1/8 = 0.008.
    assert classified(learnt) == {"right": 4 / 5, "commonest": 3 / 5}
    assert classified([*RED, ("b", "blue ball"), ("c", "green hill")]) is None
    assert classified([("a", "!"), ("b", "?")] * 2) == {"right": 0, "commonest": 1 / 2}, "no words"


@pytest.mark.parametrize(
    ("start", "epsilon"),
    [
        (None, 0.3),
        ({"epsilon": 2.0, "delta": 0.1, "unit": "record", "public": False}, 2.3),
        ({"epsilon": None, "delta": None, "unit": None, "public": True}, 0.3),
        ({"epsilon": None, "delta": None, "unit": None, "public": False}, None),
        ({"epsilon": 2.0, "delta": 0.1, "unit": "user", "public": False}, None),
    ],
)
def test_what_a_run_began_in_adds_up_with_it(start: Any, epsilon: float | None) -> None:
    runs = [{"epsilon": 0.1, "delta": 1e-5, "unit": "record", "start": start}]
    runs.append({"epsilon": 0.2, "delta": 2e-5, "unit": "record", "start": None})
    assert together(runs)[0] == epsilon, "as a person adds it up"
    assert start or together(runs)[1] == 3e-5
