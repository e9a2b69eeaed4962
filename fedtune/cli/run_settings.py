"""Composition of settings for runs over real sites, and the output of `--cfg` and `--info`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fedtune.api.compose import compose_run, restore_interpolations, select_hydra_overrides
from fedtune.api.experiment_file import list_composed_files, read_hydra_settings
from fedtune.config import RunConfig
from fedtune.data.partition import PartitionSpec
from fedtune.data.spec import AT_SITE
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.services.lead_and_server import find_members
from fedtune.privacy.site_policy import Policy
from fedtune.show.terminal_tables import Section, show
from fedtune.spec import ConfigError

_OURS = ("federation.num_sites", "federation.site_names", "federation.participants", "runtime", "runtime.kind")


def compose_for_sites(words: Sequence[str], *, kit: Kit) -> RunConfig:
    """Compose the configuration of a run over real sites, with declared sizes from the roster.

    `sites=[a,b]` selects the participating sites.

    Raises:
        ConfigError: a setting is for simulations only, or a site has not declared the data set.
    """
    wanted, others = _split_site_selection(words)
    typed = dict(word.lstrip("+~").partition("=")[::2] for word in others)
    if wanted and "resume" in typed:
        raise ConfigError("sites", wanted[-1].partition("=")[2], "cannot be changed when a run is resumed: remove it")
    if begun := {"resume", "renew"} & {*typed}:
        config, key = compose_run(others), next(iter(begun))
        if config.runtime.kind != "deployment":
            bound = f"is not a run over real sites: resume it with fedtune simulate {key}={typed[key]}"
            raise ConfigError(key, typed[key].strip("'"), bound)
        if key == "resume":
            return config
    for key, value in typed.items():
        if key in _OURS:
            bound = "is always deployment here" if key.startswith("runtime") else "is set by sites=[a,b,...] here"
            raise ConfigError(key, value, bound)
    if not begun:  # a simulation's data file and partition do not apply to real sites
        if (file := typed.get("data.train_file")) is not None:
            raise ConfigError("data.train_file", file, "is set by each site's policy: remove this setting")
        others += _build_real_data_overrides()
    named: Sequence[str]
    if wanted:
        named = _parse_site_names(wanted[-1])
    elif begun:
        named = config.federation.active
    else:  # as in the experiment, in which no participants means all sites of the roster
        known = _build_site_overrides([member.site for member in find_members(kit, ())])
        open_sizes = [word for word in others if not word.startswith("data.declared_sizes=")]
        named = compose_run([*open_sizes, *known, "data.declared_sizes=2"]).federation.participants
    chosen = find_members(kit, named)
    given = [*others, *_build_site_overrides([member.site for member in chosen]), "federation.participants=[]"]
    if "data.declared_sizes" in typed:
        return compose_run(given)
    # The declared sizes depend on data.dataset, which is known only after composition.
    dataset = compose_run([*given, "data.declared_sizes=2"]).data.dataset
    for member in chosen:
        if dataset not in member.datasets:
            bound = f"is not a data set of {member.site}, which declared {', '.join(member.datasets)}"
            raise ConfigError("data.dataset", dataset, bound)
    sizes = ",".join(str(member.datasets[dataset]) for member in chosen)
    return compose_run([*given, f"data.declared_sizes=[{sizes}]"])


def compose_for_one_site(words: Sequence[str], policy: Policy) -> RunConfig:
    """Compose a real-site run's configuration at a site, without the lead's kit or roster.

    `sites=[a,b]` selects the participating sites; all of them are given this site's declared size.

    Raises:
        ConfigError: a setting is invalid.
    """
    wanted, others = _split_site_selection(words)
    if not wanted:
        return compose_run(others, for_real_sites=True)
    given = [*others, *_build_real_data_overrides(), *_build_site_overrides(_parse_site_names(wanted[-1]))]
    if not any(word.startswith("data.declared_sizes") for word in others):
        config = compose_run([*given, "data.declared_sizes=2"], for_real_sites=True)
        sizes = {dataset.id: dataset.declared_size for dataset in policy.dataset}
        given += [f"data.declared_sizes={sizes.get(config.data.dataset, 2)}"]
    return compose_run(given, for_real_sites=True)


def _split_site_selection(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the form `sites=[a,b]` and the others."""
    wanted = [word for word in words if word.startswith("sites=")]
    return wanted, [word for word in words if not word.startswith("sites=")]


def _build_real_data_overrides() -> list[str]:
    """Return the overrides that replace a simulation's data file and partition, which do not apply to real sites."""
    partition = (f"data.partition.{key}={json.dumps(value)}" for key, value in asdict(PartitionSpec()).items())
    return ["runtime=deployment", f"data.train_file={AT_SITE}", *partition]


def _build_site_overrides(names: Sequence[str]) -> list[str]:
    listed = ",".join(f"'{name}'" for name in names)
    return [f"federation.num_sites={len(names)}", f"federation.site_names=[{listed}]"]


def _parse_site_names(override: str) -> list[str]:
    value = override.partition("=")[2]
    found = re.fullmatch(r"\[(.*)\]", value.strip())
    names = [name.strip().strip("'\"") for name in (found[1] if found else value).split(",")]
    if not all(names):
        raise ConfigError("sites", value, "must look like [north,south]")
    return names


def print_config(
    words: Sequence[str], *, kit: Path | None, cfg: str | None, package: str | None, resolve: bool, info: str | None
) -> None:
    """Print the composed settings or their sources, without starting a run."""
    words = [word for word in words if not word.lstrip("+").startswith("audit.")]
    config = compose_run(words) if kit is None else compose_for_sites(words, kit=Kit.read(kit, kind="lead"))
    ours = [word for word in words if not (kit and word.startswith("sites="))]
    hydras = select_hydra_overrides(ours)
    if info is not None:
        node = read_hydra_settings(hydras)
        path = [(one["provider"], f"{one['schema']}://{one['path']}") for one in node["runtime"]["config_sources"]]
        headings, files = ("file", "package", "included by"), list_composed_files(hydras)
        tables = {"searchpath": Section("Search path", ("provider", "path"), path, words={0, 1})}
        tables["defaults"] = Section("Config files in order of composition", headings, files, words={0, 1, 2})
        show(table for name, table in tables.items() if info in (name, "all"))
        return
    begun = any(word.startswith(("resume=", "renew=")) for word in words)
    job = config.to_json() if resolve or begun else restore_interpolations(config, ours)
    found: Any = ({} if cfg == "job" else {"hydra": read_hydra_settings(hydras)}) | ({} if cfg == "hydra" else job)
    for name in package.split(".") if package else ():
        if not (isinstance(found, dict) and name in found):
            raise ConfigError("--package", package, f"must be one of {', '.join(found)}")
        found = found[name]
    text = yaml.safe_dump(found, allow_unicode=True, sort_keys=False)
    sys.stdout.write(f"# @package {package}\n{text}" if package else text)
