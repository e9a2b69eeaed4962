"""What a person sees while a run goes on."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState
from fedtune.model.adapter import Adapter
from fedtune.privacy.accountant import epsilon_pld, epsilon_text
from fedtune.runs.results import DATA_CHANGED, DIVERGED, GUESS, WORSE, FinalResult, PrivacyResult, RunResult, SiteCharge
from fedtune.show.run_progress import Display, show_result

from ..builders import run_result
from ..cli.widths import COLUMNS, too_wide
from ..federation.conftest import receipt_of, round_of


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> RunConfig:
    return compose_run(tiny("federation.num_rounds=10", into=tmp_path))


def state(round: int, **changes: Any) -> LeadState:
    sites = ("site-1", "site-2")
    known = {"seconds": 2.0, "sites": sites, "bytes_up": 1, "metrics": {"loss": 1.23456, "macro_f1": 0.5}}
    result = round_of(round, **known | changes)
    receipts = {site: receipt_of(site, charged=round) for site in sites}
    return LeadState(round=round, adapter=Adapter({}), receipts=receipts, rounds=[result], seconds=30.0 * round)


class Nobody:
    """Stands in for the lead's model: what is shown of it is its adapter's size and device."""

    initial_adapter = Adapter({})
    device = "cpu"
    keeps_states = True


def shown(
    config: RunConfig,
    *states: LeadState,
    terminal: bool = False,
    progress: bool = True,
    start: Any = None,
    before: LeadState | None = None,
    shared: Any = None,
    width: int = 200,
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal)
    with Display(console, config, shown=progress) as display:
        proposal = config.proposal(lead="ab" * 32, plan=config.plan())
        first = before or LeadState(round=0, adapter=Adapter({}), start_adapter=start)
        display.prepared(shared or Nobody(), proposal, first)  # type: ignore[arg-type]
        for state in states:
            display.site_replied(1)
            display.site_replied(2)
            display.round_finished(state)
    return out.getvalue()


def test_a_round_is_one_line(config: RunConfig) -> None:
    line = shown(config, state(3)).splitlines()[-1]
    assert line.startswith("round  3/10 | 2/2 sites | validation: loss 1.235, macro-f1 0.500 | epsilon 0.5")
    assert line.endswith("| 2.0 s | about 3 min 30 s left")


def test_on_a_narrow_terminal_it_is_two(config: RunConfig) -> None:
    out = io.StringIO()
    failing = state(1, failed_sites={"site-2": "plan_exhausted"})
    text = shown(config, state(3), failing, width=COLUMNS)
    show_result(Console(file=out, width=COLUMNS), config, result(), whole_s=99.0)
    assert too_wide(text + out.getvalue()) == []
    assert "round  3/10 | 2/2 sites | validation: loss 1.235, macro-f1 0.500 | epsilon 0." in text
    assert "\n  2.0 s | about 3 min 30 s left\n" in text
    assert "site-2: plan_exhausted\n" in text


def test_the_last_round_has_no_time_left(config: RunConfig) -> None:
    assert "left" not in shown(config, state(10)).splitlines()[-1]


def test_failed_sites_and_scores_that_diverged(config: RunConfig) -> None:
    line = shown(
        config, state(1, sites=("site-1",), failed_sites={"site-2": "plan_exhausted"}, metrics={"loss": float("nan")})
    ).splitlines()[-1]
    assert "1/2 sites" in line
    assert line.endswith("site-2: plan_exhausted")
    assert "loss nan" in line


def test_settings_come_first(config: RunConfig) -> None:
    out = shown(config)
    assert "banking77, declared sizes: site-1 90, site-2 90" in out
    assert "10 rounds x 2 steps, sampling rate 0.2" in out
    plan = config.plan()
    epsilon = epsilon_text(epsilon_pld([plan.whole], plan.delta))
    assert float(epsilon) < 4, "its own, and not the target's 8"
    assert f"epsilon at most {epsilon} at delta 1e-05 for each record: clip 1, noise multiplier 4" in out


@pytest.mark.parametrize(
    ("dtype", "has", "told"),
    [("mixed", False, "bfloat16"), ("mixed", True, ""), ("int8", False, "int8"), ("int8", True, "")],
)
def test_a_format_that_makes_a_run_slower_is_told_before_it_trains(
    config: RunConfig, dtype: Any, has: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for instructions in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, instructions, lambda: has)
    monkeypatch.setattr("fedtune.model.products._HAS_ONEDNN", True)
    out = shown(replace(config, model=replace(config.model, dtype=dtype)))
    assert (f"model.dtype={dtype} makes this run slower: this CPU has no instructions for {told}," in out) is bool(told)
    assert ("makes this run slower" in out) is bool(told)


@pytest.mark.parametrize(("dtype", "slower"), [("int8", True), ("bfloat16", False)])
def test_a_format_that_is_made_for_cpus_is_told_on_a_gpu(config: RunConfig, dtype: Any, slower: bool) -> None:
    there = Nobody()
    there.device = "cuda"
    out = shown(replace(config, model=replace(config.model, dtype=dtype)), shared=there)
    assert ("model.dtype=int8 makes this run slower: it is made for CPUs" in out) is slower


def test_no_privacy_is_said(tiny: Any, tmp_path: Path) -> None:
    assert "none (privacy=none)" in shown(compose_run(tiny("privacy=none", into=tmp_path)))


def prepared(config: RunConfig, *, terminal: bool = False, progress: bool = True, every_s: float) -> str:
    """What is shown of what takes long."""
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal)
    with Display(console, config, shown=progress, every_s=every_s) as display:
        display.preparing("loading the model", 0, 0)
        for done in range(4):
            display.preparing("trying the model", done, 3)
        state = LeadState(round=0, adapter=Adapter({}))
        display.prepared(Nobody(), config.proposal(lead="ab" * 32, plan=config.plan()), state)  # type: ignore[arg-type]
        for done in (1, 2):
            display.preparing("site-1: running the frozen layers over its records", done, 2)
    return out.getvalue()


def test_what_takes_long_before_training_is_told_of(config: RunConfig) -> None:
    lines = [
        line for line in prepared(config, every_s=0.0).splitlines() if re.match("  (loading|trying|site-1:)", line)
    ]
    assert lines[:2] == ["  loading the model ...", "  trying the model ..."]
    assert [re.sub("about .* left", "LEFT", line) for line in lines[2:]] == [
        "  trying the model: 1 of 3, LEFT",
        "  trying the model: 2 of 3, LEFT",
        "  trying the model: 3 of 3",
        "  site-1: running the frozen layers over its records: 1 of 2",
        "  site-1: running the frozen layers over its records: 2 of 2",
    ]


def test_what_is_soon_done_is_told_of_once_and_only_before_training(config: RunConfig) -> None:
    lines = [
        line for line in prepared(config, every_s=1e9).splitlines() if re.match("  (loading|trying|site-1:)", line)
    ]
    assert lines == ["  loading the model ...", "  trying the model ..."]


def test_a_terminal_has_a_bar_for_it_and_quiet_nothing(config: RunConfig) -> None:
    assert "trying the model: 2 of 3" in prepared(config, terminal=True, every_s=1e9)
    for terminal in (False, True):
        assert "model" not in prepared(config, terminal=terminal, progress=False, every_s=0.0)


def test_quiet_is_quiet(config: RunConfig) -> None:
    assert shown(config, state(1), progress=False) == ""


def test_the_bar_counts_sites_and_rounds(config: RunConfig) -> None:
    out = shown(config, state(1), terminal=True)
    assert "round 1/10, site 2/2" in out or "round 2/10, site 1/2" in out


def result(**changes: Any) -> RunResult:
    plan = {"rounds": 2, "sampling_rate": 0.2, "noise_multiplier": 4.0, "metrics_noise_multiplier": 0.0}
    site = SiteCharge(epsilon=1.00001, epsilon_rdp=1.2, steps=4, upper_bound=False, **plan)
    sites = {"site-1": site, "site-2": replace(site, upper_bound=True)}
    privacy = PrivacyResult(delta=1e-5, epsilon=1.00001, seeded_noise=False, sites=sites)
    final = FinalResult(
        metrics={"accuracy": 0.5}, metrics_before={"accuracy": 0.1}, seconds=61.0, peak_memory_bytes=2**30
    )
    return run_result(rounds=(), final=final, privacy=replace(privacy, **changes))


def table(config: RunConfig, result: RunResult) -> str:
    out = io.StringIO()
    show_result(Console(file=out, width=250), config, result, whole_s=99.0)
    return out.getvalue()


def test_a_shown_epsilon_is_never_below_the_true_one(config: RunConfig) -> None:
    out = table(config, result())
    assert "epsilon 1.001 at delta 1e-05 for each record" in out
    assert "1.000" not in out
    assert "4 at most" in out, "a silent site's steps are a bound"
    assert "test: accuracy 0.500 (before: accuracy 0.100)" in out
    assert "rounds and scores 1 min 1 s, with loading 1 min 39 s, peak memory 1.0 GiB" in out
    assert "It is a check: the figure that counts is epsilon, and nothing is spent in addition." in out


def test_no_guarantee_is_said(config: RunConfig) -> None:
    assert "No privacy guarantee" in table(config, result(epsilon=None))
    assert "the figure that counts" not in table(config, result(epsilon=None))
    assert "A study without a guarantee" in table(config, result(seeded_noise=True))


def test_time_left_uses_the_run_so_far(config: RunConfig) -> None:
    slow = replace(state(5), seconds=500.0)
    assert "about 8 min 20 s left" in shown(config, slow)


def test_scores_that_were_paid_for_are_shown(config: RunConfig) -> None:
    rounds = [round_of(n, site_scores={"site-1": (n / 8, 1.0)}) for n in (1, 2)]
    out = table(config, replace(result(), rounds=tuple(rounds)))
    assert "noised scores of held-out records, for the adapter that round 2 began with: site-1 0.250" in out
    assert "noised scores" not in table(config, result())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (DATA_CHANGED, "A training file changed between two starts of this run."),
        (DIVERGED, "Training diverged: do not use this adapter."),
        (WORSE, "The model is worse than before training."),
        (GUESS, "no better than always giving one and the same answer"),
    ],
)
def test_what_the_scores_say_against_the_training_is_said_at_the_end(config: RunConfig, code: str, said: str) -> None:
    found = replace(result(), final=replace(result().final, findings=(code,)))
    lines = " ".join(table(config, found).split())
    assert said in lines
    assert ("training.learning_rate=0.0033" in lines) == (code in (DIVERGED, WORSE))
    assert said not in " ".join(table(config, result()).split())


@pytest.mark.parametrize(
    ("epsilon", "said"),
    [
        (3.0, "its training on letters spent epsilon 3.000 at delta 1e-05 for each record"),
        (None, "its training on letters promises nothing about its records"),
        ("unknown", "what its training spent is unknown: no run.json lies beside it"),
        ("public", "it was trained without privacy on records that are declared to be public"),
    ],
)
def test_what_a_run_begins_in_is_said_before_it_begins(config: RunConfig, epsilon: Any, said: str) -> None:
    about = {"digest": "ab" * 32, "head": False, "from": "first", "dataset": "letters", "unit": "record"}
    of_it = {"epsilon": None, "public": True} if epsilon == "public" else {"epsilon": epsilon}
    out = shown(config, start={**about, "delta": 1e-5, **of_it})
    begins = f"begins in the adapter abababababab of first; {said}; its head has other labels: the head starts anew"
    assert begins in out
    assert "begins in" not in shown(config)


def test_a_resume_with_other_records_is_told(config: RunConfig) -> None:
    out = shown(config, before=LeadState(round=1, adapter=Adapter({}), data_changed=("site-2",)))
    assert "The records of site-2 are others than when the run began: its epsilon holds for both" in out


def test_noise_that_drowns_the_records_is_told_before_the_run(config: RunConfig) -> None:
    class Model:
        initial_adapter = Adapter({"a": np.zeros((1000, 100), np.float32)})
        device = "cpu"
        keeps_states = False
        states_mib = 1234.5

    out = " ".join(shown(config, shared=Model()).split())
    assert "nothing is likely to be learnt; a run wants training.go_on_without_signal=true" in out
    assert "which takes 1,235 MiB: training takes several times as long" in out
    Model.initial_adapter = Adapter({"a": np.zeros((10, 10), np.float32)})
    Model.keeps_states = True
    out = " ".join(shown(config, shared=Model()).split())
    assert "records can move the adapter at most" in out
    assert "kept_states_mib" not in out
