"""A lead's settings as they are sent to a site, and settings that must not make a site do anything else."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.config import RunConfig, parse
from fedtune.model.base_model import hash_model
from fedtune.model.spec import ModelSpec
from fedtune.privacy import accountant
from fedtune.privacy.release import Reason, Refused
from fedtune.sites.shared_settings import MAX_CHARACTERS, read_settings, select_settings_for_sites
from fedtune.spec import ConfigError

from ..privacy.builders import read_refusal_reason
from .conftest import make_letters

HASH = "ab" * 32
SETTINGS = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())
DECISIVE, NEUTRAL, REQUIRED = SETTINGS["decisive"], SETTINGS["neutral"], SETTINGS["requires"]


def change_letters(changes: Mapping[str, Any]) -> RunConfig:
    fields = make_letters().to_json()
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (fields[group] if group else fields)[name] = value
    return parse(fields)


def change_key(key: str, value: object) -> RunConfig:
    return change_letters({**REQUIRED.get(key, {}), key: value})


def change_sent_text(sent: RunConfig, **leaf: object) -> str:
    """Return the settings as sent, with some values changed in transit."""
    fields = sent.to_json()
    for path, value in leaf.items():
        *outer, last = path.split(".")
        reduce(dict.__getitem__, outer, fields)[last] = value
    return json.dumps(fields)


def iter_leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in fields.items():
        if isinstance(value, dict) and key not in ("columns", "partition", "about"):
            yield from iter_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_setting_is_classified_as_decisive_or_neutral() -> None:
    listed = [*DECISIVE, *NEUTRAL, "federation.num_sites", "name"]  # the name is a part of the identifier itself
    assert sorted(listed) == sorted(iter_leaves(make_letters().to_json()))


@pytest.mark.parametrize("key", DECISIVE)
def test_decisive_setting_changes_the_run_id(key: str) -> None:
    original = make_letters() if key in ("task", "data.input") else change_letters(REQUIRED.get(key, {}))
    assert (
        select_settings_for_sites(change_key(key, DECISIVE[key])).run_id()
        != select_settings_for_sites(original).run_id()
    )


@pytest.mark.parametrize("key", NEUTRAL)
def test_neutral_settings_do_not_change_the_run_id_and_are_not_sent(key: str) -> None:
    sent = select_settings_for_sites(change_key(key, NEUTRAL[key]))
    assert sent.run_id() == select_settings_for_sites(change_letters(REQUIRED.get(key, {}))).run_id()
    assert "canary" not in json.dumps(sent.to_json())


def test_run_id_combines_name_and_settings() -> None:
    first, second = select_settings_for_sites(make_letters()), select_settings_for_sites(make_letters(name="second"))
    assert first.run_id().startswith("trial-")
    assert first.run_id().removeprefix("trial") == second.run_id().removeprefix("second")
    three_sites = make_letters(federation={"num_sites": 3, "site_names": ("north", "south", "west")})
    assert select_settings_for_sites(three_sites).run_id() != first.run_id()


def test_local_model_path_of_the_lead_is_not_sent() -> None:
    paths = ("/home/ada/canary/minilm", "canary/minilm", "~/canary", "canary-labs/minilm")
    (text,) = {
        change_sent_text(select_settings_for_sites(make_letters(model={"path": path, "sha256": HASH})))
        for path in paths
    }
    assert "canary" not in text
    assert HASH in text
    packaged = make_letters(model={"path": "package:some_weights/model", "sha256": HASH})
    assert select_settings_for_sites(packaged).model.path == "package:some_weights/model", "no local path"


def test_model_is_sent_with_the_digest_of_its_weights() -> None:
    for path in ("random:bert", "random:llama"):
        sent = select_settings_for_sites(make_letters(model={"path": path, "sha256": None}))
        assert sent.model.sha256 == hash_model(ModelSpec(path=path))
    assert select_settings_for_sites(make_letters(model={"sha256": None})) == select_settings_for_sites(make_letters())
    with pytest.raises(ConfigError, match=r"model\.path"):
        select_settings_for_sites(make_letters(model={"path": "./nowhere", "sha256": None}))


def test_noise_is_calibrated_only_by_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_letters(privacy={"noise_multiplier": None, "epsilon": 3.0})
    plan, sent = config.plan(), select_settings_for_sites(config)
    assert sent.privacy.noise_multiplier == plan.noise_multiplier > 0
    monkeypatch.setattr(accountant, "calibrate_noise", None)
    assert read_settings(change_sent_text(sent), plan=plan, task=sent.task).plan() == plan
    assert (
        select_settings_for_sites(
            make_letters(privacy={"mechanism": "none", "noise_multiplier": None})
        ).privacy.noise_multiplier
        is None
    )


@pytest.mark.parametrize("key", ["seed", *DECISIVE, *NEUTRAL])
def test_settings_round_trip_to_the_site(key: str) -> None:
    value = DECISIVE[key] if key in DECISIVE else NEUTRAL[key]
    sent = select_settings_for_sites(change_key(key, value))
    assert parse(sent.to_json()) == sent
    assert read_settings(change_sent_text(sent), plan=sent.plan(), task=sent.task) == sent
    assert read_settings(change_sent_text(sent), plan=sent.plan(), task=sent.task).run_id() == sent.run_id()


def test_secure_vote_settings_keep_the_bound_of_their_plan() -> None:
    voting = {"task": "votes", "head.init": "label_names", "head.scale": 1.0, "privacy.sampling_rate": 1.0}
    sent = select_settings_for_sites(change_letters(REQUIRED["federation.threshold"] | voting))
    larger = replace(sent, data=replace(sent.data, declared_sizes=(600, 600, 600)))
    assert larger.plan().secure_noise.bound == 1200
    assert read_settings(change_sent_text(larger), plan=larger.plan(), task=larger.task) == larger


# What a site accepts.


@pytest.fixture(scope="module")
def sent_settings() -> RunConfig:
    """The settings that the run's sites receive."""
    return select_settings_for_sites(make_letters())


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "3", "[]", '"text"', "{}", "[[1, 2]]", "\ud800"),
        *("[" * 100_000, '{"a":' * 100_000, '{"name": ' + "9" * 5000 + "}", "{" + " " * MAX_CHARACTERS + "}"),
    ],
    ids=lambda text: f"{text[:12]!r} of {len(text)}",
)
def test_malformed_settings_are_refused(sent_settings: RunConfig, text: str) -> None:
    assert (
        read_refusal_reason(read_settings, text, plan=sent_settings.plan(), task=sent_settings.task) is Reason.SETTINGS
    )


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
def test_unknown_keys_and_invalid_values_are_refused(sent_settings: RunConfig, path: str, value: object) -> None:
    text = change_sent_text(sent_settings, **{path: value})
    assert (
        read_refusal_reason(read_settings, text, plan=sent_settings.plan(), task=sent_settings.task) is Reason.SETTINGS
    )


