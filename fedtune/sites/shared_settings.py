"""The run settings that a lead sends to sites, and the adaptation of these settings at a site.

A lead names a data set, a task, a template, and a model by its hash. Files, columns and devices are the site's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from fedtune.codec import decode
from fedtune.config import CostSpec, ReportSpec, RunConfig, TrackingSpec, parse
from fedtune.data.spec import AT_SITE
from fedtune.federation.spec import MAX_SITES, FederationSpec, PublicSpec
from fedtune.model.spec import PACKAGE, ModelSpec
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Policy
from fedtune.spec import ConfigError
from fedtune.tasks.registry import find_task
from fedtune.training.spec import Machine, RuntimeSpec

MAX_CHARACTERS = 1 << 20
_MAX_KEYS = 8  # maximum number of keys in a refusal
_NO_SETTINGS = (ConfigError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError)


def select_settings_for_sites(config: RunConfig) -> RunConfig:
    """Build the settings that the lead sends to sites.

    The noise multiplier and the model hash are fixed, and the settings of the lead's machine are removed.

    Raises:
        ConfigError: the model is not available, so its hash is unknown.
    """
    columns = config.bound_task.columns(config.data, unit=config.privacy.unit)
    noise = config.plan().noise_multiplier
    return replace(
        config,
        model=_replace_path_by_hash(config.model),
        data=config.data.for_sites(columns),
        privacy=replace(config.privacy, noise_multiplier=noise) if config.privacy.private else config.privacy,
        # Early stopping and checkpoint selection concern only the lead.
        federation=replace(config.federation, early_stopping_patience=None, checkpoint_selection="last", renewal=0),
        runtime=RuntimeSpec(kind="deployment", seeded_noise=config.runtime.seeded_noise),
        tracking=TrackingSpec(output_dir=AT_SITE),
        report=ReportSpec(),
        cost=CostSpec(),
        # The origin of a start adapter is the lead's claim, which the run's name covers.
        public=PublicSpec(train_file=AT_SITE) if config.public.train_file else PublicSpec(),
        resume=None,
    )


def serialize_for_sites(sent: RunConfig) -> str:
    """Serialize the result of `select_settings_for_sites` as JSON."""
    return json.dumps(sent.to_json(), ensure_ascii=False, separators=(",", ":"))


@lru_cache(maxsize=4)
def read_settings(text: str, *, plan: Plan, task: str) -> RunConfig:
    """Parse the settings that a lead sent.

    Args:
        text: untrusted JSON.
        plan: the signed plan, which policy and budget allow.
        task: the task that the policy allows; packages of other tasks are never imported.

    Raises:
        Refused: this version of fedtune does not support the settings, the settings contradict `plan` or `task`, or the
            task is not installed here.
    """
    fields: dict[str, Any] = {}
    try:
        if len(text) > MAX_CHARACTERS:
            raise ValueError("too long")
        fields = dict(json.loads(text))
        # First, because validation computes the privacy cost, which could take hours and all memory for a
        # malicious plan.
        if _build_unvalidated_plan(fields, bound=plan.secure_noise.bound if plan.shared else 1) != plan:
            raise Refused(Reason.PLAN_CHANGED)
        if fields["task"] != task:
            raise ValueError("the task differs from the proposal's task")
        if find_task(task) is None:
            raise Refused(Reason.TASKS, requested=task, allowed="a task that is installed at this site")
        return parse(fields)
    except _NO_SETTINGS as error:
        # `keys` contains only the lead's own keys, where the two versions of fedtune differ.
        keys = _list_unshared_keys(fields) or (error.key[:100] if isinstance(error, ConfigError) else None)
        raise Refused(Reason.SETTINGS, requested=keys, allowed="settings that this site's fedtune supports") from error


def _list_unshared_keys(sent: Mapping[str, Any]) -> str:
    """List the settings that only one of the two versions of fedtune supports, the lead's or this one."""
    hints = get_type_hints(RunConfig)
    apart = {*hints} ^ {*sent} if sent else set()
    for group, spec in hints.items():
        if is_dataclass(spec) and type(values := sent.get(group)) is dict:
            apart |= {f"{group}.{key}" for key in {field.name for field in dataclass_fields(spec)} ^ {*values}}
    return ", ".join(sorted(str(key)[:100] for key in apart)[:_MAX_KEYS])


