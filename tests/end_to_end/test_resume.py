"""Resumed runs, which end as if they had never stopped."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import fedtune.flower.simulation as simulation
import fedtune.sites.virtual_site as virtual_site
import fedtune.sites.work as site_work
from fedtune.api.compose import compose_run
from fedtune.config import read_saved_config
from fedtune.federation.lead import Checkpoints, LeadState
from fedtune.federation.site_round import answer, answer_invitation, end_run
from fedtune.flower.simulation import simulate as run_simulation
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Difference, Update
from fedtune.sites.virtual_site import Participants

from ..conftest import (
    fail_where,
    list_tiny_overrides,
    read_adapter_files,
    read_result,
    run_command,
    simulate,
    write_config,
)

_ROUNDS = 3


class Stop(Exception):
    """Exception that ends a run in these tests."""


def make_listener(early_stopping_patience: int | None) -> Mock:
    """Create a listener that aborts after a round (None: never)."""

    def on_round_finished(state: LeadState) -> None:
        if state.round == early_stopping_patience:
            raise Stop

    return Mock(on_round_finished=Mock(side_effect=on_round_finished))


def test_resumed_run_keeps_its_number_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["mixed"])
    monkeypatch.setattr(virtual_site, "choose_number_format", lambda *_, **__: next(answers))
    words = list_tiny_overrides("model.dtype=auto", "federation.num_rounds=2", into=tmp_path)
    with monkeypatch.context() as interrupted:
        fail_where(interrupted, simulation.InProcessGrid, "deliver", lambda *_: True, KeyboardInterrupt())
        assert run_command("simulate", *words).code != 0
    assert read_saved_config(tmp_path / "run").model.dtype == "mixed"
    outcome = run_command("simulate", *words, f"resume={tmp_path / 'run'}")  # measuring again would raise an error
    assert outcome.code == 0, outcome.err
    assert read_saved_config(tmp_path / "run").model.dtype == "mixed"


ALGORITHMS = {
    "fedadam": ("federation.algorithm_settings.server_learning_rate=0.05",),
    "fedprox": ("federation.algorithm_settings.mu=0.5",),
    "scaffold": ("training.optimizer=sgd", "training.learning_rate=0.5"),
}


def test_scaffold_uses_the_state_that_a_site_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = ("federation.algorithm=scaffold", *ALGORITHMS["scaffold"])
    overrides = ("runtime.seeded_noise=true", "federation.num_rounds=2", *algorithm)
    for name in ("stored", "lost"):
        if name == "lost":
            monkeypatch.setattr(SiteLedger, "read_algorithm_state", lambda ledger, run: b"")
        folder = tmp_path / name
        write_config(compose_run(list_tiny_overrides(*overrides, into=tmp_path, name=name)), folder)
        run_simulation(read_saved_config(folder), folder, make_listener(None))
    assert read_adapter_files(tmp_path / "stored") != read_adapter_files(tmp_path / "lost")


@pytest.mark.by_day("scaffold")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_run_resumed_at_any_round_produces_identical_bytes(tmp_path: Path, algorithm: str) -> None:
    """Covers algorithms with state at the lead, at the sites, and without state; others:
    tests/flower/test_averaging.py.
    """
    settings = (f"federation.algorithm={algorithm}", *ALGORITHMS[algorithm])
    overrides = ("runtime.seeded_noise=true", f"federation.num_rounds={_ROUNDS}", *settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        write_config(compose_run(list_tiny_overrides(*overrides, into=tmp_path, name=folder.name)), folder)
    run_simulation(read_saved_config(whole), whole, make_listener(None))
    for number in range(1, _ROUNDS + 1):
        # A new process every time: only the folder's files can continue the run.
        resume = [] if number == 1 else [f"resume={parts}"]
        listener = make_listener(number)
        with pytest.raises(Stop):
            run_simulation(
                compose_run([*list_tiny_overrides(*overrides, into=tmp_path, name="parts"), *resume]), parts, listener
            )
        (prepared,), (ended,) = listener.on_prepared.call_args_list, listener.on_round_finished.call_args_list
        assert (prepared.args[2].round, ended.args[0].round) == (number - 1, number)
    run_simulation(compose_run([f"resume={parts}"]), parts, make_listener(None))
    assert read_adapter_files(parts) == read_adapter_files(whole)
    assert len(read_adapter_files(parts)) == 2
    one, other = read_result(whole), read_result(parts)
    assert one["privacy"] == other["privacy"]
    assert one["final"]["metrics"] == other["final"]["metrics"]
    assert [entry["metrics"] for entry in one["rounds"]] == [entry["metrics"] for entry in other["rounds"]]


def test_interrupted_round_stays_charged_and_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charges that survive SIGKILL at any moment: test_kill_points.py."""
    folder = tmp_path / "run"

    def is_interrupted(model: Any, adapter: Any, examples: Any, work: Any, **_: Any) -> bool:
        return bool((work.site, work.round) == ("site-2", 2))

    with monkeypatch.context() as patch:
        fail_where(patch, site_work, "train_round", is_interrupted, KeyboardInterrupt())
        outcome = run_command("simulate", *list_tiny_overrides("federation.spare_rounds=1", into=tmp_path))
    assert (outcome.code, outcome.err) == (1, "")
    assert f"Interrupted. Continue with: fedtune simulate resume={folder}\n" in outcome.out
    before = verify(folder / "sites" / "site-1" / "ledger.db").events
    assert run_command("simulate", f"resume={folder}").code == 0
    # site-1's committed replies are resent as stored: only the end of the run is new in its ledger.
    (*after, end) = verify(folder / "sites" / "site-1" / "ledger.db").events
    assert (tuple(after), end.detail["what"]) == (before, "run_ended")
    events = [event for event in verify(folder / "sites" / "site-2" / "ledger.db").events if event.round == 2]
    assert [(event.kind.value, event.attempt) for event in events] == [("reserve", 1), ("reserve", 2), ("commit", 2)]
    result = read_result(folder)
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{}, {}]
    spent = {site: (entry["steps"], entry["upper_bound"]) for site, entry in result["privacy"]["sites"].items()}
    assert spent == {"site-1": (4, False), "site-2": (6, False)}


