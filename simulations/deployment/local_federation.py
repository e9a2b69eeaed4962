"""A whole federation on this machine as a lead and its sites would set it up: real kits, processes and TLS."""

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

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.site_policy import Asserted
from fedtune.sites.run_records import partition_run_records
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.sites.virtual_site import generate_policy

SITES = ("north", "south", "west")
START_S = 120.0


class LocalFederation:
    """Server, lead and sites under one folder, each site with its part of the experiment's records.

    Args:
        folder: an empty one.
        overrides: of the experiment, as for `fedtune simulate`.
        sites: their names.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], *, sites: Sequence[str] = SITES) -> None:
        self.folder, self.overrides, self.sites = folder, list(overrides), tuple(sites)
        self.config: RunConfig = compose_run([*overrides, *self._same_sites(), "name=made"])
        self.port = free_port()
        (folder / "federation.toml").write_text(f'name = "fed"\nserver = "127.0.0.1:{self.port}"\n')
        fedtune(folder, "provision", "init", "federation.toml")
        self._make_sites()

    def _make_sites(self) -> None:
        lead = tomllib.loads((self.folder / "fed/lead/kit.toml").read_text())["lead"]
        config, sent = self.config, select_settings_for_sites(self.config)
        dealt, commands = partition_run_records(config).sites, list[list[str]]()
        for name, records in zip(self.sites, dealt, strict=True):
            place = self.folder / name
            place.mkdir()
            with (place / "records.csv").open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                roles = sorted(records.training[0].fields)
                writer.writerow(roles)
                writer.writerows([record.fields[role] for role in roles] for record in records.training)
            policy = generate_policy(sent, sent.plan(), name, lead=lead)
            dataset = replace(policy.dataset[0], path="records.csv", columns={role: role for role in roles})
            # Room for several runs.
            budget = replace(policy.budget, max_epsilon=20 * policy.budget.max_epsilon)
            policy = replace(
                policy,
                dataset=(dataset,),
                budget=budget,
                simulated=False,
                asserted=Asserted(no_person_at_another_site=True),
            )
            write_policy(policy, place / "site.toml", others=_ONE_THREAD)
            commands.append(["site", "init", "--site", f"{name}/site.toml"])
            commands.append(
                ["provision", "add-site", f"{name}/kit/join_request.json", "--federation", "fed", "--compared"]
            )
        _python(self.folder, "-c", _ONE_AFTER_THE_OTHER, json.dumps(commands))
        if sent.plan().shared is not None:
            self._make_known()
        for name in self.sites:
            place = self.folder / name
            zipfile.ZipFile(self.folder / f"fed/sites/{name}-kit.zip").extractall(place / "kit")

    def _make_known(self) -> None:
        """Each site learns the others' keys from these sites themselves, as secure aggregation needs it."""
        requests = {name: json.loads((self.folder / name / "kit/join_request.json").read_text()) for name in self.sites}
        for name in self.sites:
            path = self.folder / name / "site.toml"
            policy = read_policy(path)
            members = {other: request["site_key"] for other, request in requests.items() if other != name}
            write_policy(replace(policy, trust=replace(policy.trust, members=members)), path, others=_ONE_THREAD)

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Server and sites, until the block ends.

        The sites are forked off one process, so that their libraries lie in memory once; else each is on its own.
        """
        with self.server_up(), self._process("sites", [str(Path(__file__).parent / "fork_sites.py"), *self.sites]):
            for name in self.sites:
                self._wait(name, "the site is up")
            yield

    @contextlib.contextmanager
    def server_up(self) -> Iterator[None]:
        """The server alone."""
        with self._process(
            "server", ["-m", "fedtune", "server", "start", "--kit", "fed/server", "--host", "127.0.0.1"]
        ):
            self._wait("server", "the server is listening")
            yield

    def start_alone(self, name: str) -> float:
        """Start one site as a process of its own and end it; the seconds until it is up."""
        began = time.monotonic()
        words = ["-m", "fedtune", "site", "start", "--kit", f"{name}/kit", "--site", f"{name}/site.toml"]
        with self._process(name, words):
            self._wait(name, "the site is up", every_s=0.02)
            return time.monotonic() - began

    @contextlib.contextmanager
    def _process(self, name: str, arguments: Sequence[str]) -> Iterator[None]:
        with (self.folder / f"{name}.log").open("w") as stream:
            process = subprocess.Popen([sys.executable, *arguments], cwd=self.folder, stderr=stream, env=environment())
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)

    def _wait(self, name: str, ready: str, *, every_s: float = 0.1) -> None:
        log, deadline = self.folder / f"{name}.log", time.monotonic() + START_S
        while not log.exists() or ready not in log.read_text():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(every_s)

    def run(self, name: str, *more: str, sites: Sequence[str] = ()) -> dict[str, Any]:
        """`fedtune run` over these sites, or all of them; returns run.json."""
        # The sites' files hold what the simulation would take of the whole file.
        taking_part = f"sites=[{','.join(sites or self.sites)}]"
        words = [*self.overrides, "data.train_fraction=1.0", taking_part, f"name={name}", *more]
        fedtune(self.folder, "run", "--kit", "fed/lead", *words)
        return json.loads((self.folder / "runs" / name / "run.json").read_text())

    def simulate(self, name: str, *more: str) -> dict[str, Any]:
        """The same run in one process."""
        fedtune(self.folder, "simulate", *self.overrides, *self._same_sites(), f"name={name}", *more)
        return json.loads((self.folder / "runs" / name / "run.json").read_text())

    def _same_sites(self) -> list[str]:
        return [f"federation.num_sites={len(self.sites)}", f"federation.site_names=[{','.join(self.sites)}]"]

    def log(self, site: str) -> list[dict[str, Any]]:
        """A site's log, one object a line."""
        return [json.loads(line) for line in (self.folder / f"{site}.log").read_text().splitlines()]


def fedtune(folder: Path, *arguments: str) -> None:
    """Run one command, and stop where it fails."""
    _python(folder, "-m", "fedtune", *arguments)


_ONE_THREAD = {"machine": {"num_threads": 1}}  # since all sites share this machine
_ONE_AFTER_THE_OTHER = """
import json, sys
from fedtune.cli.main import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
"""
"""Hundreds of commands, each of which would take a second to begin."""


def _python(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
