"""An update in bfloat16: rounded once at its site, and added to the adapter that was sent once at the lead.

Guarantee: post-processing.  A site rounds what its noised training released, by the adapter that it was sent.
"""

from __future__ import annotations

import numpy as np

from fedtune.privacy.release import Difference, Tensors

MOST_ROUNDING = 2.0**-8
"""The most that a difference is rounded by, relative to the rounded one: half of the last of 8 binary digits."""


def rounded_difference(trained: Tensors, sent: Tensors) -> Difference:
    """`trained` minus `sent`, each value the nearest bfloat16, ties to even; NaN stays NaN."""
    halves = {}
    for name, value in trained.items():
        moved = value - sent[name]
        bits = moved.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a carry into the exponent is right: the next binade
        halves[name] = np.where(np.isnan(moved), 0x7FC0, nearest).astype(np.uint16)
    return Difference(halves)


def add_difference(sent: Tensors, difference: Difference) -> Tensors:
    """The adapter that arrived, in float32; names and shapes must be those of `sent`."""
    with np.errstate(over="ignore", invalid="ignore"):  # a lead refuses values that are not finite
        return {
            name: sent[name] + (half.astype(np.uint32) << 16).view(np.float32)
            for name, half in difference.halves.items()
        }
