"""Reports that fedtune 0.1.0 wrote are read, agree with their events but for rounding, and say what they said then."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.report import recompute, signing
from fedtune.report.page.render import render

OLD = Path(__file__).parent / "of_0_1_0"


@pytest.mark.parametrize(
    ("name", "state", "reasons"),
    [("run", "within", ("not_finished",)), ("audited", "within", ("audited",)), ("ledger", "within", ())],
)
def test_a_report_of_0_1_0_is_read_and_lacks_rounding_alone(name: str, state: str, reasons: tuple[str, ...]) -> None:
    data = (OLD / f"{name}.json").read_bytes()
    report = signing.read(data)
    assert signing.to_text(report).encode() == data
    # Its epsilons by PLD lack the rounding that is counted now, a hundred-millionth: each is found, and nothing else
    # is.
    for problem in recompute.problems(report):
        least = float(str(problem.found).removeprefix("at least "))
        assert problem.said < least <= problem.said * (1 + 2e-8), problem
    assert (report.verdict.state, report.verdict.reasons) == (state, reasons)
    assert f'<div class="verdict {state}" id="verdict">' in render(report, language="en")
