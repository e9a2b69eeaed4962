"""A progress bar in a notebook, without a package for widgets."""

from __future__ import annotations

import html
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.api.public import Progress


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML instead of a terminal's control characters."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def notebook_bar() -> Callable[[Progress], None]:
    """Show a bar below the cell, and return the callback that moves it."""
    library: Any = importlib.import_module("IPython.display")
    handle = library.display(library.HTML(""), display_id=True)

    def move(told: Progress) -> None:
        scores = told.round.metrics.items() if told.round is not None else ()
        said = ", ".join(f"{name} {value:.4f}" for name, value in scores if value is not None)
        text = f"{told.stage} {told.done} of {told.total}" if told.total else told.stage
        bar = f'<progress value="{told.done}" max="{max(told.total, 1)}"></progress>'
        handle.update(library.HTML(f"{bar} {html.escape(f'{text}: {said}' if said else text)}"))

    return move
