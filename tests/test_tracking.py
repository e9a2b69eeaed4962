"""A run in MLflow, TensorBoard and wandb, read back with each library: what it contains and what it must not."""

import getpass
import importlib.util
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

import fedtune.tracking as tracking
from fedtune.api.compose import compose_run
from fedtune.config import read_saved_config
from fedtune.federation.lead import compute_charged_epsilons

from .conftest import list_tiny_overrides, read_result, run_command, simulate
from .processes import wait_for

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings that these libraries cause in each other

FILES = {"report.html", "report.json", "run.json", "README.md"}


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run with this tracker; each is run once."""

    @cache
    def run(name: str) -> Path:
        pytest.importorskip(name, reason=f"{name} is not installed")
        return simulate(f"tracking={name}", into=tmp_path_factory.mktemp(name), name="one")

    return run


@pytest.fixture(scope="module", autouse=True)
def go_offline() -> Iterator[None]:
    """Override the user's environment, so that nothing is sent anywhere, and end wandb's process after this file."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "online")
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        yield
    if importlib.util.find_spec("wandb") is not None:
        import wandb

        wandb.teardown()


def list_expected(folder: Path) -> dict[str, list[float]]:
    """Compute the expected figures of each round, by name, from run.json alone."""
    rounds, plan = read_result(folder)["rounds"], read_saved_config(folder).plan()
    return {
        "validation/accuracy": [record["metrics"]["accuracy"] for record in rounds],
        "system/bytes_up": [record["bytes_up"] for record in rounds],
        "privacy/epsilon": [compute_charged_epsilons(plan, record["round"])[0] for record in rounds],
    }


def list_final(folder: Path) -> dict[str, float]:
    result = read_result(folder)
    return {
        "test/accuracy": result["final"]["metrics"]["accuracy"],
        "privacy/claimed_epsilon": result["privacy"]["epsilon"],
        "system/peak_memory_bytes": result["final"]["peak_memory_bytes"],
    }


def require_rounds(told: Sequence[tuple[int, float]], values: list[float]) -> None:
    assert dict(told) == pytest.approx(dict(enumerate(values, 1)))
    assert len(told) == len(values)


def load_mlflow_run(folder: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fedtune").experiment_id])
    return client, run


def test_tracker_receives_no_local_folder_names() -> None:
    settings = tracking.list_settings(
        compose_run(["experiment=debug", "name=x", "public.train_file=/secret/public.csv"])
    )
    assert settings["public.train_file"] == "public.csv"


@pytest.mark.nightly
def test_mlflow_receives_settings_metrics_and_report(tracked_run: Callable[[str], Path]) -> None:
    folder = tracked_run("mlflow")
    client, run = load_mlflow_run(folder)
    assert (run.info.status, run.info.run_name, run.info.user_id) == ("FINISHED", "one", "unknown")
    assert set(run.data.tags) == {"fedtune.run", "mlflow.runName"}, "user, source and commit must not be sent"
    assert run.data.params["training.local_steps"] == "2"
    assert run.data.params["data.train_file"] == "train.jsonl.gz", "local folder names must not be sent"
    for name, values in list_expected(folder).items():
        require_rounds([(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)], values)
    assert {name: run.data.metrics[name] for name in list_final(folder)} == pytest.approx(list_final(folder))
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == FILES
    # The same command resumes the same tracked run without logging a round twice.
    assert run_command("simulate", f"resume={folder}").code == 0
    client, again = load_mlflow_run(folder)
    assert again.info.run_id == run.info.run_id
    assert len(client.get_metric_history(run.info.run_id, "privacy/epsilon")) == 2


def test_tensorboard_receives_settings_metrics_and_report(tracked_run: Callable[[str], Path]) -> None:
    folder = tracked_run("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder / "run.json").unlink()  # as if the run had been killed before its end
    assert run_command("simulate", f"resume={folder}").code == 0  # writes all rounds again, into another event file
    events: Any = EventAccumulator(str(folder.parent / "tensorboard" / "one")).Reload()
    files = sorted((folder.parent / "tensorboard" / "one").iterdir())
    assert len(files) == 2
    assert socket.gethostname() not in "".join(path.name.partition("tfevents.")[2] for path in files)
    for name, values in list_expected(folder).items():
        require_rounds([(record.step, record.value) for record in events.Scalars(name)], values)
    for name, value in list_final(folder).items():
        assert events.Scalars(name)[-1].value == pytest.approx(value)
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| training.local_steps | 2 |" in texts["settings/text_summary"]
    assert "## Privacy" in texts["report/text_summary"]


def read_wandb_records(path: Path) -> list[Any]:
    """Read the records of an offline run: LevelDB's log format in 32 KiB blocks after wandb's seven-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a full record, or its last fragment
            records.append(Record.FromString(part))
            part = b""
    return records


@pytest.mark.nightly
def test_wandb_receives_settings_metrics_and_report(tracked_run: Callable[[str], Path]) -> None:
    folder = tracked_run("wandb")
    (path,) = (folder.parent / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    wait_for(lambda: sum(one.WhichOneof("record_type") == "history" for one in read_wandb_records(path)) == 2)
    records = read_wandb_records(path)

    def index_items(items: Any) -> dict[str, str]:
        return {item.key or ".".join(item.nested_key): item.value_json for item in items}

    rounds = [index_items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    history = [{name: json.loads(value) for name, value in one.items()} for one in rounds]
    for name, values in list_expected(folder).items():
        assert [one[name] for one in history] == pytest.approx(values)
    assert [one["_step"] for one in history] == [1, 2]
    configured = index_items(item for one in records for item in one.run.config.update)
    assert configured["training.local_steps"] == "2"
    logged = index_items(item for one in records for item in one.summary.update)
    assert {name: json.loads(logged[name]) for name in list_final(folder)} == pytest.approx(list_final(folder))
    held = path.read_bytes()
    assert all(name.encode() in held for name in FILES)
    (of_run,) = (one.run for one in records if one.WhichOneof("record_type") == "run")
    assert (of_run.host, of_run.settings.username if hasattr(of_run.settings, "username") else "") == ("", "")
    assert not any(one.WhichOneof("record_type") == "stats" for one in records), "no machine statistics may be sent"
    assert getpass.getuser() not in set(configured.values())
    assert not list(path.parent.glob("files/*requirements*")) + list(path.parent.glob("files/*metadata*"))


@pytest.mark.nightly
def test_failing_tracker_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=OSError("the disk is full"))
    failing = Mock(return_value=SimpleNamespace(begin=lambda settings: 0, log_round=full))
    monkeypatch.setattr(tracking, "_TRACKERS", {"tensorboard": failing})
    monkeypatch.setattr("fedtune.extras.is_installed", lambda _: True)
    outcome = run_command("simulate", *list_tiny_overrides("tracking=tensorboard", into=tmp_path))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("tracking=tensorboard stopped, and the run continues: OSError: the disk is full") == 1
    assert "the disk is full" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "report.html").exists()
    simulate(into=tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["run"], "a run without a tracker adds nothing"


def test_tracker_that_cannot_start_ends_the_run_uncharged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "mlflow").write_text("a file where the folder is to be")
    outcome = run_command("simulate", *list_tiny_overrides("tracking=mlflow", into=tmp_path))
    assert outcome.code == 1
    assert "tracking=mlflow cannot start at" in outcome.err
    assert not (tmp_path / "run").exists()
