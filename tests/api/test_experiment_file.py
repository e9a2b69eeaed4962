"""`experiment=` may be a file anywhere: plain data, composed as conf/experiment's are."""

from pathlib import Path

import pytest

from fedtune.api.compose import compose_run
from fedtune.spec import ConfigError
from fedtune.studies.trials import Trials

PAGE = """\
defaults:
  - own_data
  - override /model: random_bert
name: tickets
data:
  train_file: tickets.csv
  columns: {text: body, label: team}
  labels: [0, 1]
  declared_sizes: 100
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "tickets.yaml"
    file.write_text(PAGE)
    (tmp_path / "tickets.csv").write_text("body,team\na,0\n")
    return file


def test_a_file_is_composed_as_an_experiment_of_conf(page: Path) -> None:
    config = compose_run([f"experiment={page}"])
    assert (config.name, config.model.path, config.training.optimizer) == ("tickets", "random:bert", "adamw")
    assert config.data.columns == {"text": "body", "label": "team"}
    assert config.data.labels == ("0", "1"), "whole numbers are taken as text"
    assert config.data.train_file == str(page.parent / "tickets.csv"), "found beside the file"


def test_a_value_stands_for_nothing_but_itself(page: Path) -> None:
    page.write_text(PAGE.replace("[0, 1]", "['${seed}', 2026-11-28, 010, 1:30, 0x1F, 1_000, yes, 3.0.0]"))
    config = compose_run([f"experiment={page}", "report.about.curator=${name}", "data.columns.site='${oc.env:HOME}'"])
    assert config.data.labels == ("${seed}", "2026-11-28", "010", "1:30", "0x1F", "1_000", "yes", "3.0.0")
    assert (config.report.about.curator, config.data.columns["site"]) == ("${name}", "${oc.env:HOME}")


def test_what_is_typed_wins_over_the_file(page: Path) -> None:
    typed = ["data.declared_sizes=50", "data.train_file=other.csv", "lora={rank: 3}", "lora=qv"]
    config = compose_run([f"experiment={page}", *typed])
    assert (config.data.declared_sizes, config.data.train_file) == (50, "other.csv")
    assert (config.lora.rank, config.lora.target_modules) == (3, ("query", "value"))
    page.write_text(f"{PAGE}report: {{about: {{curator: Ann}}}}\nseed: 4\n")
    config = compose_run([f"experiment={page}", "report.language=de"])
    assert (config.report.about.curator, config.report.language, config.seed) == ("Ann", "de", 4)


def test_a_file_s_map_replaces_that_of_conf_and_is_swept(page: Path) -> None:
    page.write_text(PAGE.replace("{text: body, label: team}", "{text: body, label: team, site: org}"))
    runs = [trial.config for trial in Trials.of_sweep([f"experiment={page}", "privacy.epsilon=1,3"]).rows.values()]
    assert [run.privacy.epsilon for run in runs] == [1.0, 3.0]
    assert all(run.data.columns == {"text": "body", "label": "team", "site": "org"} for run in runs)


@pytest.mark.parametrize(
    ("text", "key", "bound"),
    [
        ("a: [", "experiment", "must hold a configuration as YAML (a line that is no YAML"),
        ("- 1\n", "experiment", "must hold a configuration as YAML (no keys with values)"),
        ("", "experiment", "must hold a configuration as YAML (no keys with values)"),
        ("\0", "experiment", "must hold a configuration as YAML (control characters)"),
        ("a: &b [1]\nc: *b\n", "experiment", "must hold a configuration as YAML (a reference"),
        ("name: a\ndata:\n  max_length: 8\n  max_length: 9\n", "experiment", "or a key twice"),
        (PAGE + "hydra: {run: {dir: x}}\n", "hydra", "is not a setting"),
        ("resume: runs/x\n", "resume", "must not be there"),
        ("experiment: debug\n", "experiment", "must not be there"),
        (PAGE.replace("label: team", "null: team"), "data.columns.None", "must be text; put quotes around it"),
        (PAGE.replace("[0, 1]", "[a, 1.5]"), "data.labels.1", "must be text; put quotes around it"),
        (
            PAGE.replace("[0, 1]", "!!set {a}"),
            "experiment",
            "must hold a configuration as YAML (a reference (& and *) or a tag",
        ),
        (PAGE + "  _target_: os.system\n", "data._target_", "is not a setting"),
        (PAGE + "  1.5: x\n", "data", "must be text, as every key is"),
        (PAGE + "privacy: none\n", "privacy", "must be keys and values; an option is chosen by defaults"),
        (PAGE + "federation: null\n", "federation", "must be keys and values"),
        (PAGE + "privacy.epsilon: 3\n", "privacy.epsilon", "is not a setting"),
        (PAGE + "privacy: {max-grad-norm: 3}\n", "privacy.max-grad-norm", "did you mean privacy.max_grad_norm?"),
        (PAGE + "<<: {seed: 3}\n", "<<", "is not a setting"),
        (PAGE.replace("sizes: 100", "sizes: [true, 9, 9, 9]"), "data.declared_sizes.0", "must be a number"),
        (PAGE + "privacy: {epsilon: 1:30}\n", "privacy.epsilon", "must be a number"),
        ("defaults: [override /model: nonesuch]\n", "defaults, model", "must be one of"),
        ("defaults: [override /hydra/launcher: joblib]\n", "defaults, hydra/launcher", "no group"),
        (PAGE + "trainin: {epochs: 3}\n", "trainin", "not a setting"),
        (PAGE.replace("declared_sizes: 100", "declared_sizes: 0"), "data.declared_sizes", "at least 1"),
    ],
)
def test_a_wrong_file_is_named(page: Path, text: str, key: str, bound: str) -> None:
    page.write_text(text)
    with pytest.raises(ConfigError) as error:
        compose_run([f"experiment={page}"])
    assert str(page) in str(error.value)
    assert key in error.value.key
    assert bound in error.value.bound


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.labels=billing", "data.labels = 'billing': must be a list, as in [a,b]"),
        ("labels=billing", "did you mean data.labels?"),
        ("training.epochs=3", "did you mean federation.num_rounds and training.local_steps?"),
        ("lr=3", "did you mean training.learning_rate?"),
        ("privacy.epsilno=1", "privacy.epsilno = '1': is not a setting of fedtune; did you mean privacy.epsilon?"),
        ("privacy={epsilonn: 1}", "privacy.epsilonn = 1: is not a setting of fedtune; did you mean privacy.epsilon?"),
        ("privacy=3", "privacy = '3': must be one of dp_sgd, none"),
        *((override, f"override = '{override}': must look like") for override in ("+privacy=none", "++privacy=none")),
        *((out, f"override = '{out}': must be key=value: nothing can be taken out") for out in ("~privacy", "~seed=1")),
        ("training.betas.1=0.5", "training.betas.1 = '0.5': is not a setting of fedtune"),
        ("privacy.epsilon.x=1", "privacy.epsilon.x = '1': is not a setting"),
        ("+privacy.x=1", "privacy.x = '1': is not a setting"),
        ("model.path=???", "model.path = '': is required: give it as model.path=VALUE"),
        ("data.labels=shuffle([a,b])", "must look like key=value"),
        (f"seed={'9' * 5000}", "must look like key=value"),
        ("seed=range(1,3)", "seed = 'range(1,3)': is several values"),
        ("training.learning_rates=1", "did you mean training.learning_rate?"),
        ("federation.rounds=1", "did you mean federation.num_rounds?"),
        ("federation.num_round=1", "did you mean federation.num_rounds?"),
        ("model.pth=x", "did you mean model.path?"),
        ("seed=1e30", "must be a whole number of at most"),
        ("seed=100000000000000000000000000000", "must be at most"),
        ("federation.site_names=[ä,b]", "federation.site_names = 'ä'"),
        ("tracking.output_dir=''", "must not be blank"),
        ("privacy.epsilon=1000", "privacy.epsilon = 1000.0: must be at most 100"),
        ("runtime.num_threads=100000", "must be at most 1024"),
    ],
)
def test_mistakes_in_plain_words(page: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_run([f"experiment={page}", "federation.num_sites=2", override])
    assert message in str(error.value)


def test_a_wrong_value_that_was_typed_is_not_the_file_s(page: Path) -> None:
    for typed in ("data.labels=[1.5]", "data={max_length: -1}"):
        with pytest.raises(ConfigError) as error:
            compose_run([f"experiment={page}", typed])
        assert str(error.value).startswith("data.")
    page.write_text(PAGE + "  validation_file: " + "x" * 300)
    assert compose_run([f"experiment={page}"]).data.validation_file == "x" * 300, "its reader refuses it"


def test_values_as_they_are_typed(page: Path) -> None:
    def made(*overrides: str) -> object:
        return compose_run([f"experiment={page}", *overrides]).data

    writes = ["task=causal_lm", "training.learning_rate=1", "data.labels=[]", "data.columns={prompt: a, completion: b}"]
    assert made(*writes, "data.prompt_template=Q: {prompt}\\nA:").prompt_template == "Q: {prompt}\nA:"  # type: ignore[attr-defined]
    assert made(*writes, "data.prompt_template='Q: {prompt}\\nA:'").prompt_template == "Q: {prompt}\nA:"  # type: ignore[attr-defined]
    assert made("data.labels=[Störung,'a ä']").labels == ("Störung", "a ä")  # type: ignore[attr-defined]
    columns = made(
        "data.columns={text: a, label: b}",
        "data.columns.site=org",
        "data.partition.kind=column",
        "data.partition.sites={o: 0, p: 1, q: 2, r: 3}",
    ).columns  # type: ignore[attr-defined]
    assert columns == {"text": "a", "label": "b", "site": "org"}


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["experiment=mails"], r"votes; did you mean experiment=\./mails\.yaml\?$"),
        (["./mails.yaml"], r"did you mean experiment=\./mails\.yaml\?$"),
        (["mails.yaml", "seed=1"], r"did you mean experiment=\./mails\.yaml\?$"),
        (["mails"], r"must look like key=value; did you mean experiment=\./mails\.yaml\?$"),
        (["own_data"], r"did you mean experiment=own_data\?$"),
        (["nothing.yaml"], r"like key='\.\.\.'$"),
        (["experiment=./gone.yaml"], r"experiment = 'gone\.yaml': must be a file that can be read"),
        (["m" * 5000], r"like key='\.\.\.'$"),
        (["experiment=./mails.yaml", "experiment=debug"], "'debug': is one too many: experiment=./mails.yaml is given"),
        (["experiment=debug", "experiment=own_data"], "'own_data': is one too many: experiment=debug is given, too$"),
        (["resume=runs/a", "resume=null"], "resume = null: is one too many: resume=runs/a is given, too$"),
    ],
)
def test_an_experiment_that_is_not_typed_as_one_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mails.yaml").write_text("defaults: [debug]\nname: mails\n")
    with pytest.raises(ConfigError, match=wanted):
        compose_run(overrides)
    with pytest.raises(ConfigError, match=wanted):
        Trials.of_sweep(overrides)
