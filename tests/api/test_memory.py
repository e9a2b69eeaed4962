"""Simulations on in-memory records."""

import datetime
import json
import math
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.dataset
import pytest

import fedtune
from fedtune.api import memory
from fedtune.data.records import memory_folder
from fedtune.spec import ConfigError, DataError

from .test_public import TINY

TEAMS = ("billing", "sales")
Simulate = Callable[..., fedtune.Run]


def make_tickets(count: int, *, first: int = 0) -> list[dict[str, str]]:
    numbers = range(first, first + count)
    return [{"body": f"ticket {number} about {TEAMS[number % 2]}", "team": TEAMS[number % 2]} for number in numbers]


SITES = {"north": pandas.DataFrame(make_tickets(60)), "south": make_tickets(50, first=60)}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    small = {key: TINY[key] for key in ("runtime.device", "runtime.num_threads", "privacy.noise_multiplier")}
    small |= {"model": "random_bert", "data.max_length": 16, "federation.num_rounds": 1, "training.local_steps": 1}
    return {**small, "training.ignore_weak_signal": True, "tracking.output_dir": tmp_path / "runs", "name": "run"}


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folder for private files, which must be empty at the end."""
    (folder := tmp_path / "private").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def read(data: Any) -> list[dict[str, Any]]:
    with memory.make_private_folder() as folder:
        memory.write_rows(folder / "rows.jsonl", data, at="data", widths=set())
        return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_simulate_trains_on_in_memory_tables_of_two_sites(settings: dict[str, Any], private: Path) -> None:
    modes = dict[str, int]()

    def record_modes(event: fedtune.Progress) -> None:
        for path in private.rglob("*"):
            modes[path.name] = stat.S_IMODE(path.stat().st_mode)
        modes["folder"] = stat.S_IMODE(next(private.iterdir()).stat().st_mode)

    test = pyarrow.Table.from_pylist(make_tickets(20, first=200))
    run = fedtune.simulate(sites=SITES, settings=settings, test=test, progress=record_modes)
    assert run.config.federation.names == ("north", "south")
    assert run.config.data.columns == {"text": "body", "label": "team"}
    assert run.config.data.labels == TEAMS
    assert all(0 < size <= count for size, count in zip(run.config.data.declared_sizes, (60, 50), strict=True))
    assert run.metrics["accuracy"] is not None
    assert modes["north.jsonl"] == modes["test.jsonl"] == modes["own.yaml"] == 0o600
    assert modes["folder"] == modes["sites"] == 0o700
    assert list(private.iterdir()) == []
    assert "about billing" not in (run.folder / "log.txt").read_text()
    assert fedtune.load(run.folder).report().epsilon == run.privacy.epsilon


def test_interrupted_in_memory_run_resumes_and_warns_of_changed_records(
    settings: dict[str, Any], private: Path
) -> None:
    settings["federation.num_rounds"] = 2

    def interrupt(event: fedtune.Progress) -> None:
        if event.stage == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        fedtune.simulate(sites=SITES, settings=settings, progress=interrupt)
    assert list(private.iterdir()) == []
    resume = {"resume": settings["tracking.output_dir"] / "run"}
    assert f'pass settings={{"resume": {str(resume["resume"])!r}}}' in interrupted.value.__notes__[0]
    with pytest.raises(DataError, match=r"in-memory/sites/north\.jsonl'.*: pass it again \(sites="):
        fedtune.simulate(settings=resume)
    with pytest.raises(ConfigError, match="must name the sites of the run: north, south"):
        fedtune.simulate(settings=resume, sites={"north": SITES["north"]})
    with pytest.warns(UserWarning, match="The records of south have changed since the run started: its epsilon holds"):
        run = fedtune.simulate(settings=resume, sites={**SITES, "south": SITES["north"]})
    assert [entry.round for entry in run.rounds] == [1, 2]
    assert "data_changed" in run.result.final.findings


def test_recipe_with_in_memory_records_keeps_its_model(settings: dict[str, Any]) -> None:
    sites: dict[str, Any] = {
        "a": {
            "text": [f"{word} {number}" for number in range(30) for word in ("aaaa", "zzzz")],
            "label": ["x", "y"] * 30,
        }
    }
    sites["b"] = pyarrow.table(sites["a"])
    settings |= {"data.labels": ["x", "y"], "data.declared_sizes": [40, 40]}
    run = fedtune.simulate("debug", settings, sites=sites, validation=sites["a"])
    assert run.config.data.validation_file == "in-memory/validation.jsonl"
    assert (run.config.data.test_fraction, run.config.data.train_fraction) == (0.2, 1.0)
    assert run.config.data.declared_sizes == (40, 40)
    assert run.rounds[0].metrics["accuracy"] is not None
    for override in ({"data.declared_sizes": {"a": 40}}, {"data.declared_sizes.a": 40}):
        with pytest.raises(ConfigError, match=r"data\.declared_sizes"):
            fedtune.simulate("debug", {**settings, **override, "name": "never"}, sites=sites)
    with pytest.raises(ConfigError, match=r"sites = .*must be omitted: the run reads data\.train_file"):
        fedtune.simulate(settings={"resume": _run_on_files(settings)}, sites=sites)


def _run_on_files(settings: Mapping[str, Any]) -> Path:
    """Create a run folder with the settings of a run on data files."""
    folder = Path(settings["tracking.output_dir"]) / "files"
    folder.mkdir()
    text = (folder.parent / "run" / "config.yaml").read_text()
    text = text.replace("in-memory/sites/{site}.jsonl", "rows.csv").replace("kind: file", "kind: iid")
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("progress", [None, False, 1])
def test_simulate_refuses_a_progress_callback_that_is_not_callable(settings: dict[str, Any], progress: Any) -> None:
    with pytest.raises(ConfigError, match=r"progress = .*: must be a function"):
        fedtune.simulate(settings=settings, sites=SITES, progress=progress)
    assert not Path(settings["tracking.output_dir"]).exists()


def test_evaluate_warns_of_training_records(settings: dict[str, Any], tmp_path: Path) -> None:
    for name, first in (("train", 0), ("new", 60)):
        pandas.DataFrame(make_tickets(60, first=first)).to_csv(tmp_path / f"{name}.csv", index=False)
    file = {"train_file": str(tmp_path / "train.csv"), "columns": {"text": "body", "label": "team"}, "labels": TEAMS}
    own = {f"data.{key}": value for key, value in file.items()} | {"data.test_fraction": 0.3}
    own |= {"federation.num_sites": 2, "data.declared_sizes": 20}
    run = fedtune.simulate("own_data", settings | own)
    with pytest.warns(UserWarning, match="trained on records of this file"):
        run.evaluate(tmp_path / "train.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.evaluate(tmp_path / "new.csv")


def test_simulate_refuses_unusable_rows_unless_asked_to_skip_them(settings: dict[str, Any]) -> None:
    sites = {"north": make_tickets(60), "south": [*make_tickets(40), {"body": " ", "team": "sales"}]}
    with pytest.raises(DataError, match=r"south:41, column 'body' = 'blank': must not be blank"):
        fedtune.simulate(settings=settings, sites=sites)
    with pytest.warns(UserWarning, match="1 of 101 rows"):
        run = fedtune.simulate(settings=settings | {"data.on_bad_record": "skip"}, sites=sites)
    assert sum(run.config.declared_sizes().values()) <= 100


def test_simulate_trains_on_arrays_with_declared_ranges(settings: dict[str, Any]) -> None:
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(60, 2))
    labels = (inputs[:, 0] > 0).astype(int)
    ranges = {"data.features": [{"columns": ["x0", "x1"], "range": [-3, 3]}]}
    del settings["model"], settings["data.max_length"]
    with pytest.raises(ConfigError, match=r"data\.features"):
        fedtune.simulate(settings=settings, sites={"a": (inputs, labels)})
    run = fedtune.simulate(settings=settings | ranges, sites={"a": (inputs, labels), "b": (inputs, labels)})
    assert (run.config.task, run.config.data.labels) == ("classification", ("0", "1"))
    assert run.predict_proba(inputs[:3]).shape == (3, 2)
    assert len(run.predict(inputs[:3])) == 3
    wider = np.column_stack([inputs[:, 1], inputs])  # without names, the first two columns would be taken
    resume = {"resume": run.folder}
    for more in ({"a": (inputs, labels), "b": (wider, labels)}, {"a": (wider, labels), "b": (wider, labels)}):
        with pytest.raises(DataError, match=r"^[ab]:1 = '3 columns': must have as many columns as every site"):
            fedtune.simulate(settings=resume, sites=more)
    with pytest.raises(DataError, match=r"^b:1 = '3 columns': must have as many columns as every site .*: 2$"):
        fedtune.simulate(settings=settings | ranges, sites={"a": (inputs, labels), "b": (wider, labels)})
    more = {"a": (wider, labels), "b": (wider, labels)}
    with pytest.raises(
        ConfigError, match=r"^sites = '3 columns': must be only those that data\.features uses, 2: remove"
    ):
        fedtune.simulate(settings=settings | ranges, sites=more)
    with pytest.raises(DataError, match=r"^test:1 = '3 columns'"):
        fedtune.simulate(settings=settings | ranges, sites={"a": (inputs, labels)}, test=(wider, labels))
    with pytest.raises(ConfigError, match=r"^test = 'records': must be omitted, as in the run's first call$"):
        fedtune.simulate(settings=resume, sites=dict.fromkeys("ab", (inputs, labels)), test=(inputs, labels))
    for use in (run.predict_proba, run.predict, lambda rows: run.evaluate((rows, labels[: len(rows)]))):
        for rows in (wider[:3], wider[:3, :1]):
            with pytest.raises(DataError, match=r"^data:1 = '\d columns?': must have as many columns as .*: 2$"):
                use(rows)
    with pytest.raises(DataError, match=r"2$"):
        run.predict(wider[:3].tolist())
    frame = pandas.DataFrame(wider[:3], columns=["more", "x0", "x1"])
    named = np.array([(row[1], row[0]) for row in inputs[:3]], dtype=[("x1", float), ("x0", float)])
    for by_name in (frame, named):
        np.testing.assert_array_equal(run.predict_proba(by_name), run.predict_proba(inputs[:3]))
    with pytest.raises(DataError, match=r"^data:1, feature:x0 = "):
        run.predict_proba(np.array([[np.nan, 1]]))


class Frame:
    """Stub of a polars data frame."""

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, Any]]:
        assert named
        yield {"text": "a", "n": 1}


class DataSet:
    """Stub of a Hugging Face dataset."""

    column_names = ("text", "n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"text": "a", "n": 1}


class Stream:
    """Stub of a table with Arrow's C stream protocol."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return pyarrow.table({"text": ["a"], "n": [1]}).__arrow_c_stream__(requested_schema)


