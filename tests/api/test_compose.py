import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fedtune.api.compose import compose_recipe, compose_run
from fedtune.config import RunConfig, read_saved_config
from fedtune.lab.studies.trials import Trials
from fedtune.spec import ConfigError

from ..conftest import write_config


def compose_sweep(overrides: Sequence[str]) -> list[RunConfig]:
    return [trial.config for trial in Trials.from_sweep(overrides).rows.values()]


OWN_DATA = ["data.train_file=mine.csv", "data.declared_sizes=500", "data.labels=[yes,no]"]
"""Mandatory settings of `experiment=own_data`."""
CAUSAL_LM = ["task=causal_lm", "data.labels=[]", "data.columns={prompt: text, completion: text}"]
"""Settings of a language model."""


def test_yaml_round_trip_preserves_value_types(tmp_path: Path) -> None:
    overrides = [
        *("experiment=debug", "name='1e5'", "privacy.delta=1e-7", "data.labels=['yes','no','1','null']"),
        *("lora.layers=[-1,0]", "federation.site_names=['01','0x2']"),
    ]
    config = compose_run(overrides)
    assert config.data.labels == ("yes", "no", "1", "null")
    assert config.privacy.delta == 1e-7
    write_config(config, tmp_path)
    assert read_saved_config(tmp_path) == config
    config = compose_recipe("debug", {"name": "x", "report.about.curator": "a\x85b\u2028ä"})
    write_config(config, tmp_path)
    assert read_saved_config(tmp_path) == config, "line separators that YAML would fold into a space"
    config = compose_run(["experiment=debug", "name=x", *CAUSAL_LM, "data.prompt_template='{prompt}: a # b'"])
    write_config(config, tmp_path)
    assert read_saved_config(tmp_path) == config


@pytest.mark.parametrize("missing", OWN_DATA)
def test_missing_required_settings_are_named(missing: str) -> None:
    key = missing.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        compose_run(["experiment=own_data", *(override for override in OWN_DATA if override != missing)])
    assert error.value.key == key
    assert "is required" in error.value.bound


def test_default_experiment_is_banks_intents() -> None:
    config = compose_run(["name=x"])
    assert config == compose_run(["experiment=banks_intents", "name=x"])
    assert (config.data.dataset, config.privacy.epsilon, config.privacy.delta) == ("banking77", 8.0, 1e-5)
    assert config.federation.num_sites == 4


def test_unnamed_run_gets_a_timestamp() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", compose_run(["experiment=debug"]).name)


def test_blank_overrides_are_ignored() -> None:
    # `make simulate OVERRIDES=` passes an empty argument.
    assert compose_run(["", "experiment=debug", "name=x", " "]) == compose_run(["experiment=debug", "name=x"])


def test_sweep_combines_all_values_and_names_its_runs() -> None:
    runs = compose_sweep(["experiment=debug", "name=s", "privacy.epsilon=1,3", "training=adamw,sgd"])
    expected = [*product((1, 3), ("adamw", "sgd"))]
    assert [(run.privacy.epsilon, run.training.optimizer) for run in runs] == expected
    assert [run.name for run in runs] == [f"s-privacy.epsilon={eps},training={name}" for eps, name in expected]
    (run,) = compose_sweep(["experiment=debug", "privacy.epsilon=3"])
    assert run.name.endswith("-run"), "single values make one run"


@pytest.mark.nightly
def test_sweep_runs_never_share_a_folder() -> None:
    sweeps = [
        ["privacy.epsilon=1,3"],
        ["name=same", "privacy.epsilon=1,3"],
        ["lora.target_modules=[query],[key]"],
        [*CAUSAL_LM, "data.prompt_template='a b','c/d'"],
        ["seed=range(0,3)"],
    ]
    for sweep in sweeps:
        names = [run.name for run in compose_sweep(["experiment=debug", *sweep])]
        assert len(set(names)) == len(names) > 1
    for repeated in ("privacy={epsilon: 3}", "+privacy.epsilon=3"):
        with pytest.raises(ConfigError, match=r"^privacy\.epsilon: has several values and is set again"):
            compose_sweep(["experiment=debug", "+privacy.epsilon=1,2", repeated])
    options = compose_sweep(["experiment=debug", "privacy=none,dp_sgd", "privacy={epsilon: 3}"])
    assert [(run.privacy.mechanism, run.privacy.epsilon) for run in options] == [("none", 3.0), ("dp_sgd", 3.0)]
    with pytest.raises(ConfigError, match="name = 'a': is used by two runs of the sweep"):
        compose_sweep(["experiment=debug", "name=a,b", "privacy.epsilon=1,3"])


