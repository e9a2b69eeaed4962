"""The decorator, the validators and the exceptions that every layer shares."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import pydantic
import pytest

from fedtune.spec import (
    NOT_GIVEN,
    ConfigError,
    DataError,
    LibraryPanic,
    check_at_least,
    check_fraction,
    check_one_of,
    check_positive,
    spec,
    translate_panics,
)


@spec
class Knob:
    turns: int = 1

    def __post_init__(self) -> None:
        check_at_least("turns", self.turns, 1)


@spec
class Lamp(Knob):
    color: Literal["red", "green"] = "red"
    level: Literal[1, 2] | None = None


def test_literal_field_accepts_only_its_declared_values() -> None:
    assert Lamp(color="green", level=2) == pydantic.TypeAdapter(Lamp).validate_python({"color": "green", "level": 2})
    with pytest.raises(ConfigError, match=r"^color = 'blue': must be one of red, green$"):
        Lamp(color="blue")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^level = 3: must be one of 1, 2, None$"):
        dataclasses.replace(Lamp(), level=3)
    with pytest.raises(ConfigError, match=r"^turns = 0"):
        Lamp(turns=0)


def test_specs_are_frozen_and_keyword_only() -> None:
    knob = Knob(turns=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        knob.turns = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Knob(2)  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        knob.other = 3  # type: ignore[attr-defined]
    adapter = pydantic.TypeAdapter(Knob)
    assert knob == Knob(turns=2) == adapter.validate_python({"turns": 2})
    with pytest.raises(pydantic.ValidationError, match="Unexpected keyword argument"):
        adapter.validate_python({"turns": 3, "torns": 3})
    with pytest.raises(pydantic.ValidationError, match="turns = 0"):
        adapter.validate_python({"turns": 0})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "k = null: must be given"),
        (True, "k = true: must be given"),
        ([None, False, "a"], "k = [null, false, 'a']: must be given"),
        ({"a": (1, None)}, "k = {'a': [1, null]}: must be given"),
        (NOT_GIVEN, "k: must be given"),
    ],
)
def test_values_in_errors_use_setting_syntax_and_are_shortened(value: object, said: str) -> None:
    assert str(ConfigError("k", value, "must be given").under("")) == said
    error = DataError("train_file", "x", "must exist").under("data").under("")
    assert type(error) is DataError
    assert str(error) == "data.train_file = 'x': must exist"
    message = str(ConfigError("labels", "x" * 1000, "must be short"))
    assert len(message) < 150
    assert message.endswith("…: must be short")


INFINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("check", "inside", "outside", "shown"),
    [
        (lambda v: check_positive("k", v), (1e-300, 1, 1e300), (0, -1e-9, *INFINITE), ""),
        (lambda v: check_at_least("k", v, 2), (2, 2.5), (1.999, *INFINITE), ""),
        (lambda v: check_fraction("k", v), (1e-9, 0.999), (0, 1, -0.1, 1.1, *INFINITE), "(0, 1)"),
        (lambda v: check_fraction("k", v, zero=True), (0, 0.5), (1, -1e-9, *INFINITE), "[0, 1)"),
        (lambda v: check_fraction("k", v, one=True), (1, 0.5), (0, 1.0001, *INFINITE), "(0, 1]"),
        (lambda v: check_fraction("k", v, zero=True, one=True), (0, 1), (-1e-9, 1.0001, *INFINITE), "[0, 1]"),
        (lambda v: check_one_of("k", v, ("a", "b")), ("a", "b"), ("c", None, ""), ""),
    ],
)
def test_bound_checks_accept_inside_and_refuse_outside_values(
    check: Callable[[object], None], inside: Any, outside: Any, shown: str
) -> None:
    for value in inside:
        check(value)
    for value in outside:
        with pytest.raises(ConfigError, match=r"^k = .*: must ") as caught:
            check(value)
        assert not shown or caught.value.bound == f"must be in {shown}"


def test_library_panics_become_errors_and_other_exceptions_propagate() -> None:
    panic = type("Panic", (BaseException,), {})  # as a library written in Rust raises it
    with pytest.raises(LibraryPanic, match=r"^Panic$") as found, translate_panics():
        raise panic("the text of a record")
    assert isinstance(found.value.__cause__, panic)
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, ValueError):
        with pytest.raises(error), translate_panics():
            raise error
