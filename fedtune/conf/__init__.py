"""Support for Hydra applications: the search path `pkg://fedtune.conf`, and a schema in Hydra's config store.

If a defaults list begins with `fedtune_schema`, Hydra checks the type of each setting. `fedtune.simulate` always checks
values and their combinations.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from fedtune.config import RunConfig
from fedtune.version import find_config_folder

_PLAIN = (bool, int, float, str)


class _Reader:
    """A resource reader that exposes the files of conf/ to importlib.resources."""

    def get_resource_reader(self, name: str) -> Any:
        return self

    def files(self) -> Path:
        return find_config_folder()


def schema(cls: type = RunConfig) -> type:
    """Build a dataclass with the fields of `cls` but no values, and Any for types that OmegaConf does not support."""
    hints = typing.get_type_hints(cls)
    fields = [
        (one.name, _convert_to_omegaconf_type(hints[one.name]), dataclasses.field(default=MISSING))
        for one in dataclasses.fields(cls)
    ]
    return dataclasses.make_dataclass(cls.__name__, fields)


def _convert_to_omegaconf_type(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return schema(typing.cast(type, hint))
    plain = [one for one in typing.get_args(hint) or (hint,) if one is not type(None)]
    return plain[0] | None if len(plain) == 1 and plain[0] in _PLAIN else Any


assert __spec__ is not None
__spec__.loader = _Reader()  # type: ignore[assignment]
ConfigStore.instance().store(name="fedtune_schema", node=schema(), provider="fedtune")