def test_resumed_run_accepts_overrides_but_keeps_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "renamed, first's"
    overrides = ["experiment=debug", "privacy.epsilon=2.5", "federation.num_rounds=7"]
    config = compose_run([*overrides, "name=first"])
    write_config(config, folder)
    resume = f'resume="{folder}"'
    resumed = compose_run([resume])
    assert (resumed.resume, resumed.name) == (str(folder), "first")
    assert resumed.run_id() == config.run_id(), "the ledgers' key for the run"
    assert compose_run([resume, *overrides]) == resumed
    resumed = compose_run([resume, "runtime.num_threads=1"])
    assert (resumed.runtime.num_threads, resumed.digest()) == (1, config.digest())
    assert compose_run([resume, "privacy.epsilon=3"]).privacy.epsilon == 3
    for ending, message in (("n=3", r"privacy\.epsilonn"), ("=1,3", r"privacy\.epsilon = '1,3': has several values")):
        with pytest.raises(ConfigError, match=message):
            compose_run([resume, f"privacy.epsilon{ending}"])
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = '1,3': has several values"):
        compose_run(["renew=x", "privacy.epsilon=1,3"])
    quiet = compose_run([resume, "tracking=quiet"])
    assert (quiet.tracking.progress, quiet.digest()) == (False, config.digest()), "an option replaces only its group"
    # Under another name the sites' ledgers would charge it as a new run.
    assert compose_run([resume, "name=second"]).name == "first"
    (swept,) = compose_sweep([resume])
    assert swept.name == "first"


def test_automatic_learning_rate_is_resolved_before_the_run(tmp_path: Path) -> None:
    base = ["experiment=own_data", "name=x", *OWN_DATA, "data.declared_sizes=80"]
    noisy, quiet = (compose_run([*base, f"privacy.epsilon={epsilon}"]) for epsilon in (1, 8))
    rates = noisy.training.compute_peak_rates(clipped=True)
    assert rates[1] == pytest.approx(8 * rates[0], rel=1e-2)
    assert rates == quiet.training.compute_peak_rates(clipped=True)
    assert rates[1] == pytest.approx(0.0283)
    write_config(noisy, tmp_path)  # stores the chosen rates for a resumed run
    assert read_saved_config(tmp_path).training.compute_peak_rates(clipped=True) == rates
    larger = compose_run([*base, "privacy.epsilon=1", "lora.alpha=8"])
    assert larger.training.compute_peak_rates(clipped=True) == (pytest.approx(rates[0] / 4, rel=1e-2), rates[1])
    assert compose_run([*base, "training.learning_rate=0.01"]).training.compute_peak_rates(clipped=True) == (0.01, 0.01)


@pytest.mark.parametrize("sweep", ["privacy.epsilon=range(1,1000000000)", "seed=range(0,40)"])
def test_sweep_with_too_many_runs_is_refused(sweep: str) -> None:
    with pytest.raises(ConfigError, match="must produce at most 1000 runs in all"):
        compose_sweep(["experiment=debug", sweep, "privacy.delta=range(1,30)"])


SECURE = "federation.aggregation=secure"


def list_secure_choices(*overrides: str) -> tuple[int, int, int | None, str, float, float | None]:
    """Return the settings that secure aggregation changes."""
    config = compose_run(["name=x", *overrides])
    training, federation = config.training, config.federation
    assert training.learning_rate != "auto"
    rates = training.learning_rate, training.head_learning_rate
    return federation.num_rounds, training.local_steps, federation.threshold, training.schedule, *rates


