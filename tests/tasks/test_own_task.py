"""A custom task as in docs/own_task.md: it runs, it is refused if it mixes records, and its code is recorded."""

import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedtune
from fedtune.data import Record
from fedtune.extras import describe_code
from fedtune.report.from_run import read_run
from fedtune.spec import ConfigError
from fedtune.tasks import register
from fedtune.tasks.classification import Classification
from fedtune.tasks.registry import TASKS, find_task, get_task, tokenize_separately

from ..data.conftest import make_data_spec

PAGE = (Path(__file__).parents[2] / "docs" / "own_task.md").read_text()
CLASS, SIMULATION = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SCRIPTS = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
SMALL = """model=random_bert lora=all_linear federation.num_rounds=1 training.local_steps=1 data.max_length=16
    privacy.noise_multiplier=4.0 training.ignore_weak_signal=true runtime.num_threads=1
    runtime.micro_batch_tokens=64"""
TINY = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in SMALL.split())}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the documented task, in which it can be imported; the task is unregistered afterwards."""
    (tmp_path / "quantile.py").write_text(CLASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("quantile", None)
    TASKS.pop("quantile", None)


@pytest.fixture
def small(work: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Additional settings of each `fedtune.simulate` call, such as a tiny model."""
    rows = [f"case {n} of ward {n % 7},{n % 60},{('north', 'south')[n % 2]}" for n in range(120)]
    (work / "cases.csv").write_text("\n".join(["report,days,clinic", *rows]))
    added, simulate = dict[str, Any](), fedtune.simulate
    monkeypatch.setattr(
        fedtune, "simulate", lambda recipe, settings, **told: simulate(recipe, settings | TINY | added, **told)
    )
    return added


def declare(folder: Path, package: str, entry: str) -> None:
    """Make a folder on the path an installed package with this entry point."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fedtune.tasks]\n{entry}\n")
    (info / "RECORD").write_text("quantile.py,,\n")


def test_documented_task_is_simulated_and_its_code_is_recorded(work: Path, small: dict[str, Any]) -> None:
    assert len(CLASS.splitlines()) <= 60
    names: dict[str, Any] = {}
    exec(SIMULATION, names)
    run, sha256 = names["run"], hashlib.sha256(CLASS.encode()).hexdigest()
    assert run.config.task_settings.quantile == 0.8
    assert {"coverage", "width", "loss"} <= set(run.metrics)
    assert 0 <= run.predict(["a case of ward 2"])[0]["number"] <= 60
    (environment,) = read_run(run.folder).environments
    assert environment.libraries["task quantile"] == f"quantile.py SHA-256 {sha256}"
    assert f"quantile.py SHA-256 {sha256}" in (run.folder / "report.json").read_text()


def test_task_whose_loss_mixes_records_is_refused_before_the_run(work: Path, small: dict[str, Any]) -> None:
    leaky = CLASS.replace("error = targets - logits[:, 0]", "error = targets - logits[:, 0] + logits.mean()")
    (work / "quantile.py").write_text(leaky)
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        exec(SIMULATION, {})
    assert not (work / "runs" / "days").exists(), "nothing may be trained or charged"


@pytest.mark.nightly
@pytest.mark.by_day("torch")
@pytest.mark.parametrize("script", SCRIPTS, ids=["TRL", "torch"])
def test_script_needs_at_most_15_changed_lines_for_two_sites(script: str, work: Path, small: dict[str, Any]) -> None:
    assert all(sum(line.startswith(mark) for line in script.splitlines()) <= 15 for mark in "+-")
    turns = '[{"role": "user", "content": "lost card %d"}, {"role": "assistant", "content": "we send one"}]'
    (work / "chats.jsonl").write_text("\n".join('{"messages": ' + turns % n + "}" for n in range(1000)))
    rows = [f"ticket {n} about {team},{team}" for n in range(30) for team in ("billing", "sales", "technical")]
    (work / "tickets.csv").write_text("\n".join(["body,team", *rows]))
    own = {"model": "random_llama", "data.chat_template": "plain", "evaluation.generate": False}
    small.update(own | {"model.path": "random:llama"} if "SFT" in script else {"model.path": "random:bert"})
    before, after = ("".join(f"{line[1:]}\n" for line in script.splitlines() if line[:1] != drop) for drop in "+-")
    compile(before, "before", "exec")
    names: dict[str, Any] = {}
    exec(after, names)
    ledgers = [fedtune.Ledger(path) for path in names["run"].folder.glob("sites/*/ledger.db")]
    assert [ledger.spending.epsilon > 0 for ledger in ledgers] == [True, True]


def test_installed_task_package_is_imported_only_by_name(work: Path) -> None:
    declare(work, "quantile-task", "quantile = quantile:Quantile\nclassification = quantile:Quantile")
    assert type(get_task("classification")) is Classification, "fedtune's own names must take precedence"
    assert (find_task("quantiles"), sys.modules.get("quantile")) == (None, None)
    assert get_task("quantile", {"quantile": 0.5}).own.quantile == 0.5
    assert describe_code(type(get_task("quantile"))).startswith("quantile-task 1.0, quantile.py SHA-256 ")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["median = quantile:Quantile"], "not as a subclass of fedtune.tasks.Task with this `name`"),
        (["median = quantile:missing"], "cannot be imported from quantile:missing: AttributeError"),
        (["median = quantile:Quantile", "median = quantile:Median"], "several installed packages: keep one of p0, p1"),
    ],
)
def test_unusable_package_is_refused(work: Path, entries: list[str], message: str) -> None:
    for number, entry in enumerate(entries):
        declare(work, f"p{number}", entry)
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_task("median")


def test_register_refuses_taken_names_and_replaces_changed_classes(work: Path) -> None:
    first = importlib.import_module("quantile").Quantile
    del sys.modules["quantile"]
    changed = importlib.import_module("quantile").Quantile
    assert type(TASKS["quantile"]) is changed is not first
    with pytest.raises(ConfigError, match=r"fedtune\.tasks\.classification\.Classification; choose another"):
        register(type("Mine", (Classification,), {}))
    with pytest.raises(ConfigError, match=r"task = 'my task'"):
        register(type("Mine", (Classification,), {"name": "my task"}))


class Shared(Classification):
    """Task whose targets depend on all records together, and which makes an additional example of a long text."""

    name = "shared"

    def tokenize(self, records: Any, tokenizer: Any, **options: Any) -> Any:
        data = super().tokenize(records, tokenizer, **options)
        data.targets[:] = len(records)
        return data.select_examples([*range(len(data)), *(n for n in range(len(data)) if data.lengths[n] > 8)])


def test_own_task_tokenizes_one_record_at_a_time_into_one_example(encoder_tokenizer: Any) -> None:
    data = make_data_spec(labels=("a", "b"), max_length=16)
    tokenize = partial(tokenize_separately, tokenizer=encoder_tokenizer, data=data)
    short = [Record({"text": text, "label": "a"}) for text in ("my", "my card", "where")]
    assert tokenize(Shared(), short).targets.tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="exactly one example per record"):
        tokenize(Shared(), [Record({"text": "card " * 20, "label": "a"})])