def _build_unvalidated_plan(fields: dict[str, Any], *, bound: int) -> Plan:
    """Compute the plan from unvalidated settings.

    `bound` depends on the task and is checked later with the proposal.
    """
    privacy_fields, federation = dict(fields["privacy"]), fields["federation"]
    cohorts = privacy_fields.pop("cohorts", None)
    privacy = PrivacySpec(**privacy_fields, cohorts=None if cohorts is None else decode(Cohorts, cohorts))
    if privacy.private and privacy.noise_multiplier is None:
        raise ValueError("the noise multiplier is missing")
    counts = {key: federation[key] for key in ("num_rounds", "spare_rounds")}
    counts["local_steps"] = fields["training"]["local_steps"]
    if any(type(count) is not int for count in (*counts.values(), federation["num_sites"])):
        raise ValueError("every count must be an integer")
    if federation["num_sites"] > MAX_SITES:
        raise ValueError("too many sites")
    together = None
    if federation.get("aggregation", "plain") != "plain":
        names = {key: tuple(federation[key]) for key in ("site_names", "participants")}
        together = FederationSpec(**{**federation, **names}).together
    return Plan.from_privacy(privacy, **counts, together=together, bound=bound)


def localize_settings(
    config: RunConfig, policy: Policy, machine: Machine, *, folder: Path, installed: Callable[[str], Path]
) -> RunConfig:
    """Replace the files, columns and machine settings in a lead's configuration with the site's own values.

    Args:
        config: the lead's configuration, which policy and budget allow.
        policy: the site's policy.
        machine: machine settings of the site.
        folder: folder of the policy file, where its relative paths start.
        installed: function from a base model's hash to its local folder; raises ConfigError if it is not installed.

    Raises:
        Refused: the site lacks the data set or the base model, or the run has no model hash.
    """
    dataset = next((declared for declared in policy.dataset if declared.id == config.data.dataset), None)
    if dataset is None:
        raise Refused(Reason.DATASET, requested=config.data.dataset)
    settings = asdict(machine)
    for key in ("num_threads", "micro_batch_tokens", "step_mib"):
        settings[key] = settings[key] or None
    if settings["kept_states_folder"]:
        settings["kept_states_folder"] = str(folder / settings["kept_states_folder"])
    settings["kept_states_folder"] = settings["kept_states_folder"] or None
    runtime = RuntimeSpec(**settings, kind="deployment", seeded_noise=config.runtime.seeded_noise)
    try:
        data = config.data.apply_to_site_dataset(dataset, folder=folder)
        return replace(config, model=_find_local_model(config.model, installed), data=data, runtime=runtime)
    except ConfigError as error:  # a column that the site's data lacks
        raise Refused(Reason.SETTINGS) from error


def derive_settings_for_own_site(config: RunConfig, policy: Policy, *, folder: Path) -> RunConfig:
    """Derive the configuration of an experiment on a real site's own file.

    Args:
        config: the experiment's configuration.
        policy: the site's policy, which describes the file.
        folder: folder of the policy file.

    Raises:
        ConfigError: the policy does not list the data set.
    """
    dataset = next((declared for declared in policy.dataset if declared.id == config.data.dataset), None)
    if dataset is None:
        known = ", ".join(declared.id for declared in policy.dataset) or "none"
        raise ConfigError("data.dataset", config.data.dataset, f"must be a data set of the site's policy ({known})")
    unit = policy.population.unit
    sent = config.data.for_sites(config.bound_task.columns(config.data, unit=unit))
    data = replace(sent.apply_to_site_dataset(dataset, folder=folder), declared_sizes=dataset.declared_size)
    federation = FederationSpec(num_sites=1, min_sites=1, site_names=(policy.site,))
    privacy = replace(config.privacy, unit=unit)
    return replace(config, data=data, federation=federation, privacy=privacy)


def _replace_path_by_hash(model: ModelSpec) -> ModelSpec:
    """Replace the lead's model path with the model's hash."""
    if (sha256 := model.sha256) is None:
        from fedtune.model.base_model import hash_model  # torch and transformers take seconds to import

        sha256 = hash_model(model)
    path = model.path if model.is_built_in or model.path.startswith(PACKAGE) else AT_SITE
    return replace(model, path=path, sha256=sha256, revision=None, cache_dir=None, public_id=None, adapter=None)


def _find_local_model(model: ModelSpec, installed: Callable[[str], Path]) -> ModelSpec:
    """Replace the model's hash with its local path. The hash is checked when the model is loaded."""
    model = replace(model, adapter=None)  # never open a path from a lead; the start adapter arrives with round 1
    if model.sha256 is None:
        raise Refused(Reason.BASE_MODELS, requested=UNVERIFIED, allowed="a SHA-256 of the model")
    if model.is_built_in:
        return model
    try:
        return replace(model, path=str(installed(model.sha256)), revision=None, cache_dir=None)
    except ConfigError as error:
        # Part of an installed Python package; other local paths from a server are refused.
        if model.path.startswith(PACKAGE) and ".." not in model.path:
            return replace(model, cache_dir=None)
        raise Refused(Reason.BASE_MODEL_MISSING, requested=model.sha256) from error
