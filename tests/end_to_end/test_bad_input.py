"""Every mistake a person can make ends with exit code 2 and one line that names key, value and bound."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ..conftest import command, files_in, simulate, tiny


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without privacy; not to be changed."""
    folder: Path = simulate("privacy=none", into=tmp_path_factory.mktemp("finished"))
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """Run with a mistake; return the one line that says so.  Nothing may be left behind."""

    def run(*overrides: str, multirun: bool = False) -> str:
        runs = tmp_path / "runs"
        runs.mkdir(exist_ok=True)
        outcome = command("simulate", *(["-m"] if multirun else []), *tiny(*overrides, into=runs))
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.out + outcome.err
        assert list(runs.iterdir()) == []
        message = outcome.message
        assert isinstance(message, str)
        return message

    return run


# override, what the line must name: key, value, bound; of each bound that no spec has by itself
_WRONG_VALUES = [
    ("privacy.epsilonn=3", "privacy.epsilonn", "'3'", "not a setting of fedtune; did you mean privacy.epsilon?"),
    ("+privacy.new=3", "privacy.new", "3", "not a setting of fedtune"),
    ("hydra.run.dir=elsewhere", "hydra.run.dir", "'elsewhere'", "not a setting of fedtune"),
    ("privacy.epsilon=much", "privacy.epsilon", "'much'", "must be a number"),
    ("federation.num_rounds=1.5", "federation.num_rounds", "1.5", "must be a whole number"),
    ("federation.num_rounds=true", "federation.num_rounds", "true", "must be a number"),
    ("training.optimizer=adam", "training.optimizer", "'adam'", "must be 'adamw' or 'sgd'"),
    ("privacy.delta=0.012", "privacy.delta", "0.012", "below 1 / data.declared_sizes = 0.0111"),
    ("privacy.unit=user", "data.columns", "'label': 'label'", "must name the column for role 'user'"),
    ("privacy.metrics=noised", "data.heldout_fraction", "0", "must be above 0 for privacy.metrics = noised"),
    ("privacy.metrics=noised_by_group", "privacy.metrics", "'noised_by_group'", "must be 'none' or 'noised'"),
    ("data.dataset='our patients'", "data.dataset", "'our patients'", "letters, digits, '-', '_' and '.'"),
    ("data.declared_sizes=[90,90,90]", "data.declared_sizes", "[90, 90, 90]", "one for each of 2 sites"),
    ("data.max_length=9999", "data.max_length", "9999", "at most the model's 512"),
    ("data.train_file=nowhere.jsonl", "data.train_file", "'nowhere.jsonl'", "no such file"),
    ("data.prompt_template=Text", "data.prompt_template", "'Text'", "task classification does not use it"),
    ("federation.num_sites=500", "data.train_file", "train.jsonl.gz", "without a record"),
    ("data.heldout_fraction=0.999", "data.train_file", "train.jsonl.gz", "without a record"),
    ("lora.target_modules=[nothing]", "lora.target_modules", "'nothing'", "must be among the base's modules: dense"),
    ("model.path=/no/such/folder", "model.path", "'/no/such/folder'", "neither a folder on this machine"),
    ("experiment=nonesuch", "experiment", "'nonesuch'", "must be one of banks_intents, debug"),
    ("privacy.epsilon=1,3", "privacy.epsilon", "'1,3'", "add -m to run each"),
    ("runtime=deployment", "runtime", "'deployment'", "is for real sites: fedtune run"),
    ("runtime.kind=moon", "runtime.kind", "'moon'", "must be 'simulation'"),
    ("name=../up", "name", "'../up'", "plain folder name"),
    (f"name={'n' * 201}", "name", "nnn", "at most 200 characters"),
    ("privacy.epsilon=[1", "override", "'privacy.epsilon=[1'", "must look like key=value"),
    ("=3", "override", "'=3'", "must look like key=value"),
    ("privacy.epsilon==3", "override", "'privacy.epsilon==3'", "must have one equals sign: privacy.epsilon=3"),
    ("debug", "override", "'debug'", "must look like key=value; did you mean experiment=debug?"),
    ("privacy.epsilon=${nope}", "privacy.epsilon", "'${nope}'", "Interpolation key 'nope' not found"),
]


