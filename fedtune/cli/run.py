"""`fedtune run`: start, look at, stop and resume a run over real sites."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedtune.cli.compose import compose_run, saved_config
from fedtune.cli.run_arguments import ACTIONS
from fedtune.cli.run_folder import folder_of, is_running, make, run_in_folder, told
from fedtune.config import RunConfig
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.kits.members import Member
from fedtune.spec import ConfigError, RunError

_STOP_S = 60.0
_OURS = ("federation.num_sites", "federation.site_names", "federation.participants", "runtime", "runtime.kind")


def run(options: argparse.Namespace) -> None:
    """Do what the arguments say.

    Raises:
        ConfigError: kit, roster, run folder or a setting is wrong.
        RunError: the server cannot be reached, too few sites replied, or a run does not stop.
        RefusedError: too many sites refuse.
    """
    words = list(options.overrides)
    if not words or words[0] not in ACTIONS:
        _start(words, kit=_kit(options))
        return
    if len(words) < 2:
        raise ConfigError("run folder", None, f"is required: fedtune run {words[0]} FOLDER")
    folder, rest = Path(words[1]), words[2:]
    match words[0]:
        case "status":
            from fedtune.cli.run_status import show_status

            show_status(folder, as_json=options.json)
        case "stop":
            _stop(folder, kit=_kit(options) if options.for_good else None)
        case _:
            _start([f"resume='{folder}'", *rest], kit=_kit(options))


def _kit(options: argparse.Namespace) -> Kit:
    if options.kit is None:
        raise ConfigError("--kit", None, "is required: the folder of the lead's kit")
    return Kit.read(Path(options.kit), kind="lead")


def _start(words: Sequence[str], *, kit: Kit) -> None:
    # Here, because torch and Flower take seconds to import and a mistake in an override should not wait for them.
    config = composed(words, kit=kit)
    folder = folder_of(config)
    import fedtune.flower.deployment  # noqa: F401 - before the run's log takes the place of what Flower's import sets up
    from fedtune.deploy.services.lead_service import LeadService

    lead, console = LeadService(kit=kit), Console()
    if config.resume is None:
        config = told(console, config, lead.fitted(config))
        make(folder, config)
    again = f"fedtune run resume {folder} --kit {kit.folder}"
    run_in_folder(config, folder, console, work=lead.run, again=again)


def composed(words: Sequence[str], *, kit: Kit) -> RunConfig:
    """The run's configuration, with the sites that `sites=[a,b]` names, and their sizes from the roster.

    Raises:
        ConfigError: for every mistake in a setting, or a site that the roster does not have.
    """
    from fedtune.deploy.services.lead_service import members

    wanted = [word for word in words if word.startswith("sites=")]
    others = [word for word in words if not word.startswith("sites=")]
    if any(word.startswith("resume=") for word in others):
        if wanted:
            raise ConfigError("sites", wanted[-1].partition("=")[2], "cannot change in a run that is resumed")
        return _resumed(others)
    for word in others:
        key, value = _key_and_value(word)
        if key in _OURS:
            bound = "is always deployment here" if key.startswith("runtime") else "is set by sites=[a,b,...] here"
            raise ConfigError(key, value, bound)
    chosen = members(kit, _names(wanted[-1]) if wanted else ())
    given = [*others, "runtime=deployment", *_about(chosen)]
    if any(_key_and_value(word)[0] == "data.declared_sizes" for word in others):
        return compose_run(given)
    # Which data set it is, and so how large the sites declare it, is known once the rest is composed.
    dataset = compose_run([*given, "data.declared_sizes=2"]).data.dataset
    return compose_run([*given, f"data.declared_sizes=[{','.join(map(str, _sizes(chosen, dataset)))}]"])


def _resumed(words: Sequence[str]) -> RunConfig:
    config = compose_run(words)
    if config.runtime.kind != "deployment":
        bound = f"must be a run over real sites: fedtune simulate resume={config.resume} goes on with this one"
        raise ConfigError("resume", config.resume, bound)
    return config


def _key_and_value(word: str) -> tuple[str, str]:
    key, _, value = word.lstrip("+~").partition("=")
    return key, value


def _about(chosen: Sequence[Member]) -> list[str]:
    names = ",".join(f"'{member.site}'" for member in chosen)
    return [
        f"federation.num_sites={len(chosen)}",
        f"federation.site_names=[{names}]",
        "federation.participants=[]",
        # How a simulation deals out its file says nothing of real sites.
        "~data.partition",
    ]


def _sizes(chosen: Sequence[Member], dataset: str) -> list[int]:
    for member in chosen:
        if dataset not in member.datasets:
            bound = f"is no data set of {member.site}, which declared {', '.join(member.datasets)}"
            raise ConfigError("data.dataset", dataset, bound)
    return [member.datasets[dataset] for member in chosen]


def _names(override: str) -> list[str]:
    value = override.partition("=")[2]
    found = re.fullmatch(r"\[(.*)\]", value.strip())
    names = [name.strip().strip("'\"") for name in (found[1] if found else value).split(",")]
    if not all(names):
        raise ConfigError("sites", value, "must look like [north,south]")
    return names


def _stop(folder: Path, *, kit: Kit | None) -> None:
    from fedtune.deploy.services.lead_service import LeadService, running_process

    config, console = saved_config(folder), Console()
    if is_running(folder):
        pid = running_process(folder)
        if pid is None:
            raise RunError(f"{folder} is running, and does not say in which process; stop it where it was started")
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while is_running(folder):
            if time.monotonic() > deadline:
                raise RunError(f"process {pid} has not stopped within {_STOP_S:g} s; it may be finishing an evaluation")
            time.sleep(0.2)
        console.print(f"{folder} is stopped; `fedtune run resume {folder} --kit ...` goes on.", soft_wrap=True)
    else:
        console.print(f"{folder} is not running.", soft_wrap=True)
    if kit is not None:
        heard = LeadService(kit=kit).end(config, timeout_s=30.0)
        console.print(f"Told that it is over: {', '.join(heard) or 'no site'}.", soft_wrap=True)
        if silent := [site for site in config.federation.active if site not in heard]:
            text = f"Not reached: {', '.join(silent)}; their budget is free when the run expires."
            console.print(text, soft_wrap=True)
