"""A run in MLflow, TensorBoard and wandb, read back with each library: what is there, and what is not."""

import getpass
import importlib.util
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedtune.tracking as tracking
from fedtune.api.compose import compose_run
from fedtune.config import saved_config
from fedtune.runs.results import charged_epsilons

from .conftest import command, simulate, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries say of each other

FILES = {"report.html", "report.json", "run.json", "README.md"}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that the tracker of this name follows; made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        module = {"mlflow": "mlflow", "tensorboard": "tensorboard", "wandb": "wandb"}[name]
        pytest.importorskip(module, reason=f"{module} is not installed")
        if name not in made:
            made[name] = simulate(f"tracking={name}", into=tmp_path_factory.mktemp(name), name="one")
        return made[name]

    return run


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """What a person's own environment says sends nothing anywhere; wandb's process ends with this file."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "online")
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        yield
    if importlib.util.find_spec("wandb") is not None:
        import wandb

        wandb.teardown()


def expected(folder: Path) -> dict[str, list[float]]:
    """By name, the figures of each round, from run.json alone."""
    result, plan = json.loads((folder / "run.json").read_text()), saved_config(folder).plan()
    return {
        "validation/accuracy": [one["metrics"]["accuracy"] for one in result["rounds"]],
        "system/bytes_up": [one["bytes_up"] for one in result["rounds"]],
        "privacy/epsilon": [charged_epsilons(plan, one["round"])[0] for one in result["rounds"]],
    }


def final(folder: Path) -> dict[str, float]:
    result = json.loads((folder / "run.json").read_text())
    return {
        "test/accuracy": result["final"]["metrics"]["accuracy"],
        "privacy/claimed_epsilon": result["privacy"]["epsilon"],
        "system/peak_memory_bytes": result["final"]["peak_memory_bytes"],
    }


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fedtune").experiment_id])
    return client, run


def test_a_tracker_is_told_no_folder_of_this_machine() -> None:
    settings = tracking.settings_of(compose_run(["experiment=debug", "name=x", "public.train_file=/secret/public.csv"]))
    assert settings["public.train_file"] == "public.csv"


def test_mlflow(tracked: Callable[[str], Path]) -> None:
    folder = tracked("mlflow")
    client, run = mlflow_run(folder)
    assert (run.info.status, run.info.run_name, run.info.user_id) == ("FINISHED", "one", "unknown")
    assert set(run.data.tags) == {"fedtune.run", "mlflow.runName"}, "no user, source or commit"
    assert run.data.params["training.local_steps"] == "2"
    assert run.data.params["data.train_file"] == "train.jsonl.gz", "without the folders of this machine"
    for name, values in expected(folder).items():
        told = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        assert dict(told) == pytest.approx(dict(enumerate(values, 1)))
        assert len(told) == len(values)
    assert {name: run.data.metrics[name] for name in final(folder)} == pytest.approx(final(folder))
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == FILES
    # The same command again goes on with the same run, and tells no round twice.
    assert command("simulate", f"resume={folder}").code == 0
    client, again = mlflow_run(folder)
    assert again.info.run_id == run.info.run_id
    assert len(client.get_metric_history(run.info.run_id, "privacy/epsilon")) == 2


def test_tensorboard(tracked: Callable[[str], Path]) -> None:
    folder = tracked("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> Any:
        return EventAccumulator(str(folder.parent / "tensorboard" / "one")).Reload()

    assert command("simulate", f"resume={folder}").code == 0  # writes all rounds again, into another file
    events, files = read(), sorted((folder.parent / "tensorboard" / "one").iterdir())
    assert len(files) == 2
    assert socket.gethostname() not in "".join(path.name.partition("tfevents.")[2] for path in files)
    for name, values in expected(folder).items():
        told = [(one.step, one.value) for one in events.Scalars(name)]
        assert dict(told) == pytest.approx(dict(enumerate(values, 1)))
        assert len(told) == len(values)
    for name, value in final(folder).items():
        assert events.Scalars(name)[-1].value == pytest.approx(value)
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| training.local_steps | 2 |" in texts["settings/text_summary"]
    assert "## Privacy" in texts["report/text_summary"]


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB, behind seven bytes of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.mark.nightly
def test_wandb(tracked: Callable[[str], Path]) -> None:
    folder = tracked("wandb")
    (path,) = (folder.parent / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    records = wandb_records(path)

    def named(items: Any) -> dict[str, str]:
        return {item.key or ".".join(item.nested_key): item.value_json for item in items}

    rounds = [named(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    history = [{name: json.loads(value) for name, value in one.items()} for one in rounds]
    for name, values in expected(folder).items():
        assert [one[name] for one in history] == pytest.approx(values)
    assert [one["_step"] for one in history] == [1, 2]
    configured = named(item for one in records for item in one.run.config.update)
    assert configured["training.local_steps"] == "2"
    told = named(item for one in records for item in one.summary.update)
    assert {name: json.loads(told[name]) for name in final(folder)} == pytest.approx(final(folder))
    held = path.read_bytes()
    assert all(name.encode() in held for name in FILES)
    (of_run,) = (one.run for one in records if one.WhichOneof("record_type") == "run")
    assert (of_run.host, of_run.settings.username if hasattr(of_run.settings, "username") else "") == ("", "")
    assert not any(one.WhichOneof("record_type") == "stats" for one in records), "of the machine only the run's figures"
    assert getpass.getuser() not in set(configured.values())
    assert not list(path.parent.glob("files/*requirements*")) + list(path.parent.glob("files/*metadata*"))


def test_without_a_tracker_there_is_the_run_alone(tmp_path: Path) -> None:
    simulate(into=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_extra_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    outcome = command("simulate", *tiny("tracking=wandb", into=tmp_path))
    assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
    assert outcome.message == "tracking.tracker = 'wandb': needs the extra: pip install 'fedtune[wandb]'"


class Failing:
    """A tracker that fails once it is to say something."""

    def __init__(self, *_: object) -> None:
        pass

    def begin(self, settings: object) -> int:
        return 0

    def round(self, number: int, figures: object) -> None:
        raise OSError("the disk is full")


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_TRACKERS", {"tensorboard": Failing})
    monkeypatch.setattr(tracking, "find_spec", lambda _: True)
    outcome = command("simulate", *tiny("tracking=tensorboard", into=tmp_path))
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("tracking=tensorboard ends here, and the run goes on: OSError: the disk is full") == 1
    assert "the disk is full" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "report.html").exists()


def test_a_tracker_that_cannot_begin_ends_the_run_before_a_charge(tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_text("a file where the folder is to be")
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    outcome = command("simulate", *tiny("tracking=mlflow", into=tmp_path))
    assert outcome.code == 1
    assert "tracking=mlflow cannot begin at" in outcome.err
    assert not (tmp_path / "run").exists()
