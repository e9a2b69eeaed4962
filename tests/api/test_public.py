"""The Python API of `import fedtune`."""

import asyncio
import doctest
import inspect
import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import fedtune
from fedtune.api import public
from fedtune.api.compose import compose_recipe
from fedtune.api.public_ledger import to_data_frame
from fedtune.lab.audit.experiment import audit as audit_run
from fedtune.spec import ConfigError

from ..conftest import run_python

TINY: Mapping[str, Any] = json.loads(Path(__file__).with_name("tiny.json").read_text())


def make_tiny_settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {**TINY, "tracking.output_dir": folder, "name": "run", **overrides}


@pytest.fixture(scope="module")
def progress_messages() -> list[fedtune.Progress]:
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, progress_messages: list[fedtune.Progress]) -> fedtune.Run:
    settings = make_tiny_settings(tmp_path_factory.mktemp("public"), **{"privacy.planned_runs": 2})
    return fedtune.simulate("debug", settings, progress=progress_messages.append)


def test_simulate_returns_metrics_rounds_privacy_and_report(run: fedtune.Run) -> None:
    assert set(run.metrics) >= {"accuracy", "loss"}
    assert [entry.round for entry in run.rounds] == [1, 2]
    assert run.privacy.epsilon is not None
    assert 0 < run.privacy.epsilon < 8
    assert (run.adapter / "adapter_config.json").is_file()
    assert run.report().epsilon == run.privacy.epsilon
    assert (run.folder / "report.html").is_file()


def test_progress_events_follow_the_order_of_the_run(
    run: fedtune.Run, progress_messages: list[fedtune.Progress]
) -> None:
    rounds = [event for event in progress_messages if event.stage == "round"]
    assert [event.round for event in rounds] == list(run.rounds)
    assert [(event.done, event.total) for event in rounds] == [(1, 2), (2, 2)]
    assert progress_messages.index(
        next(event for event in progress_messages if event.stage == "training")
    ) < progress_messages.index(rounds[0])


def test_progress_total_includes_the_spare_rounds_of_failed_rounds() -> None:
    config = compose_recipe("debug", {"federation.num_rounds": 2, "federation.spare_rounds": 1})
    events = list[fedtune.Progress]()
    listener = public.CallbackListener(config, events.append)
    rounds: tuple[Any, ...] = ()
    for number, sites in enumerate((("site-1",), (), ("site-1",)), 1):
        rounds = (*rounds, SimpleNamespace(sites=sites))
        listener.on_round_finished(cast(Any, SimpleNamespace(round=number, rounds=rounds)))
    listener.on_prepared(None, None, cast(Any, SimpleNamespace(round=2, rounds=rounds[:2])))
    assert [(event.done, event.total) for event in events] == [(1, 2), (2, 3), (3, 3), (2, 3)]


def test_data_warnings_point_to_the_calling_code() -> None:
    listener = public.CallbackListener(compose_recipe("debug"), public.ignore_progress)
    with pytest.warns(UserWarning, match="2 of 300 rows") as caught:
        listener.note("2 of 300 rows cannot be used")
    assert caught[0].filename == __file__


def test_distill_method_has_the_arguments_of_the_function() -> None:
    from fedtune.lab.distillation import distill

    method, function = (inspect.signature(target).parameters for target in (fedtune.Run.distill, distill))
    assert {*method} - {"self"} == {*function} - {"config", "adapter"}
    for name in ("columns", "format", "int8", "seed", "passes"):
        assert method[name].default == function[name].default


def test_classifier_predicts_labels_and_refuses_to_generate(run: fedtune.Run) -> None:
    first, second = run.predict(["I lost my card", "Where is my money?"])
    assert first
    assert first != second
    with pytest.raises(ValueError, match="task = 'classification': does not generate text"):
        run.generate("Hello")
    with pytest.raises(ValueError, match="must not be blank"):
        run.predict([" "])
    assert run.predict("Where is my money?") == [second], "a single text is one record"
    for value in (None, [None], [3]):
        with pytest.raises(ValueError, match="must be a text"):
            run.predict(value)  # type: ignore[arg-type]


def test_run_is_loaded_from_its_folder_or_adapter(run: fedtune.Run) -> None:
    assert fedtune.load(run.folder) == fedtune.load(str(run.adapter)) == run
    with pytest.raises(ValueError, match=r"must contain a config\.yaml"):
        fedtune.load(run.folder / "sites")


