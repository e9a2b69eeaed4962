"""Warm start of a run: the lead trains an adapter on public records without privacy, from which the sites start."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from typing import Any

from fedtune.config import RunConfig, parse
from fedtune.data.records import record_key
from fedtune.derived_settings import use_recipe_without_privacy
from fedtune.federation.spec import PublicSpec
from fedtune.runs.lineage import read_base_lineage
from fedtune.sites.run_records import LeadRecords, RunRecords, require_disjoint, require_no_card
from fedtune.spec import ConfigError


def needs_public_stage(config: RunConfig) -> bool:
    """Return True if the run has a public warm-start stage that has not been trained yet."""
    return config.public.train_file is not None and config.model.adapter is None


def add_public_stage(config: RunConfig, plain: Mapping[str, Any], *, keep: Container[str]) -> RunConfig:
    """Add the default settings of the warm start, and lower the run's learning rates.

    The warm start uses a third of the rates without privacy, and the sites use a third of their own rates
    (simulations/warm_start).

    Args:
        config: the run's configuration.
        plain: the run's settings before secure aggregation changed rounds, steps and rates, and before "auto" became a
            number.
        keep: dotted keys of explicit learning rates, which stay unchanged; "auto" does not count as explicit.

    Raises:
        ConfigError: the run already has a start adapter, or the warm start is not possible with these settings.
    """
    public, adapter = config.public, config.model.adapter
    if adapter is not None:
        bound = "must be null with public.train_file: the run starts from the public stage's adapter"
        raise ConfigError("model.adapter", adapter, bound)
    num_rounds = public.num_rounds or plain.get("federation", {}).get("num_rounds", config.federation.num_rounds)
    given_rates = plain.get("training", {})
    alone = _build_draft_config(replace(config, public=replace(public, num_rounds=num_rounds)), given_rates, keep=keep)
    rates = {
        key.removeprefix("unclipped_"): rate for key, rate in alone.training.suggest_lower_rates(clipped=False).items()
    }
    chosen: dict[str, Any] = {"num_rounds": num_rounds, "local_steps": alone.training.local_steps, **rates}
    overrides = {key: value for key, value in asdict(public).items() if value is not None}
    lower = config.training.suggest_lower_rates(clipped=config.privacy.private)
    kept = {key for key in lower if f"training.{key}" in keep and given_rates.get(key) != "auto"}
    lowered: dict[str, Any] = {key: rate for key, rate in lower.items() if key not in kept}
    return replace(config, public=PublicSpec(**chosen | overrides), training=replace(config.training, **lowered))


def build_public_stage_config(config: RunConfig) -> RunConfig:
    """Build the configuration of the warm start: one site, all records of the public file, no privacy.

    The name of its data set includes a digest of the records, so that a warm start on another file can neither be
    resumed nor used instead.

    Raises:
        ConfigError: the file cannot be used, or shares texts with the run's own files (real sites' files are elsewhere
            and are not compared); or a run exported the base model.
    """
    if read_base_lineage(config.model):
        bound = "must have no lineage with public.train_file, but its config.json names a run on other records"
        raise ConfigError("model.path", config.model.path, bound)
    for path, key in RunRecords(config).files().items():
        require_no_card(path, key=key, kind="a run's own")
    public, training = config.public, config.to_json()["training"]
    training |= {"learning_rate": public.learning_rate, "head_learning_rate": public.head_learning_rate}
    training |= {"unclipped_learning_rate": None, "unclipped_head_learning_rate": None}
    alone, file = _build_draft_config(config, training), str(public.train_file)
    records = LeadRecords.read(file, alone, key="public.train_file").records
    require_disjoint(records, RunRecords(config), key="public.train_file", file=file)
    digest = hashlib.sha256(b"\n".join(map(record_key, records))).hexdigest()
    data = replace(alone.data, dataset=f"{alone.data.dataset}-{digest[:12]}", declared_sizes=len(records))
    return replace(alone, data=data)


def _build_draft_config(config: RunConfig, training: Mapping[str, Any], *, keep: Container[str] = ()) -> RunConfig:
    """Build the configuration of the warm start before the number of its records is known.

    Its steps, unless `keep` has them, its schedule and its sampling rate are those of a run without privacy.
    """
    settings, public = config.to_json(), config.public
    data: dict[str, Any] = dict.fromkeys(("heldout_fraction", "validation_fraction", "test_fraction"), 0.0)
    data |= {"dataset": f"{config.data.dataset}-public", "train_file": public.train_file, "declared_sizes": 1}
    data |= {"partition": {}, "train_fraction": 1.0}
    if public.columns is not None:  # the lead's other files have other columns
        data |= {"columns": public.columns, "validation_file": None, "test_file": None}
        data |= {"prompt_template": "{prompt}", "chat_template": "none"} if "text" in public.columns else {}
    privacy = {"mechanism": "none", "unit": "record", "planned_runs": 1, "metrics": "none"}
    privacy |= {"noise_multiplier": None, "cohorts": None}
    runtime = {"kind": "simulation", "sites_dir": None, "ray_address": None, "sites_per_gpu": None}
    federation = {"num_rounds": public.num_rounds, "num_sites": 1, "site_names": ["lead"]}
    steps = {"local_steps": public.local_steps, "unclipped_local_steps": None} if public.local_steps else {}
    changed = {"data": data, "privacy": privacy, "runtime": runtime, "training": {**training, **steps}}
    settings |= {group: settings[group] | values for group, values in changed.items()}
    settings = use_recipe_without_privacy(settings, keep=keep)
    try:
        return parse(settings | {"name": f"{config.name}-public", "federation": federation, "public": {}})
    except ConfigError as error:
        data_keys = ("data.train_file", "data.columns") if public.columns else ("data.train_file",)
        if not error.key.startswith(data_keys):
            raise
        raise ConfigError(error.key.replace("data", "public", 1), error.value, error.bound) from None
