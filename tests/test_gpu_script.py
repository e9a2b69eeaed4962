"""The GPU script, on the CPU with tiny models, so that it is known to work once a GPU is available."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .forked import run_forked

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "simulations" / "gpu" / "run.py"


def call(into: Path, *words: str, script: tuple[str, ...] = (str(SCRIPT),)) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *script, "--tiny", "--device", "cpu", "--into", str(into), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return run_forked(command, timeout_s=600, env=environment, cwd=ROOT)


def test_gpu_script_runs_every_step_on_the_cpu(tmp_path: Path) -> None:
    into = tmp_path / "results.json"
    process = call(into)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    (steps,) = json.loads(into.read_text()).values()
    separate = [f"alone-{dtype}" for dtype in ("float32", "bfloat16", "nf4")]
    checks = ["equal", "repeats", *separate, "alone-and-long", "moved-by-one", "several-devices"]
    assert list(steps) == [*checks, "speed-135m", "speed-1b", "speed-8b", "four-bit"]
    assert steps["several-devices"]["devices"] == 2
    assert steps["moved-by-one"]["exceeded"] == 0
    for step in (*separate, "alone-and-long"):
        assert set(steps[step].values()) - {steps[step]["step_seconds"]} == {0.0}, step
    assert steps["speed-8b"]["4 rows"]["private_tokens_a_second"] > 0
    four = steps["four-bit"]
    assert four["random:llama causal_lm"]["gradients"] < 0.05
    assert four["4 rows"]["private_tokens_a_second"] > 0
    assert four["model_bytes"] < steps["speed-8b"]["model_bytes"]


def test_failed_step_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    into = tmp_path / "results.json"
    # Passed instead of the script itself, because on the CPU every step succeeds.
    code = (
        "import sys; sys.path.insert(0, 'simulations/gpu'); import run\n"
        "def fails(machine): raise RuntimeError('no kernel')\n"
        "run.STEPS['equal'] = fails\n"
        "run.main()\n"
    )
    process = call(into, "--steps", "equal", "repeats", script=("-c", code))
    (steps,) = json.loads(into.read_text()).values()
    assert process.returncode == 1
    assert steps["equal"]["error"] == "RuntimeError: no kernel"
    assert steps["repeats"]["random:bert classification"] is True
