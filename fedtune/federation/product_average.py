"""Average of the updates' products B A, for sites that train both factors at different ranks."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.federation.update_store import UpdateStore
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import LORA_A, LORA_B, project_average


def average_products(arrived: UpdateStore, average: Adapter, weights: Mapping[str, float]) -> Adapter:
    """Replace the LoRA factors of `average` by those of the average product of each layer, at the adapter's rank.

    Guarantee: post-processing of updates.

    Args:
        arrived: the complete updates of a round.
        average: their element-wise average; its other tensors, such as the head's, are kept.
        weights: site -> its weight, in a fixed order for reproducible sums.
    """
    total, tensors = sum(weights.values()), dict(average.tensors)
    for name in average.tensors:
        if LORA_A not in name:
            continue
        other = name.replace(LORA_A, LORA_B)
        products = [
            (weight / total, arrived.read_tensor(site, other), arrived.read_tensor(site, name))
            for site, weight in weights.items()
        ]
        tensors[other], tensors[name] = project_average(products, arrived.sent.tensors[name])
    return Adapter(tensors)
