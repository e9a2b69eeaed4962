"""What a run notes in its folder for later: machine and model, its search, and what its start and base owe."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.codec import decode, parse_json
from fedtune.config import RunConfig, saved_settings
from fedtune.data.records import resolve_file
from fedtune.federation.run_folder import RunFolder
from fedtune.model.refusals import OWED, PRIVATE_TO
from fedtune.privacy.durable import write_durably
from fedtune.privacy.selection import Selection, released
from fedtune.runs.earlier_debts import SPENT, UNKNOWN, Debt, chain, debts_in, debts_of_base, debts_of_texts
from fedtune.sites.run_records import RunRecords, card_of, file_sha256
from fedtune.spec import RUN_SCHEMA, ConfigError, FedtuneError, RunError, check_schema, spec
from fedtune.version import __version__, shipped_folders

if TYPE_CHECKING:  # they import torch, which a reader does not need
    from transformers import PreTrainedConfig

    from fedtune.sites.shared_model import RunModel
    from fedtune.tasks.saved import SavedAdapter

_NOTED = ("cryptography", "dp-accounting", "flwr", "numpy", "opacus", "peft", "safetensors", "torch", "transformers")


@spec
class Environment:
    """One process's; it is the lead's, and in a simulation the sites' too.

    Attributes:
        since: UTC; when the run was first started, or resumed, here.
        machine: such as "x86_64", with the number of its cores.
        device: that the model was on, and how it was set.
        model_sha256: of the base model as it was loaded, see `fedtune.model.manifest`.
        sampling: how units joined a step, where training took place in this process; None: elsewhere.
        randomness: "operating_system" or "seeded", likewise.
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


def note_environment(folder: Path, shared: RunModel) -> None:
    """Note what this process is, in the run folder, unless the newest note says just that."""
    known, here = read_environments(folder), _here(shared)
    if known and replace(here, since=known[-1].since) == known[-1]:
        return
    fields = {"schema_version": RUN_SCHEMA, "environments": [asdict(environment) for environment in (*known, here)]}
    write_durably(RunFolder(folder).environment, json.dumps(fields, indent=1).encode() + b"\n")


def read_environments(folder: Path) -> tuple[Environment, ...]:
    """The machines and versions of a run, oldest first; empty for a run that noted nothing.

    Raises:
        RunError: the note is damaged.
    """
    path = RunFolder(folder).environment
    if not path.exists():
        return ()
    try:
        fields = parse_json(path.read_bytes(), key=str(path), bound="must be an object")
        check_schema("schema_version", fields["schema_version"], RUN_SCHEMA, of="run folder")
        return tuple(decode(Environment, each) for each in fields["environments"])
    except (ConfigError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged, so the machine and the model of the run are not known") from error


def read_selection(folder: Path) -> Selection | None:
    """The search that the run is a trial of; None: not on file.  Raises RunError for a damaged note."""
    if not (path := RunFolder(folder).selection).is_file():
        return None
    try:
        return decode(Selection, parse_json(path.read_bytes(), key=str(path), bound="must be an object"))
    except ConfigError as error:
        raise RunError(f"{path} is damaged, so the search behind this run is not known") from error


def start_adapter_of(config: RunConfig) -> dict[str, Any] | None:
    """The provenance of what a run begins in, for `run.json`; None: in a new adapter, and nothing else owes.

    What its training spent is told by the run folder that an adapter lies in, of a base by the mark of its export, and
    of synthetic records by their card.  It is "unknown" without; an epsilon of None bounds nothing.
    """
    of_base = debts_of_base(config.model)
    earlier = [*of_base, *_of_records(config)]
    if config.model.adapter is None:
        return chain(earlier)
    from fedtune.tasks.saved import SavedAdapter

    start = SavedAdapter.to_begin_in(config.model.adapter)
    has_head = config.bound_task.has_head
    about = {"digest": start.digest, "head": start.has_head_for(config.task_model()) if has_head else None}
    public, (of_run, learnt) = config.public.train_file, _of_run(start)
    if public is not None and (learnt != public or of_base):
        bound = "must be null with public.train_file: it was not trained on those records alone"
        raise ConfigError("model.adapter", config.model.adapter, bound)
    if earlier:  # of a base, its run told it where that is on file
        of_run["start_adapter"] = chain([*debts_in(of_run.get("start_adapter")), *earlier])
    return about | ({"public": True} if public else {}) | of_run  # the person who started the run declares it


def _of_records(config: RunConfig) -> Iterator[Debt]:
    """What synthetic records among those that a run reads here owe."""
    for file, key in RunRecords(config).files().items():
        path = resolve_file(file, shipped_folders(), key=key).resolve()
        if os.path.lexists(card := card_of(path, ".json")):
            try:
                told = json.loads(card.read_bytes())
                own = told["sha256"] == file_sha256(path, key=key)  # else it is another file's
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                told, own = {}, False
            yield from debts_of_texts(told.get("runs") if own else None)


def _of_run(adapter: SavedAdapter) -> tuple[dict[str, Any], str | None]:
    """What the run of an adapter owes, by the folder that it lies in, and the records of one that owes nothing else."""
    owed: dict[str, Any] = dict.fromkeys(SPENT, UNKNOWN)
    try:
        folder = adapter.folder.resolve().parent
        earlier = json.loads(RunFolder(folder).result.read_bytes())
        RunFolder(folder).require_own(adapter.digest)
        spent, settings = earlier["privacy"], saved_settings(folder)
        epsilon, delta = released(spent["epsilon"], float(spent["delta"]), read_selection(folder))
        own = {"unit": str(spent["unit"]), "delta": delta, "epsilon": None if spent["seeded_noise"] else epsilon}
        before = (earlier.get("provenance") or {}).get("start_adapter")
        owed = {"from": str(settings["name"]), "dataset": str(settings["data"]["dataset"]), **own}
        owed |= {"start_adapter": before} if before else {}
        return owed, settings["data"]["train_file"] if owed["epsilon"] is None and not before else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, FedtuneError):
        return owed, None


def mark(
    base: PreTrainedConfig, adapter: Path, *, private_to: str | None, texts: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Note in a model's settings, which become its config.json, what its training owes: that of a run's adapter.

    `texts` are the runs behind texts that it learnt from as well, as their card tells them.  What is `private_to` a
    site owes nothing that could be told, and is no base.
    """
    if private_to is not None:
        setattr(base, PRIVATE_TO, private_to)
        return
    from fedtune.tasks.saved import SavedAdapter

    saved = SavedAdapter.read(adapter)
    own = {"digest": saved.digest} | _of_run(saved)[0]
    of_texts = debts_of_texts([*texts]) if texts else ()
    setattr(base, OWED, chain([*debts_in(own), *of_texts, *debts_in(getattr(base, OWED, None))]))


def _here(shared: RunModel) -> Environment:
    from fedtune.model.base_model import model_sha256
    from fedtune.training.accelerators import about

    config = shared.config
    trains = config.runtime.kind != "deployment"
    return Environment(
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        fedtune_version=__version__,
        python=platform.python_version(),
        system=platform.system(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        device=about(shared.device),
        libraries={name: version(name) for name in _NOTED},  # fedtune needs all of them
        model_sha256=config.model.sha256 or model_sha256(config.model),  # a pinned hash was checked at loading
        # training.local knows one way to sample; tests/training/test_dp_step.py shows that it really happens.
        sampling="poisson" if trains else None,
        randomness=("seeded" if config.runtime.seeded_noise else "operating_system") if trains else None,
    )
