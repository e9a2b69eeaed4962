"""Fixtures and helpers for several layers: the command line, the smallest run, and its plan, proposal and policy."""

import contextlib
import copy
import gc
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from fedtune.api import compose, experiment_file
from fedtune.cli.main import fedtune, main
from fedtune.config import RunConfig, format_config_yaml, read_saved_config
from fedtune.data import partition, records
from fedtune.data.records import Record
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.durable import write_durably
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Dataset, Policy, ReferenceRun
from fedtune.spec import DataError

from .privacy.builders import change_values, lead_key, make_policy, make_proposal, plan, stranger_key

REPOSITORY = Path(__file__).parents[1]
_BEGAN = time.monotonic()
# Ledgers and run folders are synced to disk at every step, which takes longer than the rest of the tests. No test cuts
# the power, so their folders are in memory if there is enough space.
_MEMORY, _ROOM = Path("/dev/shm"), 8 << 30
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))
# Tests search for phrases in printed output, so lines do not wrap unless a test sets the terminal width.
os.environ["COLUMNS"] = "250"
# Hypothesis stores failing examples in the repository, because no test may write to the working folder.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(REPOSITORY / ".hypothesis"))
# Flower's command line imports typer, which uses names that click 8.4 deprecates.
_CLICK = r"'click\."
warnings.filterwarnings("ignore", _CLICK, DeprecationWarning)  # while the other conftest files are imported
# Imported modules and collected tests stay in memory; collecting garbage while importing them takes 50 % longer.
gc.disable()


# Data that many tests read is cached once per process: conf/, overrides, and the records of the repository's own data
# files.
_plain_yaml = experiment_file.read_plain_yaml
_of_conf = cache(_plain_yaml)
_judged, _record_key = records.validate_rows, records.record_key
_keys: dict[int, bytes] = {}
"""Record keys by the identity of a record; `_read` keeps these records alive."""


@cache
def _read(path: Path, columns: tuple[tuple[str, str], ...], lenient: bool) -> tuple[Any, ...]:
    validated = tuple(_judged(path, dict(columns), lenient=lenient))
    _keys.update({id(record): _record_key(record) for _, record in validated if isinstance(record, Record)})
    return validated


def _cache_plain_yaml(path: Path, *, key: str) -> dict[str, Any]:
    in_conf = experiment_file.find_config_folder() in path.parents
    return copy.deepcopy(_of_conf(path, key=key)) if in_conf else _plain_yaml(path, key=key)


def _cache_validated_records(
    path: Path, columns: Mapping[str, str], *, fault: records.Fault = lambda record: None, lenient: bool = False
) -> Iterator[tuple[int, Record | DataError]]:
    if REPOSITORY not in path.absolute().parents:
        yield from _judged(path, columns, fault=fault, lenient=lenient)
        return
    for line, validated in _read(path, tuple(columns.items()), lenient):
        yield line, (fault(validated) or validated) if isinstance(validated, Record) else validated


# Hydra takes a third of a second to compose the same words again.
_compose_settings = compose.compose_settings
_OF_A_TEST = re.compile(r"[^'\"=\[,]*/pytest-of-[^/]+/pytest-\d+/[^/'\",\]]+")
_BYPASSED = re.compile(r"^[+~]*(experiment=.*[/.]|.*hydra)|--|pkg:")
_composed: dict[object, Any] = {}


def _cache_composed_settings(words: Sequence[str] = (), **options: Any) -> DictConfig:
    """Compose each list of words once per process; the test's own folder is substituted afterwards.

    Words that read a test's own file or contain Hydra settings are not cached.
    """
    if any(_BYPASSED.search(word) for word in words):
        return _compose_settings(words, **options)
    folders = sorted({match for word in words for match in _OF_A_TEST.findall(word)}, key=len, reverse=True)
    marks = {folder: f"/folder-{number}-of-a-test" for number, folder in enumerate(folders)}
    key = tuple(_replace_texts(word, marks) for word in words), *sorted(options.items())
    if key not in _composed:
        _composed[key] = OmegaConf.to_container(_compose_settings(key[0], **options))
    folders_by_mark = {mark: folder for folder, mark in marks.items()}
    return OmegaConf.create(_replace_texts(_composed[key], folders_by_mark))


