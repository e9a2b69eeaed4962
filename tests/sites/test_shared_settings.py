"""What a lead's settings become on their way to a site, and that nobody's settings make a site do anything else."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import RunConfig, parse
from fedtune.data.features import FeatureSpec
from fedtune.data.partition import PartitionSpec
from fedtune.data.spec import PairsSpec, PreferenceSpec
from fedtune.model.base_model import model_sha256
from fedtune.model.spec import ModelSpec
from fedtune.privacy import accountant
from fedtune.privacy.about import AboutSpec
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.release import Reason
from fedtune.sites.shared_settings import MOST_CHARACTERS, for_sites, read_settings
from fedtune.spec import ConfigError

from ..privacy.builders import reason_of
from .conftest import TABLE, letters

HASH = "ab" * 32


def of(group: str, **values: Any) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in values.items()}


def asks(task: str, *roles: str, **data: Any) -> dict[str, Any]:
    """A task with its columns, and what else it needs of data."""
    return {"task": task, "data": {"columns": {role: f"column {role}" for role in roles}, **data}}


# Whatever may be different in a run, and whether that makes it another run to its sites.
DECISIVE: dict[str, Any] = {
    "task": "causal_lm",
    "seed": 1,
    **of("model", path="random:llama", sha256=HASH, gguf_file="small.gguf", dtype="mixed", licence="MIT"),
    "model.adapter_sha256": HASH,
    **of("data", dataset="notes", declared_sizes=(40, 41), max_length=13, labels=("invoice", "praise")),
    **of("data", prompt_template="Say: {prompt}", chat_template="plain", heldout_fraction=0.1, label_separator="|"),
    **of("data", windows=3, stride=4, target_range=(0.0, 9.0), intervals=(1.0, 3.0), input="features"),
    **of("data", features=(FeatureSpec(columns=("age",), range=(0.0, 90.0)),), pairs=PairsSpec(margin=0.4)),
    "data.preferences": PreferenceSpec(beta=0.3),
    **of("lora", kind="ia3", rank=3, alpha=5.0, target_modules=("query",), layers=(0,), rslora=True, train_a=False),
    "lora.alternate": True,
    **of("head", scale=5.0, centre=True, init="label_names", train=False, label_texts=("one", "two", "three")),
    "head.hidden": (3,),
    **of("privacy", mechanism="none", unit="user", records_per_user=5, epsilon=7.0, delta=1e-6, noise_multiplier=5.0),
    **of("privacy", cohorts=Cohorts(period="year", last="2026"), runs=2),
    **of("privacy", max_grad_norm=0.5, sampling_rate=0.4, metrics="noised", metrics_noise_multiplier=30.0),
    **of("training", local_steps=3, optimizer="sgd", learning_rate=0.5, head_learning_rate=0.5),
    **of("training", unclipped_learning_rate=0.5, unclipped_head_learning_rate=0.5, weight_decay=0.1, momentum=0.1),
    **of("training", betas=(0.8, 0.9), schedule="linear", warmup_steps=1),
    **of("federation", num_rounds=4, site_names=("north", "west"), participants=("north",), min_sites=2),
    **of("federation", spare_rounds=1, if_over_budget="fewer_rounds", aggregation="secure", update_dtype="bfloat16"),
    **of("federation", threshold=3, colluders=1, strategy="fedadam", server_learning_rate=0.5, server_momentum=0.5),
    **of("federation", server_beta_2=0.5, server_tau=0.5),
    **of("evaluation", generate=True, max_new_tokens=5, generation_rows=5),
    "runtime.seeded_noise": False,
}
NEUTRAL: dict[str, Any] = {
    "resume": "/home/ada/canary/run",
    **of("model", cache_dir="/home/ada/canary/cache", revision="canary", public_id="canary/model"),
    "model.adapter": "/home/ada/canary/runs/first",
    **of("data", train_file="/home/ada/canary/train.csv", validation_file="/home/ada/canary/validation.csv"),
    **of("data", test_file="canary/test.csv", columns={"text": "canary a", "label": "canary b", "site": "canary c"}),
    **of("data", partition=PartitionSpec(proportions=(1.0, 2.0)), train_fraction=0.5, validation_rows=5, test_rows=5),
    **of("data", validation_fraction=0.2, test_fraction=0.2, unusable="leave_out"),
    **of("federation", stop_after=2, keep_round="best", round_timeout_s=9.0, enough_sites=2, grace_s=5.0),
    "federation.renewal": 3,
    "evaluation.max_tokens": 64,
    "training.go_on_without_signal": True,
    **of("runtime", kind="simulation", device="auto", num_devices=2, num_threads=3, micro_batch_tokens=64, step_mib=5),
    **of("runtime", kept_states_mib=0, onednn=False, kept_states_folder="/home/ada/canary/fast"),
    **of("runtime", gradient_checkpointing=True, sites_dir="/home/ada/canary/sites", ray_address="canary:6379"),
    "runtime.sites_per_gpu": 4,
    **of("tracking", progress=False, output_dir="/home/ada/canary/runs"),
    **of("report", language="de", about=AboutSpec(curator="canary")),
    **of("tracking", log_level="debug", tracker="mlflow", send_to="https://canary.example"),
    **of("cost", energy=True, country="DEU"),
    **of("public", train_file="/home/ada/canary/public.csv", columns={"text": "canary a", "label": "canary b"}),
    **of("public", num_rounds=3, local_steps=7, learning_rate=0.25, head_learning_rate=0.25),
}
FIXED = {"name": "is part of the identifier itself"}
LANGUAGE: dict[str, Any] = {"labels": (), "columns": {"prompt": "a", "completion": "b"}}
SUMS: dict[str, Any] = {
    "federation": {"aggregation": "secure", "num_sites": 3, "site_names": ("north", "south", "west")},
    "data": {"declared_sizes": (40, 40, 40)},
    "training": {"local_steps": 1},
}
OF_USERS = {"text": "text", "label": "label", "user": "who"}
PUBLIC = ("columns", "num_rounds", "local_steps", "learning_rate", "head_learning_rate")
WITH: dict[str, Any] = {
    "data.input": TABLE,
    "data.features": TABLE,
    "head.hidden": TABLE,
    "task": {"data": LANGUAGE},
    "privacy.unit": {"data": {"columns": OF_USERS}},
    "privacy.records_per_user": {"privacy": {"unit": "user"}, "data": {"columns": OF_USERS}},
    "privacy.cohorts": {"privacy": {"unit": "user"}, "data": {"columns": {**OF_USERS, "arrival": "since"}}},
    "privacy.metrics": {"data": {"heldout_fraction": 0.1}},
    "data.prompt_template": {"task": "causal_lm", "data": LANGUAGE},
    "data.chat_template": {"task": "causal_lm", "data": LANGUAGE},
    "data.validation_fraction": {"runtime": {"kind": "simulation"}, "data": {"validation_file": None}},
    "data.test_fraction": {"runtime": {"kind": "simulation"}, "data": {"test_file": None}},
    "runtime.ray_address": {"runtime": {"kind": "ray", "num_threads": 2}},
    "runtime.sites_per_gpu": {"runtime": {"kind": "ray", "device": "auto"}},
    "federation.aggregation": {"training": {"local_steps": 1}},
    "federation.threshold": SUMS,
    "federation.colluders": SUMS,
    "federation.stop_after": {"data": {"validation_file": "validation.csv"}},
    "federation.keep_round": {"data": {"validation_file": "validation.csv"}},
    "tracking.send_to": {"tracking": {"tracker": "wandb"}},
    "cost.country": {"cost": {"energy": True}},
    **{f"public.{key}": {"public": {"train_file": "/home/ada/canary/public.csv"}} for key in PUBLIC},
    "data.label_separator": asks("multi_label", "text", "labels"),
    "data.target_range": {
        **asks("regression", "text", "target", labels=(), target_range=(0.0, 5.0)),
        "head": {"scale": 1.0},
    },
    "data.intervals": asks("survival", "text", "time", "event", labels=(), intervals=(1.0, 2.0)),
    **dict.fromkeys(("data.windows", "data.stride"), asks("token_classification", "tokens", "tags")),
    "data.pairs": asks("embedding", "anchor", "positive", "negative", labels=()),
    "data.preferences": asks("preference", "prompt", "chosen", "rejected", labels=()),
}
"""What a change needs beside it."""


def with_change(key: str, value: object) -> RunConfig:
    group, _, name = key.rpartition(".")
    changes: dict[str, Any] = {name: value} if not group else {group: {name: value}}
    for other, more in WITH.get(key, {}).items():
        changes[other] = {**more, **changes.get(other, {})} if isinstance(more, dict) else more
    return letters(**changes)


def text_of(sent: RunConfig) -> str:
    return json.dumps(sent.to_json())


def leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in fields.items():
        if isinstance(value, dict) and key not in ("columns", "partition", "pairs", "preferences", "about"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_setting_is_in_one_of_the_tables() -> None:
    listed = [*DECISIVE, *NEUTRAL, *FIXED, "federation.num_sites"]
    assert sorted(listed) == sorted(leaves(letters().to_json()))


@pytest.mark.parametrize("key", DECISIVE)
def test_whatever_decides_a_result_makes_another_run(key: str) -> None:
    without = letters() if key in ("task", "data.input") else letters(**WITH.get(key, {}))
    assert for_sites(with_change(key, DECISIVE[key])).run_id() != for_sites(without).run_id()


@pytest.mark.parametrize("key", NEUTRAL)
def test_places_and_speeds_of_the_lead_make_no_difference_and_do_not_travel(key: str) -> None:
    sent = for_sites(with_change(key, NEUTRAL[key]))
    assert sent.run_id() == for_sites(letters()).run_id()
    assert "canary" not in json.dumps(sent.to_json())


def test_a_number_of_sites_makes_another_run() -> None:
    three = letters(federation={"num_sites": 3, "site_names": ("north", "south", "west")})
    assert for_sites(three).run_id() != for_sites(letters()).run_id()


def test_a_run_is_known_by_name_and_settings() -> None:
    one, other = for_sites(letters()), for_sites(letters(name="second"))
    assert one.run_id().startswith("trial-")
    assert one.run_id().removeprefix("trial") == other.run_id().removeprefix("second")


def test_where_a_lead_has_its_model_does_not_travel() -> None:
    places = ("/home/ada/canary/minilm", "canary/minilm", "~/canary", "canary-labs/minilm")
    (text,) = {text_of(for_sites(letters(model={"path": path, "sha256": HASH}))) for path in places}
    assert "canary" not in text
    assert HASH in text
    packaged = letters(model={"path": "package:some_weights/model", "sha256": HASH})
    assert for_sites(packaged).model.path == "package:some_weights/model", "the same on every machine"


def test_weights_are_named_by_their_hash() -> None:
    for path in ("random:bert", "random:llama"):
        sent = for_sites(letters(model={"path": path, "sha256": None}))
        assert sent.model.sha256 == model_sha256(ModelSpec(path=path))
    assert for_sites(letters(model={"sha256": None})) == for_sites(letters())
    with pytest.raises(ConfigError, match=r"model\.path"):
        for_sites(letters(model={"path": "./nowhere", "sha256": None}))


def test_noise_is_calibrated_by_the_lead_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = letters(privacy={"noise_multiplier": None, "epsilon": 3.0})
    plan, sent = config.plan(), for_sites(config)
    assert sent.privacy.noise_multiplier == plan.noise_multiplier > 0
    monkeypatch.setattr(accountant, "calibrate_noise", None)
    assert read_settings(text_of(sent), plan=plan).plan() == plan
    assert for_sites(letters(privacy={"mechanism": "none", "noise_multiplier": None})).privacy.noise_multiplier is None


@pytest.mark.parametrize("key", ["seed", *DECISIVE, *NEUTRAL])
def test_what_is_sent_is_read_as_it_was_sent(key: str) -> None:
    value = DECISIVE[key] if key in DECISIVE else NEUTRAL[key]
    sent = for_sites(with_change(key, value))
    assert parse(sent.to_json()) == sent
    assert read_settings(text_of(sent), plan=sent.plan()) == sent
    assert read_settings(text_of(sent), plan=sent.plan()).run_id() == sent.run_id()


def test_votes_in_a_secure_sum_are_read_with_the_bound_of_their_plan() -> None:
    voting = {"task": "votes", "head": {"init": "label_names", "scale": 1.0}, "privacy": {"sampling_rate": 1.0}}
    sent = for_sites(letters(**SUMS, **voting))
    larger = replace(sent, data=replace(sent.data, declared_sizes=(600, 600, 600)))
    assert larger.plan().sums.bound == 1200
    assert read_settings(text_of(larger), plan=larger.plan()) == larger


# What a site reads.


@pytest.fixture(scope="module")
def sent() -> RunConfig:
    """What the run's sites are sent."""
    return for_sites(letters())


