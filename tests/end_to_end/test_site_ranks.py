"""Whole runs whose sites train different ranks: results, bytes, resuming, reports and policies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedtune.flower.simulation as simulation
from fedtune.privacy.policy_file import read_policy

from ..conftest import (
    check_planned_bytes,
    fail_where,
    list_tiny_overrides,
    read_adapter_files,
    read_result,
    run_command,
    simulate,
)

SITES = ("federation.num_sites=3", "federation.num_rounds=2", "runtime.seeded_noise=true", "lora.rank=8")
RANKS = "federation.ranks=[2,4,8]"
TRAIN_A, FIX_A = "lora.train_a=true", "lora.train_a=false"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with ranks 2, 4 and 8 that trains both factors."""
    return Path(simulate(*SITES, RANKS, TRAIN_A, into=tmp_path_factory.mktemp("mixed")))


def test_ranks_by_site_change_the_adapter_and_the_bytes(mixed: Path, tmp_path: Path) -> None:
    adapters = [read_adapter_files(mixed)["adapter_model.safetensors"]]
    for name, ranks in (("equal", "[]"), ("largest", "[8]"), ("four", "[4]")):
        folder = simulate(*SITES, f"federation.ranks={ranks}", TRAIN_A, into=tmp_path, name=name)
        adapters.append(read_adapter_files(folder)["adapter_model.safetensors"])
        if name == "largest":
            check_planned_bytes(folder)
    assert len(set(adapters)) == 4
    sizes = [sum(row["bytes_up"] for row in read_result(folder)["rounds"]) for folder in (mixed, tmp_path / "largest")]
    assert sizes[0] < sizes[1]


def test_lead_averages_products_where_both_factors_train(mixed: Path) -> None:
    saved = load_file(mixed / "adapter" / "adapter_model.safetensors")
    for name in [name for name in saved if ".lora_A." in name]:
        products = saved[name] @ saved[name].T  # the lead's decomposition has orthogonal rows; trained factors do not
        assert np.abs(products - np.diag(np.diag(products))).max() < 1e-5 * products.max()


def test_equal_ranks_with_a_frozen_a_give_the_plain_average(tmp_path: Path) -> None:
    """If the average of factors is exact, ranks that all equal the shared one change nothing."""
    plain, ranked = (
        simulate(*SITES, f"federation.ranks={ranks}", FIX_A, into=tmp_path, name=name)
        for name, ranks in (("plain", "[]"), ("ranked", "[8]"))
    )
    assert read_adapter_files(plain) == read_adapter_files(ranked)


def test_interrupted_run_with_ranks_resumes_to_the_same_adapter(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = list_tiny_overrides(*SITES, RANKS, TRAIN_A, into=tmp_path)
    calls = 0

    def is_second_round(*_: Any, **__: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls > 6  # an invitation and a round at each of three sites

    with monkeypatch.context() as interrupted:
        fail_where(interrupted, simulation.InProcessGrid, "deliver", is_second_round, KeyboardInterrupt())
        assert run_command("simulate", *words).code != 0
    resumed = run_command("simulate", f"resume={tmp_path / 'run'}")
    assert resumed.code == 0, resumed.err
    assert len(read_result(tmp_path / "run")["rounds"]) == 2
    assert read_adapter_files(tmp_path / "run") == read_adapter_files(mixed)


def test_plan_and_report_show_each_sites_rank(mixed: Path) -> None:
    words = list_tiny_overrides(*SITES, RANKS, TRAIN_A, into=mixed.parent)
    planned = run_command("plan", *words)
    assert "site-1 2, site-2 4, site-3 8, of the adapter's 8" in " ".join(planned.out.split())
    sites = json.loads(run_command("plan", *words, "--json").printed)["sites"]
    assert {site: figures["rank"] for site, figures in sites.items()} == {"site-1": 2, "site-2": 4, "site-3": 8}
    facts = json.loads((mixed / "report.json").read_text())["facts"]
    assert facts["settings"]["rank"] == "8 (site-1 2, site-2 4, site-3 8)"
    assert run_command("report", "verify", str(mixed)).code == 0
    assert read_policy(mixed / "sites" / "site-1" / "site.toml").allow.max_rank == 2


def test_run_at_persistent_sites_is_lowered_to_their_policies(tmp_path: Path) -> None:
    sites = f"runtime.sites_dir={tmp_path / 'sites'}"
    simulate(
        *SITES, RANKS, TRAIN_A, sites, "federation.num_rounds=1", "privacy.planned_runs=2", into=tmp_path, name="first"
    )
    words = list_tiny_overrides(*SITES, "federation.ranks=[8]", TRAIN_A, sites, "federation.num_rounds=1",
                                "privacy.planned_runs=2", into=tmp_path, name="second")  # fmt: skip
    outcome = run_command("simulate", *words)
    assert outcome.code == 0, outcome.err
    assert "policies allow these ranks: site-1 2, site-2 4, site-3 8" in " ".join(outcome.out.split())
    facts = json.loads((tmp_path / "second" / "report.json").read_text())["facts"]
    assert facts["settings"]["rank"] == "8 (site-1 2, site-2 4, site-3 8)"