def test_moved_run_folder_keeps_its_budget(folder: Path, tmp_path: Path) -> None:
    # Ledgers know a run by its original name; a new name would let every site start from zero.
    (folder / "checkpoints" / "round-0002.safetensors").unlink()
    before = [verify(folder / "sites" / site / "ledger.db").events for site in ("site-1", "site-2")]
    moved = folder.rename(tmp_path / "elsewhere")
    assert run_command("simulate", f"resume={moved}").code == 0
    after = [verify(moved / "sites" / site / "ledger.db").events for site in ("site-1", "site-2")]
    assert after == before, "the second round is already charged, and its reply stored"
    assert read_result(moved)["privacy"]["sites"]["site-1"]["steps"] == 4


def test_resuming_a_finished_run_rewrites_the_same_results(folder: Path) -> None:
    adapter, result = read_adapter_files(folder), read_result(folder)
    assert run_command("simulate", f"resume={folder}").code == 0
    assert read_adapter_files(folder) == adapter
    assert read_result(folder)["privacy"] == result["privacy"]
    assert "data_changed" not in read_result(folder)["final"]["findings"]


def test_damaged_checkpoint_ends_the_resumed_run(folder: Path) -> None:
    newest = folder / "checkpoints" / "round-0002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    outcome = run_command("simulate", f"resume={folder}")
    assert "round-0002.safetensors is damaged" in outcome.failed(1)
    assert "move it away, and resume the run from round-0001.safetensors" in outcome.message
    assert "Continue with" not in outcome.out, "resuming would fail in the same way"
    newest.unlink()
    assert run_command("simulate", f"resume={folder}").code == 0
    newest.write_bytes(b"")
    (folder / "checkpoints" / "round-0001.safetensors").unlink()
    assert "there is no earlier checkpoint: start a new run" in run_command("simulate", f"resume={folder}").message