def _replace_texts(value: Any, pairs: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for old, new in pairs.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {key: _replace_texts(inner, pairs) for key, inner in value.items()}
    return [_replace_texts(inner, pairs) for inner in value] if isinstance(value, list) else value


compose.compose_settings = experiment_file.compose_settings = _cache_composed_settings  # type: ignore[assignment]
experiment_file.read_plain_yaml = _cache_plain_yaml  # type: ignore[attr-defined]
compose._parse_override = lru_cache(maxsize=2048)(compose._parse_override)  # type: ignore[assignment]
records.validate_rows = _cache_validated_records
partition.record_key = lambda record: _keys.get(id(record)) or _record_key(record)  # type: ignore[attr-defined]


def share_tiny_models() -> None:
    """Build each tiny random model once per process; each run gets a copy, and tests it as usual."""
    from fedtune.sites import shared_model

    build = shared_model.build_task_model
    built = lru_cache(maxsize=64)(lambda spec, device: build(spec, device=device))

    def copy_model(spec: Any, *, device: Any) -> Any:
        random = spec.model.path.startswith("random:")
        return copy.deepcopy(built(spec, str(device))) if random else build(spec, device=device)

    shared_model.build_task_model = copy_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, metavar="FILE", help="write what the tests came to into FILE, as JSON")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (file := config.getoption("--result")) is None:
        return
    git = partial(subprocess.run, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    failed_reports = [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": git(["git", "rev-parse", "HEAD"]).stdout.strip(),
        "changed_since": bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()),
        "selected": config.getoption("-m"),
        **counts,
        "minutes": round((time.monotonic() - _BEGAN) / 60, 1),
        "cores": os.cpu_count(),
        "not_passed": sorted({report.nodeid for report in failed_reports}),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore deprecation warnings that libraries cause in each other; every other warning stays an error."""
    config.addinivalue_line("filterwarnings", f"ignore:{_CLICK}:DeprecationWarning")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases that `by_day(...)` does not list as nightly."""
    if (by_day := item.get_closest_marker("by_day")) and item.callspec.id not in by_day.args:  # type: ignore[attr-defined]
        item.add_marker("nightly")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse an id in `by_day(...)` that no case has, if whole files were collected."""
    if any("::" in argument for argument in config.args):
        return
    selected: dict[str, set[str]] = {}
    for item in items:
        if by_day := item.get_closest_marker("by_day"):
            remaining = selected.setdefault(item.nodeid.partition("[")[0], set(map(str, by_day.args)))
            remaining.discard(item.callspec.id)  # type: ignore[attr-defined]
    if unknown := {test: remaining for test, remaining in selected.items() if remaining}:
        raise pytest.UsageError(f"by_day names cases that there are not: {unknown}")


def pytest_collection_finish() -> None:
    """Enable garbage collection, but exclude everything that was imported or collected."""
    gc.freeze()
    gc.enable()
    if "fedtune.sites.shared_model" in sys.modules:
        share_tiny_models()


@pytest.fixture(scope="session", autouse=True)
def _empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run all tests in an empty folder, so that none reads a checkout's runs/, ledgers or site.toml."""
    folder, before = tmp_path_factory.mktemp("empty"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def _check_empty_folder(_empty_folder: Path) -> Iterator[None]:
    """Check that a test leaves no files in the shared working folder."""
    yield
    assert Path.cwd() == _empty_folder
    leftovers = sorted(path.name for path in _empty_folder.iterdir())
    for name in leftovers:  # so that the next test does not fail
        shutil.rmtree(name) if (_empty_folder / name).is_dir() else (_empty_folder / name).unlink()
    assert leftovers == []


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one-line message to the user; further lines or a traceback fail the test."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("fedtune: ")
        return lines[0].removeprefix("fedtune: ")

    @property
    def printed(self) -> str:
        """The output of a command that must have succeeded."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}{self.err}"
        return self.out

    def failed(self, code: int = 2) -> str:
        """The message of a command that must have failed with this exit code."""
        assert self.code == code, f"exit code {self.code}\n{self.out}{self.err}"
        return self.message


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parse_command(*arguments: str) -> dict[str, Any]:
    """Parse the arguments as the command line would, without running the command.

    Raises:
        click.UsageError: the arguments are invalid.
    """
    found: list[dict[str, Any]] = []
    with (
        unittest.mock.patch.object(click.Command, "invoke", lambda self, ctx: found.append(ctx.params)),
        fedtune.make_context("fedtune", list(arguments)) as context,
    ):
        fedtune.invoke(context)
    return found[-1]


def run_command(*arguments: str) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return Outcome(code, out.getvalue(), err.getvalue())


def run_python(*words: str | Path, **kwargs: Any) -> str:
    """Run Python in a separate process, which must succeed, and return its output."""
    run = {"capture_output": True, "text": True, "timeout": 600, "check": False}
    process = subprocess.run([sys.executable, *words], **run | kwargs)
    assert process.returncode == 0, process.stderr
    return str(process.stdout)


@contextlib.contextmanager
def restore_logging() -> Iterator[None]:
    """Restore the logging configuration and hooks of the process after the block."""
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values() if type(one) is logging.Logger)]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    factory = logging.getLogRecordFactory()
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def list_tiny_overrides(*overrides: str, into: Path, name: str = "run") -> list[str]:
    """Return overrides for a run that takes well under a second; fixed noise avoids the calibration.

    The keyword `into` is the folder for run folders. Positional overrides are last, so they take precedence.
    """
    own = any(override.startswith("experiment=") for override in overrides)
    return [
        *([] if own else ["experiment=debug"]),
        *(f"tracking.output_dir='{into}'", f"name={name}", "runtime.device=cpu", "runtime.num_threads=1"),
        *("privacy.noise_multiplier=4.0", "training.ignore_weak_signal=true", "data.train_fraction=0.02"),
        *("data.declared_sizes=90", "data.max_length=16", "data.validation_rows=10", "data.test_rows=10"),
        *overrides,
    ]


def simulate(*overrides: str, into: Path, name: str = "run") -> Path:
    outcome = run_command("simulate", *list_tiny_overrides(*overrides, into=into, name=name))
    assert outcome.code == 0, outcome.err
    return into / name


def write_config(config: RunConfig, folder: Path) -> None:
    """Write the config.yaml of a run folder, and create the folder if it does not exist."""
    write_durably(RunFolder(folder).config, format_config_yaml(config))


def check_planned_bytes(folder: Path) -> None:
    """Check that a simulation transfers what `fedtune plan` estimates, without settings, which its sites have."""
    from fedtune.ops.round_bytes import estimate_round_bytes
    from fedtune.sites.shared_settings import select_settings_for_sites, serialize_for_sites
    from fedtune.tasks.task_model import build_task_model

    config, rounds = read_saved_config(folder), read_result(folder)["rounds"]
    down, up = estimate_round_bytes(config, config.plan(), build_task_model(config.task_model()))
    down -= len(serialize_for_sites(select_settings_for_sites(config)).encode())
    for entry in rounds[1:]:  # the first round also sets up secure aggregation
        sites = len(entry["sites"])
        assert (entry["bytes_down"], entry["bytes_up"]) == pytest.approx((sites * down, sites * up), rel=0.02)


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_config(folder: Path, **groups: Mapping[str, Any]) -> None:
    """Change settings in a run folder's config.yaml, by group."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    changed = {group: settings[group] | values for group, values in groups.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | changed))


def read_result(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def read_adapter_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").glob("*.safetensors"))}


# The same helpers as fixtures.
_command = pytest.fixture(scope="session", name="command")(lambda: run_command)
_tiny = pytest.fixture(scope="session", name="tiny")(lambda: list_tiny_overrides)
_simulate = pytest.fixture(scope="session", name="simulate")(lambda: simulate)
_result_of = pytest.fixture(scope="session", name="result_of")(lambda: read_result)
_adapter_of = pytest.fixture(scope="session", name="adapter_of")(lambda: read_adapter_files)


@cache
def run_plan() -> Plan:
    return plan(sampling_rate=0.2, noise_multiplier=4.0, max_grad_norm=1.0, local_steps=2, num_rounds=3, spare_rounds=1)


def run_proposal(**changes: Any) -> Proposal:
    """Build the lead's proposal for the run `r`; keywords override fields of the proposal or of its plan."""
    of_plan = {field.name for field in fields(Plan)}
    plan = replace(run_plan(), **{key: value for key, value in changes.items() if key in of_plan})
    of_run = {"dataset": "patients", "base_model": "ab" * 32, "target_modules": ("query", "value"), "plan": plan}
    return replace(make_proposal(), **of_run | {key: value for key, value in changes.items() if key not in of_plan})


def name_run(run: str, settings: str) -> str:
    """Return the run name that a lead derives from the run's settings."""
    return f"{run}-{hashlib.sha256(settings.encode()).hexdigest()[:32]}"


def make_site_policy(site: str = "a", *, declared_size: int = 100, **changes: Any) -> Policy:
    """Build a site's policy that allows only the run `r`, with a budget for several such runs.

    Keywords override tables with dicts of their values, as in `limits={"max_rounds": 9}`, and other keys with values.
    """
    proposal = run_proposal()
    plan = proposal.plan
    steps = plan.local_steps * plan.max_rounds
    reference = ReferenceRun(sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps)
    allowed = make_policy(
        site=site,
        population={"name": f"{site}-patients"},
        dataset=(Dataset(id=proposal.dataset, declared_size=declared_size),),
        budget={"delta": plan.delta, "max_epsilon": 5.0, "reference": reference},
        limits={
            "min_noise_multiplier": plan.noise_multiplier,
            "max_sampling_rate": plan.sampling_rate,
            "max_grad_norm": plan.max_grad_norm,
            "max_local_steps": plan.local_steps,
            "max_rounds": plan.max_rounds,
            "max_adapter_value": 5.0,  # the tests' random adapters have values up to this
        },
        allow={
            "leads": (proposal.lead,),
            "base_models": (proposal.base_model,),
            "target_modules": proposal.target_modules,
            "max_rank": proposal.rank,
        },
    )
    return change_values(allowed, **changes)


def has_scale(values: Any, scale: float) -> bool:
    """Whether values look like independent N(0, scale^2), by a two-sided chi-square test of their variance.

    The test rejects a correct scale once in a million; with 5,000 values it misses a 10 % error even less often.
    """
    from scipy import stats

    below = stats.chi2.cdf(((values / scale) ** 2).sum(), df=values.size)
    return bool(2 * min(below, 1 - below) > 1e-6)


_lead_key = pytest.fixture(scope="session", name="lead_key")(lambda: lead_key)
_stranger_key = pytest.fixture(scope="session", name="stranger_key")(lambda: stranger_key)
_run_proposal = pytest.fixture(scope="session", name="run_proposal")(lambda: run_proposal)
_site_policy = pytest.fixture(scope="session", name="site_policy")(lambda: make_site_policy)
_has_scale = pytest.fixture(scope="session", name="has_scale")(lambda: has_scale)


@pytest.fixture
def sent_bytes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the bytes of every message that a site passes to Flower, as serialized for the network."""
    from flwr.common.serde import message_to_proto  # imported here because some tests run without Flower

    from fedtune.flower.simulation import InProcessGrid

    sent: list[bytes] = []
    deliver = InProcessGrid.deliver

    def spy(self: InProcessGrid, message: Any) -> Any:
        answer = deliver(self, message)
        sent.append(message_to_proto(answer).SerializeToString())
        return answer

    monkeypatch.setattr(InProcessGrid, "deliver", spy)
    return sent


def fail_where(
    patched: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], error: BaseException | None = None
) -> None:
    """Make the function or method raise an error for arguments where `when` is true."""
    real = getattr(owner, name)

    def fail_or_call(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise error or OSError("away")
        return real(*args, **kwargs)

    patched.setattr(owner, name, fail_or_call)
