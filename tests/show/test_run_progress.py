"""Terminal display of a run's progress and result; the text is in tests/cli/snapshots/run-progress.txt."""

import io
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli import interruptible_run
from fedtune.config import RunConfig
from fedtune.federation.lead import LeadState, SiteCharge
from fedtune.lab.studies.trials import SearchTrial
from fedtune.model.adapter import Adapter
from fedtune.privacy.accountant import epsilon_pld, format_epsilon
from fedtune.runs.results import DATA_CHANGED, DIVERGED, GUESS, WORSE, FinalResult, PrivacyResult, RunResult
from fedtune.show.budget_text import ABOUT_RDP, explain_signal
from fedtune.show.run_progress import Display, show_result
from fedtune.sites.run_cache import RunCache

from ..builders import run_result
from ..cli import snapshots
from ..conftest import list_tiny_overrides
from ..federation.conftest import make_receipt, round_of


@pytest.fixture
def config(tmp_path: Any) -> RunConfig:
    return compose_run(list_tiny_overrides("federation.num_rounds=10", into=tmp_path))


def make_state(round: int, **changes: Any) -> LeadState:
    sites = ("site-1", "site-2")
    common = {"seconds": 2.0, "sites": sites, "bytes_up": 1, "metrics": {"loss": 1.23456, "macro_f1": 0.5}}
    end_times = (f"2026-01-01T00:{n // 2:02}:{30 * (n % 2):02}+00:00" for n in range(1, round + 1))
    *earlier, last = (round_of(n, ended=end) for n, end in enumerate(end_times, 1))
    rounds = [*earlier, replace(last, **common | changes)]
    receipts = {site: make_receipt(site, charged=round) for site in sites}
    return LeadState(round=round, adapter=Adapter({}), receipts=receipts, rounds=rounds, seconds=30.0 * round)


def make_model(values: int = 0, *, device: str = "cpu", keeps_states: bool = True) -> SimpleNamespace:
    """Return a stub of the lead's model, with the attributes that the display shows."""
    adapter = Adapter({"a": np.zeros(values, np.float32)} if values else {})
    loaded = SimpleNamespace(keeps_states=keeps_states)
    return SimpleNamespace(initial_adapter=adapter, device=device, loaded=loaded, states_mib=1234.5)


def show_rounds(config: RunConfig, *states: LeadState, of: Any = None, every_s: float | None = None, **how: Any) -> str:
    """Return the output for a run's rounds and, with `every_s`, for its preparation."""
    begun = {key: how.pop(key) for key in ("round", "start_adapter", "data_changed") if key in how}
    out, progress = io.StringIO(), {"shown": how.pop("progress", True)} | ({"every_s": every_s} if every_s else {})
    display = Display(Console(file=out, **{"width": 200} | how), config, **progress)
    with display.show_progress_bar():
        if every_s:
            display.on_preparing("loading the model", 0, 0)
            for done in range(4):
                display.on_preparing("checking the model on this machine", done, 3)
        proposal = config.proposal(lead="ab" * 32, plan=config.plan())
        first: Any = {"round": 0, "adapter": Adapter({})} | begun
        display.on_prepared(of or make_model(), proposal, LeadState(**first))
        for done in (1, 2) if every_s else ():
            display.on_preparing("site-1: running the frozen layers over the records", done, 2)
        for state in states:
            display.on_site_replied(1)
            display.on_site_replied(2)
            display.on_round_finished(state)
    return re.sub("about .* left", "LEFT", out.getvalue()) if every_s else out.getvalue()


def make_result(**changes: Any) -> RunResult:
    plan = {"rounds": 2, "sampling_rate": 0.2, "noise_multiplier": 4.0, "metrics_noise_multiplier": 0.0}
    site = SiteCharge(epsilon=1.00001, epsilon_rdp=1.2, steps=4, upper_bound=False, **plan)
    sites = {"site-1": site, "site-2": replace(site, upper_bound=True)}
    privacy = PrivacyResult(delta=1e-5, epsilon=1.00001, seeded_noise=False, sites=sites)
    scores: Any = {"metrics": {"accuracy": 0.5}, "metrics_before": {"accuracy": 0.1}}
    final = FinalResult(**scores, seconds=61.0, peak_memory_bytes=2**30)
    return run_result(rounds=(), final=final, privacy=replace(privacy, **changes))


def render_table(config: RunConfig, result: RunResult, *, width: int = 250) -> str:
    out = io.StringIO()
    show_result(Console(file=out, width=width), config, result, whole_s=99.0)
    return out.getvalue()


