"""What the live page says of runs in every state, from folders that are made by hand and from real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedtune.cli.compose import saved_config
from fedtune.cli.run_folder import is_running, only_one
from fedtune.federation.results import charged_epsilons
from fedtune.privacy import accountant
from fedtune.report import from_run
from fedtune.report.watch import watch_state
from fedtune.report.watch.watch_state import RunNow, WatchedFolder, to_json

from .watched import BEGAN, ROUND_S, MadeRun, contents

NORTH = ("federation.num_sites=3", "federation.num_rounds=10", "federation.site_names=[north,south,west]")


def watched(folder: Path) -> WatchedFolder:
    return WatchedFolder(folder, saved_config(folder), is_running=is_running)


def seen(folder: Path, *, seconds: float = 0.0, running: bool = True) -> RunNow:
    """The run, so long after it began."""
    at = BEGAN + timedelta(seconds=seconds)
    if not running:
        return watched(folder).now(at=at)
    with only_one(folder):
        return watched(folder).now(at=at)


def latest(now: RunNow) -> dict[str, tuple[str, int | None]]:
    return {site.site: (site.latest.what, site.latest.round) for site in now.sites}


def test_a_run_that_is_being_prepared(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run")
    now = seen(run.folder)
    assert (now.phase, now.rounds_done, now.rounds_planned, now.epsilon, now.left) == ("preparing", 0, 2, 0.0, None)
    assert set(latest(now).values()) == {("nothing", None)}
    assert seen(run.folder, running=False).phase == "waiting"


def test_a_round_that_is_under_way_counts_as_charged(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    assert seen(run.folder).epsilon == 0.0
    run.ask()
    now, plan = seen(run.folder), run.config.plan()
    assert (now.phase, now.under_way, now.rounds_done) == ("running", 1, 0)
    assert now.epsilon == charged_epsilons(plan, 1)[0]
    assert now.upper_bound
    assert set(latest(now).values()) == {("asked", 1)}
    run.finish_round()
    now = seen(run.folder)
    assert (now.epsilon, now.upper_bound, now.under_way) == (charged_epsilons(plan, 1)[0], False, None)
    assert set(latest(now).values()) == {("update", 1)}


def test_finished_rounds_keep_their_epsilon_while_the_next_is_under_way(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    for _ in range(2):
        run.ask().finish_round()
    before = seen(run.folder)
    run.ask()
    after = seen(run.folder)
    assert [site.steps for site in after.sites] == [site.steps for site in before.sites]
    assert after.epsilon > before.epsilon == after.sites[0].steps[-1].epsilon


def test_refused_failed_and_silent_sites(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round({"south": "min_noise_multiplier", "west": "no_reply"})
    run.ask().finish_round({"south": "max_epsilon"})
    now, plan = seen(run.folder), run.config.plan()
    assert latest(now) == {"north": ("update", 2), "south": ("max_epsilon", 2), "west": ("update", 2)}
    assert {site.site: (site.updates, site.failures, site.charged) for site in now.sites} == {
        "north": (2, 0, 2),
        "south": (0, 2, 0),
        "west": (1, 1, 1),
    }
    assert [(one.round, one.site, one.reason) for one in now.failures] == [
        (2, "south", "max_epsilon"),
        (1, "south", "min_noise_multiplier"),
        (1, "west", "no_reply"),
    ]
    assert {site.site: site.epsilon for site in now.sites}["south"] == 0.0
    assert (now.epsilon, now.upper_bound) == (charged_epsilons(plan, 2)[0], False)


def test_a_site_that_fell_silent_is_an_upper_bound(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    for _ in range(2):
        run.ask().finish_round({"west": "no_reply"})
    now = seen(run.folder)
    bounds = {site.site: (site.charged, site.upper_bound) for site in now.sites}
    assert bounds == {"north": (2, False), "south": (2, False), "west": (2, True)}
    assert not now.upper_bound, "another site has spent just as much, and signed for it"


def test_a_receipt_that_nobody_signed_counts_for_nothing(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    for _ in range(3):
        run.ask().finish_round()
    forged = replace(run.receipt("north", 3), charged_rounds=1)
    run.state = replace(run.state, receipts={**run.state.receipts, "north": forged})
    now, report = seen(run.begin().folder), from_run.build(run.folder)
    assert [(site.charged, site.upper_bound) for site in now.sites] == [(10, True), (3, False), (3, False)]
    assert [site.epsilon for site in now.sites] == [site.spent.epsilon for site in report.sites]
    assert [step.epsilon for step in now.sites[0].steps] == [step.epsilon for step in report.sites[0].steps]
    assert now.upper_bound


def test_what_real_sites_answer_within_a_round(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", "runtime.kind=deployment", *NORTH).begin()
    run.ask().answer("north", "update", seconds=10).answer("south", "update", seconds=12)
    run.finish_round({"west": "paused"}).ask()
    run.answer("south", "update", seconds=ROUND_S + 5).answer("west", "awaiting_approval", seconds=ROUND_S + 6)
    now = seen(run.folder)
    assert latest(now) == {"north": ("asked", 2), "south": ("update", 2), "west": ("awaiting_approval", 2)}
    assert not now.simulated
    assert (run.folder / "answers.json").exists(), "the name under which the lead's process notes them"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"north": 3}', '{"north": {"what": "update"}}', "\xff"])
def test_answers_that_cannot_be_read_are_left_out(tmp_path: Path, text: str) -> None:
    run = MadeRun.at(tmp_path / "run", "runtime.kind=deployment", *NORTH).begin().ask()
    (run.folder / "answers.json").write_text(text, encoding="latin-1")
    assert set(latest(seen(run.folder)).values()) == {("asked", 1)}


def test_time_left_at_the_pace_of_the_run(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    assert seen(run.folder).left is None, "no round has shown a pace"
    run.ask().finish_round()
    run.ask()

    def left(seconds: float) -> tuple[int, str]:
        found = seen(run.folder, seconds=ROUND_S + seconds).left
        return found.value, found.unit

    assert left(0) == (6, "minutes")  # nine rounds of 40 s
    assert left(39) == (6, "minutes")
    assert left(41) == left(4000) == (6, "minutes"), "eight rounds are still to come when the second one takes long"
    assert left(-100) == (6, "minutes"), "a clock that was put back"
    for _ in range(8):
        run.finish_round()
    assert seen(run.folder, seconds=9 * ROUND_S).left.unit == "seconds"
    assert seen(run.folder, seconds=9 * ROUND_S).left.value == ROUND_S
    run.finish_round()
    assert seen(run.folder).left is None
    assert seen(run.folder, running=False).left is None


@pytest.mark.parametrize(("overrides", "marks"), [
    (("privacy=none", "privacy.noise_multiplier=null"), ("no_noise",)),
    (("runtime.seeded_noise=true",), ("seeded_noise",)),
    ((), ()),
])  # fmt: skip
def test_what_is_no_promise_is_marked_from_the_start(tmp_path: Path, overrides: tuple[str, ...], marks: object) -> None:
    run = MadeRun.at(tmp_path / "run", *overrides)
    assert seen(run.folder).marks == marks
    run.begin().ask().finish_round()
    now = seen(run.folder)
    assert now.marks == marks
    assert (now.epsilon is None) == (now.target_epsilon is None) == (marks == ("no_noise",))


def test_more_than_the_target_is_marked(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", "privacy.noise_multiplier=1.2", "privacy.epsilon=3.5").begin()
    for _ in range(2):
        run.ask().finish_round()
    assert seen(run.folder).marks == ()
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("num_rounds: 2", "num_rounds: 1").replace("epsilon: 3.5", "epsilon: 2.6"))
    run = MadeRun(run.folder, saved_config(run.folder), run.state).begin()
    now = seen(run.folder)
    assert now.epsilon > now.target_epsilon
    assert now.marks == ("above_target",)


def test_a_finished_run_says_what_its_report_says(simulate: Callable[..., Path], tmp_path: Path) -> None:
    folder = simulate(into=tmp_path)
    now, report = seen(folder, running=False), from_run.build(folder)
    assert (now.phase, now.rounds_done, now.under_way, now.left) == ("finished", 2, None, None)
    assert (now.epsilon, now.target_epsilon, now.delta) == (report.epsilon, report.target_epsilon, report.delta)
    assert now.final == report.utility.final
    for site, told in zip(now.sites, report.sites, strict=True):
        assert (site.site, site.epsilon, site.charged) == (told.site, told.spent.epsilon, told.spent.rounds)
        assert [step.epsilon for step in site.steps] == [step.epsilon for step in told.steps]
    for done, told in zip(now.rounds, report.utility.rounds, strict=True):
        assert (done.seconds, done.bytes_down, done.bytes_up) == (told.seconds, told.bytes_down, told.bytes_up)
        assert done.scores == told.scores
    assert json.loads(json.dumps(to_json(now), allow_nan=False))["phase"] == "finished"


def test_a_run_that_was_interrupted_or_killed(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round().ask()
    now = seen(run.folder, running=False)
    assert (now.phase, now.rounds_done, now.under_way, now.left) == ("stopped", 1, None, None)
    assert {what for what, _ in latest(now).values()} == {"asked"}
    assert now.upper_bound, "it died in a round that may have been charged"
    while run.state.round < 10:
        run.finish_round()
    assert seen(run.folder, running=False).phase == "stopped", "all rounds are done, and no result was written"


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run").begin()
    run.finish_round(metrics={"accuracy": 0.1, "loss": float("nan")})
    assert seen(run.folder).rounds[0].scores == {"accuracy": 0.1, "loss": None}


def test_files_are_read_again_only_where_one_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = watch_state.read_run
    monkeypatch.setattr(watch_state, "read_run", lambda *args, **rest: reads.append(1) or real(*args, **rest))
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    folder = watched(run.folder)
    for _ in range(3):
        folder.now()
    assert len(reads) == 1
    run.ask()
    assert folder.now().under_way is None, "no process works on it"
    assert len(reads) == 2
    with only_one(run.folder):
        assert folder.now().under_way == 1
    run.finish_round()
    assert folder.now().rounds_done == 1


def test_a_damaged_folder_is_told_and_may_be_mended(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round()
    folder = watched(run.folder)
    assert folder.now().rounds_done == 1
    newest = run.folder / "checkpoints" / "round-0001.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:100])
    now = folder.now()
    assert now.phase == "unreadable"
    assert "is damaged" in now.problem
    assert now.rounds_done == 1, "what was last known stays"
    newest.write_bytes(whole)
    assert folder.now().problem is None


def test_a_folder_that_is_taken_away(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run")
    folder = watched(run.folder)
    run.folder.rename(tmp_path / "gone")
    assert folder.now().phase == "unreadable"
    (tmp_path / "gone").rename(run.folder)
    assert folder.now().phase == "waiting"


@pytest.mark.parametrize("failures", [1, 2])
def test_what_fails_is_tried_again_at_once_and_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A checkpoint may be followed by the next one while it is read."""
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    real, tries = watch_state.read_run, []

    def flaky(*args: object, **rest: object) -> object:
        tries.append(1)
        if len(tries) <= failures:
            raise FileNotFoundError("round-0000.safetensors")
        return real(*args, **rest)

    monkeypatch.setattr(watch_state, "read_run", flaky)
    folder = watched(run.folder)
    assert (folder.now().problem is None) == (failures == 1)
    assert folder.now().problem is None
    folder.now()
    assert len(tries) == failures + 1


def test_nothing_is_written_into_the_folder(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round({"west": "no_reply"}).ask()
    before = contents(run.folder)
    folder = watched(run.folder)
    for _ in range(3):
        folder.now()
    assert contents(run.folder) == before


def test_a_long_run_needs_few_computations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun.at(tmp_path / "run", "federation.num_sites=20", "federation.num_rounds=300").begin()
    for _ in range(300):
        run.finish_round()
    computed, real = [], accountant.epsilon_pld
    monkeypatch.setattr(accountant, "epsilon_pld", lambda *args, **rest: computed.append(1) or real(*args, **rest))
    folder = watched(run.folder)
    assert len(folder.now().sites[0].steps) == 300
    assert 0 < len(computed) <= 80
    computed.clear()
    folder.now()
    assert computed == []
