"""Updates in bfloat16: the site rounds the difference to the adapter that it received, and the lead adds it back.

Guarantee: post-processing.  The site rounds the release of its noised training, relative to the adapter that it
received.
"""

from __future__ import annotations

import numpy as np

from fedtune.privacy.release import Difference, Tensors

MOST_ROUNDING = 2.0**-8
"""The most that a difference is rounded by, relative to the rounded one: half of the last of 8 binary digits."""


def round_difference(trained: Tensors, sent: Tensors) -> Difference:
    """Subtract `sent` from `trained` and round each value to the nearest bfloat16, ties to even; NaN stays NaN."""
    halves = {}
    for name, value in trained.items():
        moved = value - sent[name]
        bits = moved.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a carry into the exponent is right: the next binade
        halves[name] = np.where(np.isnan(moved), 0x7FC0, nearest).astype(np.uint16)
    return Difference(halves)


def add_difference(sent: Tensors, difference: Difference) -> Tensors:
    """Add a difference to `sent` and return the adapter in float32; the names and shapes must match."""
    with np.errstate(over="ignore", invalid="ignore"):  # a lead refuses values that are not finite
        return {
            name: sent[name] + (half.astype(np.uint32) << 16).view(np.float32)
            for name, half in difference.halves.items()
        }