def test_settings_refusal_names_the_mismatched_keys(sent_settings: RunConfig) -> None:
    fields = json.loads(change_sent_text(sent_settings, **{"training.newer_key": 1, "privacy.newer": 2}))
    del fields["training"]["optimizer"], fields["seed"]
    with pytest.raises(Refused) as caught:
        read_settings(json.dumps(fields), plan=sent_settings.plan(), task=sent_settings.task)
    assert caught.value.requested == "privacy.newer, seed, training.newer_key, training.optimizer"


def test_cost_of_an_unsigned_plan_is_never_computed(sent_settings: RunConfig, monkeypatch: Any) -> None:
    # Some of these would need all of a machine's memory; a plan may not have so many steps.
    plan, steps = sent_settings.plan(), {"training.local_steps": 10**9, "federation.num_rounds": 10**12}
    other_settings = {"noise_multiplier": 0.01, "delta": 1e-7, "metrics": "noised", "unit": "user"}
    monkeypatch.setattr(accountant, "compute_epsilon_above_limit", None)
    for path, value in (steps | {f"privacy.{key}": value for key, value in other_settings.items()}).items():
        reason = read_refusal_reason(
            read_settings, change_sent_text(sent_settings, **{path: value}), plan=plan, task=sent_settings.task
        )
        assert reason is (Reason.SETTINGS if path in steps else Reason.PLAN_CHANGED), path
