"""The one place that keeps transformers' messages short: no bars or advice while it loads, an error in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Show only transformers' errors inside the block, and none of its deprecations that PEFT runs into."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 still asks transformers 5 for a property by its old name.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error, without the paragraphs of advice that follow."""
    return next(iter(str(error).splitlines()), type(error).__name__)