def test_secure_aggregation_selects_rounds_steps_and_learning_rates() -> None:
    explicit = ["federation.threshold=4", "training.local_steps=1", "federation.num_rounds=20"]
    explicit += ["training.learning_rate=8.33", "training.head_learning_rate=66.7"]
    assert list_secure_choices(SECURE) == (20, 1, 4, "constant", 8.33, 66.7)  # simulations/banks_intents
    assert compose_run([SECURE, "name=x"]) == compose_run([SECURE, "name=x", *explicit])
    two_sites = list_secure_choices(SECURE, "federation.num_sites=2", "federation.site_names=[]")
    assert two_sites == (20, 1, 2, "constant", 7.07, 56.6), "noise shrinks with the root of the number of sites"
    assert list_secure_choices(SECURE, "federation.colluders=1")[-1] == 66.7
    sampled = list_secure_choices(SECURE, "privacy.sampling_rate=0.3")
    assert sampled[3] == "linear", "the rate decays unless each step uses every record"
    five = ("experiment=debug", "federation.num_sites=5", "federation.enough_sites=4")
    assert list_secure_choices(SECURE, *five)[2] == 4, "the threshold follows enough_sites"
    adam = list_secure_choices(SECURE, "experiment=debug", "federation.num_sites=4")
    assert adam == (4, 1, 4, "linear", 0.01, None), "Adam's step does not depend on the noise"
    labels = [*OWN_DATA, "experiment=own_data"]
    assert compose_run([SECURE, "name=x", *labels]).training.learning_rate != "auto"


def test_explicit_settings_override_secure_aggregation_defaults(tmp_path: Path) -> None:
    explicit = ("federation.num_rounds=7", "training.head_learning_rate=9")
    assert list_secure_choices(SECURE, *explicit) == (7, 1, 4, "constant", 8.33, 9.0)
    assert list_secure_choices(SECURE, "training.local_steps=1") == (10, 1, None, "constant", 5.0, 40.0), "plain rounds"
    with pytest.raises(ConfigError, match=r"training\.local_steps = 5: must be 1 with federation\.aggregation"):
        compose_run([SECURE, "training.local_steps=5", "name=x"])
    plain, secure = tmp_path / "plain.yaml", tmp_path / "secure.yaml"
    plain.write_text("defaults: [banks_intents]\nfederation: {num_rounds: 3}\n")
    secure.write_text("defaults: [banks_intents]\nfederation: {aggregation: secure, num_rounds: 3}\n")
    assert list_secure_choices(f"experiment={plain}", SECURE)[0] == 6, "the file sets the rounds of a plain run"
    assert list_secure_choices(f"experiment={secure}")[:3] == (3, 1, 4)
    maps = ("federation={aggregation: secure, num_rounds: 7}", "training={learning_rate: 1.5}")
    assert list_secure_choices(*maps)[-2:] == (1.5, 66.7)
    settings = {"federation": {"aggregation": "secure", "num_rounds": 7}, "training": {"learning_rate": 1.5}}
    config = compose_recipe("banks_intents", settings)
    assert (config.federation.num_rounds, config.training.learning_rate) == (7, 1.5)


def test_run_without_privacy_has_its_own_steps_schedule_and_sampling_rate() -> None:
    def list_choices(*overrides: str) -> tuple[int, str, float]:
        config = compose_run(["name=x", *overrides])
        return config.training.local_steps, config.training.schedule, config.privacy.sampling_rate

    assert list_choices() == list_choices("privacy=dp_sgd") == (2, "constant", 1.0)
    assert list_choices("privacy=none") == list_choices("privacy.mechanism=none") == (5, "linear", 0.3)
    assert list_choices("privacy=none", "training.local_steps=3", "privacy.sampling_rate=0.7") == (3, "linear", 0.7)
    changed = compose_run(["name=x"], changed={"privacy.mechanism": "none", "training.schedule": "cosine"})
    assert (changed.training.local_steps, changed.training.schedule) == (5, "cosine"), "as `compare` does"
    assert list_choices("privacy=none", "experiment=hospitals_abstracts") == (5, "linear", 0.3), "no own values"


PUBLIC = "public.train_file=public.csv"


