"""A run that stopped between two rounds ends as if it had never stopped."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run, write_config
from fedtune.config import saved_config
from fedtune.federation.lead import LeadState
from fedtune.flower.simulation import simulate as run_simulation
from fedtune.privacy.ledger.store import SCHEMA
from fedtune.privacy.ledger.verify import verify

_ROUNDS = 3
_STRATEGIES = {
    "fedavg": (),
    "fedadam": ("federation.server_learning_rate=0.05", "federation.server_momentum=0.9"),
    "fedavgm": ("federation.server_learning_rate=0.7", "federation.server_momentum=0.8"),
}


class Stop(Exception):
    """What ends a run in these tests."""


class Follower:
    """A listener that breaks off after a round; None: never."""

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after
        self.rounds: list[int] = []

    def prepared(self, shared: object, proposal: object, state: LeadState) -> None:
        self.rounds.append(state.round)

    def preparing(self, what: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def site_replied(self, number: int) -> None:
        pass

    def round_finished(self, state: LeadState) -> None:
        self.rounds.append(state.round)
        if state.round == self.stop_after:
            raise Stop


def overrides(tiny: Any, strategy: str, folder: Path) -> list[str]:
    chosen = ("runtime.seeded_noise=true", f"federation.num_rounds={_ROUNDS}", f"federation.strategy={strategy}")
    settings: list[str] = tiny(*chosen, *_STRATEGIES[strategy], into=folder.parent, name=folder.name)
    return settings


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By strategy, a run that nothing stopped."""
    folders = {strategy: tmp_path_factory.mktemp("whole") / strategy for strategy in _STRATEGIES}
    for strategy, folder in folders.items():
        write_config(compose_run(overrides(tiny, strategy, folder)), folder)
        run_simulation(saved_config(folder), folder, Follower(None))
    return folders


@pytest.mark.by_day("fedadam")
@pytest.mark.parametrize("strategy", list(_STRATEGIES))
def test_stopped_at_each_boundary_and_resumed_gives_the_same_bytes(
    whole: dict[str, Path], strategy: str, tiny: Any, tmp_path: Path, adapter_of: Any, result_of: Any
) -> None:
    parts = tmp_path / strategy
    write_config(compose_run(overrides(tiny, strategy, parts)), parts)
    for number in range(1, _ROUNDS + 1):
        # A new start every time: only what lies in the folder can carry the run on.
        resume = [] if number == 1 else [f"resume={parts}"]
        follower = Follower(number)
        with pytest.raises(Stop):
            run_simulation(compose_run([*overrides(tiny, strategy, parts), *resume]), parts, follower)
        assert follower.rounds == [number - 1, number]
    run_simulation(compose_run([f"resume={parts}"]), parts, Follower(None))
    assert adapter_of(parts) == adapter_of(whole[strategy])
    assert len(adapter_of(parts)) == 2
    one, other = result_of(whole[strategy]), result_of(parts)
    assert one["privacy"] == other["privacy"]
    assert one["final"]["metrics"] == other["final"]["metrics"]
    assert [entry["metrics"] for entry in one["rounds"]] == [entry["metrics"] for entry in other["rounds"]]


def test_strategies_that_average_alike_still_differ_where_they_should(whole: dict[str, Path], adapter_of: Any) -> None:
    # Were the server's momentum lost, resuming would agree with itself all the same.
    assert len({adapter_of(folder)["head.safetensors"] for folder in whole.values()}) == 3


def test_ctrl_c_between_rounds_leaves_a_folder_that_resumes(
    command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result_of: Any
) -> None:
    import fedtune.show.run_progress as display

    def interrupt(self: object, state: LeadState) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(display.Display, "round_finished", interrupt)
        outcome = command("simulate", *tiny(into=tmp_path))
    folder = tmp_path / "run"
    assert outcome.code == 1
    assert f"fedtune simulate resume={folder}\n" in outcome.out
    early = result_of(folder)
    assert len(early["rounds"]) == 1
    assert early["final"]["metrics"] == {}
    resumed = command("simulate", f"resume={folder}")
    assert resumed.code == 0
    assert "resuming after round 1" in resumed.out
    assert [entry["round"] for entry in result_of(folder)["rounds"]] == [1, 2]
    assert result_of(folder)["privacy"]["sites"]["site-1"]["steps"] == 4