def with_leaf(sent: RunConfig, path: str, value: object) -> str:
    fields = sent.to_json()
    group = fields
    *outer, last = path.split(".")
    for name in outer:
        group = group[name]
    group[last] = value
    return json.dumps(fields)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "3", "[]", '"text"', "{}", "[[1, 2]]", "\ud800"),
        *("[" * 100_000, '{"a":' * 100_000, '{"name": ' + "9" * 5000 + "}", "{" + " " * MOST_CHARACTERS + "}"),
    ],
    ids=lambda text: f"{text[:12]!r} of {len(text)}",
)
def test_what_is_no_settings_is_refused_as_such(sent: RunConfig, text: str) -> None:
    assert reason_of(read_settings, text, plan=sent.plan()) is Reason.SETTINGS


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("new_key", 1), ("training.new_key", 1), ("training.learning_rate", "fast")),
        *(("training.learning_rate", float("nan")), ("privacy.noise_multiplier", None)),
        *(("privacy.epsilon", float("inf")), ("privacy", []), ("federation", None), ("federation.num_sites", 10**12)),
        *(("federation.num_sites", 2.5), ("federation.num_rounds", 3.0), ("seed", 10**400), ("seed", -1)),
        *(("lora.rank", True), ("lora.rank", 10**400), ("head.scale", {}), ("data.labels", ["one"])),
        *(("data.columns", "text"), ("model.path", "package:../secret"), ("model.sha256", "AB" * 32)),
        *(("task", "translation"), ("federation.num_sites", 10**400), ("federation.num_sites", 1 << 31)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_of_a_newer_version_or_of_nonsense_are_refused(sent: RunConfig, path: str, value: object) -> None:
    assert reason_of(read_settings, with_leaf(sent, path, value), plan=sent.plan()) is Reason.SETTINGS


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.local_steps", 10**9),
        ("federation.num_rounds", 10**12),
        ("privacy.noise_multiplier", 0.01),
        ("privacy.delta", 1e-7),
        ("privacy.metrics", "noised"),
        ("privacy.unit", "user"),
    ],
    ids=str,
)
def test_the_cost_of_another_plan_than_was_signed_is_never_computed(
    sent: RunConfig, path: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some of these would take all of a machine's memory.
    plan = sent.plan()
    monkeypatch.setattr(accountant, "epsilon_above", None)
    assert reason_of(read_settings, with_leaf(sent, path, value), plan=plan) is Reason.PLAN_CHANGED
