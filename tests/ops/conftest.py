"""Fixtures for tests of operations: a federation folder, joining sites, and a server for the doctor."""

import contextlib
import json
import os
import shutil
import ssl
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.doctor.check import DoctorCheck
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.members import REQUEST, Member, Roster, initialize_site
from fedtune.ops.kits.provisioning import JoinResult
from fedtune.ops.wire.fleet import HELLO
from fedtune.privacy.policy_file import write_policy
from tests.flower.hostile import Hostile, build_response

from ..conftest import fail_where, make_site_policy, read_files

SNAPSHOTS = Path(__file__).parent / "snapshots" / "doctor.txt"
FEDERATION_TOML = f"""\
name = "cardiology-2026"
server = "127.0.0.1:9092"
also_known_as = ["localhost", "fl.example.org"]

[[model]]
name = "minilm"
sha256 = "{"53" * 32}"
license = "Apache-2.0"
"""


@pytest.fixture(scope="session")
def now() -> datetime:
    """The creation time of all certificates, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def federation_toml(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION_TOML)
    return path


@pytest.fixture(scope="session")
def fresh_federation(tmp_path_factory: pytest.TempPathFactory, now: datetime) -> Path:
    """A federation folder without sites, created once and copied, because its keys and durable writes are slow."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "federation.toml").write_text(FEDERATION_TOML)
    return provisioning.init_federation(folder / "federation.toml", out=folder / "federation", now=now).folder


@pytest.fixture
def federation(federation_toml: Path, fresh_federation: Path) -> Path:
    return shutil.copytree(fresh_federation, federation_toml.parent / "federation")


@dataclass(frozen=True)
class Desk:
    """The lead's desk: a federation folder, the folders of its sites, and operations on their requests."""

    folder: Path
    now: datetime

    def request(self, site: str, *, kit: str = "kit", **policy: Any) -> Path:
        """Create the join request of a site in a folder with its name; `kit` is another folder for its keys."""
        folder = self.folder.parent / site
        folder.mkdir(exist_ok=True)
        write_policy(make_site_policy(site, **policy), folder / "site.toml")
        return initialize_site(folder / "site.toml", out=folder / kit, new_ledger=True) / REQUEST

    def join(self, site: str, **policy: Any) -> Path:
        """Admit a site and unzip its kit into the folder with its keys."""
        request = self.request(site, **policy)
        unpack(self.add(request).archive, request.parent)
        return request.parent

    def add(self, request: Path, *, days: int | None = None) -> JoinResult:
        return provisioning.check_join_request(self.folder, request=request, days=days, now=self.now)[1]()

    def renew(
        self, name: str, request: Path | None = None, *, new_site_key: bool = False, later: int = 0
    ) -> JoinResult:
        """Renew a site a number of days `later`."""
        now = self.now + timedelta(days=later)
        if request is None:
            return provisioning.renew_site(self.folder, name, days=None, now=now)
        return provisioning.check_renewal_request(
            self.folder, name, request=request, days=None, new_site_key=new_site_key, now=now
        )[1]()

    def revoke(self, name: str) -> Member:
        return provisioning.revoke_site(self.folder, name, now=self.now)

    def member(self, name: str) -> Member:
        """Return a site's entry in the server's roster, which must equal the lead's."""
        members = Roster.read(self.folder / "server" / "roster.json").sites
        assert members == Roster.read(self.folder / "lead" / "roster.json").sites
        return next(member for member in members if member.site == name)


@pytest.fixture
def desk(federation: Path, now: datetime) -> Desk:
    return Desk(folder=federation, now=now)


@pytest.fixture
def request_of(desk: Desk) -> Callable[..., Path]:
    return desk.request


@pytest.fixture
def join_site(desk: Desk) -> Callable[[str], Path]:
    return desk.join


class Killed(BaseException):
    """Exception that stands for a killed process."""


def kill_at_step(step: int, patch: pytest.MonkeyPatch) -> list[Any]:
    """Kill the code in the block before disk step number `step`, counted from 0; yield the steps that were started."""
    started: list[Any] = []

    def is_due(*arguments: Any, **options: Any) -> bool:
        started.append(arguments)
        return len(started) > step

    for name in ("fsync", "replace", "unlink"):
        fail_where(patch, os, name, is_due, Killed())
    return started


@contextlib.contextmanager
def expect_unchanged(folder: Path) -> Iterator[None]:
    """Check that the block does not change the folder."""
    before = read_files(folder)
    yield
    assert read_files(folder) == before


def unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as zip_file:
        zip_file.extractall(folder)


def format_lines(check: DoctorCheck) -> list[str]:
    return [f"{check.status:<8}{check.name}: {check.found}", *([f"        -> {check.fix}"] if check.fix else [])]


def check_snapshot(name: str, text: str) -> None:
    """Compare with the section `name` of the snapshots; FEDTUNE_WRITE_SNAPSHOTS=1 writes it."""
    sections = dict(part.split("\n", 1) for part in SNAPSHOTS.read_text().split("## ")[1:])
    if os.environ.get("FEDTUNE_WRITE_SNAPSHOTS"):
        sections[name] = text + "\n\n"
        SNAPSHOTS.write_text("".join(f"## {section}\n{sections[section]}" for section in sections))
    assert text == sections[name].rstrip("\n")


@pytest.fixture
def remove_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class Mailbox(Hostile):
    """A federation's server on loopback that knows one site, with configurable answer and clock."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.says: Callable[[], tuple[int, Any]] = lambda: (200, {"site": "north", "time": time.time()})
        self.clock_ahead_s = 0.0
        super().__init__(context, self._said)  # type: ignore[arg-type]

    def _said(self, conn: ssl.SSLSocket, path: str) -> None:
        status, content = self.says() if path == HELLO else (404, {"reason": "no"})
        date = formatdate(time.time() + self.clock_ahead_s, usegmt=True)
        conn.sendall(build_response(json.dumps(content).encode(), headers=f"date: {date}\r\n", status=f"{status} Said"))


@pytest.fixture
def north_folder(desk: Desk) -> Path:
    """The folder of a joined site, with its anchor on another disk."""
    folder = desk.join("north").parent
    (folder / "other disk").mkdir()
    write_policy(make_site_policy("north", anchor=str(folder / "other disk/anchor.json")), folder / "site.toml")
    return folder
