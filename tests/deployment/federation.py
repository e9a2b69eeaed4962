"""A federation as operators set it up: kits by the real commands, and server, sites and lead as processes."""

from __future__ import annotations

import csv
import json
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.ops.kits import provisioning
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_policy import Asserted, Policy
from fedtune.sites.run_records import partition_run_records
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.sites.virtual_site import generate_policy

from ..processes import FEDTUNE, Process
from .networks import SERVER, Network, choose_network
from .site_folder import SiteFolder

LEAD, NAMES = "lead", ("north", "south", "west")
DECLARED_SIZE = 230
MINILM = "69dbedbf1fe8d9d0599e7b8c2a45c5b6c70d9ffc4fa6d0e72f04e2c8fa51c194"
Command = Callable[..., Any]
"""Runs `fedtune` in the test's own process."""


def list_settings(*overrides: str) -> list[str]:
    """List the overrides of a very short run, with given noise to skip the calibration."""
    return [
        *("experiment=debug", "runtime.device=cpu", "runtime.num_threads=1", "privacy.noise_multiplier=4.0"),
        *("data.max_length=16", "data.validation_rows=10", "data.test_rows=10"),
        *overrides,
    ]


def simulate_same_run(*overrides: str, names: Sequence[str] = NAMES) -> list[str]:
    """Simulate the same run with the same records at each site."""
    sites = [f"federation.num_sites={len(names)}", f"federation.site_names=[{','.join(names)}]"]
    return [*overrides, *sites, f"data.declared_sizes={DECLARED_SIZE}", "data.train_fraction=0.05"]


@cache
def partition_records(names: tuple[str, ...]) -> dict[str, list[Record]]:
    """Partition the records among the sites as a simulation does."""
    config = compose_run(simulate_same_run(*list_settings("name=dealt"), names=names))
    site_records = partition_run_records(config).sites
    return {name: records.training for name, records in zip(names, site_records, strict=True)}


ONE_THREAD = {"machine": {"num_threads": 1}}
"""Additions to each site's site.toml, because all sites share this machine."""


@cache
def _compose_sent_settings() -> RunConfig:
    """Compose the settings that the sites receive, as far as policies check them."""
    return select_settings_for_sites(
        compose_run(simulate_same_run(*list_settings("name=any", "runtime.seeded_noise=true")))
    )


def make_policy(site: str, *, lead: str) -> Policy:
    """Build a policy with room for all runs of these tests."""
    policy = generate_policy(_compose_sent_settings(), _compose_sent_settings().plan(), NAMES[0], lead=lead)
    columns = {"text": "question", "label": "intent"}
    modules = ("all-linear", "value", "attention.output.dense")
    return replace(
        policy,
        site=site,
        population=replace(policy.population, name=f"{site}-population"),
        dataset=(replace(policy.dataset[0], path="questions.csv", columns=columns),),
        budget=replace(policy.budget, max_epsilon=60.0, max_epsilon_per_run=None),
        limits=replace(policy.limits, min_noise_multiplier=0.3, max_sampling_rate=1.0, max_local_steps=5, max_rounds=9),
        allow=replace(
            policy.allow, base_models=(*policy.allow.base_models, MINILM), target_modules=modules, max_rank=8
        ),
        simulated=False,
        asserted=Asserted(no_person_at_another_site=True),
    )


def write_records(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["question", "intent"])
        lines.writerows([record.fields["text"], record.fields["label"]] for record in records)


