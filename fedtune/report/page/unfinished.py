"""How a page says that its run goes on, and loads itself again."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from datetime import datetime

AGAIN_S = 15
"""After this time a page of a run that goes on loads itself again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """What a page says of a run that is not at its end.

    Attributes:
        done: rounds, of `planned` ones.
        goes_on: a process works on the run.
        left_s: at the run's pace; None: not known.
        written: in ISO form.
        silent_after_s: without a newer page for so long, the run counts as silent.
    """

    done: int
    planned: int
    goes_on: bool
    left_s: float | None
    written: str
    silent_after_s: float

    @property
    def left(self) -> tuple[str, int] | None:
        """Unit and number of the time that is left, rounded up."""
        if not self.goes_on or not self.left_s:
            return None
        if self.left_s < 60:
            return "seconds", 10 * math.ceil(self.left_s / 10)
        return (
            ("minutes", math.ceil(self.left_s / 60)) if self.left_s < 5400 else ("hours", math.ceil(self.left_s / 3600))
        )

    @property
    def script(self) -> str:
        """Loads the page again, until the run fell silent: a page without a script cannot know what time it is."""
        until = round(1000 * (datetime.fromisoformat(self.written).timestamp() + self.silent_after_s))
        again = f"setTimeout(() => location.reload(), {1000 * AGAIN_S})"
        return f'if (Date.now() < {until}) {again}; else document.getElementById("silent").hidden = false;'

    @property
    def script_digest(self) -> str:
        """What the page's policy lets run, and nothing else."""
        return "sha256-" + base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
