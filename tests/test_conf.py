"""conf/: plain data, and every combination that a user can select composes with exactly the expected keys."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.api.compose import compose_run
from fedtune.api.experiment_file import read_option
from fedtune.config import RunConfig, read_saved_config
from fedtune.lab.preparation.experiment_writer import build_placeholder_overrides
from fedtune.version import find_config_folder

from .conftest import write_config

CONF = find_config_folder()
FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [(path.parent.name, path.stem) for path in FILES if path.parent != CONF and path.stem[0] != "_"]
# The experiment in which an option makes a complete run, if not in the default; `own_text` and similar ones have their
# own.
_WITHIN = {
    ("data", "medical_abstracts"): "hospitals_abstracts",
    ("data", "e2e_nlg"): "smollm2_e2e",
    ("data", "users_ubuntu_irc"): "debug_users",
    ("data", "users_shakespeare"): "debug_users",
    ("model", "vision"): "own_images",
    ("model", "none"): "own_features",
    ("lora", "none"): "own_features",
}
_LISTS_AND_MAPS = {"task_settings", "federation.algorithm_settings", "data.columns", "data.partition.sites"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def list_required_options(group: str, option: str) -> list[str]:
    experiment = _WITHIN.get((group, option), option)
    if not experiment.startswith(("own", "votes")):
        return [f"experiment={experiment}"] if experiment != option else []
    within = [f"experiment={experiment}"] if group != "experiment" and option != "own" else []
    return [*within, *build_placeholder_overrides(experiment.replace("votes", "own_labels"))]


def list_spec_keys(cls: type = RunConfig, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, type_ in typing.get_type_hints(cls).items():
        keys |= list_spec_keys(type_, f"{prefix}{name}.") if dataclasses.is_dataclass(type_) else {prefix + name}
    return keys


def list_leaf_keys(settings: Any, prefix: str) -> set[str]:
    key = prefix.removesuffix(".")
    if not isinstance(settings, dict) or key in _LISTS_AND_MAPS:
        return {key}
    return {leaf for name, value in settings.items() for leaf in list_leaf_keys(value, f"{prefix}{name}.")}


def list_keys(path: Path) -> set[str]:
    settings = load(path)
    settings.pop("defaults", None)
    whole = path.parent == CONF or path.read_text().startswith("# @package _global_")
    return list_leaf_keys(settings, "" if whole else f"{path.parent.name}.")


def walk(value: Any) -> typing.Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


def test_every_configuration_file_is_plain_data() -> None:
    for path in FILES:
        settings = load(path)
        assert isinstance(settings, dict), path
        if path.parent.name in {"experiment", "data", "model", "lora", "privacy"}:
            assert "# " in "".join(path.read_text().splitlines()[:2]), f"{path} must start with a comment"
        assert not settings.get("seeded_noise"), "noise must be seeded only on request"
        for key, value in walk(settings):
            assert not (isinstance(key, str) and key.startswith("_") and key.endswith("_")), f"{path}: {key} is code"
            # PyYAML reads 1e-5 as a string; only 1.0e-5 is a number.
            if isinstance(value, str):
                with pytest.raises(ValueError, match="could not convert"):
                    float(value)


@pytest.mark.parametrize("group", sorted({group for group, _ in OPTIONS if group != "experiment"}))
def test_options_of_a_group_set_the_same_keys(group: str) -> None:
    assert {key for path in FILES for key in list_keys(path)} == list_spec_keys(), (
        "the keys in conf/ must be exactly the settings"
    )
    # Otherwise an option would silently keep a value from the previously selected one.
    sets = {option: list_leaf_keys(read_option(group, option), f"{group}.") for of, option in OPTIONS if of == group}
    assert all(keys == next(iter(sets.values())) for keys in sets.values()), sets


@pytest.mark.by_day(
    "experiment-debug",
    "experiment-banks_intents",
    "experiment-own_data",
    "experiment-own_entities",
    "experiment-own_images",
    "experiment-smollm2_e2e",
    "experiment-votes",
    "privacy-none",
    "runtime-ray",
    "federation-secure",
    "lora-none",
    "model-smollm2_135m",
    "training-adamw",
    "data-own_text",
    "tracking-quiet",
)
@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["-".join(option) for option in OPTIONS])
def test_every_option_composes_and_round_trips(group: str, option: str, tmp_path: Path) -> None:
    overrides = [*list_required_options(group, option), f"{group}={option}", "name=x"]
    config = compose_run(overrides)
    write_config(config, tmp_path / "x")
    assert read_saved_config(tmp_path / "x") == config
    assert read_saved_config(tmp_path / "x").digest() == config.digest()
    if group == "experiment":  # experiments must also run with Ray and without privacy
        other = compose_run([*overrides, "privacy=none", "runtime=ray"])
        assert (other.runtime.kind, other.privacy.private) == ("ray", False)
        return
    settings = load(CONF / group / f"{option}.yaml")
    for key in ("path", "target_modules", "mechanism", "optimizer", "kind", "progress"):
        if (value := settings.get(key, "???")) != "???":
            assert getattr(getattr(config, group), key) == (tuple(value) if isinstance(value, list) else value)
