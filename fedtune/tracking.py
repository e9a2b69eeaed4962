"""Experiment trackers: MLflow, TensorBoard and Weights & Biases. No tracker is used unless the settings name one.

Guarantee: a tracker receives the settings, the rounds and results in run.json, and the run's report, and nothing else
that depends on a record. It writes to a local folder, regardless of its own configuration files and environment
variables, unless `tracking.send_to` names a server: that releases the content of run.json. The trackers do not receive
the names of machine and user, code and commits, which they would log by default.

A failing tracker does not end the run, because that would waste charged privacy budget.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from fedtune.codec import read_regular_file
from fedtune.config import PATHS, RunConfig
from fedtune.federation.lead import LeadState, compute_charged_epsilons, compute_site_charge
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import convert_infinite_to_none, flatten
from fedtune.runs.results import RunResult
from fedtune.spec import RunError

log = logging.getLogger(__name__)

Settings = Mapping[str, str | int | float | bool]
Figures = Mapping[str, float]
Ending = Literal["finished", "failed"]

_PROJECT = "fedtune"


class Tracker(Protocol):
    """Interface of an experiment tracker that logs one run."""

    def begin(self, settings: Settings) -> int:
        """Start or resume the run, and return the number of rounds that are already logged."""

    def log_round(self, number: int, figures: Figures) -> None:
        """Log the metrics of a round."""

    def log_result(self, figures: Figures, files: Sequence[Path]) -> None:
        """Log the final metrics of the run, and its report files."""

    def close(self, how: Ending) -> None:
        """Mark the run as finished or failed, and close the tracker."""


class Mlflow:
    """MLflow tracker.  It uses the client API, which does not log user, source and commit by default."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # the default retries an unreachable server for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # warns about truncated settings
        logging.getLogger("alembic").setLevel(logging.WARNING)
        address = config.tracking.send_to
        self._artifacts = None if address else (folder / "artifacts").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=address or f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self._name, self._tag = config.name, config.run_id()
        self._run = ""

    def begin(self, settings: Settings) -> int:
        client, experiment = self._client, self._client.get_experiment_by_name(_PROJECT)
        number = experiment.experiment_id if experiment else client.create_experiment(_PROJECT, self._artifacts)
        if known := client.search_runs([number], f"tags.`fedtune.run` = '{self._tag}'", max_results=1):
            self._run = known[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return len(client.get_metric_history(self._run, "system/seconds"))
        self._run = client.create_run(number, run_name=self._name, tags={"fedtune.run": self._tag}).info.run_id
        for key, value in settings.items():
            client.log_param(self._run, key, value)
        return 0

    def log_round(self, number: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value, step=number)

    def log_result(self, figures: Figures, files: Sequence[Path]) -> None:
        self.log_round(0, figures)
        for path in files:
            self._client.log_artifact(self._run, str(path))

    def close(self, how: Ending) -> None:
        self._client.set_terminated(self._run, status=how.upper())


class TensorBoard:
    """TensorBoard tracker.  It uses the record writer, because the standard writer adds the host name to file names."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._summary: Any = import_module("torch.utils.tensorboard.summary")  # no type stubs
        run_folder = folder / config.name
        run_folder.mkdir(parents=True, exist_ok=True)
        self._file = (run_folder / f"events.out.tfevents.{time.time_ns()}").open("wb")
        self._writer = RecordWriter(self._file)

    def begin(self, settings: Settings) -> int:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write_event(file_version="brain.Event:2")
        # Remove the files of earlier starts, because this start logs all rounds.
        self._write_event(step=1, session_log=SessionLog(status=SessionLog.START))
        lines = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self._write_event(summary=self._summary.text("settings", f"| setting | value |\n|---|---|\n{lines}"))
        return 0

    def log_round(self, number: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._write_event(step=number, summary=self._summary.scalar(name, value))
        self._writer.flush()

    def log_result(self, figures: Figures, files: Sequence[Path]) -> None:
        self.log_round(0, figures)
        for path in files:
            if path.suffix == ".md":  # TensorBoard stores no files; the model card repeats the report
                self._write_event(summary=self._summary.text("report", read_regular_file(path).decode()))

    def close(self, how: Ending) -> None:
        self._writer.close()

    def _write_event(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())


class WandB:
    """Weights & Biases tracker, offline unless a server is set.  Each start of a run logs all rounds of the run."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        self._config, self._folder = config, folder
        self._run: Any = None

    def begin(self, settings: Settings) -> int:
        import wandb

        address = self._config.tracking.send_to
        quiet: dict[str, Any] = {"mode": "online", "base_url": address} if address else {"mode": "offline"}
        quiet |= {"console": "off", "x_save_requirements": False, **dict.fromkeys(("host", "username", "program"), "")}
        quiet |= dict.fromkeys(("silent", "disable_code", "disable_git", "disable_job_creation"), True)
        quiet |= dict.fromkeys(("x_disable_machine_info", "x_disable_meta", "x_disable_stats"), True)
        identity: dict[str, Any] = {"name": self._config.name, "id": self._config.run_id()[-32:], "dir": self._folder}
        self._run = wandb.init(project=_PROJECT, config=dict(settings), settings=wandb.Settings(**quiet), **identity)
        return 0

    def log_round(self, number: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=number)

    def log_result(self, figures: Figures, files: Sequence[Path]) -> None:
        import wandb

        self._run.summary.update(dict(figures))
        report = wandb.Artifact(f"{self._config.name}-report", type="report")
        for path in files:
            report.add_file(str(path), policy="immutable", skip_cache=True)
        self._run.log_artifact(report)

    def close(self, how: Ending) -> None:
        self._run.finish(exit_code=0 if how == "finished" else 1)


_TRACKERS: Mapping[str, Callable[[RunConfig, Path], Tracker]]
_TRACKERS = {"mlflow": Mlflow, "tensorboard": TensorBoard, "wandb": WandB}
"""Tracker classes by module name, which is also the name of the extra that installs the module."""


class Tracked:
    """Context manager that logs a run to the tracker in its settings, if there is one.

    Args:
        config: the run's configuration.
        note: displays a message to the user.
    """

    def __init__(self, config: RunConfig, *, note: Callable[[str], None]) -> None:
        self._config, self._note = config, note
        self._tracker: Tracker | None = None
        self._known = 0

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._call_tracker(lambda tracker: tracker.close("failed" if kind else "finished"))

    def begin(self) -> None:
        """Start the tracker before anything is charged.

        Raises:
            RunError: the tracker cannot start, because a server is unreachable or a folder is not writable.
        """
        spec = self._config.tracking
        if (name := spec.tracker) == "none":
            return
        folder = Path(spec.output_dir) / spec.tracker
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tracker = _TRACKERS[name](self._config, folder)
            self._known = tracker.begin(list_settings(self._config))
        except Exception as error:
            raise RunError(
                f"tracking={name} cannot start at {spec.send_to or folder}: {_describe_error(error)}"
            ) from error
        self._tracker = tracker

    def update(self, state: LeadState) -> None:
        """Log all finished rounds that are not logged yet."""
        if self._tracker is None:
            return
        rounds = state.rounds[self._known :]
        self._known += len(rounds)
        for result in rounds:
            number, figures = result.round, dict(iter_round_figures(self._config, state, result.round))
            self._call_tracker(lambda tracker: tracker.log_round(number, figures))  # noqa: B023 - it is called at once

    def finish(self, result: RunResult, folder: Path) -> None:
        """Log the result and the report."""
        files = (folder / "report.html", folder / "report.json", RunFolder(folder).result)
        card = RunFolder(folder).adapter / "README.md"
        self._call_tracker(lambda tracker: tracker.log_result(dict(iter_final_figures(result)), (*files, card)))

    def _call_tracker(self, tell: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            tell(self._tracker)
        except Exception as error:
            log.info("the tracker failed", exc_info=True)  # the note is for the user
            self._tracker = None
            self._note(
                f"tracking={self._config.tracking.tracker} stopped, and the run continues: {_describe_error(error)}"
            )


def _describe_error(error: Exception) -> str:
    """Return the type and the first line of an exception's message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def list_settings(config: RunConfig) -> Settings:
    """List the run's name, its digest and all settings that can change the result, by dotted key.

    Paths are reduced to their last component, because the rest would reveal this machine's folders.
    """
    settings: dict[str, str | int | float | bool] = {"config_sha256": config.digest(), "name": config.name}
    for key, value in flatten(config.decisive()):
        if value is not None:
            # Paths are reduced to their last component, to hide local folders.
            shown = Path(value).name if key in PATHS or key == "model.path" else value
            settings[key] = shown if isinstance(shown, str | int | float | bool) else str(shown)
    return settings


def iter_round_figures(config: RunConfig, state: LeadState, number: int) -> Iterator[tuple[str, float]]:
    """Yield the finite metrics of a finished round, and the largest epsilon of any site up to that round.

    Charges for retries count from the earliest round in which the retry may have happened.
    """
    plan, result = config.plan(), state.rounds[number - 1]
    charges = {site: compute_site_charge(state, site, plan).rounds for site in config.federation.active}
    until = {site: n - sum(site in later.sites for later in state.rounds[number:]) for site, n in charges.items()}
    figures: dict[str, float | None] = {f"validation/{name}": score for name, score in result.metrics.items()}
    figures |= {
        "privacy/epsilon": max(compute_charged_epsilons(plan, max(0, n))[0] for n in until.values()),
        "system/seconds": result.seconds,
        "system/bytes_down": result.bytes_down,
        "system/bytes_up": result.bytes_up,
        "system/sites": len(result.sites),
    }
    return ((name, score) for name, value in figures.items() if (score := convert_infinite_to_none(value)) is not None)


def iter_final_figures(result: RunResult) -> Iterator[tuple[str, float]]:
    """Yield the finite metrics of the whole run, as in run.json."""
    final = result.final
    figures: dict[str, float | None] = {f"test/{name}": score for name, score in final.metrics.items()}
    figures |= {f"test_before/{name}": score for name, score in final.metrics_before.items()}
    figures |= {
        "privacy/claimed_epsilon": result.privacy.epsilon,
        "privacy/delta": result.privacy.delta,
        "system/total_seconds": final.seconds,
        "system/peak_memory_bytes": final.peak_memory_bytes,
        "system/kwh": final.energy.kwh if final.energy else None,
        "selected_round": final.selected_round.round if final.selected_round else None,
    }
    return ((name, score) for name, value in figures.items() if (score := convert_infinite_to_none(value)) is not None)
