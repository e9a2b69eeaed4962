"""Records in a run folder: software environments, selection by a search, lineage of start adapter and base model."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.codec import decode, read_bounded_file, read_json_object
from fedtune.config import RunConfig, read_saved_config
from fedtune.data.records import resolve_file
from fedtune.extras import describe_code
from fedtune.federation.lead import Checkpoints, compute_charged_epsilons, find_invalid_field
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import convert_none_to_infinite
from fedtune.model.unsupported_models import OWED, PRIVATE_TO
from fedtune.privacy.durable import write_durably
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import Selection, compute_released_epsilon
from fedtune.runs.lineage import (
    ANOTHER_MACHINE,
    SPENT,
    UNKNOWN,
    LineageEntry,
    build_lineage,
    is_counted,
    read_base_lineage,
    read_texts_lineage,
    sum_start_losses,
    walk_lineage,
)
from fedtune.sites.run_records import RunRecords, find_card_path, hash_file
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.spec import RUN_SCHEMA, ConfigError, FedtuneError, RunError, check_schema, spec
from fedtune.version import __version__, find_shipped_folders

if TYPE_CHECKING:  # these import torch, which readers do not need
    from transformers import PreTrainedConfig

    from fedtune.sites.shared_model import RunModel
    from fedtune.tasks.saved import SavedAdapter

Signers = frozenset[str] | None
"""Public keys of the real sites whose receipts prove a privacy loss; None: it is not fully proved."""
_NOTED = ("cryptography", "dp-accounting", "flwr", "numpy", "opacus", "peft", "safetensors", "torch", "transformers")


@spec
class Environment:
    """Software and hardware of the process of the lead and, in a simulation, of the sites.

    Attributes:
        since: UTC time when the run was started or resumed in this environment.
        fedtune_version: version of fedtune.
        python: version of Python.
        system: operating system.
        machine: architecture, such as "x86_64", with the number of cores.
        device: device of the model, with its numeric settings.
        libraries: name -> version; for a user-defined task also its package and file.
        model_sha256: digest of the loaded base model (`fedtune.model.manifest`).
        sampling: sampling method of a step; None if training took place elsewhere.
        randomness: "operating_system" or "seeded"; None if training took place elsewhere.
        total_parameters: number of parameters of the model, frozen ones included; None if unknown.
    """

    since: str
    fedtune_version: str
    python: str
    system: str
    machine: str
    device: str
    libraries: Mapping[str, str]
    model_sha256: str
    sampling: str | None
    randomness: str | None
    total_parameters: int | None = None


def record_environment(folder: Path, shared: RunModel) -> None:
    """Append the current environment to the run folder, unless the newest entry is identical."""
    known, here = read_environments(folder), _describe_current_environment(shared)
    if known and replace(here, since=known[-1].since) == known[-1]:
        return
    fields = {"schema_version": RUN_SCHEMA, "environments": [asdict(environment) for environment in (*known, here)]}
    write_durably(RunFolder(folder).environment, json.dumps(fields, indent=1).encode() + b"\n")


def read_environments(folder: Path) -> tuple[Environment, ...]:
    """Read a run's environments, oldest first, or return an empty tuple if the file does not exist.

    Raises:
        RunError: the file is damaged.
    """
    path = RunFolder(folder).environment
    if not path.exists():
        return ()
    try:
        fields = read_json_object(path, key=str(path))
        check_schema("schema_version", fields["schema_version"], RUN_SCHEMA, of="run folder")
        return tuple(decode(Environment, item) for item in fields["environments"])
    except (OSError, ConfigError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged: the run's machine and model are unknown") from error


def read_selection(folder: Path) -> Selection | None:
    """Read the selection record of a trial, or return None if the run belongs to no hyperparameter search.

    Raises:
        RunError: the file is damaged.
    """
    if not (path := RunFolder(folder).selection).is_file():
        return None
    try:
        return decode(Selection, read_json_object(path, key=str(path)))
    except ConfigError as error:
        raise RunError(f"{path} is damaged: the run's hyperparameter search is unknown") from error


def build_start_lineage(config: RunConfig) -> dict[str, Any] | None:
    """Build the lineage of a run's start adapter, base model and synthetic records for `run.json`."""
    return _build_lineage(config)[0]


