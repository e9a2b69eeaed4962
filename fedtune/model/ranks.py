"""Ranks by site: sites that train different numbers of LoRA's rows and columns of one shared adapter.

The product B A is the sum, over the shared rank, of a column of B times a row of A.  A site of rank r trains the first
r of these pairs in the model with all of them, and sends only these.  Its update stands for an adapter whose other
pairs are as the site received them, so the products of all updates can be averaged.

If one factor trains in a round, the average of the products is the product of the average factor and the other factor,
so padding is exact.  If both factors train, `project_average` averages the products and projects the result to the
shared rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.model.spec import LORA_A, LORA_B

Array = npt.NDArray[np.float32]


def cut_to_rank(tensors: Mapping[str, Any], rank: int | None, *, axis: int = 0) -> dict[str, Any]:
    """Return views of the values that a site of this rank trains, by name.

    Args:
        tensors: NumPy arrays or torch tensors by the names of an adapter.
        rank: the number of rows of A and of columns of B; None: all.
        axis: the number of axes before those of the adapter, such as 1 for per-example gradients.
    """
    before, first = (slice(None),) * axis, slice(rank)
    places = {LORA_A: (*before, first), LORA_B: (*before, slice(None), first)}
    views = dict(tensors)
    for name, value in tensors.items() if rank is not None else ():
        for part, place in places.items():
            if part in name:
                views[name] = value[place]
    return views


def pad_to_full_rank(part: Mapping[str, Array], sent: Mapping[str, Array], rank: int | None) -> Mapping[str, Array]:
    """Return a site's update in the shapes of `sent`; values that the site did not train are those of `sent`.

    Args:
        part: the update, in the shapes of `cut_to_rank`.
        sent: the adapter that the site received.
        rank: the site's rank; None: the update is complete.
    """
    if rank is None:
        return part
    whole = {name: value.copy() for name, value in sent.items()}
    for name, trained in cut_to_rank(whole, rank).items():
        trained[...] = part[name]
    return whole


def count_trained_values(tensors: Mapping[str, Array], ranks: Mapping[str, int | None]) -> dict[str, int]:
    """Count the values that each site trains: site -> number of values.

    Args:
        tensors: the shared adapter.
        ranks: site -> its rank; None: the whole adapter.
    """
    return {site: sum(value.size for value in cut_to_rank(tensors, rank).values()) for site, rank in ranks.items()}


def project_average(products: Sequence[tuple[float, Array, Array]], sent: Array) -> tuple[Array, Array]:
    """Return the factors B and A whose product is closest to a weighted average of products B A, in the Frobenius norm.

    The columns of B are in the order of the average's singular values, largest first, so that a site of a smaller rank
    trains the most important directions.  The rows of A are orthogonal, with the root mean square norm of the rows of
    `sent`, which keeps the scale of B's gradient.

    Guarantee: post-processing of updates.

    Args:
        products: weight, B (outputs, rank) and A (rank, inputs) of each site; the weights sum to 1.
        sent: the factor A that the sites received.
    """
    left = np.concatenate([weight * b.astype(np.float64) for weight, b, _ in products], axis=1)
    right = np.concatenate([a.astype(np.float64) for _, _, a in products])
    # The average has a rank of at most the sites' ranks together, so its decomposition needs only a small matrix.
    (left, inner), (right, outer) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(inner @ outer.T)
    a = sent.astype(np.float64)
    kept = min(len(a), len(values))  # a layer may be narrower than the rank; the other rows of A stay
    size = np.sqrt(np.square(a).sum() / len(a)) or 1.0
    b = np.zeros((len(left), len(a)))
    b[:, :kept] = left @ u[:, :kept] * (values[:kept] / size)
    a[:kept] = size * (v[:kept] @ right.T)
    return b.astype(np.float32), a.astype(np.float32)
