"""Suppression of transformers' progress bars and warnings, and conversion of library errors to one-line messages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from fedtune.spec import ConfigError, translate_panics


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress transformers' messages below errors inside the block, and a deprecation warning that PEFT triggers."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 still uses a deprecated property of transformers 5.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def translate_library_errors(key: str, value: object, bound: str) -> Iterator[None]:
    """Silence transformers inside the block, and convert any library error to a ConfigError.

    A `{}` in `bound` is replaced by the first line of the error.
    """
    try:
        with silence_transformers(), translate_panics():
            yield
    except ConfigError:
        raise
    except Exception as error:  # any exception: its text comes from a model's files and public texts, never a record
        raise ConfigError(key, value, bound.format(get_first_line(error))) from error


def get_first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the advice that follows."""
    return next(iter(str(error).splitlines()), type(error).__name__)