def _build_lineage(config: RunConfig) -> tuple[dict[str, Any] | None, Signers]:
    """Build the lineage of a run, and find the sites that signed for all of it.

    Prior spending comes from the run folder of the start adapter, from the mark in an exported base model, and from the
    card of synthetic records. It is "unknown" if the source is missing. An epsilon of None means that no finite bound
    exists; a lineage of None is a new adapter without prior spending.
    """
    earlier = [*read_base_lineage(config.model), *_iter_records_lineage(config)]
    if config.model.adapter is None:
        return build_lineage(earlier), None
    from fedtune.tasks.saved import SavedAdapter

    start = SavedAdapter.read_initial(config.model.adapter)
    has_head = config.bound_task.has_head
    about = {"digest": start.digest, "head": start.can_reuse_head(config.task_model()) if has_head else None}
    public, (of_run, learned, signers) = config.public.train_file, _read_run_lineage(start)
    if public is not None and (learned != public or earlier):
        bound = "must be null with public.train_file: it was trained on other records as well"
        raise ConfigError("model.adapter", config.model.adapter, bound)
    if earlier:
        of_run["start_adapter"] = build_lineage([*walk_lineage(of_run.get("start_adapter")), *earlier])
    entry = about | ({"public": True} if public else {}) | of_run  # declared by the user
    return entry, None if any(map(is_counted, earlier)) else signers


def _iter_records_lineage(config: RunConfig) -> Iterator[LineageEntry]:
    """Yield the lineage entries of the runs that generated the synthetic records in a run's local files."""
    for file, key in RunRecords(config).files().items():
        path = resolve_file(file, find_shipped_folders(), key=key).resolve()
        if os.path.lexists(card := find_card_path(path, ".json")):
            try:
                card_fields = json.loads(read_bounded_file(card, key=key))
                valid = card_fields["sha256"] == hash_file(path, key=key)  # otherwise the card belongs to another file
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                card_fields, valid = {}, False
            yield from read_texts_lineage(card_fields.get("runs") if valid else None)


def _read_run_lineage(adapter: SavedAdapter) -> tuple[dict[str, Any], str | None, Signers]:
    """Read an adapter's lineage entry, its run's training file if it has neither privacy nor lineage, and the sites
    that signed for the entry.

    An epsilon that does not follow from the run's folder, or a start that the run's settings do not bind, is unknown.
    """
    try:
        folder = adapter.folder.resolve().parent
        earlier = json.loads(read_bounded_file(RunFolder(folder).result, key="model.adapter"))
        RunFolder(folder).require_own_adapter(adapter.folder)
        config = read_saved_config(folder)
        before: Any = (earlier.get("provenance") or {}).get("start_adapter")
        plan, epsilon, signers = _derive_epsilon(adapter, config, earlier["privacy"])
        epsilon, delta = compute_released_epsilon(epsilon, plan.delta, read_selection(folder))
        entry: dict[str, Any] = {"from": config.name, "dataset": config.data.dataset, "unit": plan.unit, "delta": delta}
        entry |= {"epsilon": None if config.runtime.seeded_noise else epsilon}
        if digest := config.model.adapter_sha256:
            losses, privacy = (*sum_start_losses(before), before["unit"]), config.privacy
            same = losses[1:] == (privacy.start_delta, privacy.start_unit) and before["digest"] == digest
            same &= (before.get("public") is True) == (config.public.train_file is not None)
            if not same or not _is_same_epsilon(losses[0], privacy.start_epsilon):
                before = dict.fromkeys(("digest", *SPENT), UNKNOWN)
        entry |= {"start_adapter": before} if before else {}
        if any(map(is_counted, walk_lineage(before))):
            start_keys = config.privacy.start_keys
            signers = None if signers is None or start_keys is None else signers | {*start_keys}
        return entry, config.data.train_file if entry["epsilon"] is None and not before else None, signers
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, FedtuneError):
        return dict.fromkeys(SPENT, UNKNOWN), None, None


