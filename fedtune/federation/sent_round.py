"""The tensors of a round on their way to the sites.

An algorithm may send arrays of its own with the adapter.  They travel as further tensors of the same record, so that
one digest in the signed request covers both.
"""

from __future__ import annotations

from fedtune.model.adapter import Adapter
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm

_PREFIX = "algorithm/"  # no tensor of an adapter begins with it


def pack_adapter(adapter: Adapter, arrays: Arrays) -> Adapter:
    """Return the adapter together with the algorithm's arrays; the adapter itself if there are none."""
    own = {f"{_PREFIX}{name}": value for name, value in arrays.items()}
    return Adapter({**adapter.tensors, **own}) if own else adapter


def unpack_adapter(sent: Adapter) -> tuple[Adapter, Arrays]:
    """Return the adapter and the algorithm's arrays; the inverse of `pack_adapter`."""
    own = {name.removeprefix(_PREFIX): value for name, value in sent.tensors.items() if name.startswith(_PREFIX)}
    if not own:
        return sent, own
    return Adapter({name: value for name, value in sent.tensors.items() if not name.startswith(_PREFIX)}), own


def pack_initial(adapter: Adapter, algorithm: LocalAlgorithm) -> Adapter:
    """Return what round 1 of a run sends, whose names and shapes every round has."""
    return pack_adapter(adapter, algorithm.sent_arrays(algorithm.initial_arrays(adapter.tensors)))