def test_runs_are_compared_on_the_same_records(run: fedtune.Run) -> None:
    events = list[fedtune.Progress]()
    comparison = fedtune.compare({"tuned": run}, progress=events.append)
    assert [event.stage for event in events] == ["scoring tuned"]
    assert comparison.estimate("tuned", "accuracy").value == pytest.approx(run.metrics["accuracy"])
    difference = comparison.compare_models("base", "tuned").difference
    assert difference.low <= difference.value <= difference.high
    for models in ({}, {"base": run}, [run], {"tuned": run.folder}, {1: run}):
        with pytest.raises(ValueError, match=r"must map at least one string to a fedtune\.Run, and base is reserved"):
            fedtune.compare(models)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"score = 'precision': must be one of accuracy"):
        comparison.compare_models("base", "tuned", "precision")
    with pytest.raises(ValueError, match="model = 'tunned': must be one of base, tuned"):
        comparison.compare_models("base", "tunned")


@pytest.mark.nightly
def test_personalize_creates_an_adapter_for_one_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"data.declared_sizes": 180, "data.train_fraction": 0.04, "federation.num_rounds": 1}
    run, events = fedtune.simulate("debug", make_tiny_settings(tmp_path, **settings)), list[fedtune.Progress]()
    (personalized,) = fedtune.personalize(run, ["site-2"], progress=events.append).values()
    assert set(personalized.sides.measured) == {"base", "alone", "shared", "own"}
    difference = personalized.sides.compare_models("shared", "own").difference
    assert difference.low <= difference.value <= difference.high
    assert any("site-2: training its personalized adapter" in event.stage for event in events)
    loaded = fedtune.load(personalized.folder)
    assert loaded.folder == run.folder / "private_to_site-2"
    assert loaded.predict(["I lost my card"])[0]
    with pytest.raises(ValueError, match="is private to 'site-2' and has no guarantee"):
        fedtune.personalize(loaded)
    assert tuple(capsys.readouterr()) == ("", "")


def test_rounds_and_ledger_events_convert_to_data_frames(run: fedtune.Run) -> None:
    pandas = pytest.importorskip("pandas")
    rounds = run.to_frame()
    assert isinstance(rounds, pandas.DataFrame)
    assert list(rounds["sites"]) == [len(entry.sites) for entry in run.rounds]
    events = fedtune.Ledger(run.folder / "sites" / "site-1" / "ledger.db").to_frame()
    assert list(events["kind"]).count("commit") == 2
    empty = to_data_frame([], ("round", "seconds"), vars)
    assert (empty.index.name, list(empty.columns), len(empty)) == ("round", ["seconds"], 0)


def test_audit_run_returns_the_run_and_its_findings(tmp_path: Path) -> None:
    run, audit = audit_run("debug", make_tiny_settings(tmp_path), attack={"canaries": 20})
    assert run.rounds
    assert not audit.exceeded
    with pytest.raises(ValueError, match="canaries"):
        audit_run("debug", make_tiny_settings(tmp_path, name="other"), attack={"canaries": 1})
    with pytest.raises(ValueError, match=r"audit\.canary = 5: is not an audit setting"):
        audit_run("debug", make_tiny_settings(tmp_path, name="other"), attack={"canary": 5})
    with pytest.raises(ValueError, match=r"audit\.canaries = 'many': must be a whole number"):
        audit_run("debug", make_tiny_settings(tmp_path, name="other"), attack={"canaries": "many"})
    with pytest.raises(ValueError, match=r"audit\.kind = 'sensitivity': does not train a run"):
        audit_run("debug", make_tiny_settings(tmp_path, name="other"), attack={"kind": "sensitivity"})


def test_ledger_read_writes_no_files(run: fedtune.Run) -> None:
    path = run.folder / "sites" / "site-1" / "ledger.db"
    before = path.read_bytes()
    ledger = fedtune.Ledger(path)
    assert [charged.rounds for charged in ledger.spending.runs] == [2]
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"must be a ledger\.db"):
        fedtune.Ledger(run.folder / "none.db")


