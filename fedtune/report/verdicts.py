"""Verdicts put together: the worst of them counts."""

from __future__ import annotations

from collections.abc import Iterable

from fedtune.report.site_model import State, Verdict

_WORST_FIRST: tuple[State, ...] = ("no_guarantee", "exceeded", "within")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst state of some verdicts, with the reasons of those that have it, each once.

    That one site spent nothing is no reason where another one did.
    """
    several = list(verdicts)
    state = min((verdict.state for verdict in several), key=_WORST_FIRST.index, default=_WORST_FIRST[-1])
    having = [verdict.reasons for verdict in several if verdict.state == state]
    codes = dict.fromkeys(code for reasons in having for code in reasons)
    if not all("nothing_spent" in reasons for reasons in having):
        codes.pop("nothing_spent", None)
    return Verdict(state=state, reasons=tuple(codes))
