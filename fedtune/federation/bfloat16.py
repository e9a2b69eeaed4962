"""Rounding of updates to bfloat16: a site sends the rounded difference, and the lead adds it to the adapter it sent.

Guarantee: post-processing.  The site rounds the release of its noised training, relative to the adapter that it
received.
"""

from __future__ import annotations

import numpy as np

from fedtune.privacy.release import Difference, Tensors

MAX_ROUNDING = 2.0**-8
"""The largest relative rounding error of a difference: half a unit in the last place of an 8-bit significand."""


def round_difference(trained: Tensors, sent: Tensors) -> Difference:
    """Subtract `sent` from `trained` and round every value to bfloat16, ties to even; NaN is preserved."""
    halves = {}
    for name, value in trained.items():
        moved = value - sent[name]
        bits = moved.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a carry into the exponent yields the next binade
        halves[name] = np.where(np.isnan(moved), 0x7FC0, nearest).astype(np.uint16)
    return Difference(halves)


def add_difference(sent: Tensors, difference: Difference) -> Tensors:
    """Add a bfloat16 difference to `sent` and return the adapter in float32; names and shapes must match."""
    with np.errstate(over="ignore", invalid="ignore"):  # the lead rejects non-finite values
        return {
            name: sent[name] + (half.astype(np.uint32) << 16).view(np.float32)
            for name, half in difference.halves.items()
        }