def test_finished_run_is_renewed_with_the_same_ledgers(run: fedtune.Run, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"renew": run.folder, "name": "later"}
    assert [period.number for period in fedtune.plan(settings=settings).calendar] == [2]
    later = fedtune.simulate(settings=settings, progress=True)
    assert "round 2/2 | 2/2 sites | validation: " in capfd.readouterr().err, "the same lines as the command"
    runs = fedtune.Ledger(run.folder / "sites" / "site-1" / "ledger.db").spending.runs
    assert [charged.run for charged in runs] == [run.config.run_id(), later.config.run_id()]
    with pytest.raises(ValueError, match=r"renew = .*was the last of privacy\.planned_runs = 2"):
        fedtune.simulate(settings={"renew": later.folder})


def test_invalid_setting_raises_value_error_with_the_command_line_message(tmp_path: Path, command: Any) -> None:
    for settings in ({"privacy.epsilon": -1}, {"privacy.epsilo": 3}, {"privacy": "nonee"}, {"lora.rank": None}):
        ((key, value),) = settings.items()
        with pytest.raises(ConfigError) as raised:
            fedtune.simulate("debug", make_tiny_settings(tmp_path, **settings))
        argument = "null" if value is None else f"'{value}'" if isinstance(value, str) else value
        arguments = [f"{name}={word}" for name, word in make_tiny_settings(tmp_path).items()]
        outcome = command("simulate", "experiment=debug", *arguments, f"{key}={argument}")
        assert outcome.code == 2
        assert " ".join(str(raised.value).split()) in " ".join(outcome.err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["a'b", 'a"b', "a,b", "ends in \\", "\\'", "{prompt}\nnew line", "ä = [1]", "null", "3"]
)
def test_string_settings_are_passed_unchanged(text: str) -> None:
    settings = {"data.columns": {"text": text, "label": "category"}}
    config = compose_recipe("debug", settings)
    assert config.data.columns["text"] == text
    assert compose_recipe(compose_recipe("debug"), settings).data.columns == config.data.columns


def test_simulate_accepts_a_run_config(tmp_path: Path) -> None:
    config = compose_recipe("debug", make_tiny_settings(tmp_path))
    changed = compose_recipe(config, {"name": "other", "privacy.noise_multiplier": 5})
    assert (changed.name, changed.privacy.noise_multiplier) == ("other", 5.0)
    assert fedtune.plan(changed).epsilon < fedtune.plan(config).epsilon
    with pytest.raises(ConfigError, match="not a setting"):
        compose_recipe(config, {"privacy.epsilo": 3})


def test_simulate_prints_nothing_in_a_running_event_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: fedtune.Run
) -> None:
    async def run_cell() -> fedtune.Run:
        return fedtune.simulate("debug", make_tiny_settings(tmp_path, **{"runtime.seeded_noise": True}))

    assert asyncio.run(run_cell()).rounds
    assert tuple(capsys.readouterr()) == ("", "")


def test_importing_fedtune_loads_no_heavy_library() -> None:
    code = (
        "import sys, fedtune, os;"
        "print(sorted({'torch', 'flwr', 'hydra', 'pydantic', 'numpy'} & set(sys.modules)));"
        "print(os.environ['MKL_CBWR'], fedtune.process.torch_came_first);"
        "import torch; del sys.modules['fedtune.process'], os.environ['MKL_CBWR']; import fedtune.process as late;"
        "print(late.torch_came_first)"
    )
    assert run_python("-c", code) == "[]\nAUTO,STRICT False\nTrue\n"


def test_public_names_have_docstrings_and_shadow_no_packages() -> None:
    rooms = {path.name for path in Path(fedtune.__file__).parent.iterdir() if path.is_dir()}
    for name in fedtune.__all__:
        assert getattr(fedtune, name).__doc__
        assert name not in rooms


def test_docstring_examples_of_every_module_are_correct() -> None:
    root = Path(fedtune.__file__).parent
    texts = {path: path.read_text() for path in root.rglob("*.py")}
    assert not [path for path, text in texts.items() if re.search(r"^\s*>> ", text, re.MULTILINE)], "no doctest runs it"
    for path in (path for path, text in texts.items() if ">>> " in text):
        parts = path.relative_to(root.parent).with_suffix("").parts
        assert not doctest.testmod(import_module(".".join(parts).removesuffix(".__init__"))).failed, path


@pytest.mark.parametrize("module", [fedtune, public], ids=["fedtune", "public"])
def test_docstring_examples_are_correct(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert not result.failed
