"""Mutations of valid inputs: bytes with edits, and JSON and TOML with changed values."""

import copy
import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

_DEEP, _DIGITS = "@deep@", "@digits@"
_RAW = {f'"{_DEEP}"': "[" * 50_000, f'"{_DIGITS}"': "9" * 5_000}
"""Values that no JSON writer produces: extremely deep nesting, and an integer of thousands of digits."""
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1 << 31, 1 << 53, 1 << 63, 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, math.inf, math.nan),
    *("", " ", "\x00", "\ud800", "\u202e", "a" * 5_000, "1e400", "nan", "../../../etc/passwd", "/dev/zero", "%s{}"),
    *([], {}, [[]], [None], ["x", "x"], {"": 0}, {"x": {"x": 1}}, [0] * 300, _DEEP, _DIGITS),
)
ODD_TOML = (
    *("true", "-1", "0", "9223372036854775808", "1e308", "inf", "nan", '""', '"\\u0000"', '"a b"', "[]", "[[]]", "{}"),
    *("{x = 1}", "1979-05-27", "00:00:00", '["x", 1]', "'''x'''", "9" * 5_000, "[" * 50_000, '"' + "a" * 5_000 + '"'),
    *('"../../x"', "[1, [2, [3]]]", "= =", "\\", '"\\ud800"'),
)


@st.composite
def mutate_json(draw: st.DrawFn, valid: Any) -> bytes:
    """Mutate JSON: one to three places are changed, removed, added or exchanged."""
    holder = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_list_places(holder))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(("odd", "odd", "odd", "remove", "add", "other"))):
            case "odd":
                container[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
            case "remove" if container is not holder:
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(("x", "", "__class__", "self", "version")))] = draw(_draw_small_value())
            case _:
                other, name = places[draw(st.integers(0, len(places) - 1))]
                container[key] = copy.deepcopy(other[name]) if other is not holder else draw(_draw_small_value())
    text = json.dumps(holder[0])
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    return text.encode()


@st.composite
def mutate_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Mutate bytes with one to four edits."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from((64, 1 << 30)))) - 1)))
        match draw(st.sampled_from(("flip", "cut", "insert", "number", "remove", "repeat"))):
            case "flip" if data:
                data[offset] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[offset:]
            case "insert":
                data[offset:offset] = draw(st.binary(min_size=1, max_size=16))
            case "number":  # a length or a count, in the sizes and byte orders of the formats
                form = draw(st.sampled_from(("<I", "<Q", ">I", ">H")))
                max_value = (1 << 8 * struct.calcsize(form)) - 1
                number = draw(st.sampled_from((0, 1, max_value, max_value >> 1, 1 << 14, max_value - 7)))
                data[offset : offset + struct.calcsize(form)] = struct.pack(form, number)
            case "remove":
                del data[offset : offset + draw(st.integers(1, 64))]
            case _:
                data[offset:offset] = data[offset : offset + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def mutate_toml(draw: st.DrawFn, valid: str) -> bytes:
    """Mutate TOML: one to three lines are changed, removed or repeated."""
    lines = valid.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        offset = draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[offset].partition(" = ")
        match draw(st.sampled_from(("odd", "odd", "odd", "remove", "repeat", "key", "bytes"))):
            case "odd" if equals:
                lines[offset] = f"{key} = {draw(st.sampled_from(ODD_TOML))}"
            case "remove" if len(lines) > 1:
                del lines[offset]
            case "repeat":
                lines.insert(offset, lines[offset])
            case "key":
                lines.insert(offset, f"{draw(st.sampled_from(('x', 'a.b', 'site', '[x]', '[[x]]')))} = 1")
            case _:
                return draw(mutate_bytes("\n".join(lines).encode()))
    return "\n".join(lines).encode()


def _list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """List every (container, key) inside `value`, outermost first."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
    for key in keys:
        if isinstance(value[key], dict | list):
            yield from _list_places(value[key])


def _draw_small_value() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def mutate_json_like(valid: Callable[[], Any]) -> Callable[[], st.SearchStrategy[bytes]]:
    """Yield mutations of JSON, which is built on first use."""
    return lambda: mutate_json(valid()) | mutate_bytes(json.dumps(valid()).encode()) | st.binary(max_size=64)


def mutate_bytes_like(valid: Callable[[], bytes]) -> Callable[[], st.SearchStrategy[bytes]]:
    """Yield mutations of bytes, which are built on first use."""
    return lambda: mutate_bytes(valid()) | st.binary(max_size=64)


def mutate_toml_like(valid: Callable[[], str]) -> Callable[[], st.SearchStrategy[bytes]]:
    """Yield mutations of TOML, which is built on first use."""
    return lambda: mutate_toml(valid()) | st.binary(max_size=64)
