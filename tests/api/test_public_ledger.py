"""`fedtune.Ledger`: charges for releases, receipts, and their display in commands and reports."""

import inspect
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas
import pytest

import fedtune
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.report.from_ledger import build_ledger_report
from fedtune.report.verify_report import problems
from fedtune.spec import ConfigError, RunError

from ..conftest import run_command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "site_policy.md").read_text().partition("\n## Charge any release\n")[2]
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def create_ledger(folder: Path, **changes: object) -> fedtune.Ledger:
    return fedtune.Ledger.create(folder, **{"epsilon": 3.0, "delta": 1e-6, "size": 10_000} | changes)


@pytest.mark.filterwarnings("ignore")  # Opacus's own
def test_documented_examples_charge_the_same_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    count_example, open_example, train_example = BLOCKS
    exec(count_example, {})
    for _ in range(2):
        exec(open_example, names := {})
    assert names["ledger"].receipt("over-65").charged_rounds == 1
    first = names["ledger"].spending
    assert first.epsilon > 1.345
    assert 0.18 < first.runs[0].epsilon < 0.19
    exec(train_example, {})
    runs = fedtune.Ledger("registry/ledger.db").spending.runs
    assert [run.run for run in runs] == ["count over-65", "histogram decades", "dp_sgd opacus-1"]
    assert [run.steps for run in runs] == [1, 1, 40]


