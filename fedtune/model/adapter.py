"""The adapter: the trained tensors alone, as arrays that can be hashed, sent and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.spec import FedtuneError

if TYPE_CHECKING:  # a lead's `run status` and `run stop` read adapters, and need neither torch nor PEFT
    import torch
    from torch import nn


class _Trained(Protocol):
    """A model, of which the trained tensors alone are used: `fedtune.tasks.TaskModel`."""

    def trainable(self) -> dict[str, nn.Parameter]: ...


class AdapterError(FedtuneError, ValueError):
    """An adapter is malformed, or does not fit the model it is to be loaded into."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Float32 arrays by name, in the order of their names; neither can be changed.

    Attributes:
        tensors: read-only arrays.  What is given is copied.

    Raises:
        AdapterError: for anything that is not a float32 array.
    """

    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        frozen = {}
        for name, array in sorted(self.tensors.items()):
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                kind = getattr(array, "dtype", type(array).__name__)
                raise AdapterError(f"{name} must be a float32 array, not {kind}")
            frozen[name] = np.array(array, dtype="<f4", order="C")
            frozen[name].flags.writeable = False
        object.__setattr__(self, "tensors", MappingProxyType(frozen))

    @classmethod
    def of(cls, model: _Trained) -> Adapter:
        """The model's trainable tensors as they are now."""
        return cls({name: parameter.detach().cpu().numpy() for name, parameter in model.trainable().items()})

    @property
    def num_values(self) -> int:
        """In all tensors together."""
        return sum(value.size for value in self.tensors.values())

    def load_into(self, model: _Trained) -> None:
        """Copy into the model's trainable tensors; the base stays in memory as it is.

        Raises:
            AdapterError: unless names and shapes are exactly the model's; nothing is copied then.
        """
        copy_tensors(self.tensors, model.trainable())

    def within(self, most: float) -> Adapter:
        """The same with every value brought into [-most, most]; what is not a number stays so."""
        return Adapter({name: np.clip(value, -most, most) for name, value in self.tensors.items()})

    def same_shapes(self, other: Adapter) -> bool:
        """Both have the same names and shapes."""
        return {n: value.shape for n, value in self.tensors.items()} == {n: v.shape for n, v in other.tensors.items()}

    def digest(self) -> str:
        """The SHA-256, in hexadecimal, that names this adapter in requests and receipts.

        Over each tensor in the order of the names (by code point): one line of JSON, `["name", "float32", [shape]]`
        without spaces and ASCII only, a newline, then the values as little-endian float32 in row-major order.
        It depends on nothing but names, shapes and values.
        """
        digest = hashlib.sha256()
        for name, array in self.tensors.items():
            header = json.dumps([name, "float32", list(array.shape)], separators=(",", ":"))
            digest.update(header.encode() + b"\n")
            digest.update(array.tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """In safetensors form."""
        return save(dict(self.tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> Adapter:
        """Read what `to_bytes` wrote.

        Raises:
            AdapterError: for anything else.
        """
        try:
            return cls(load(data))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise AdapterError(f"not an encoded adapter: {error}") from error


def copy_tensors(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy arrays into the parameters of the same names.

    Raises:
        AdapterError: unless names and shapes agree exactly; nothing is copied then.
    """
    for name in sorted(set(parameters) ^ set(tensors)):
        raise AdapterError(f"the adapter {'lacks' if name in parameters else 'has no place for'} the tensor {name}")
    for name, parameter in parameters.items():
        if tensors[name].shape != tuple(parameter.shape):
            raise AdapterError(f"{name} has shape {tensors[name].shape}, not the model's {tuple(parameter.shape)}")
    import torch

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(tensors[name]))