@pytest.mark.parametrize(
    "where",
    [
        "fedtune.runs.federation_run.FederationRun._first_state",
        "fedtune.sites.shared_model.SharedModel.finally_measured",
    ],
)
def test_ctrl_c_before_anything_was_trained_leaves_nothing(
    command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*args: object, **rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    outcome = command("simulate", *tiny(into=tmp_path))
    assert outcome.code == 1
    assert "resume=" not in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(simulate: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end, which tests copy."""
    return Path(simulate(into=tmp_path_factory.mktemp("runs")))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """That run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_folder_that_moved_keeps_its_budget(folder: Path, command: Any, tmp_path: Path, result_of: Any) -> None:
    # Ledgers know a run by the name it began with; a new one would let every site start from zero.
    (folder / "checkpoints" / "round-0002.safetensors").unlink()
    before = [verify(folder / "sites" / site / "ledger.db").events for site in ("site-1", "site-2")]
    moved = folder.rename(tmp_path / "elsewhere")
    assert command("simulate", f"resume={moved}").code == 0
    after = [verify(moved / "sites" / site / "ledger.db").events for site in ("site-1", "site-2")]
    assert after == before, "the second round was already charged and its reply is stored"
    assert result_of(moved)["privacy"]["sites"]["site-1"]["steps"] == 4


def test_resuming_a_finished_run_writes_the_same_again(
    folder: Path, command: Any, result_of: Any, adapter_of: Any
) -> None:
    adapter, result = adapter_of(folder), result_of(folder)
    assert command("simulate", f"resume={folder}").code == 0
    assert adapter_of(folder) == adapter
    assert result_of(folder)["privacy"] == result["privacy"]
    assert "data_changed" not in result_of(folder)["final"]["findings"]


def test_a_damaged_checkpoint_ends_the_run_and_says_so(folder: Path, command: Any) -> None:
    newest = folder / "checkpoints" / "round-0002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    outcome = command("simulate", f"resume={folder}")
    assert outcome.code == 1
    assert "round-0002.safetensors is damaged" in outcome.message
    assert "move it away, and resume the run from round-0001.safetensors" in outcome.message
    assert "Continue with" not in outcome.out, "that would fail in the same way"
    newest.unlink()
    assert command("simulate", f"resume={folder}").code == 0
    newest.write_bytes(b"")
    (folder / "checkpoints" / "round-0001.safetensors").unlink()
    assert "no other is left: start a new run" in command("simulate", f"resume={folder}").message


def test_other_records_in_a_resumed_run_are_noticed_and_reported(
    command: Any, tiny: Any, tmp_path: Path, result_of: Any
) -> None:
    rows = [f"question {number} of {number % 7},{number % 2}" for number in range(60)]
    train = tmp_path / "train.csv"
    train.write_text("\n".join(["text,label", *rows]) + "\n")
    chosen = (
        f"data.train_file={train}",
        "data.labels=['0','1']",
        "data.train_fraction=1.0",
        "data.validation_file=null",
    )
    given = tiny(*chosen, "data.test_file=null", "federation.num_rounds=1", "tracking.progress=true", into=tmp_path)
    assert command("simulate", *given).code == 0
    folder = tmp_path / "run"
    train.write_text("\n".join(["text,label", *rows, "a question that was not there,1"]) + "\n")
    resumed = command("simulate", f"resume={folder}")
    assert resumed.code == 0
    assert "are others than when the run began" in resumed.out
    assert "A training file changed between two starts of this run." in resumed.out
    assert result_of(folder)["final"]["findings"] == ["data_changed"]
    assert json.loads((folder / "report.json").read_text())["derived"]["utility"]["findings"] == ["data_changed"]


def test_a_damaged_ledger_keeps_its_site_from_training(folder: Path, command: Any, result_of: Any) -> None:
    (folder / "checkpoints" / "round-0002.safetensors").unlink()
    with contextlib.closing(sqlite3.connect(folder / "sites" / "site-1" / "ledger.db", isolation_level=None)) as file:
        file.execute("DROP TRIGGER events_are_never_deleted")
        file.execute("DELETE FROM events WHERE kind = 'reserve' AND round = 1")
        file.execute(next(statement for statement in SCHEMA if "events_are_never_deleted" in statement))
    assert command("simulate", f"resume={folder}").code == 0
    result = result_of(folder)
    assert result["rounds"][1]["failed_sites"] == {"site-1": "site_error"}
    assert re.search(r"site-1/ledger\.db: event \d+ is missing", (folder / "log.txt").read_text())
    spent = result["privacy"]["sites"]
    # Without a receipt the lead can only bound what site-1 was charged.
    assert (spent["site-1"]["upper_bound"], spent["site-1"]["steps"]) == (True, 4)
    assert (spent["site-2"]["upper_bound"], spent["site-2"]["steps"]) == (False, 4)


def test_the_journal_of_rounds_is_written_before_a_site_is_asked(folder: Path) -> None:
    asked = [json.loads(line) for line in (folder / "checkpoints" / "asked.jsonl").read_text().splitlines()]
    assert asked == [{"round": round, "sites": ["site-1", "site-2"]} for round in (1, 2)]
