"""Verdicts put together: the worst of them counts."""

from __future__ import annotations

from collections.abc import Iterable

from fedtune.report.site_model import State, Verdict

WORST_FIRST: tuple[State, ...] = ("no_guarantee", "exceeded", "within")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst state of some verdicts, with the reasons of those that have it, each once.

    That one site spent nothing is no reason where another one did.
    """
    several = list(verdicts)
    state = min((verdict.state for verdict in several), key=WORST_FIRST.index, default=WORST_FIRST[-1])
    having = [verdict.reasons for verdict in several if verdict.state == state]
    codes = dict.fromkeys(code for reasons in having for code in reasons)
    if not all("nothing_spent" in reasons for reasons in having):
        codes.pop("nothing_spent", None)
    return Verdict(state=state, reasons=tuple(codes))


def with_foundations(verdict: Verdict, violated: Iterable[str]) -> Verdict:
    """The verdict, or that there is none to give because something that the figures rest on does not hold."""
    if not (reasons := tuple(violated)):
        return verdict
    before = verdict.reasons if verdict.state == "no_guarantee" else ()
    return Verdict(state="no_guarantee", reasons=(*before, *reasons))


def has_meaning(verdict: Verdict) -> bool:
    """Whether it may be said what an epsilon means: where something is promised, or where it says "anything"."""
    return verdict.state != "no_guarantee" or verdict.reasons == ("no_noise",)