class Federation:
    """A newly provisioned federation in an empty folder, on the best network of this machine.

    `command` runs `fedtune` in this process, for commands that need no separate one.
    """

    active: ClassVar[list[Federation]] = []
    """Members whose processes may be running; a failed test shows their logs."""

    def __init__(
        self, folder: Path, command: Any, *, names: Any = NAMES, network: Any = None, created: Any = None
    ) -> None:
        self.folder, self._command = folder, command
        self.home, self.lead_kit = folder / "banks", folder / "banks" / "lead"
        self.server: Any = None
        self.sites: dict[str, SiteFolder] = {}
        self._processes: list[Process] = []
        self.network: Network = network or choose_network([LEAD, *names])
        self.address = f"{self.network.address}:{self.network.port}"
        self.active.append(self)
        try:
            file = folder / "federation.toml"
            file.write_text(f'name = "banks"\nserver = "{self.address}"\n')
            if created is None:
                self.do("provision", "init", str(file), "--out", str(self.home))
            else:
                provisioning.init_federation(file, out=self.home, now=created)
            self.lead_key: str = tomllib.loads((self.lead_kit / "kit.toml").read_text())["lead"]
            self.sites = {name: self.join(name, records) for name, records in partition_records(tuple(names)).items()}
        except BaseException:
            self.close()
            raise

    def do(self, *words: str, code: int = 0) -> Any:
        outcome = self._command(*words)
        assert outcome.code == code, (words, outcome)
        return outcome

    def join(self, name: str, records: Sequence[Record]) -> SiteFolder:
        """Admit a site as lead and site do, after comparing its keys."""
        site = SiteFolder(self.folder / "sites" / name, name, self)
        site.folder.mkdir(parents=True, exist_ok=True)
        write_records(site.folder / "questions.csv", records)
        write_policy(make_policy(name, lead=self.lead_key), site.site_toml, others=ONE_THREAD)
        self.do("site", "init", "--site", str(site.site_toml))
        request = site.kit / "join_request.json"
        site.site_key = json.loads(request.read_bytes())["site_key"]
        self.do("provision", "add-site", str(request), "--compared", "--federation", str(self.home))
        with zipfile.ZipFile(self.home / "sites" / f"{name}-kit.zip") as archive:
            archive.extractall(site.kit)
        return site

    def run(self, name: str, member: str, words: Sequence[str], *, env: dict[str, str] | None = None) -> Process:
        """Start a process of a member; its log is NAME.log in the federation's folder."""
        flower = {"FLWR_HOME": str(self.folder / "flower" / name), **(env or {})}
        command = self.network.inside(member, words)
        self._processes.append(Process(name, command, log=self.folder / f"{name}.log", cwd=self.folder, env=flower))
        return self._processes[-1]

    def start_server(self, *options: str) -> None:
        words = [*FEDTUNE, "server", "start", "--kit", str(self.home / "server"), "--host", self.network.address]
        self.server = self.run("server", SERVER, [*words, *options])
        self.server.wait_for_text("the server is listening")

    def start(self, *names: str, held: bool = False) -> None:
        sites = [self.sites[name] for name in names or self.sites]
        for site in sites:
            site.start(held=held, wait=False)
        self.start_server()
        for site in sites:
            site.wait_until_up()

    def finish(self, name: str, *overrides: str) -> Process:
        lead = self.lead(name, *overrides)
        assert lead.end() == 0, lead.text
        return lead

    def lead(self, name: str, *overrides: str, program: Sequence[str] = FEDTUNE) -> Process:
        output = f"tracking.output_dir='{self.folder / 'runs'}'"
        words = ["run", "--kit", str(self.lead_kit), *(overrides or list_settings()), f"name={name}", output]
        return self.run(f"lead-{name}", LEAD, [*program, *words])

    def resume(self, name: str) -> Process:
        words = [*FEDTUNE, "run", "resume", str(self.run_folder(name)), "--kit", str(self.lead_kit)]
        return self.run(f"lead-{name}", LEAD, words)

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def result(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.run_folder(name) / "run.json").read_bytes()))

    def logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.log"), *self.folder.glob("runs/*/log.txt")])

    def close(self) -> None:
        try:
            for site in self.sites.values():
                site.hold(False)
            processes = [process for process in self._processes if process is not self.server]
            for process in processes:
                process.ask_to_end()
            for process in [*processes, *([self.server] if self.server else [])]:
                process.stop()
        finally:
            self.network.close()
            self.active.remove(self)
