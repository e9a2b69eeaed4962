"""A parser under test, and the property that each must have."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

MAX_CPU_S = 30.0
"""Time limit for one input, in seconds; a hang would take longer, and the slowest valid input far less than one."""


@dataclass(frozen=True)
class Target:
    """A parser of external input."""

    name: str
    broken: Callable[[], st.SearchStrategy[bytes]]  # a function, because building a seed may take a second
    parse: Callable[[bytes], object]  # its return value is ignored
    errors: tuple[type[Exception], ...]  # the errors that its docstring allows
    cost: int = 1  # a slow target gets fewer inputs by this factor

    def check(self, data: bytes) -> None:
        """Check the property: a result or one of the documented errors, in time."""
        start, message = time.process_time(), ""
        try:
            self.parse(data)
        except self.errors as error:
            message = str(error)
        # Error messages must be short and printable for any input.
        assert len(message.encode()) < 20_000
        assert time.process_time() - start < MAX_CPU_S
