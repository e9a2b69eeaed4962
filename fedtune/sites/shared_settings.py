"""One run's settings on their way from the lead to the sites: what is sent, and what a site puts in its place.

A lead names a data set, a task, a template and a model by its hash.  Files, columns and devices are the site's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fedtune.config import RunConfig, parse
from fedtune.data.partition import PartitionSpec
from fedtune.model.base import weights_sha256
from fedtune.model.spec import PACKAGE, RANDOM, ModelSpec
from fedtune.privacy.policy import Policy
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import ConfigError
from fedtune.training.spec import RuntimeSpec

MOST_CHARACTERS = 1 << 20
_AT_SITE = "at-site"
"""Stands in what is sent for every file."""


def for_sites(config: RunConfig) -> RunConfig:
    """What of a lead's configuration the sites are sent: noise and weights fixed, nothing of the lead's own machine.

    Raises:
        ConfigError: the model's weights cannot be had, so that they cannot be named by their hash.
    """
    data = replace(
        config.data,
        train_file=_AT_SITE,
        validation_file=None,
        test_file=None,
        validation_rows=None,
        test_rows=None,
        columns={role: role for role in config.data.needed_columns(config.task)},
        partition=PartitionSpec(),
        train_fraction=1.0,
    )
    noise = config.plan().noise_multiplier
    return replace(
        config,
        model=replace(config.model, sha256=config.model.sha256 or weights_sha256(config.model), cache_dir=None),
        data=data,
        privacy=replace(config.privacy, noise_multiplier=noise) if config.privacy.private else config.privacy,
        runtime=RuntimeSpec(kind="deployment", seeded_noise=config.runtime.seeded_noise),
        tracking=replace(config.tracking, output_dir=_AT_SITE),
        resume=None,
    )


@lru_cache(maxsize=4)
def read_settings(text: str) -> RunConfig:
    """The configuration that a lead sent.

    Raises:
        Refused: it is none of this version of fedtune.
    """
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError("too long")
        return parse(dict(json.loads(text)))
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(Reason.SETTINGS) from error


def at_site(config: RunConfig, policy: Policy, *, folder: Path, installed: Callable[[str], Path]) -> RunConfig:
    """What was sent, with the site's own files, columns and machine.

    Args:
        config: as it was sent; policy and budget allow it.
        policy: the site's.
        folder: where the policy lies; its paths start there.
        installed: the folder of the base model with a given hash; raises ConfigError where it is not installed.

    Raises:
        Refused: the site has no such base model, or the run names no hash.
    """
    dataset = next(one for one in policy.dataset if one.id == config.data.dataset)
    machine = policy.machine
    runtime = RuntimeSpec(
        kind="deployment",
        device=machine.device,
        num_threads=machine.num_threads or None,
        micro_batch_tokens=machine.micro_batch_tokens,
        kept_states_mib=machine.kept_states_mib,
        gradient_checkpointing=machine.gradient_checkpointing,
        seeded_noise=config.runtime.seeded_noise,
    )
    data = replace(config.data, train_file=str(folder / dataset.path), columns=dict(dataset.columns))
    return replace(config, model=_local_model(config.model, installed), data=data, runtime=runtime)


def _local_model(model: ModelSpec, installed: Callable[[str], Path]) -> ModelSpec:
    """The model where it lies here; its hash is checked when it is loaded."""
    if model.sha256 is None:
        raise Refused(Reason.BASE_MODELS, asked="unverified", allowed="a SHA-256 of the weights")
    if model.path.startswith(RANDOM):
        return model
    try:
        return replace(model, path=str(installed(model.sha256)), revision=None, cache_dir=None)
    except ConfigError as error:
        # Part of an installed Python package; a server names no other place of this machine.
        if model.path.startswith(PACKAGE) and ".." not in model.path:
            return replace(model, cache_dir=None)
        raise Refused(Reason.BASE_MODEL_MISSING, asked=model.sha256) from error
