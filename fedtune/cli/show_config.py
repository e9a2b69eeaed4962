"""What `--cfg` and `--info` print in place of a run: the composed settings, and the files that Hydra composed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedtune.api.compose import compose_run, for_hydra, with_interpolations
from fedtune.api.experiment_file import composed_files, hydra_node
from fedtune.show.terminal_tables import Section, show
from fedtune.spec import ConfigError


def show_config(
    words: Sequence[str], *, kit: Path | None, cfg: str | None, package: str | None, resolve: bool, info: str | None
) -> None:
    """Print what these overrides come to, and run nothing."""
    words = [word for word in words if not word.lstrip("+").startswith("audit.")]
    if kit is None:
        config = compose_run(words)
    else:
        from fedtune.cli.run import compose_for_sites
        from fedtune.ops.kits.kit_file import Kit

        config = compose_for_sites(words, kit=Kit.read(kit, kind="lead"))
    ours = [word for word in words if not (kit and word.startswith("sites="))]
    hydras = for_hydra(ours)
    if info is not None:
        node = hydra_node(hydras)
        path = [(one["provider"], f"{one['schema']}://{one['path']}") for one in node["runtime"]["config_sources"]]
        tables = {
            "searchpath": Section("Search path", ("provider", "path"), path, words={0, 1}),
            "defaults": Section(
                "Files, in their order", ("file", "package", "named by"), composed_files(hydras), words={0, 1, 2}
            ),
        }
        show(table for name, table in tables.items() if info in (name, "all"))
        return
    begun = any(word.startswith(("resume=", "renew=")) for word in words)
    job = config.to_json() if resolve or begun else with_interpolations(config, ours)
    found: Any = ({} if cfg == "job" else {"hydra": hydra_node(hydras)}) | ({} if cfg == "hydra" else job)
    for name in package.split(".") if package else ():
        if not (isinstance(found, dict) and name in found):
            raise ConfigError("--package", package, f"must be one of {', '.join(found)}")
        found = found[name]
    text = yaml.safe_dump(found, allow_unicode=True, sort_keys=False)
    sys.stdout.write(f"# @package {package}\n{text}" if package else text)
