"""Ctrl-C in the middle of several runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedtune.show.run_progress import Display


@contextmanager
def interrupted_in_round(number: int) -> Iterator[None]:
    """Interrupt whatever runs after the `number`-th round of all runs together."""
    finished, seen = Display.round_finished, []

    def interrupt(self: Display, state: Any) -> None:
        finished(self, state)
        seen.append(state.round)
        if len(seen) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "round_finished", interrupt)
        yield
