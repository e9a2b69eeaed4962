"""A whole federation on this machine as a lead and three sites would set it up: real kits, processes and TLS."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_policy import Machine
from fedtune.sites.run_records import dealing
from fedtune.sites.shared_settings import for_sites
from fedtune.sites.virtual_site import generated_policy

SITES = ("north", "south", "west")
START_S = 120.0


class LocalFederation:
    """Server, lead and three sites under one folder, each site with its third of the experiment's records.

    Args:
        folder: an empty one.
        overrides: of the experiment, as for `fedtune simulate`.
    """

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, list(overrides)
        self.config: RunConfig = compose_run([*overrides, *same_sites(), "name=made"])
        self.port = free_port()
        (folder / "federation.toml").write_text(f'name = "fed"\nserver = "127.0.0.1:{self.port}"\n')
        fedtune(folder, "provision", "init", "federation.toml")
        self._make_sites()

    def _make_sites(self) -> None:
        lead = tomllib.loads((self.folder / "fed/lead/kit.toml").read_text())["lead"]
        config, sent = self.config, for_sites(self.config)
        dealt = dealing(config).dealt().sites
        for name, records in zip(SITES, dealt, strict=True):
            place = self.folder / name
            place.mkdir()
            with (place / "records.csv").open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                roles = sorted(records.training[0].fields)
                writer.writerow(roles)
                writer.writerows([record.fields[role] for role in roles] for record in records.training)
            policy = generated_policy(sent, sent.plan(), name, lead=lead)
            dataset = replace(policy.dataset[0], path="records.csv", columns={role: role for role in roles})
            # Room for several runs; one thread, since three sites share this machine.
            budget = replace(policy.budget, max_epsilon=20 * policy.budget.max_epsilon)
            policy = replace(policy, dataset=(dataset,), budget=budget, machine=Machine(num_threads=1))
            write_policy(policy, place / "site.toml")
            fedtune(self.folder, "site", "init", "--site", f"{name}/site.toml")
            fedtune(self.folder, "provision", "add-site", f"{name}/kit/join_request.json", "--federation", "fed")
            zipfile.ZipFile(self.folder / f"fed/sites/{name}-kit.zip").extractall(place / "kit")

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Server and sites, until the block ends."""
        with contextlib.ExitStack() as stack:
            serve = ["server", "start", "--kit", "fed/server", "--host", "127.0.0.1"]
            stack.enter_context(self._process("server", serve, ready="the server listens"))
            for name in SITES:
                start = ["site", "start", "--kit", f"{name}/kit", "--site", f"{name}/site.toml"]
                stack.enter_context(self._process(name, start, ready="the site is up"))
            yield

    @contextlib.contextmanager
    def _process(self, name: str, arguments: Sequence[str], *, ready: str) -> Iterator[None]:
        log = self.folder / f"{name}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedtune", *arguments], cwd=self.folder, stderr=stream, env=environment()
            )
        try:
            deadline = time.monotonic() + START_S
            while ready not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)

    def run(self, name: str, *more: str) -> dict[str, Any]:
        """`fedtune run` over all three sites; returns run.json."""
        # The sites' files hold what the simulation would take of the whole file.
        words = [*self.overrides, "data.train_fraction=1.0", f"sites=[{','.join(SITES)}]", f"name={name}", *more]
        fedtune(self.folder, "run", "--kit", "fed/lead", *words)
        return json.loads((self.folder / "runs" / name / "run.json").read_text())

    def simulate(self, name: str, *more: str) -> dict[str, Any]:
        """The same run in one process."""
        fedtune(self.folder, "simulate", *self.overrides, *same_sites(), f"name={name}", *more)
        return json.loads((self.folder / "runs" / name / "run.json").read_text())

    def log(self, site: str) -> list[dict[str, Any]]:
        """A site's log, one object a line."""
        return [json.loads(line) for line in (self.folder / f"{site}.log").read_text().splitlines()]


def same_sites() -> list[str]:
    return [f"federation.num_sites={len(SITES)}", f"federation.site_names=[{','.join(SITES)}]"]


def fedtune(folder: Path, *arguments: str) -> None:
    """Run one command, and stop where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"fedtune {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
