"""Inputs of a few kilobytes that stand for gigabytes take no more memory than they are worth."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ..forked import run_forked
from .bombs import MOST_MIB

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.nightly
def test_small_inputs_that_stand_for_much_fill_no_memory() -> None:
    done = run_forked(
        [sys.executable, "-m", "tests.fuzz.bombs"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout_s=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    grown = {one["bomb"]: one["mib"] for one in map(json.loads, done.stdout.splitlines())}
    assert len(grown) >= 15
    assert {name: mib for name, mib in grown.items() if mib > MOST_MIB} == {}
