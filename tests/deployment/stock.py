"""A federation of stock Flower processes: `flower-superlink`, one `flower-supernode` per site, and the lead's
SuperExec.

fedtune's commands create the kits. Sites have no network: each answers at its Unix socket, in its own namespace. Each
SuperNode runs as a separate user, who can open nothing of the site's except that socket.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fedtune.privacy.policy_file import read_policy, write_policy

from ..flower.loopback import find_free_port
from ..processes import REPOSITORY, Process, make_environment, wait_for
from .federation import ONE_THREAD, Federation
from .networks import Network
from .site_folder import HELD_SITE, SiteFolder

BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
STRICT = "north"
"""The site whose SuperNode has fedtune's bundle preinstalled, and cannot install another one."""
SOCKET_GROUP, NODE_USER = 60001, 60002
AS_GROUP = ("setpriv", "--regid", str(SOCKET_GROUP), "--clear-groups")
AS_NODE = (
    *("unshare", "--mount", "sh", str(Path(__file__).with_name("open_python.sh")), sys.base_prefix, str(Path.home())),
    *("setpriv", "--reuid", str(NODE_USER), "--regid", str(NODE_USER), "--groups", str(SOCKET_GROUP)),
)


@cache
def explain_missing_users() -> str:
    """Return the reason why processes cannot have separate users here; empty if they can."""
    if os.geteuid() or shutil.which("setpriv") is None:
        return "users of their own need root and setpriv"
    words = [*AS_NODE, "env", sys.executable, "-c", "import fedtune.flower.site_app"]  # `env` runs as that user
    result = subprocess.run(words, cwd="/", env=make_environment(), capture_output=True, check=False)
    return "" if result.returncode == 0 else "other users cannot run this Python"


class Named(Network):
    """A server with a host name, because nginx does not verify certificates for IP addresses."""

    address = "localhost"


