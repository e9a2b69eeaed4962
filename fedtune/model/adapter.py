"""Adapters: the trained tensors of a model as arrays that can be hashed, sent and loaded."""

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

from fedtune.privacy.release import MAX_HEADER_BYTES
from fedtune.spec import FedtuneError

if TYPE_CHECKING:  # a lead's `run status` and `run stop` read adapters, and need neither torch nor PEFT
    import torch
    from torch import nn


class _Trained(Protocol):
    """Protocol of a model with trainable tensors, such as `fedtune.tasks.task_model.TaskModel`."""

    def trainable(self) -> dict[str, nn.Parameter]: ...


class AdapterError(FedtuneError, ValueError):
    """Error for an adapter that is malformed, or does not match the model that loads it."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An immutable set of float32 arrays by name, sorted by name.

    Attributes:
        tensors: read-only copies of the given arrays.

    Raises:
        AdapterError: a value is not a float32 array.
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
    def from_task_model(cls, model: _Trained) -> Adapter:
        """Copy the model's current trainable tensors."""
        return cls({name: parameter.detach().cpu().numpy() for name, parameter in model.trainable().items()})

    @property
    def num_values(self) -> int:
        """Total number of values in all tensors."""
        return sum(value.size for value in self.tensors.values())

    def load_into(self, model: _Trained) -> None:
        """Copy the tensors into the model's trainable parameters, without changing the frozen base.

        Raises:
            AdapterError: the names or shapes differ from the model's, and nothing was copied.
        """
        copy_tensors(self.tensors, model.trainable())

    def clip_values(self, most: float) -> Adapter:
        """Return a copy with every value clipped to [-most, most]; NaN stays NaN."""
        return Adapter({name: np.clip(value, -most, most) for name, value in self.tensors.items()})

    @property
    def shapes(self) -> Mapping[str, list[int]]:
        """Shape of each tensor by name, as lists like those in JSON."""
        return {name: [*value.shape] for name, value in self.tensors.items()}

    def has_same_shapes(self, other: Adapter) -> bool:
        """Return True if both adapters have the same names and shapes."""
        return self.shapes == other.shapes

    def digest(self) -> str:
        """Return the SHA-256 of the adapter in hexadecimal, its identifier in requests and receipts.

        The tensors are hashed in the order of their names (by code point): for each, one line of JSON, `["name",
        "float32", [shape]]` without spaces and ASCII only, a newline, then the values as little-endian float32 in
        row-major order.  The digest depends only on names, shapes and values.
        """
        digest = hashlib.sha256()
        for name, array in self.tensors.items():
            header = json.dumps([name, "float32", list(array.shape)], separators=(",", ":"))
            digest.update(header.encode() + b"\n")
            digest.update(array.tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """Serialize the adapter in safetensors format."""
        return save(dict(self.tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> Adapter:
        """Parse an adapter in safetensors format.

        Raises:
            AdapterError: the bytes are not an adapter in safetensors format, or their header is too long.
        """
        if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
            raise AdapterError(f"not an adapter in safetensors format: its header exceeds {MAX_HEADER_BYTES} bytes")
        try:
            return cls(load(data))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise AdapterError(f"not an adapter in safetensors format: {error}") from error


def copy_tensors(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy arrays into the parameters with the same names.

    Raises:
        AdapterError: the names or shapes differ, and nothing was copied.
    """
    for name in sorted(set(parameters) ^ set(tensors)):
        raise AdapterError(f"the adapter {'lacks the' if name in parameters else 'has an unexpected'} tensor {name}")
    for name, parameter in parameters.items():
        if tensors[name].shape != tuple(parameter.shape):
            raise AdapterError(f"{name} has shape {tensors[name].shape}, not the model's {tuple(parameter.shape)}")
    import torch

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(tensors[name]))