def compose_rates_with_public_stage(*overrides: str) -> tuple[object, object]:
    """Return the learning rates of adapter and head, as (public stage, sites)."""
    config = compose_run([PUBLIC, "name=x", *overrides])
    rates = config.training.compute_peak_rates(clipped=config.privacy.private)
    return (config.public.learning_rate, config.public.head_learning_rate), rates


def test_public_stage_lowers_the_learning_rates() -> None:
    # of 8 and 14, and of 3 and 24: simulations/warm_start
    assert compose_rates_with_public_stage() == ((2.7, 4.7), (1.7, 13.0))
    assert compose_rates_with_public_stage("privacy=none") == ((2.7, 4.7), (2.7, 4.7))
    assert compose_rates_with_public_stage("training.learning_rate=2.5") == ((2.7, 4.7), (2.5, 13.0)), (
        "an explicit rate is kept"
    )
    assert compose_rates_with_public_stage("public.head_learning_rate=7") == ((2.7, 7.0), (1.7, 13.0))
    without = compose_run([*OWN_DATA, "experiment=own_data", "privacy=none"]).training.compute_peak_rates(clipped=False)
    private = compose_run([*OWN_DATA, "experiment=own_data"]).training.compute_peak_rates(clipped=True)
    auto = [tuple(float(f"{rate / 3:.2g}") for rate in rates) for rates in (without, private)]
    for overrides in ((), ("training.learning_rate=auto",)):
        assert [*compose_rates_with_public_stage(*OWN_DATA, "experiment=own_data", *overrides)] == auto
    assert compose_rates_with_public_stage(SECURE) == ((2.7, 4.7), (2.8, 22.0))
    explicit = (("training.local_steps=3",), 3), (("public.local_steps=2",), 2)
    for overrides, steps in (((), 5), ((SECURE,), 5), *explicit):
        public = compose_run([PUBLIC, "name=x", *overrides]).public
        assert (public.num_rounds, public.local_steps) == (10, steps), "the defaults of a plain run"


def test_rates_in_a_file_with_a_public_stage_are_kept(tmp_path: Path) -> None:
    (tmp_path / "public.csv").touch()
    path = tmp_path / "x.yaml"
    path.write_text("defaults: [banks_intents]\nname: x\ntraining: {learning_rate: 2.0}\n")
    assert compose_run([f"experiment={path}", PUBLIC]).training.learning_rate == 0.67, "the file has no public stage"
    path.write_text(path.read_text() + "public: {train_file: public.csv, columns: {text: body, label: kind}}\n")
    config = compose_run([f"experiment={path}"])
    assert config.training.compute_peak_rates(clipped=True) == (2.0, 13.0)
    assert config.public.train_file == str(tmp_path / "public.csv"), "relative to the experiment file"
    assert config.public.columns == {"text": "body", "label": "kind"}


def test_complete_configuration_keeps_its_rates_with_a_public_stage() -> None:
    before = compose_run(["name=x"])
    after = compose_recipe(before, {"public.train_file": "public.csv"})
    assert (after.training, after.public.learning_rate) == (before.training, 2.7)
    assert compose_recipe(after, {"name": "y"}).public == after.public
    assert after.digest() != before.digest()
    warm_started = replace(before, model=replace(before.model, adapter="runs/x"))
    with pytest.raises(ConfigError, match=r"model\.adapter = 'runs/x': must be null with public\.train_file"):
        compose_recipe(warm_started, {"public.train_file": "public.csv"})