def run_comparison(
    config: RunConfig, without_privacy: RunConfig, patched: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    slow = replace(
        make_state(5), rounds=[replace(row, seconds=100.0) for row in make_state(4).rounds] + make_state(5).rounds[4:]
    )
    three = (make_state(3), slow, make_state(10))
    yield "three rounds: one of ten, a slow one, the last one", show_rounds(config, *three)
    failing = {"sites": ("site-1",), "failed_sites": {"site-2": "plan_exhausted"}, "metrics": {"loss": float("nan")}}
    yield "a site that fails, and a score that is no number", show_rounds(config, make_state(1, **failing))
    yield "without privacy", show_rounds(without_privacy)
    patched.setattr("fedtune.model.frozen_linear._HAS_ONEDNN", True)
    for dtype in ("mixed", "bfloat16"):
        changed_config = replace(config, model=replace(config.model, dtype=dtype))
        for has in (False, True):
            for instructions in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
                patched.setattr(torch.cpu, instructions, lambda has=has: has)
            yield f"{dtype} on a CPU {'with' if has else 'without'} its instructions", show_rounds(changed_config)
        yield f"{dtype} on a GPU", show_rounds(changed_config, of=make_model(device="cuda"))
    start = {"digest": "ab" * 32, "head": False, "from": "first", "dataset": "letters", "unit": "record", "delta": 1e-5}
    for spent in ({"epsilon": 3.0}, {"epsilon": None}, {"epsilon": "unknown"}, {"epsilon": None, "public": True}):
        yield f"a start that spent {spent}", show_rounds(config, start_adapter=start | spent)
    yield "a resumed run", show_rounds(config, round=1)
    yield "noise that drowns the records", show_rounds(config, of=make_model(100_000, keeps_states=False))
    one_round = replace(config, federation=replace(config.federation, num_rounds=1))
    yield "frozen layers that run once for each record", show_rounds(one_round, of=make_model(keeps_states=False))
    yield "noise that does not", show_rounds(config, of=make_model(100))
    yield "what takes long", show_rounds(config, every_s=1e-9)
    yield "what is soon done", show_rounds(config, every_s=1e9)


def list_results() -> Iterator[tuple[str, RunResult]]:
    yield "no guarantee", make_result(epsilon=None)
    yield "seeded noise", make_result(seeded_noise=True)
    rounds = tuple(round_of(n, site_scores={"site-1": (n / 8, 1.0)}) for n in (1, 2))
    yield "noised scores", replace(make_result(), rounds=rounds)
    yield "a constant answer", replace(make_result(), final=replace(make_result().final, constant=0.552))
    for code in (DATA_CHANGED, DIVERGED, WORSE, GUESS):
        yield f"finding {code}", replace(make_result(), final=replace(make_result().final, findings=(code,)))


def compare_lines(ref: str, text: str) -> str:
    """Return the missing and the additional lines of a text."""
    old, new = ref.splitlines(), text.splitlines()
    removed, more = ([line for line in one if line not in other] for one, other in ((old, new), (new, old)))
    return "".join([*(f"- {line}\n" for line in removed), *(f"+ {line}\n" for line in more)])


def test_run_progress_matches_its_snapshot(config: RunConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, end = show_rounds(config), render_table(config, make_result())
    without_privacy = compose_run(list_tiny_overrides("federation.num_rounds=10", "privacy=none", into=tmp_path))
    of_runs = run_comparison(config, without_privacy, monkeypatch)
    told = [f"# A run\n{run}", *(f"# {name}\n{compare_lines(run, text)}" for name, text in of_runs)]
    of_results = [f"# {name}\n{compare_lines(end, render_table(config, other))}" for name, other in list_results()]
    snapshots.check_output("run-progress", "".join([*told, f"# Its end\n{end}", *of_results]))


def test_signal_strength_is_explained_by_studies_of_the_task() -> None:
    assert "in a study, runs at 17 kept three quarters of the gain of training without privacy" in explain_signal(
        22.0, "classification"
    )
    assert "in a study, runs at 5 kept three eighths of the gain of training without privacy" in explain_signal(
        5.2, "token_classification"
    )
    assert "there is no study of how much task survival learns" in explain_signal(5.2, "survival")


def test_sweep_progress_shows_the_newest_line_of_a_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def print_progress(config: RunConfig, folder: Path, console: Console, *, cache: RunCache) -> RunResult:
        for line in ("round 1/2 | validation: loss 4.3", "round 2/2 | about 3 s left"):
            console.print(line)
            time.sleep(0.2)  # the terminal is drawn ten times a second
        return make_result()

    monkeypatch.setattr(interruptible_run, "run_simulation", print_progress)
    console, trial = (
        Console(file=io.StringIO(), force_terminal=True, width=60),
        SearchTrial(config=config, folder=Path()),
    )
    interruptible_run.run_with_summary(trial, console=console, name="2 of 3", cache=RunCache())
    for line in ("round 1/2 | validation: loss 4.3", "round 2/2 | about 3 s left"):
        assert f"2 of 3: {line}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_verbose_output_explains_rdp_epsilon(config: RunConfig) -> None:
    verbose = replace(config, tracking=replace(config.tracking, log_level="debug"))
    assert [ABOUT_RDP.format(counts="epsilon") in render_table(item, make_result()) for item in (config, verbose)] == [
        False,
        True,
    ]


def test_displayed_epsilon_is_the_planned_epsilon_rounded_up(config: RunConfig) -> None:
    plan = config.plan()
    epsilon = format_epsilon(epsilon_pld([plan.full_event], plan.delta))
    assert float(epsilon) < 4, "and not the target's 8"
    assert f"epsilon at most {epsilon} at delta 1e-05 for each record" in show_rounds(config)
    assert "epsilon 1.001 at delta 1e-05 for each record" in render_table(config, make_result())


def test_display_wraps_a_round_on_a_narrow_terminal(config: RunConfig) -> None:
    failing = make_state(1, failed_sites={"site-2": "plan_exhausted"})
    text = show_rounds(config, make_state(3), failing, width=snapshots.COLUMNS)
    assert snapshots.find_wide_lines(text + render_table(config, make_result(), width=snapshots.COLUMNS)) == []
    assert "\n  2.0 s | about 3 min 30 s left\n" in text
    assert "site-2: plan_exhausted\n" in text


def test_display_shows_a_progress_bar_unless_quiet(config: RunConfig) -> None:
    assert "checking the model on this machine: 2 of 3" in show_rounds(config, force_terminal=True, every_s=1e9)
    out = show_rounds(config, make_state(1), force_terminal=True)
    assert "round 1/10, site 2/2" in out or "round 2/10, site 1/2" in out
    for terminal in (False, True):
        assert "model" not in show_rounds(config, force_terminal=terminal, progress=False, every_s=1e-9)
    assert show_rounds(config, make_state(1), progress=False) == ""