ROW = [{"text": "a", "n": 1}]


@pytest.mark.parametrize(
    "data",
    [
        ROW,
        iter(ROW),
        pyarrow.dataset.dataset(pyarrow.Table.from_pylist(ROW)),
        pandas.DataFrame(ROW),
        pandas.DataFrame(ROW).convert_dtypes(),
        pyarrow.Table.from_pylist(ROW),
        pyarrow.RecordBatch.from_pylist(ROW),
        {"text": np.array(["a"]), "n": pandas.Series([1])},
        (pandas.DataFrame({"text": ["a"]}), pandas.Series([1], name="n")),
        Frame(),
        DataSet(),
        Stream(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_iter_rows_returns_the_same_rows_for_every_library(data: Any) -> None:
    assert read(data) == ROW


def test_iter_rows_converts_scikit_learn_arrays_to_columns() -> None:
    inputs = np.array([[1.5, 2.0]])
    assert read((inputs, np.array([3]))) == [{"x0": 1.5, "x1": 2.0, "label": 3}]
    assert read((inputs, np.array([3.5]))) == [{"x0": 1.5, "x1": 2.0, "target": 3.5}]
    assert read((["a text"], ["x"])) == [{"text": "a text", "label": "x"}]
    named = np.array([(1.5, 2.0)], dtype=[("b", float), ("a", float)])
    assert read(named) == [{"b": 1.5, "a": 2.0}]
    assert read((named, [3])) == [{"b": 1.5, "a": 2.0, "label": 3}]
    dated = np.array([("2026-03-14",)], dtype=[("when", "datetime64[ns]")])
    assert read(dated) == [{"when": "2026-03-14T00:00:00"}]
    assert read((np.array(["a text"]), ["x"])) == [{"text": "a text", "label": "x"}]
    with pytest.raises(DataError, match=r"data, y = '1 values': must have one value for each of the 2 rows of X"):
        read((np.eye(2), [1]))
    with pytest.raises(DataError, match=r"data, y = 'a table': must have one value for each row"):
        read((np.eye(2), np.eye(2)))


def test_write_rows_converts_cells_to_json() -> None:
    cells = {
        "text": np.str_("a"),
        "number": np.float32(0.5),
        "whole": np.int64(2),
        "flag": np.bool_(True),
        "list": np.array([1, 2]),
        "turns": ({"role": "user", "content": "a"},),
        "none": pandas.NA,
        "nan": float("nan"),
        "when": pandas.Timestamp("2026-03-14"),
        "of_numpy": np.datetime64("2026-03-14", "ns"),
        "day": datetime.date(2026, 3, 14),
        "never": pandas.NaT,
        "quiet": Decimal("NaN"),
        "signaling": Decimal("sNaN"),
        "price": Decimal("1.50"),
        "count": Decimal("2e2"),
        "zero": np.array(3),
        "long": np.longdouble(1.5),
    }
    (row,) = read([cells])
    assert row["turns"] == [{"role": "user", "content": "a"}]
    assert [row[name] for name in ("none", "nan", "never", "quiet", "signaling")] == [None] * 5
    assert [row[name] for name in ("price", "count", "zero", "long")] == [1.5, 200, 3, 1.5]
    assert (row["when"], row["of_numpy"], row["day"]) == ("2026-03-14T00:00:00", "2026-03-14T00:00:00", "2026-03-14")
    columns = {"text": ["a"], "when": np.array(["2026-03-14"], "datetime64[ns]")}
    assert read(columns) == [{"text": "a", "when": "2026-03-14T00:00:00"}]
    assert [row[name] for name in ("text", "number", "whole", "flag", "list")] == ["a", 0.5, 2, True, [1, 2]]


HUGE = (10**5000, -(10**300), math.inf, np.float32("inf"), *map(Decimal, ("Infinity", "-1e1000000")))


class ReturnsItself:
    """A value whose `tolist` returns itself."""

    def tolist(self) -> "ReturnsItself":
        return self


def make_cycle() -> list[Any]:
    cell: list[Any] = []
    cell.extend([cell, cell])
    return cell


def make_nested() -> dict[str, Any]:
    cell: dict[str, Any] = {}
    for _ in range(3000):
        cell = {"x": cell}
    return cell


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data = 'NoneType': must be a data frame"),
        (3, "data = 'int': must be a data frame"),
        (b"rows", "for files, set data.train_file"),
        ([ROW], "data:1 = 'list': must be a mapping from column to value"),
        ({"train": DataSet(), "test": DataSet()}, "data = 'the splits train, test': must be one data set"),
        ({"text": "a"}, "must map each column to its values"),
        ({"a": [1], "b": [1, 2]}, "columns of different lengths"),
        ([{"a": 1}, {"a": object()}], r"data:2, column 'a' = 'object': must be text, a number"),
        ([{"a": b"image"}], r"data:1, column 'a' = 'bytes': .*need a file"),
        ([{"1": 1, 1: 2}], r"data:1 = 'a duplicate column': must have distinct column names"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), r"data, column 'a' = 'a duplicate column'"),
        ({1: ["a"], "1": ["b"]}, r"data, column '1' = 'a duplicate column'"),
        (pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), r"data, column 'a' = 'a duplicate column'"),
        (pyarrow.RecordBatch.from_arrays([[1], [2]], names=["a", "a"]), r"data, column 'a' = 'a duplicate column'"),
        (([[1, 2], [1]], [0, 1]), r"data:2 = '1 column': must have as many columns as every site"),
        (np.zeros((1, 1), dtype=[("a", float)]), "data:1 = 'list': must be a text, or a row of numbers"),
        (np.array(3), "data = 'ndarray': must be a data frame"),
        ({"a": np.array(3)}, "data = 'int': must be a list or an array"),
        ((np.eye(2), np.array(3)), "data, y = 'int': must be a list or an array"),
        *(([{"a": cell}], "column 'a' = '.*': must be a finite number below 1e300") for cell in HUGE),
        ((pandas.DataFrame({"a": [1, 2]}), pandas.Series([0, 1], name="a")), "data, y = 'a': must have another name"),
        (
            (np.eye(2), pandas.DataFrame({"a": [0, 1], "b": [1, 0]})),
            "data, y = 'a table': must have one value for each",
        ),
        (((text for text in "ab"), ["x", "y"]), "data:1 = 'str': must be a mapping from column to value"),
        ([{"a": np.datetime64("99999-01-01")}], "column 'a' = 'a date': must be in the years 1 to 9999"),
        ([{"a": ReturnsItself()}], "column 'a' = 'ReturnsItself': must be text, a number"),
        *(([{"a": cell}], "column 'a' = '.*': must not contain itself") for cell in (make_cycle(), make_nested())),
    ],
)
def test_unsupported_data_is_refused_with_its_location(data: Any, message: str, private: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(data)
    assert list(private.iterdir()) == []


def test_bad_records_are_reported_by_site_without_leftover_files(settings: dict[str, Any], private: Path) -> None:
    bad = [*make_tickets(40), {"body": " ", "team": "sales"}]
    with pytest.raises(DataError, match=r"^south:41, column 'body' = 'blank': must not be blank"):
        fedtune.simulate(
            "own_data",
            settings | {"data.labels": TEAMS, "data.columns": {"text": "body", "label": "team"}},
            sites={"north": make_tickets(40), "south": bad},
        )
    with pytest.raises(DataError, match=r"^sites"):
        fedtune.simulate(settings=settings, sites={"north": [{"n": None}]})
    for sites in ({}, [make_tickets(3)]):
        with pytest.raises(ConfigError, match="must map each site to its records"):
            fedtune.simulate(settings=settings, sites=sites)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sites = '\.\./north': must consist of"):
        fedtune.simulate(settings=settings, sites={"../north": make_tickets(3)})
    with pytest.raises(ConfigError, match=r"data\.train_file = 'rows\.csv': cannot be combined with records in memory"):
        fedtune.simulate(settings=settings | {"data.train_file": "rows.csv"}, sites=SITES)
    with pytest.raises(ConfigError, match=r"sites: is missing"):
        fedtune.simulate("debug", settings, test=make_tickets(3))
    with pytest.raises(ConfigError, match="cannot be combined with records in memory: write them to files"):
        fedtune.simulate(settings=settings | {"runtime": "ray"}, sites=SITES)
    assert list(private.iterdir()) == []
    assert not settings["tracking.output_dir"].exists()
    assert memory_folder.get() is None


def test_ambiguous_columns_error_suggests_settings(settings: dict[str, Any]) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    texts = [[" ".join(words[(n * k + i * i) % 10] for i in range(12)) + f" {n}" for k in (3, 7)] for n in range(40)]
    rows = [{"first": first, "second": second, "team": TEAMS[n % 2]} for n, (first, second) in enumerate(texts)]
    with pytest.raises(DataError) as caught:
        fedtune.simulate(settings=settings, sites={"north": rows})
    assert str(caught.value).startswith("sites, columns first, second = 'several texts or images': must be one (data.")
    assert str(caught.value).endswith('as in settings={"data.columns": {"text": COLUMN}}')
    assert "--" not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"^data\.columns\.text = 'no': is not one of the columns first, second, team$"
    ):
        fedtune.simulate(settings=settings | {"data.columns.text": "no"}, sites={"north": rows})
    with pytest.raises(ConfigError, match=r"privacy\.epsilom = '3': .*did you mean privacy\.epsilon"):
        fedtune.simulate(settings=settings | {"privacy.epsilom": 3}, sites={"north": rows})
    with pytest.raises(ConfigError, match=r"model = 'minilmm': must be one of .*minilm"):
        fedtune.simulate(settings=settings | {"model": "minilmm"}, sites={"north": rows})
    with pytest.raises(ConfigError, match=r"settings = 'list': must map names to values"):
        fedtune.simulate(settings=["model=minilm"], sites={"north": rows})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "suggestion"), [({"north": make_tickets(3)}, "sites"), ({"privacy.epsilon": 3}, "settings")]
)
def test_dict_as_recipe_is_refused_with_a_suggestion(first: Any, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe = 'a dict': .*did you mean {suggestion}=\.\.\.\?"):
        fedtune.simulate(first)


def test_optional_libraries_are_not_imported_for_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pandas", "pyarrow", "polars", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    assert read(ROW) == read(DataSet()) == read(Frame()) == ROW
    with pytest.raises(ConfigError, match="data: requires pyarrow"):
        read(Stream())
