"""The run folder `runs/<name>/`: its file layout, its lock, and its log.

The module avoids slow imports, so that commands that only look up a file start without torch.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune.codec import read_bounded_file, read_json_object, read_regular_file
from fedtune.model.adapter_files import ADAPTER, CARD, LABEL, compute_adapter_digest
from fedtune.privacy.durable import hash_files, write_durably
from fedtune.spec import ConfigError, RunError, StuckError, describe_full_disk
from fedtune.system import lock

_MAX_NAMED = 10
ASKED = "asked.jsonl"  # the journal of requested rounds, in the checkpoint folder


def format_checkpoint_name(round: int | None = None) -> str:
    """Return the file name of a round's checkpoint, `round-0003.safetensors`; without a round, a glob pattern for all
    checkpoints.
    """
    return f"round-{'*' if round is None else f'{round:04d}'}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    # By length first, because names after round 9999 have an additional digit.
    return sorted(folder.glob(format_checkpoint_name()), key=lambda path: (len(path.name), path.name))


def suggest_run_folders(folder: Path) -> str:
    """Return a suffix for an error about a folder without a run: the most similar run, or a list of the existing runs.

    Searches the parent of `folder`, `folder` itself and runs/; empty if there are no runs.
    """
    for place in filter(os.path.isdir, (folder.parent, folder, Path("runs"))):
        named = {one.parent.name: str(one.parent) for one in sorted(place.glob("*/config.yaml")) if _is_run_config(one)}
        if alike := difflib.get_close_matches(folder.name, named, n=1):
            return f"; did you mean {named[alike[0]]}?"
        if named:
            more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
            return f"; there are {', '.join(list(named.values())[:_MAX_NAMED])}{more}"
    return ""


def _is_run_config(path: Path) -> bool:
    """Whether a file contains the settings of a run, and not a configuration that Hydra composes runs of."""
    with contextlib.suppress(ConfigError):
        return b"\ndefaults:" not in b"\n" + read_bounded_file(path, key="config.yaml")
    return False


class _LogFile(logging.FileHandler):
    """Log handler that ignores write errors, such as a full disk, which must neither end a run nor print text."""

    full: str | None = None  # the full-disk error of a simulated site, whose refusal has no details

    def emit(self, record: logging.LogRecord) -> None:
        self.full = self.full or describe_full_disk(record.exc_info and record.exc_info[1])
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class RunFolder:
    """Paths of a run's files; none of the files needs to exist.

    Attributes:
        path: the run folder.
        config: the composed configuration, as YAML.
        result: the result of the run (`fedtune.runs.results`).
        log: the log, locked by the running process.
        adapter: the folder of the final adapter, including the task head.
        checkpoints: the checkpoint folder (`fedtune.federation.lead.Checkpoints`).
        asked: the journal of requested rounds.
        sites: the folder of a simulation's sites, unless they are stored elsewhere.
        environment: the hardware and software of the run.
        answers: the latest answer from each real site.
        site_reports: the folder of reports released by sites.
        selection: the hyperparameter search that the run belongs to (`fedtune.privacy.selection`); in a folder of
            trials, the privacy cost of the search per trial.
        audit: the findings of an audit of the run.
        exports: the hashes of exported files: file -> SHA-256.
        audit_mark: the marker file that an audit writes before training, because its training data contain canaries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.result = path / "run.json"
        self.log = path / "log.txt"
        self.adapter = path / ADAPTER
        self.checkpoints = path / "checkpoints"
        self.asked = self.checkpoints / ASKED
        self.sites = path / "sites"
        self.environment = path / "environment.json"
        self.answers = path / "answers.json"
        self.site_reports = path / "site_reports"
        self.selection = path / "selection.json"
        self.audit = path / "audit.json"
        self.exports = path / "exports.json"
        self.audit_mark = path / "AUDIT.txt"

    def locate_sites(self, sites_dir: str | None) -> Path:
        """Return the folder of a simulation's sites: `sites_dir` if it is set, otherwise `sites` in the run folder."""
        return Path(sites_dir) if sites_dir else self.sites

    def create(self, config: bytes) -> list[Path]:
        """Create the folder with its configuration and an empty log; return the newly created folders, innermost first.

        The folder appears complete, so that a killed process leaves one that `has_begun` recognizes.

        Raises:
            ConfigError: the folder exists already, or cannot be created.
        """
        taken = ConfigError("name", self.path.name, f"is taken: {self.path} exists; choose another")
        if os.path.lexists(self.path):
            raise taken
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        staged = RunFolder(self.path.with_name(f".{self.path.name}.partial"))
        try:
            shutil.rmtree(staged.path, ignore_errors=True)
            staged.path.mkdir(parents=True)
            inherited = RunFolder(self.path.parent).selection
            if inherited.is_file():  # a trial inherits the cost of the search
                write_durably(staged.selection, read_regular_file(inherited))
            write_durably(staged.config, config)
            staged.log.touch()
            staged.path.rename(self.path)
        except OSError as error:
            shutil.rmtree(staged.path, ignore_errors=True)
            if os.path.lexists(self.path):  # another process was faster
                raise taken from None
            self.remove(new)
            bound = f"must be a folder to write {self.path.name} into ({error.strerror})"
            raise ConfigError("tracking.output_dir", str(self.path.parent), bound) from None
        return new

    def remove(self, new: Sequence[Path]) -> None:
        """Undo `create`: delete the folder with its content, and every new parent that is empty."""
        shutil.rmtree(self.path, ignore_errors=True)  # without a checkpoint, no site was charged
        with contextlib.suppress(OSError):
            for parent in new[1:]:
                parent.rmdir()

    def find_finished_adapter(self) -> Path:
        """Return the adapter folder of a finished run, after verifying that its adapter may be used.

        Raises:
            ConfigError: the run is unfinished or belongs to an audit, or a file of its adapter is not the one whose
                digest is in run.json.
        """
        if not self.adapter.is_dir():
            raise ConfigError("run folder", str(self.path), "has no finished adapter/; resume the run first")
        self.require_own_adapter(self.adapter)
        return self.adapter

    def require_export_target(self, target: Path, *, key: str) -> None:
        """Check that an export into `target` can be told apart from the run's own adapter.

        Raises:
            ConfigError: `target` is inside the adapter's folder, or has its name.
        """
        if target.absolute().resolve().is_relative_to(self.adapter.resolve()):
            raise ConfigError(key, str(target), "must be outside the run's adapter folder")
        if target.name == self.adapter.name:
            bound = "has the name of the run's own folder, and a report names files by their folder: choose another"
            raise ConfigError(key, str(target), bound)

    def read_exports(self) -> dict[str, str]:
        """Read the hashes of exported files: path relative to the parent of the export folder -> SHA-256."""
        if not self.exports.is_file():
            return {}
        digests = read_json_object(self.exports, key="exports")
        return {str(name): str(digest) for name, digest in digests.items()}

    def record_export(self, target: Path) -> None:
        """Add the hashes of the exported files in `target` to exports.json, for the run's report."""
        new = hash_files(target, besides=(CARD, LABEL))
        digests = self.read_exports() | {f"{target.name}/{name}": digest for name, digest in new.items()}
        write_durably(self.exports, json.dumps(digests, indent=1).encode() + b"\n")

    def require_own_adapter(self, adapter: Path, *, key: str = "run folder", value: str | None = None) -> None:
        """Check that the adapter in the folder `adapter` is the result of this run, and that the run is not an audit.

        Raises:
            ConfigError: the adapter comes from an audit, or run.json has another digest.
        """
        bound, mark = "", self.audit_mark.name
        if self.audit_mark.exists():
            bound = f"is an audit: its training data contain canaries ({mark}); do not use its adapter or scores"
        elif not self.result.exists():  # a site's copy of an adapter has neither run.json nor checkpoints
            missing = "has no run.json with its adapter's digest; resume the run, or restore the file"
            bound = missing if self.saved_checkpoints else ""
        elif self._read_adapter_digest() != compute_adapter_digest(adapter):
            bound = "its adapter does not match adapter_digest in run.json; resume the run, or restore the adapter"
        if bound:
            raise ConfigError(key, value or str(self.path), bound)

    def _read_adapter_digest(self) -> str | None:
        """Read the adapter's digest from run.json; None if the file is unreadable or lacks the digest."""
        with contextlib.suppress(ConfigError):
            return read_json_object(self.result, key=str(self.result)).get("adapter_digest")
        return None

    @property
    def saved_checkpoints(self) -> list[Path]:
        """The existing checkpoints, oldest first."""
        return list_checkpoints(self.checkpoints)

    def has_begun(self) -> bool:
        """Return True if the folder contains a run with a checkpoint or a result.

        Otherwise deletes a run folder that a killed process left without a checkpoint, if it has no other file than a
        run writes until then.
        """
        if self.saved_checkpoints or self.result.exists():
            return True
        both, others = {self.config, self.log}, {self.selection, self.environment, self.answers, self.sites}
        others |= {self.checkpoints, self.path / "report.html"}
        if self.path.is_dir() and both <= {*self.path.iterdir()} <= both | others:
            with self.hold_lock():
                shutil.rmtree(self.path)  # without a checkpoint, no site was charged
        return False

    @contextlib.contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Hold the lock of the folder, because two runs in one folder would mix their ledgers and checkpoints.

        Raises:
            ConfigError: a run in this or another process uses the folder.
        """
        with self.log.open("a") as held:  # the lock is released with the process, even if the process is killed
            try:
                lock(held.fileno())
            except OSError:
                bound = "is in use: wait until its run ends, or stop that run"
                raise ConfigError("run folder", str(self.path), bound) from None
            yield

    @property
    def is_running(self) -> bool:
        """True if a process holds the lock of the folder; the check changes nothing."""
        if not self.log.is_file():
            return False
        with self.log.open() as held:
            try:
                lock(held.fileno(), shared=True)
            except OSError:
                return True
        return False

    @contextlib.contextmanager
    def log_to_file(self, level: str) -> Iterator[None]:
        """Redirect the logs of fedtune and Flower to a file, so that the terminal shows only the run's progress."""
        handler = _LogFile(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        loggers = [logging.getLogger(name) for name in ("fedtune", "flwr")]
        before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(level.upper())
        try:
            yield
        except RunError as error:
            if handler.full is None or isinstance(error, StuckError) or describe_full_disk(error):
                raise
            raise RunError(f"{error}; {handler.full}") from error
        finally:
            handler.close()
            for logger, (old_level, handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(old_level)