def test_paths_may_start_at_home_and_contain_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"tracking.output_dir": "~/r", "runtime.sites_dir": "~/s", "runtime.kept_states_folder": "~/k"}
    paths |= {f"data.{part}_file": f"~/My Files, 2024/({part}).csv" for part in ("train", "test")}
    config = compose_run(["experiment=own_data", *OWN_DATA[1:], *(f"{key}={path}" for key, path in paths.items())])
    for key, path in paths.items():
        group, name = key.split(".")
        assert getattr(getattr(config, group), name) == path.replace("~", str(tmp_path))
    absolute = compose_run(["experiment=own_data", *OWN_DATA, f"runtime.sites_dir={tmp_path}/s"])
    assert absolute.runtime.sites_dir == config.runtime.sites_dir, "one folder, so one budget"
    folder = tmp_path / "My Files, 2024"
    folder.mkdir()
    (folder / "x.yaml").write_text(
        "defaults:\n  - own_data\nname: x\ndata:\n  train_file: ~/a.csv\n  declared_sizes: 9\n"
    )
    for name in (folder / "x.yaml", "~/My Files, 2024/x.yaml"):
        assert compose_run([f"experiment={name}", "data.labels=[a,b]"]).data.train_file == f"{tmp_path}/a.csv"
    assert compose_run(["experiment=own_data", *OWN_DATA, "data.test_file=null"]).data.test_file is None
    runs = compose_sweep(["experiment=own_data", *OWN_DATA[1:], "data.train_file=a.csv,~/b.csv"])
    assert [run.data.train_file for run in runs] == ["a.csv", f"{tmp_path}/b.csv"]
    with pytest.raises(ConfigError, match="must be a run folder"):
        compose_run(["resume=~/none"])
    for override in ("experiment=~no one/x.yaml", "tracking.output_dir=~no one/o", "resume=~no one/x"):
        with pytest.raises(ConfigError, match="starts with the home folder of an unknown user"):
            compose_run([override] if override[0] != "t" else ["experiment=own_data", *OWN_DATA, override])
    write_config(config, tmp_path / "r" / "x")
    assert compose_run(["resume=~/r/x"]).resume == str(tmp_path / "r" / "x")


def test_make_override_refuses_values_without_json_form() -> None:
    config = compose_recipe("debug", {"data.labels": np.array(["a", "b"]), "privacy.noise_multiplier": np.float32(3)})
    assert (config.data.labels, config.privacy.noise_multiplier) == (("a", "b"), 3.0)
    cycle: list[object] = []
    cycle.append(cycle)
    for value in (object(), {1, 2}, cycle, {("a", "b"): "c"}):
        with pytest.raises(ConfigError, match=r"^model\.path = .*: must be text, a number, true, false, None"):
            compose_recipe("debug", {"model.path": value})
    deep: list[object] = []
    for _ in range(3000):
        deep = [deep]
    for large in (10**5000, deep):
        with pytest.raises(ConfigError, match=r"^seed = 'a value of type \w+': must be text"):
            compose_recipe("debug", {"seed": large})
    with pytest.raises(ConfigError, match=r"^1 = '2': is not a setting of fedtune"):
        compose_recipe("debug", {1: 2})  # type: ignore[dict-item]


def test_model_path_clears_the_license_and_public_id_of_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("defaults: [debug, override /model: minilm]\nmodel: {path: ./mine, sha256: null}\n")
    pinned, unpinned = compose_run(["model=minilm"]).model, ["model.path=owner/other", "model.sha256=null"]
    assert (pinned.license, pinned.public_id) == ("Apache-2.0", "sentence-transformers/all-MiniLM-L6-v2")
    copied = compose_run(["model.path=./copy"]).model
    assert (copied.license, copied.public_id) == (pinned.license, pinned.public_id), "its hash still pins the weights"
    for changed in (
        compose_run(unpinned),
        compose_run(["model.path=./mine", f"model.sha256={'ab' * 32}"]),
        compose_run([f"experiment={file}"]),
        compose_recipe(None, {"model.path": "random:bert", "model.sha256": None}),
        compose_recipe(compose_run([]), {"model.path": "./mine", "model.sha256": None}),
    ):
        assert (changed.model.license, changed.model.public_id) == (None, None), changed.model.path
    explicit = compose_run([*unpinned, "model.license=MIT", "model.public_id=owner/small"]).model
    assert (explicit.license, explicit.public_id) == ("MIT", "owner/small")


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "federation.ranks.site-1=2": r"federation.ranks.site-1 = .*: must be written as a whole list",
        "federation.ranks={site-1: 2}": r"federation.ranks = .*: must be written as a whole list",
        "data.labels.999=x": r"data.labels.999 = 'x': must be written as a whole list: data.labels=\[",
        "~data.labels.0": r"~data.labels.0: must be written as a whole list",
        "~model": r"^model: is required",
        "hydra=null": r"^hydra = null: has no effect here",
    }.items(),
)
def test_override_that_hydra_cannot_apply_is_refused_with_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([override])
