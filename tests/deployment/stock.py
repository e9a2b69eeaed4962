"""A federation of Flower's own processes: `flower-superlink`, a `flower-supernode` a site, and the lead's SuperExec.

Kits are made by fedtune's commands.  Sites have no network: each answers at its Unix socket, in a namespace of its own.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.privacy.policy_file import read_policy, write_policy

from ..flower.loopback import free_port
from ..processes import Process, environment, wait_for
from .federation import Federation
from .networks import Network
from .site_folder import HELD_SITE, SiteFolder

BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
SOCKET = "site.sock"


class StockFederation(Federation):
    """The same federation, whose messages Flower's processes carry; started whole, over TLS, with registered keys."""

    def __init__(self, folder: Path, command: Any) -> None:
        super().__init__(folder, command, network=Network())
        self.nodes: dict[str, Process] = {}
        self.ca = self.lead_kit / "ca.pem"
        self.secret = folder / "superexec.secret"
        self.secret.write_bytes(secrets.token_bytes(32))
        home = folder / "home"
        home.mkdir()
        connection = f'address = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "banks"\n[superlink.banks]\n{connection}')
        self.do("flower-app", str(folder / "app"))

    def environment(self, home: str) -> dict[str, str]:
        return {**QUIET, "FLWR_HOME": str(self.folder / home)}

    def call(self, *words: str) -> str:
        """One of Flower's commands, to its end."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=environment(**self.environment("home")),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def flower(self, name: str, *words: str) -> Process:
        self._begun.append(
            Process(name, words, log=self.folder / f"{name}.log", cwd=self.folder, env=self.environment(f"{name}-home"))
        )
        return self._begun[-1]

    def start_superlink(self) -> None:
        kit = self.home / "server"
        self.server = self.flower(
            *("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.network.port)),
            *("--isolation", "process", "--enable-supernode-auth", "--database", "superlink.db"),
            *("--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(kit / "server.pem")),
            *("--ssl-keyfile", str(kit / "server_key.pem"), "--superexec-auth-secret-file", str(self.secret)),
        )
        self.server.wait_for_text("Uvicorn running")

    def start_lead(self) -> None:
        self.superexec = self.flower(
            *("superexec", "flower-superexec", "--runtime-api-address", self.address),
            *("--root-certificates", str(self.ca), "--superexec-auth-secret-file", str(self.secret)),
        )

    def start_site(self, site: SiteFolder) -> None:
        """The site's process, which has no interface of any network, and whose training a test can hold up."""
        write_policy(replace(read_policy(site.site_toml), socket=SOCKET), site.site_toml)
        program = [sys.executable, str(HELD_SITE), str(site.folder)]
        site.up = self.run(site.name, site.name, ["unshare", "--net", *program, "site", "start", *site.own])

    def start_node(self, site: SiteFolder) -> None:
        self.nodes[site.name] = self.flower(
            *(f"{site.name}-node", "flower-supernode", "--superlink", self.address, "--host", "127.0.0.1"),
            *("--port", str(free_port()), "--root-certificates", str(self.ca)),
            *("--auth-supernode-private-key", str(site.folder / "node_key")),
            *("--node-config", f'fedtune-socket="{site.folder / SOCKET}"'),
        )

    def kill(self, process: Process) -> None:
        """Kill one of Flower's processes with all that it started."""
        os.killpg(process.pid, signal.SIGKILL)
        process.end(seconds=30)

    def bring_back(self, site: SiteFolder) -> None:
        """Start a SuperNode as its unit does: again and again, while the server counts the killed one as online."""
        self.start_node(site)
        while "SuperNode ID" not in (node := self.nodes[site.name]).text:
            if node.code is not None:
                self.start_node(site)
            time.sleep(0.5)

    def start(self, *names: str, held: bool = False) -> None:
        self.start_superlink()
        for site in self.sites.values():
            key = site.folder / "node_key"
            shutil.copy(site.kit / "connection_key.pem", key)
            self.call("ssh-keygen", "-q", "-p", "-P", "", "-N", "", "-f", str(key))
            key.with_name("node_key.pub").write_text(self.call("ssh-keygen", "-y", "-f", str(key)))
            self.call("flwr", "supernode", "register", f"{key}.pub", "banks", "--name", site.name)
            self.start_site(site)
            self.start_node(site)
        self.start_lead()
        for site in self.sites.values():
            site.wait_until_up()
            self.nodes[site.name].wait_for_text("SuperNode ID")

    def submit(self, name: str, settings: Sequence[str], *, begins: bool = True) -> str:
        """Start a run by `flwr run`; its number at the SuperLink."""
        where = [f"name={name}", f"tracking.output_dir={self.folder / 'runs'}"] if begins else []
        file = self.folder / f"{name}.toml"
        file.write_text(f"kit = {json.dumps(str(self.lead_kit))}\nsettings = {json.dumps([*settings, *where])}\n")
        words = ("flwr", "run", str(self.folder / "app"), "banks", "--run-config", f'run="{file}"', "--format", "json")
        said = self.call(*words)
        return str(json.loads(said[said.index("{") :])["run-id"])

    def until_over(self, run: str, *, seconds: float = 400.0) -> str:
        """How a run ended, as `flwr list` says."""
        found: list[str] = []

        def over() -> bool:
            said = self.call("flwr", "list", "banks", "--run-id", run, "--format", "json")
            found[:] = [one["status"] for one in json.loads(said[said.index("{") :])["runs"]]
            return found[0].startswith("finished")

        wait_for(over, seconds=seconds, what=f"run {run}")
        return found[0]
