"""Networks of a federation's processes: a namespace per member, or this machine's loopback."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..flower.loopback import find_free_port

SERVER = "server"
_NUMBERS = itertools.count(1)
_NAMED = Path("/run/netns")


class Network:
    """All members on loopback; `address` is the server's address for the others."""

    isolated = False
    """Whether the members can reach only the server, which is one of them."""
    address = "127.0.0.1"

    def __init__(self) -> None:
        self.port = find_free_port()

    def inside(self, member: str, words: Sequence[str]) -> list[str]:
        return list(words)

    def connect(self, member: str, *, up: bool) -> None:
        raise NotImplementedError("nobody can be cut off from this machine's loopback")

    def hand_over(self, member: str) -> None:
        """Move the server's address to the machine of `member`; on loopback, the port is free once the server has
        ended.
        """

    def close(self) -> None:
        """Remove all namespaces and interfaces."""


class Namespaces(Network):
    """One network namespace per member, and a bridge in the server's namespace without outside access."""

    isolated = True
    address = "10.203.0.1"
    port = 9092

    def __init__(self, members: Sequence[str]) -> None:
        prefix = f"fedtune-{os.getpid()}-{next(_NUMBERS)}"
        self._names = {member: f"{prefix}-{member}" for member in (SERVER, *members)}
        try:
            for name in self._names.values():
                _run_ip("netns", "add", name)
                _run_ip("-n", name, "link", "set", "lo", "up")
            self._connect_all()
        except BaseException:
            self.close()
            raise

    def _connect_all(self) -> None:
        server = self._names[SERVER]
        _run_ip("-n", server, "link", "add", "hub", "type", "bridge")
        _run_ip("-n", server, "address", "add", f"{self.address}/24", "dev", "hub")
        _run_ip("-n", server, "link", "set", "hub", "up")
        for number, (member, name) in enumerate(self._names.items(), 1):
            if member == SERVER:
                continue
            port = f"port{number}"
            # Created with its two ends in two namespaces, so that it never appears in the machine's own.
            _run_ip("link", "add", "out", "netns", name, "type", "veth", "peer", "name", port, "netns", server)
            _run_ip("-n", server, "link", "set", port, "master", "hub", "up")
            _run_ip("-n", name, "address", "add", f"10.203.0.{number}/24", "dev", "out")
            _run_ip("-n", name, "link", "set", "out", "up")

    def inside(self, member: str, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._names[member], *words]

    def connect(self, member: str, *, up: bool) -> None:
        _run_ip("-n", self._names[member], "link", "set", "out", "up" if up else "down")

    def hand_over(self, member: str) -> None:
        _run_ip("-n", self._names[SERVER], "address", "delete", f"{self.address}/24", "dev", "hub")
        _run_ip("-n", self._names[member], "address", "add", f"{self.address}/24", "dev", "out")
        for name in self._names.values():  # the announcement of a machine that takes over an address
            _run_ip("-n", name, "neighbor", "flush", "all")

    def close(self) -> None:
        for name in self._names.values():
            with contextlib.suppress(subprocess.CalledProcessError):  # not created, because of an earlier failure
                _run_ip("netns", "delete", name)


@cache
def explain_missing_namespaces() -> str:
    """Return the reason why this machine supports no namespaces for the tests; empty if it does."""
    if shutil.which("ip") is None:
        return "the command ip is missing"
    if os.geteuid() != 0:
        return "network namespaces need root"
    _remove_leftovers()
    try:
        Namespaces(["probe"]).close()
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"
    return ""


def choose_network(members: Sequence[str]) -> Network:
    """Choose namespaces if possible, otherwise loopback; `FEDTUNE_TEST_NETWORK=loopback` forces loopback."""
    return Network() if needs_loopback() or explain_missing_namespaces() else Namespaces(members)


def needs_loopback() -> bool:
    return os.environ.get("FEDTUNE_TEST_NETWORK") == "loopback"


def _remove_leftovers() -> None:
    for path in _NAMED.glob("fedtune-*-*-*") if _NAMED.is_dir() else ():
        match = re.fullmatch(r"fedtune-(\d+)-\d+-.*", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):
                _run_ip("netns", "delete", path.name)


def _run_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