@pytest.mark.parametrize(("override", "key", "value", "bound"), _WRONG_VALUES, ids=[row[0] for row in _WRONG_VALUES])
def test_a_wrong_setting_is_named(refuse: Callable[..., str], override: str, key: str, value: str, bound: str) -> None:
    # Noise that is given, and too small, is a mistake of its own; here the epsilons are tried without it.
    without_noise = ["privacy.noise_multiplier=null"] if override.startswith("privacy.epsilon") else []
    message = refuse(*without_noise, override)
    assert message.startswith(f"{key} = ")
    assert value in message
    assert bound in message


def test_noise_too_small_for_the_target(refuse: Callable[..., str]) -> None:
    message = refuse("privacy.epsilon=0.4")
    assert message == "privacy.noise_multiplier = 4.0: gives epsilon 0.4135 over 4 steps, above privacy.epsilon = 0.4"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so that runtime.device=cuda is right")
def test_cuda_without_a_gpu(refuse: Callable[..., str]) -> None:
    assert refuse("runtime.device=cuda").startswith("runtime.device = 'cuda': needs a GPU")


def test_one_wrong_value_of_a_sweep_stops_it_before_its_first_run(refuse: Callable[..., str]) -> None:
    assert refuse("privacy.epsilon=8,0", multirun=True).startswith("privacy.epsilon = 0.0")


GOOD = json.dumps({"text": "where is my card", "label": "card_arrival"})


@pytest.mark.parametrize(
    ("key", "line", "bound"),
    [
        ("train_file", '{"text": 3, "label": "card_arrival"}', "text"),
        ("validation_file", '{"txt": "a", "label": "card_arrival"}', "data.columns.text"),
        ("test_file", '{"text": "a", "label": "parking"}', "data.labels"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(
    refuse: Callable[..., str], tmp_path: Path, key: str, line: str, bound: str
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    message = refuse(f"data.{key}={file}", "data.train_fraction=1.0", "federation.num_sites=1")
    assert f"{file}:2" in message
    assert bound in message


def test_a_name_that_is_taken(finished: Path, tmp_path: Path) -> None:
    before = files_in(finished)
    outcome = command("simulate", *tiny("privacy=none", into=tmp_path))
    assert outcome.failed().startswith("name = 'run': is taken")
    assert f"resume={finished}" in outcome.message
    assert files_in(finished) == before


def test_a_folder_of_another_configuration_is_refused_with_what_differs(finished: Path, tmp_path: Path) -> None:
    before = files_in(finished)
    changed = ("privacy=none", "training.learning_rate=0.5", "runtime.micro_batch_tokens=7", f"resume={finished}")
    outcome = command("simulate", *tiny(*changed, into=tmp_path))
    assert outcome.failed().startswith(f"resume = '{finished}': was made with another configuration")
    assert "training.learning_rate was 0.01, is 0.5" in outcome.message
    assert "micro_batch_tokens" not in outcome.message, "only what may change a result stands in the way"
    assert files_in(finished) == before


def test_resuming_what_is_no_run_folder(tmp_path: Path) -> None:
    outcome = command("simulate", f"resume={tmp_path / 'gone'}")
    assert (outcome.code, outcome.message) == (2, f"resume = '{tmp_path / 'gone'}': must be a run folder")
    assert "must hold a config.yaml" in command("simulate", f"resume={tmp_path}").failed()
    assert list(tmp_path.iterdir()) == []


def test_a_broken_config_in_a_folder_to_resume(finished: Path) -> None:
    for text in ("a: [", "- 1\n", "name: x\n"):
        (finished / "config.yaml").write_text(text)
        assert command("simulate", f"resume={finished}").code == 2


@pytest.mark.parametrize("arguments", [("RUN",), ("RUN", "--data", "FILE", "--device", "tpu"), ("--data", "FILE")])
def test_evaluate_without_what_it_needs(arguments: tuple[str, ...]) -> None:
    assert command("evaluate", *arguments).failed()


def test_evaluate_names_what_is_wrong(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a", "label": "parking"}\n')
    assert f"{file}:1" in command("evaluate", str(finished), "--data", str(file), "--device", "cpu").failed()
    outcome = command("evaluate", str(finished), "--data", str(tmp_path / "gone.csv"), "--device", "cpu")
    assert outcome.failed().startswith("--data = ")
    assert "config.yaml" in command("evaluate", str(tmp_path), "--data", str(file)).failed()
    for path in (finished / "adapter").iterdir():
        path.unlink()
    (finished / "adapter").rmdir()
    assert "resume the run first" in command("evaluate", str(finished), "--data", str(file)).failed()
