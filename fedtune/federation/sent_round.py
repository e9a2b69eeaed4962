"""Packing of a round's tensors for the sites: the adapter and the arrays of the federated algorithm.

The algorithm's arrays are additional tensors in the record of the adapter, so that one digest in the signed request
covers both.
"""

from __future__ import annotations

from fedtune.model.adapter import Adapter
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm

_PREFIX = "algorithm/"  # no tensor of an adapter begins with it


def pack_adapter(adapter: Adapter, arrays: Arrays) -> Adapter:
    """Pack the adapter and the algorithm's arrays into one adapter; without arrays, return the adapter unchanged."""
    prefixed = {f"{_PREFIX}{name}": value for name, value in arrays.items()}
    return Adapter({**adapter.tensors, **prefixed}) if prefixed else adapter


def unpack_adapter(sent: Adapter) -> tuple[Adapter, Arrays]:
    """Unpack the adapter and the algorithm's arrays; the inverse of `pack_adapter`."""
    arrays = {name.removeprefix(_PREFIX): value for name, value in sent.tensors.items() if name.startswith(_PREFIX)}
    if not arrays:
        return sent, arrays
    return Adapter({name: value for name, value in sent.tensors.items() if not name.startswith(_PREFIX)}), arrays


def pack_initial(adapter: Adapter, algorithm: LocalAlgorithm) -> Adapter:
    """Pack the initial adapter and arrays for round 1; the names and shapes are those of every round."""
    return pack_adapter(adapter, algorithm.select_sent_arrays(algorithm.initial_arrays(adapter.tensors)))
