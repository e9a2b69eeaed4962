"""External input is accepted, or refused with our own error message: never another exception, never a hang."""

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from fedtune.spec import RunError

from ..forked import run_forked
from . import seeds
from .bombs import MAX_MIB
from .target import Target
from .targets import TARGETS

EXAMPLES, EXAMPLES_AT_NIGHT = 30, 3_000
"""Inputs per target: the same every time by day, and different ones each night."""


def fuzz_target(target: Target, *, examples: int, always_the_same: bool) -> int:
    """Pass mutated inputs to the target's parser, and return their number; a failure names the smallest one found."""
    examples_seen: list[int] = []

    def check(data: bytes) -> None:
        examples_seen.append(len(data))
        target.check(data)

    limits = settings(
        max_examples=max(10, examples // target.cost),
        derandomize=always_the_same,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(target.broken())(check))()
    return len(examples_seen)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(EXAMPLES_AT_NIGHT, marks=pytest.mark.nightly)])
def test_fuzzed_input_is_refused_with_declared_errors(name: str, examples: int) -> None:
    assert fuzz_target(TARGETS[name], examples=examples, always_the_same=examples == EXAMPLES) >= 10


NESTED = ("receipts.json", "anchor", "retired keys", "environment.json", "asked.jsonl", "run.json", "answers.json")
FOUND = (
    ("end of run", b'{"run": "r", "lead": "\xff", "adapter_digest": ""}'),
    *(("request", b'{"receipt": null, "site": "\xff"}'), ("policy", b"site = " + b"[" * 50_000)),
    *(("policy", b"site = " + b"9" * 5_000), ("federation.toml", b"name = " + b"9" * 5_000)),
    ("kit.toml", b"version = " + b"9" * 5_000),
    *((name, b"[" * 50_000 + b"\n") for name in (*NESTED, "saved adapter's settings")),
    ("run.json", b'{"rounds": [], "final": {"metrics": {}}, "privacy": {"delta": 1e-05, "sites": {"site-1": {}}}}'),
    *(("config.yaml", b"[" * 5_000), ("config.yaml", b"x: 2024-99-99"), ("answers.json", b"[1]")),
    *(("how records were dealt out", b"[]"), ("how records were dealt out", b"{}")),
)
"""Earlier findings, which are fixed."""


@pytest.mark.parametrize(("name", "data"), FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_previous_fuzzing_findings_stay_fixed(name: str, data: bytes) -> None:
    target = TARGETS[name]
    target.check(data)
    with pytest.raises(target.errors):
        target.parse(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [(("head", "train"), [0]), (("lora", "rank"), 1 << 30), (("lora", "train_a"), "x"), (("seed",), 10**400)],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_saved_adapter_settings_must_have_the_right_types(key: tuple[str, ...], value: object) -> None:
    saved = json.loads((seeds.run_folder() / "adapter/fedtune.json").read_text())
    place = saved
    for name in key[:-1]:
        place = place[name]
    place[key[-1]] = value
    TARGETS["saved adapter's settings"].check(json.dumps(saved).encode())


def test_fuzzing_detects_an_undeclared_error() -> None:
    strict = Target("x", TARGETS["update"].broken, lambda data: data.decode(), (KeyError,))
    with pytest.raises(UnicodeDecodeError):
        fuzz_target(strict, examples=200, always_the_same=True)


@pytest.mark.nightly
def test_expanding_inputs_use_bounded_memory() -> None:
    """Inputs of a few kilobytes that would expand to gigabytes use only bounded memory."""
    process = run_forked(
        [sys.executable, "-m", "tests.fuzz.bombs"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout_s=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    grown = {line["bomb"]: line["mib"] for line in map(json.loads, process.stdout.splitlines())}
    assert len(grown) >= 15
    assert {name: mib for name, mib in grown.items() if mib > MAX_MIB} == {}


def test_ledger_with_a_non_text_schema_is_reported_as_damaged() -> None:
    data = seeds.make_ledger().replace(b"CREATE TABLE", b"CREATE \xa0ABLE")
    TARGETS["ledger"].check(data)
    with pytest.raises(RunError, match="cannot be read"):
        TARGETS["ledger"].parse(data)
