"""The one reader of records: what the types of a class allow, to the letter, and else one error that names the key."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import pytest

from fedtune.codec import decode, parse_json
from fedtune.spec import ConfigError

from .cli import snapshots


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Part:
    size: float = 1.0


@dataclass(frozen=True)
class Whole:
    color: Color
    pairs: tuple[tuple[int, str], ...]
    path: frozenset[tuple[int, str]]
    counts: dict[str, int]
    cap: float | None
    part: Part = Part(2.0)
    layers: tuple[int, ...] | Literal["all"] = "all"


JSON = {"color": "red", "pairs": [[1, "a"]], "path": [[2, "b"]], "counts": {"r": 3}, "cap": 4}


def test_record_is_decoded_according_to_its_types() -> None:
    whole = decode(Whole, JSON)
    assert whole == Whole(Color.RED, ((1, "a"),), frozenset({(2, "b")}), {"r": 3}, 4.0)
    assert type(whole.cap) is float
    assert [decode(Whole, JSON | {"layers": given}).layers for given in ([1], "all")] == [(1,), "all"]
    assert decode(Whole, JSON | {"part": {}}).part == Part(2.0), "a table leaves out what its default has"


@snapshots.parametrize_mistakes("mistakes-records")
def test_invalid_record_error_names_the_key(typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(Whole, JSON | json.loads(typed.replace('"HUGE"', f"1{'0' * 400}")))
    snapshots.check_message("mistakes-records", typed, str(error.value))


DEEP = b'{"a":' * 64 + b"{}" + b"}" * 64


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"a": ' + b"1" * 5000 + b"}", DEEP])
def test_invalid_json_is_not_quoted_in_the_error(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^file = 'something else': must be JSON$"):
        parse_json(data, key="file", bound="must be JSON")
    assert parse_json(DEEP[5:-1], key="file", bound="must be JSON"), "of 64 levels"
