"""Features of Hydra's documentation, as described in docs/hydra.md."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.api.compose import compose_run
from fedtune.cli.main import main
from fedtune.formatting import flatten
from fedtune.lab.studies.trials import Trials
from fedtune.spec import ConfigError

from ..conftest import REPOSITORY, run_python

PAGE = (REPOSITORY / "docs" / "hydra.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in row.strip("| ").split(" | ")) for row in re.findall(r"^\| .*`.* \|$", PAGE, re.M)
]
FILES = re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, re.S)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TODAY", "monday")
    monkeypatch.setenv("COLUMNS", "120")


def test_documented_hydra_features_have_at_most_six_refusals() -> None:
    assert len(ROWS) - 1 >= 30
    assert sum(row[2].startswith("refused: ") for row in ROWS[1:]) <= 6


@pytest.mark.parametrize(("feature", "overrides", "expected"), ROWS[1:], ids=lambda value: str(value)[:40])
def test_hydra_syntax_behaves_as_documented(feature: str, overrides: str, expected: str, capsys: Any) -> None:
    arguments = shlex.split(overrides.strip("`"))
    if expected.startswith(("refused: ", "open: ")):
        with pytest.raises(ConfigError) as caught:
            compose_run(arguments)
        assert "\n" not in str(caught.value)
    elif arguments[0] == "-m":
        assert f"{len(Trials.from_sweep(arguments[1:]).rows)} runs" == expected
    elif any(word.startswith("--") for word in arguments):
        assert main(["simulate", *arguments]) == 0
        assert expected.strip("`") in capsys.readouterr().out
    else:
        key, _, value = expected.strip("`").partition(": ")
        config = compose_run([*arguments, *([] if "name" in overrides else ["name=x"])])
        actual = dict(flatten(config.to_json()))[key]
        actual = list(actual) if isinstance(actual, tuple) else actual
        assert actual == (value if "$" in value else yaml.safe_load(value)), feature


def test_literal_interpolation_from_data_init_is_read_back() -> None:
    table = "${note},team\nhow do I pay,a${x}\nwhere is my card,b\n" + "a word or two more,b\n" * 20
    Path("elsewhere").mkdir()
    Path("elsewhere/${in}.csv").write_text(table)
    arguments = [
        "data",
        "init",
        "elsewhere/${in}.csv",
        "--out",
        "elsewhere/own.yaml",
        "--text",
        "${note}",
        "--label",
        "team",
    ]
    assert main(arguments) == 0
    config = compose_run(["experiment=elsewhere/own.yaml"])
    assert config.data.columns == {"text": "${note}", "label": "team"}
    assert config.data.labels == ("a${x}", "b")
    assert config.data.train_file == "elsewhere/${in}.csv"


@pytest.mark.by_day("basic")
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_hydra_application_works_with_its_launchers(launcher: str, tmp_path: Path) -> None:
    script = REPOSITORY / "simulations" / "hydra_application" / "application.py"
    arguments = ["-m", "experiment=debug", "seed=0,1", "federation.num_rounds=1", "name=job-${seed}"]
    run_python(script, *arguments, f"hydra/launcher={launcher}")
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["job-0", "job-1"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("hydra: {run: {dir: x}}\n", "hydra"),
        ("defaults:\n  - override /hydra/launcher: joblib\n", "override /hydra/launcher"),
        ("defaults: [debug]\nprivacy: {_target_: os.system}\n", "_target_"),
        ("defaults: [debug]\ndata: {labels: [{_target_: os.system}]}\n", "data.labels"),
        ("# @package hydra\nlauncher: {_target_: os.system}\n", "@package"),
    ],
)
def test_experiment_file_with_target_is_refused(text: str, key: str) -> None:
    Path("own.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose_run(["experiment=./own.yaml", "name=x"])
    assert key in str(caught.value)