def test_ledger_import_does_not_load_torch(tmp_path: Path) -> None:
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in {'torch', 'transformers', 'peft', 'opacus', 'flwr'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    subprocess.run([sys.executable, "-c", blocked + BLOCKS[0]], cwd=tmp_path, check=True, capture_output=True)
    assert len(fedtune.Ledger(tmp_path / "registry" / "ledger.db").spending.runs) == 2


def test_create_writes_a_private_key_and_refuses_an_existing_ledger(tmp_path: Path) -> None:
    create_ledger(tmp_path, unit="user", site="north")
    assert stat.S_IMODE((tmp_path / "site_key.pem").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"already contains site\.toml: open the ledger with fedtune\.Ledger\.open"):
        create_ledger(tmp_path)
    opening = fedtune.Ledger.open(tmp_path / "site.toml").verified.history.opening
    assert (opening.site, opening.unit, opening.delta) == ("north", "user", 1e-6)
    with pytest.raises(ConfigError, match=r"budget\.delta"):
        create_ledger(tmp_path / "other", delta=1e-3)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"size": 1000.0}, "declared_size"),
        ({"epsilon": "8"}, "max_epsilon"),
        ({"delta": "1"}, "delta"),
        ({"site": 5}, "site"),
    ],
    ids=str,
)
def test_value_of_the_wrong_type_is_refused_before_a_file_is_written(
    values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        create_ledger(tmp_path, **values)
    assert raised.value.key.endswith(key)
    assert not list(tmp_path.iterdir())


def test_own_release_is_not_charged_if_the_disk_is_too_full_for_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = create_ledger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(RunError, match=r"No space left on device.*; nothing was charged"):
            ledger.count("some", [True], noise_multiplier=5.0)
    assert isinstance(ledger.count("some", [True], noise_multiplier=5.0), float)


def test_repeated_release_returns_the_stored_answer(tmp_path: Path) -> None:
    ledger, values = create_ledger(tmp_path, epsilon=100.0), np.arange(5000)
    count = ledger.count("many", values >= 1000, noise_multiplier=5)
    assert abs(count - 4000) < 60
    assert fedtune.Ledger.open(tmp_path / "site.toml").count("many", [], noise_multiplier=5) == count
    histogram = ledger.histogram("kinds", values % 3, bins=[0, 1, 2, 3], noise_multiplier=5, noise="laplace")
    assert [abs(histogram[kind] - expected) < 100 for kind, expected in enumerate((1667, 1667, 1666, 0))] == [True] * 4
    assert ledger.histogram("kinds", [], bins=[0, 1, 2, 3], noise_multiplier=5, noise="laplace") == histogram
    with pytest.raises(ConfigError, match="'kinds': was charged with other settings"):
        ledger.histogram("kinds", values % 3, bins=[0, 1, 3, 2], noise_multiplier=5, noise="laplace")
    total = ledger.sum(
        "sum", np.array([[3.0, 0.0], [0.0, -1.0], [np.nan, 1e300]] * 1000), bound=2.0, noise_multiplier=5
    )
    assert np.abs(np.array(total) - [2000.0, 1000.0]).max() < 100, "3 and 1e300 are clipped to 2, and NaN counts as 0"
    assert len(ledger.spending.runs) == 3
    assert len(json.dumps(ledger.receipt("sum sum").to_json())) > 0
    assert ledger.receipt("sum sum").has_valid_signature()


@pytest.mark.parametrize("build", [np.array, pandas.DataFrame, lambda rows: pandas.DataFrame(rows, dtype=object)])
def test_sum_without_records_has_the_columns_of_its_table(tmp_path: Path, build: Callable[[object], object]) -> None:
    ledger, rows = create_ledger(tmp_path, epsilon=100.0), np.ones((2, 3))
    total = ledger.sum("rows", build(rows), bound=1.0, noise_multiplier=10)
    assert len(total) == 3
    assert ledger.sum("rows", build(rows[:0]), bound=1.0, noise_multiplier=10) == total
    assert len(ledger.sum("none", build(rows[:0]), bound=1.0, noise_multiplier=10)) == 3
    assert len(ledger.sum("numbers", [], bound=1.0, noise_multiplier=10)) == 1


def test_wrong_values_are_refused_without_quoting_them_or_charging(tmp_path: Path) -> None:
    ledger, by_user = create_ledger(tmp_path), create_ledger(tmp_path / "users", unit="user")
    invalid = ([{"a": 1}], [1j], np.array([1j]), [[1, 2], [3]], [[1, 2]], np.ones((2, 2, 2)), ["x"], "x", 5, [10**400])
    for values in (*invalid, np.array(["2024"], dtype="datetime64[D]"), np.ones((2, 0)), np.float64(1)):
        with pytest.raises(ConfigError, match=r"^values: must be") as caught:
            ledger.sum("a", values, bound=1.0, noise_multiplier=10)
        assert caught.value.__cause__ is None
    for values in ([[1]], np.ones((2, 2)), 5):
        with pytest.raises(ConfigError, match=r"^values: must "):
            ledger.histogram("a", values, bins=[1], noise_multiplier=10)
    for bins in ([[1]], [1, 1], []):
        with pytest.raises(ConfigError, match=r"^bins.*: must contain distinct, hashable values, at least one$"):
            ledger.histogram("a", [1], bins=bins, noise_multiplier=10)
    with pytest.raises(ConfigError, match=r"^values: must contain one true or false value per record$"):
        ledger.count("a", np.ones((2, 2)), noise_multiplier=10)
    for users in ([1], [1, 2, 3], [[1], [2]], 5):
        with pytest.raises(ConfigError, match=r"^users: must contain one id per record, a text or a whole number$"):
            by_user.count("a", [1, 1], users=users, noise_multiplier=10)
    for values in (["False"], [2], [float("inf")], [[1]]):
        with pytest.raises(ConfigError, match=r"^values: must contain one true or false value per record$"):
            ledger.count("a", values, noise_multiplier=10)
    assert ledger.spending.runs == by_user.spending.runs == ()


def test_user_level_ledger_counts_each_user_once(tmp_path: Path) -> None:
    ledger = create_ledger(tmp_path, unit="user", epsilon=100.0)
    for users in ({}, {"users": None}):
        with pytest.raises(ConfigError, match="users: must contain the user of each record"):
            ledger.count("a", [1, 1, 1], noise_multiplier=5, **users)
    users_of_rows = [number % 10 for number in range(5000)]
    assert abs(ledger.count("a", [1] * 5000, users=users_of_rows, noise_multiplier=5) - 10) < 60
    spellings = [7, "7", 7.0, np.int64(7), " 7 ", *[float("nan"), None, pandas.NA, pandas.NaT, ""] * 1000]
    ones = [1] * len(spellings)
    assert abs(ledger.count("one", ones, users=spellings, noise_multiplier=5) - 1) < 60, (
        "a person without an id is none"
    )
    assert abs(ledger.sum("two", ones, users=spellings, bound=1, noise_multiplier=5)[0] - 1) < 60
    marks = [True, np.bool_(True), 1, 1.0, *[False, 0, None, float("nan"), pandas.NA] * 1000]
    marks_ledger = create_ledger(tmp_path / "marks", epsilon=100.0)
    assert abs(marks_ledger.count("marks", marks, noise_multiplier=5) - 4) < 60
    with pytest.raises(ConfigError, match="users: must contain the user of each record"):
        create_ledger(tmp_path / "records").count("a", [1], users=[1], noise_multiplier=5)


def test_interrupted_release_counts_as_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = create_ledger(tmp_path)
    monkeypatch.setattr(SiteLedger, "commit", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ledger.count("a", [1], noise_multiplier=20)
    assert ledger.spending.epsilon == fedtune.Ledger(tmp_path / "ledger.db").spending.epsilon > 0


def test_refused_release_charges_nothing(tmp_path: Path) -> None:
    ledger = create_ledger(tmp_path)
    ledger.charge("training", noise_multiplier=1.5, sampling_rate=0.01, steps=100)
    before = ledger.spending.epsilon
    cause = r"release 'gaussian again' .*max_epsilon: epsilon would be \d+\.\d+ in total, at most 3, of which \d.*spent"
    with pytest.raises(fedtune.RefusedError, match=cause) as caught:
        ledger.charge("again", noise_multiplier=0.2)
    assert type(caught.value) is fedtune.RefusedError
    with pytest.raises(ConfigError, match="was already charged: give a repeated release a new name"):
        ledger.charge("training", noise_multiplier=1.5, sampling_rate=0.01, steps=100)
    with pytest.raises(ConfigError, match=r"name = 'training': was charged with other settings: choose another name$"):
        ledger.charge("training", noise_multiplier=1.6, sampling_rate=0.01, steps=100)
    for options in (
        {"sampling_rate": 0.01},
        {"metrics_noise_multiplier": 1.0},
    ):  # a count covers all records: it has no sampling rate
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            ledger.count("a", [1], noise_multiplier=20, **options)
    with pytest.raises(ConfigError, match="noise = 'laplace': must be gaussian if units are sampled"):
        ledger.charge("a", noise_multiplier=20, noise="laplace", sampling_rate=0.5)
    with pytest.raises(ConfigError, match="is read-only"):
        fedtune.Ledger(tmp_path / "ledger.db").count("a", [1], noise_multiplier=20)
    assert fedtune.Ledger(tmp_path / "ledger.db").spending.epsilon == before


def test_invalid_noise_and_steps_errors_name_the_arguments(tmp_path: Path) -> None:
    ledger = create_ledger(tmp_path)
    for charge in (partial(ledger.charge, "a"), partial(ledger.count, "a", [1])):
        with pytest.raises(ConfigError, match=r"noise_multiplier = 0: must be in \[0\.01"):
            charge(noise_multiplier=0)
        with pytest.raises(TypeError, match="noise_multiplier"):
            charge()
    for steps in (1.5, 0):
        with pytest.raises(ConfigError, match=rf"^steps = {steps}: must be"):
            ledger.charge("a", noise_multiplier=1, steps=steps)
    for release in (ledger.count, ledger.histogram, ledger.sum):
        assert {"noise_multiplier", "noise", "users"} <= inspect.signature(release).parameters.keys()
    assert ledger.spending.runs == ()


def test_receipt_requires_an_unambiguous_release_name(tmp_path: Path) -> None:
    ledger = create_ledger(tmp_path)
    with pytest.raises(ConfigError, match=r"name = 'over-65': must be the name of .*; nothing was charged yet"):
        ledger.receipt("over-65")
    ledger.count("over-65", [1], noise_multiplier=20)
    assert ledger.receipt("over-65").run == ledger.receipt("count over-65").run == "count over-65"
    with pytest.raises(ConfigError, match=r"name = 'count': must be the name of .* of this ledger: count over-65"):
        ledger.receipt("count")
    ledger.sum("over-65", [1], bound=1, noise_multiplier=20)
    with pytest.raises(ConfigError, match="is ambiguous: choose one of count over-65, sum over-65"):
        ledger.receipt("over-65")
    assert ledger.receipt("sum over-65").charged_rounds == 1


def test_crash_before_storing_the_answer_keeps_the_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = create_ledger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(SiteLedger, "commit", lambda *arguments: sys.exit("killed"))
        with pytest.raises(SystemExit):
            ledger.count("a", [1], noise_multiplier=20)
    reopened = fedtune.Ledger.open(tmp_path / "site.toml")
    assert reopened.spending.epsilon > 0
    with pytest.raises(ConfigError, match="its result was lost in a crash: choose another name"):
        reopened.count("a", [1], noise_multiplier=20)


def test_ledger_commands_and_report_show_releases(tmp_path: Path) -> None:
    ledger = create_ledger(tmp_path)
    ledger.histogram("kinds", ["a"], bins=["a"], noise_multiplier=20, noise="laplace")
    report = build_ledger_report(tmp_path / "site.toml")
    assert {assumption.code: assumption.status for assumption in report.assumptions}["poisson_sampling"] == "ensured"
    ledger.charge("opacus", noise_multiplier=1.5, sampling_rate=0.01, steps=100)
    for command, text in (
        ("show", "histogram on population, 1 noised sum"),
        ("show", "result stored at the site"),
        ("show", "charge complete: other software computes the release"),
        ("spent", "dp_sgd opacus"),
        ("verify", "Checked"),
    ):
        output = " ".join(run_command("ledger", command, str(tmp_path / "ledger.db")).out.split())
        assert text in output
        assert "ready to send" not in output
    report = build_ledger_report(tmp_path / "site.toml")
    assert not problems(report)
    assumptions = {item.code: (item.status, item.evidence) for item in report.assumptions}
    assert assumptions["poisson_sampling"] == assumptions["clipping_exact"] == ("assumed", "dp_sgd opacus")
    assert "own_releases" in report.released
    assert [release.kind for release in report.facts.releases] == ["own_release", "own_release"]
    assert [mechanism.sampling_run for mechanism in report.sites[0].mechanisms] == ["poisson", "not_recorded"]