class StockFederation(Federation):
    """A federation over Flower's own processes, started with TLS and registered keys."""

    def __init__(self, folder: Path, command: Any) -> None:
        super().__init__(folder, command, network=Named())
        self.front = self.address
        """The server's address for SuperNodes: nginx, if it is installed."""
        self.nodes: dict[str, Process] = {}
        self.ca = self.lead_kit / "ca.pem"
        self.public = Path(tempfile.mkdtemp(prefix="stock-", dir="/tmp"))
        """The folder that SuperNodes can read: a home for each, with its socket."""
        self.public.chmod(0o711)
        self.secret = folder / "superexec.secret"
        self.secret.write_bytes(secrets.token_bytes(32))
        home = folder / "home"
        home.mkdir()
        connection = f'address = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "banks"\n[superlink.banks]\n{connection}')
        self.do("flower-app", str(folder / "app"))

    def call(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a Flower command to its end."""
        result = subprocess.run(
            words,
            cwd=cwd or self.folder,
            env=make_environment(**{**QUIET, "FLWR_HOME": str(self.folder / "home"), **variables}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        return result.stdout

    def flower(self, name: str, *words: str, home: Path | None = None) -> Process:
        flower_home = str(home or self.folder / f"{name}-home")
        env = {**QUIET, "FLWR_HOME": flower_home, "HOME": flower_home}
        self._processes.append(Process(name, words, log=self.folder / f"{name}.log", cwd=home or self.folder, env=env))
        return self._processes[-1]

    def start_superlink(self) -> None:
        kit = self.home / "server"
        self.server = self.flower(
            *("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.network.port)),
            *("--isolation", "process", "--enable-supernode-auth", "--database", "superlink.db"),
            *("--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(kit / "server.pem")),
            *("--ssl-keyfile", str(kit / "server_key.pem"), "--superexec-auth-secret-file", str(self.secret)),
        )
        self.server.wait_for_text("Uvicorn running")

    def start_front(self) -> str:
        """Start nginx, if installed, in front of the SuperLink with the deployed configuration; return its address."""
        port, folder, kit = find_free_port(), self.folder / "nginx", self.home / "server"
        text = (REPOSITORY / "deployment/flower/nginx.conf").read_text()
        edits = {"listen 443": f"listen 127.0.0.1:{port}", "ssl_name fl.example.org": "ssl_name localhost"}
        edits |= {"/etc/nginx/fl.example.org.pem": f"{kit}/server.pem", "/etc/nginx/superlink_ca.pem": str(self.ca)}
        edits |= {"/etc/nginx/fl.example.org.key": f"{kit}/server_key.pem", "127.0.0.1:8000": self.address}
        for old, new in edits.items():
            assert old in text
            text = text.replace(old, new)
        folder.mkdir()
        (folder / "flower.conf").write_text(text)
        shutil.copy(Path(__file__).with_name("nginx.conf"), folder)
        self.flower("nginx", "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"))
        wait_for(lambda: (folder / "pid").exists(), what="nginx")
        return f"localhost:{port}"

    def start_lead(self) -> None:
        self.superexec = self.flower(
            *("superexec", "flower-superexec", "--runtime-api-address", self.address),
            *("--root-certificates", str(self.ca), "--superexec-auth-secret-file", str(self.secret)),
        )

    def start_site(self, site: SiteFolder) -> None:
        """Start the site's process without a network interface, with training that a test can pause."""
        socket = self.public / f"{site.name}-socket" / "site.sock"
        write_policy(replace(read_policy(site.site_toml), socket=str(socket)), site.site_toml, others=ONE_THREAD)
        program = [*AS_GROUP, sys.executable, str(HELD_SITE), str(site.folder)]
        site.up = self.run(site.name, site.name, ["unshare", "--net", *program, "site", "start", *site.args])

    def start_node(self, site: SiteFolder) -> None:
        home, socket = self.public / site.name, self.public / f"{site.name}-socket" / "site.sock"
        self.nodes[site.name] = self.flower(
            *(f"{site.name}-node", *AS_NODE, "flower-supernode", "--superlink", self.front, "--host", "127.0.0.1"),
            *("--port", str(find_free_port()), "--root-certificates", str(home / "ca.pem")),
            *("--auth-supernode-private-key", str(home / "node_key"), "--node-config", f'fedtune-socket="{socket}"'),
            home=home,
        )

    def kill(self, process: Process) -> None:
        """Kill a Flower process with all of its children."""
        os.killpg(process.pid, signal.SIGKILL)
        process.end(seconds=30)

    def restart_node(self, site: SiteFolder) -> None:
        """Restart a SuperNode as its unit does, repeatedly while the server counts the killed SuperNode as online."""
        self.start_node(site)
        while "SuperNode ID" not in (node := self.nodes[site.name]).text:
            if node.code is not None:
                self.start_node(site)
            time.sleep(0.5)

    def start(self, *names: str, held: bool = False) -> None:
        self.start_superlink()
        if shutil.which("nginx"):
            self.front = self.start_front()
        for site in self.sites.values():
            home, socket = self.public / site.name, self.public / f"{site.name}-socket"
            for path, group in ((home, NODE_USER), (socket, SOCKET_GROUP), (home / "apps", NODE_USER)):
                path.mkdir()
                path.chmod(0o770 if path.name == "apps" and site.name != STRICT else 0o750)
                os.chown(path, 0, group)
            key = home / "node_key"
            shutil.copy(self.ca, home)
            (home / "ca.pem").chmod(0o644)
            shutil.copy(site.kit / "connection_key.pem", key)
            self.call("ssh-keygen", "-q", "-p", "-P", "", "-N", "", "-f", str(key))
            key.with_name("node_key.pub").write_text(self.call("ssh-keygen", "-y", "-f", str(key)))
            self.call("flwr", "supernode", "register", f"{key}.pub", "banks", "--name", site.name)
            os.chown(key, NODE_USER, NODE_USER)
            if site.name == STRICT:
                self.install_bundle(home)
            self.start_site(site)
            self.start_node(site)
        self.start_lead()
        for site in self.sites.values():
            site.wait_until_up()
            self.nodes[site.name].wait_for_text("SuperNode ID")

    def install_bundle(self, home: Path) -> None:
        """Install the bundle as root, for a SuperNode that cannot write to its app folder."""
        (output := self.folder / "built").mkdir()
        self.call("flwr", "build", "--app", str(self.folder / "app"), cwd=output)
        self.call("flwr", "install", *map(str, output.iterdir()), FLWR_HOME=str(home))
        for path in (home / "apps").rglob("*"):
            path.chmod(0o755)

    def submit(self, name: str, settings: Sequence[str], *, new_run: bool = True) -> str:
        """Start a run with `flwr run`; return its number at the SuperLink."""
        overrides = [f"name={name}", f"tracking.output_dir={self.folder / 'runs'}"] if new_run else []
        file = self.folder / f"{name}.toml"
        file.write_text(f"kit = {json.dumps(str(self.lead_kit))}\nsettings = {json.dumps([*settings, *overrides])}\n")
        return self.submit_app(self.folder / "app", f'run="{file}"')

    def submit_app(self, app: Path, run_config: str) -> str:
        answer = self.call("flwr", "run", str(app), "banks", "--run-config", run_config, "--format", "json")
        return str(json.loads(answer[answer.index("{") :])["run-id"])

    def status(self, run: str) -> str:
        """Return the status of a run from `flwr list`."""
        answer = self.call("flwr", "list", "banks", "--run-id", run, "--format", "json")
        return str(json.loads(answer[answer.index("{") :])["runs"][0]["status"])

    def wait_until_over(self, run: str, *, seconds: float = 400.0) -> str:
        """Wait for the end of a run and return its final status."""
        statuses: list[str] = []

        def has_finished() -> bool:
            statuses[:] = [self.status(run)]
            return statuses[0].startswith("finished")

        wait_for(has_finished, seconds=seconds, what=f"run {run}")
        return statuses[0]

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.public, ignore_errors=True)