def test_changed_records_in_a_resumed_run_are_reported(tmp_path: Path) -> None:
    rows = [f"question {number} of {number % 7},{number % 2}" for number in range(60)]
    train = tmp_path / "train.csv"
    train.write_text("\n".join(["text,label", *rows]) + "\n")
    data_settings = (f"data.train_file={train}", "data.labels=['0','1']", "data.train_fraction=1.0")
    files = ("data.validation_file=null", "data.test_file=null", "federation.num_rounds=1", "tracking.progress=true")
    overrides = list_tiny_overrides(*data_settings, *files, into=tmp_path)
    assert run_command("simulate", *overrides).code == 0
    folder = tmp_path / "run"
    train.write_text("\n".join(["text,label", *rows, "a question that was not there,1"]) + "\n")
    (folder / "run.json").unlink()  # as if the run had been killed before its end
    resumed = run_command("simulate", f"resume={folder}")
    assert "have changed since the run started" in resumed.printed
    assert "A training file changed between two starts of this run." in resumed.out
    assert read_result(folder)["final"]["findings"] == ["data_changed"]
    assert json.loads((folder / "report.json").read_text())["facts"]["findings"] == ["data_changed"]


# By default updates are sent in bfloat16: the same adapter with and without Flower, with half the bytes.


def make_local_transport(participants: Participants) -> Any:
    """Create a transport that calls the sites directly, without messages."""
    numbers = {name: number for number, name in enumerate(participants.config.federation.active)}

    def answer_each(call: Callable[..., Any]) -> Callable[..., Iterator[tuple[str, Any]]]:
        return lambda questions, **_: (
            (question.site, call(participants.site(numbers[question.site]), question)) for question in questions
        )

    return SimpleNamespace(
        wait_for_sites=lambda sites, **_: numbers,
        invite=answer_each(lambda site, question: answer_invitation(site, question.signed)),
        train=answer_each(lambda site, question: answer(site, question.signed, question.adapter)),
        end=answer_each(lambda site, question: end_run(site, question.signed, question.adapter)),
        take_traffic=lambda: (0, 0),
    )


def test_bfloat16_updates_halve_traffic_with_and_without_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = ("runtime.seeded_noise=true", "privacy.noise_multiplier=4.0")
    full = simulate(*seeded, "federation.update_dtype=float32", into=tmp_path, name="float32")
    flower = simulate(*seeded, into=tmp_path, name="flower")
    sizes = [sum(entry["bytes_up"] for entry in read_result(folder)["rounds"]) for folder in (full, flower)]
    state = Checkpoints(flower / "checkpoints", read_saved_config(flower).digest()).load()
    assert sizes[0] - sizes[1] == pytest.approx(2 * 2 * 2 * state.adapter.num_values, abs=100)  # sites, rounds, bytes
    with monkeypatch.context() as patch:
        patch.setattr(
            simulation,
            "_make_engine",
            lambda config, folder, sites, listener: lambda run: run(make_local_transport(sites)),
        )
        direct = simulate(*seeded, into=tmp_path, name="direct")
    assert read_adapter_files(flower) == read_adapter_files(direct) != read_adapter_files(full)
    for name, value in (
        Checkpoints(full / "checkpoints", read_saved_config(full).digest()).load().adapter.tensors.items()
    ):
        np.testing.assert_allclose(state.adapter.tensors[name], value, rtol=0, atol=0.01 * np.abs(value).max())
    with store.open_for_reading(next((flower / "sites").glob("*/ledger.db"))) as file:
        updates = [Update.from_bytes(reply) for _, _, reply in store.read_replies(file)]
    assert updates
    assert all(isinstance(update.tensors, Difference) for update in updates), "sites must store differences"


def test_finished_run_is_not_changed_by_resuming_it(folder: Path) -> None:
    assert run_command("simulate", f"resume={folder}").code == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = run_command("simulate", f"resume={folder}")
    assert outcome.code == 0
    assert "is finished: nothing is left to resume" in outcome.printed
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