def _derive_epsilon(
    adapter: SavedAdapter, config: RunConfig, privacy: Mapping[str, Any]
) -> tuple[Plan, float | None, Signers]:
    """Derive the plan of the run that trained an adapter, its epsilon at a site (None: unbounded), and who signed it.

    Args:
        adapter: the run's final adapter, in the run's folder.
        config: the settings in that folder.
        privacy: the field `privacy` of run.json, which anybody can edit.

    Raises:
        ValueError: run.json states another epsilon, or a receipt is not signed for this run, plan and adapter.
        KeyError: a site that sent an update has no receipt.
        FedtuneError: the adapter is damaged, or the folder has no checkpoint of these settings.
    """
    folder, trained, real = adapter.folder.resolve().parent, adapter.trained_sha256, config.runtime.kind == "deployment"
    noise = next(iter(privacy["sites"].values()))["noise_multiplier"] or None  # part of the plan, which receipts sign
    with_noise = replace(config, privacy=replace(config.privacy, noise_multiplier=noise))
    plan = with_noise.plan()
    epsilon = compute_charged_epsilons(plan, plan.max_rounds)[0]
    if not _is_same_epsilon(epsilon, privacy["epsilon"]):
        raise ValueError("epsilon")
    if not plan.private:
        return plan, None, None
    _ = adapter.tensors  # checks their hash
    state, run = Checkpoints(RunFolder(folder).checkpoints, config.digest()).load(), config.run_id()
    if real:
        sha256 = config.model.sha256 or read_environments(folder)[-1].model_sha256
        run = select_settings_for_sites(replace(with_noise, model=replace(config.model, sha256=sha256))).run_id()
    updated = {site for done in state.rounds for site in config.federation.active if done.has_update_from(site)}
    receipts = {site: state.receipts[site] for site in updated}
    wrong = any(find_invalid_field(receipt, site=site, run=run, plan=plan) for site, receipt in receipts.items())
    unsigned = real and any(receipt.reply != trained for receipt in receipts.values())
    if wrong or unsigned or not receipts or state.kept_adapter.digest() != trained:
        raise ValueError("receipts")
    return plan, epsilon, frozenset(receipt.site_key for receipt in receipts.values()) if real else None


def _is_same_epsilon(*epsilons: float | None) -> bool:
    """Whether two epsilons differ at most by the rounding of another machine; None: unbounded."""
    return math.isclose(*map(convert_none_to_infinite, epsilons), rel_tol=ANOTHER_MACHINE)


def derive_start(config: RunConfig) -> dict[str, Any]:
    """Derive the `PrivacySpec.start` of a run with a start adapter from the folders of the runs behind it."""
    entry, signers = _build_lineage(config)
    entry = entry or {}
    epsilon, delta = sum_start_losses(entry)
    unit = None if entry.get("unit") == UNKNOWN else entry.get("unit")
    keys = None if signers is None or epsilon is None else tuple(sorted(signers))
    return {"start_epsilon": epsilon, "start_delta": delta, "start_unit": unit, "start_keys": keys}


def write_lineage_mark(
    base: PreTrainedConfig, adapter: Path, *, private_to: str | None, texts: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the lineage of an adapter into a model's settings, which are saved as config.json.

    Args:
        base: settings of the model.
        adapter: folder of the adapter.
        private_to: site of a personalized adapter. Such a model gets only this mark: its privacy loss cannot be stated,
            and it cannot be a base model.
        texts: runs that generated synthetic training texts, as listed in the card of the texts.
    """
    if private_to is not None:
        setattr(base, PRIVATE_TO, private_to)
        return
    from fedtune.tasks.saved import SavedAdapter

    saved = SavedAdapter.read(adapter)
    entry = {"digest": saved.digest} | _read_run_lineage(saved)[0]
    of_texts = read_texts_lineage([*texts]) if texts else ()
    setattr(base, OWED, build_lineage([*walk_lineage(entry), *of_texts, *walk_lineage(getattr(base, OWED, None))]))


def _describe_current_environment(shared: RunModel) -> Environment:
    from fedtune.model.base_model import hash_model
    from fedtune.training.accelerators import describe_device

    config, task = shared.config, type(shared.config.bound_task)
    task_code = {} if task.__module__.startswith("fedtune.") else {f"task {task.name}": describe_code(task)}
    trains = config.runtime.kind != "deployment"
    return Environment(
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        fedtune_version=__version__,
        python=platform.python_version(),
        system=platform.system(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        device=describe_device(shared.device),
        libraries={name: version(name) for name in _NOTED} | task_code,  # all are required packages
        model_sha256=config.model.sha256 or hash_model(config.model),  # a pinned hash was checked at loading
        # The only sampling method; tests/training/test_dp_step.py verifies it.
        sampling="poisson" if trains else None,
        randomness=("seeded" if config.runtime.seeded_noise else "operating_system") if trains else None,
        total_parameters=sum(parameter.numel() for parameter in shared.model.parameters()),
    )
