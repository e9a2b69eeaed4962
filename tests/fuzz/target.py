"""One parser under test, and the property that every one of them has."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

MAX_CPU_S = 30.0
"""Of one input; a hang would take longer, and the slowest honest answer takes well under a second."""


@dataclass(frozen=True)
class Target:
    """Something that parses what comes from outside."""

    name: str
    broken: Callable[[], st.SearchStrategy[bytes]]  # broken inputs, given lazily: a seed may take a second to make
    parse: Callable[[bytes], object]  # takes one; what it returns is of no interest
    errors: tuple[type[Exception], ...]  # what it may raise, as its docstring says
    cost: int = 1  # a slow one gets so many times fewer inputs

    def check(self, data: bytes) -> None:
        """The property: an answer, or one of the documented errors, in time."""
        began, told = time.process_time(), ""
        try:
            self.parse(data)
        except self.errors as error:
            told = str(error)
        # What people are told is short and can be printed, whatever the input was.
        assert len(told.encode()) < 20_000
        assert time.process_time() - began < MAX_CPU_S
