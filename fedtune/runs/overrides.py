"""Application of overrides to settings in plain data, by the same rules for every source of overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FREE_MAPS = (
    *("data.columns", "data.partition.sites", "public.columns", "task_settings"),
    "federation.algorithm_settings",
)
"""Mappings with user-defined keys, which a new value replaces as a whole."""


def merge_settings(old: Any, new: Any, key: str = "") -> Any:
    """Merge a new value into a setting.  Groups of settings are merged key by key."""
    if not (isinstance(old, dict) and isinstance(new, dict)) or key in FREE_MAPS:
        return new
    return old | {
        name: merge_settings(old.get(name), value, f"{key}.{name}".lstrip(".")) for name, value in new.items()
    }


def set_by_key(settings: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key in place; return False if the setting does not exist."""
    if free := next((name for name in FREE_MAPS if key.startswith(f"{name}.")), None):
        before, entry = _get_by_key(settings, free), {key.removeprefix(f"{free}."): value}
        key, value = free, before | entry if isinstance(before, dict) else entry
    outer, _, name = key.rpartition(".")
    group = _get_by_key(settings, outer)
    if not isinstance(group, dict) or name not in group:
        return False
    group[name] = merge_settings(group[name], value, key) if isinstance(value, dict) else value
    return True


def _get_by_key(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for name in filter(None, key.split(".")):
        value = value.get(name) if isinstance(value, dict) else None
    return value
