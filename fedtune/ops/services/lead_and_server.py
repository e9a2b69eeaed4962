"""Services of `fedtune run` and `fedtune server start`: a lead's runs over real sites, and a federation's server.

The module imports neither Flower nor torch, which take seconds, because commands that only show a run or report an
invalid setting need neither.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.codec import read_regular_file
from fedtune.federation.lead import read_receipts
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.spec import FederationSpec
from fedtune.ops.kits.certificates import compute_key_fingerprint
from fedtune.ops.kits.kit_file import DATABASE, Address, Kit, KitCertificate, stat_signature
from fedtune.ops.kits.members import Member, Roster
from fedtune.ops.metrics import ServerMetrics
from fedtune.privacy.durable import write_durably
from fedtune.spec import ConfigError, RunError
from fedtune.system import send_signal

if TYPE_CHECKING:
    from fedtune.ops.health import Health

log = logging.getLogger(__name__)
RECEIPTS, RUNNING = "receipts.json", "running.json"


def find_members(kit: Kit, names: Sequence[str]) -> tuple[Member, ...]:
    """Return the roster entries of the named sites, or of all active sites if `names` is empty.

    Raises:
        ConfigError: the roster is not signed by the lead, or a site is unknown, revoked or named twice.
    """
    known = {member.site: member for member in Roster.read_signed(kit.roster, kit=kit).sites}
    current = [name for name, member in known.items() if member.revoked is None]
    if not names and not current:
        raise ConfigError("sites", [], "the roster has no active site: add a site with `fedtune provision add-site`")
    for name in names:
        if name not in known:
            raise ConfigError("sites", name, f"must be one of {', '.join(current)}")
        if known[name].revoked is not None:
            raise ConfigError("sites", name, f"was revoked at {known[name].revoked}")
    if len(set(names)) != len(names):
        raise ConfigError("sites", list(names), "must not repeat a name")
    return tuple(known[name] for name in names or current)


def list_federation_settings(kit: Kit) -> FederationSpec:
    """Return the federation settings for a run with all active sites of the roster."""
    names = tuple(member.site for member in find_members(kit, ()))
    return FederationSpec(num_sites=len(names), site_names=names)


def find_run_name(kit: Kit, name: str) -> str:
    """Return the full name of a run at its sites: `name` itself, or the matching run in the newest receipts.

    Raises:
        ConfigError: no run, or more than one run, matches the name.
    """
    if re.fullmatch(r".+-[0-9a-f]{32}", name):
        return name
    known = sorted({receipt.run for receipt in read_receipts(kit.folder / RECEIPTS).values()})
    matches = [run for run in known if run.rpartition("-")[0] == Path(name).name]
    if len(matches) != 1:
        newest = f"; the latest runs are {', '.join(known)}" if known else ""
        bound = "must be a run folder, or the full name of a run as in a site's `fedtune ledger show`"
        raise ConfigError("run folder", name, bound + newest)
    return matches[0]


def read_latest_answers(folder: Path) -> dict[str, dict[str, str]]:
    """Read each site's latest answer and its time (UTC) from a run folder; empty before the first answer.

    Raises:
        RunError: the file cannot be read.
    """
    path = RunFolder(folder).answers
    try:
        known = json.loads(read_regular_file(path)) if path.exists() else {}
        return {str(site): {key: str(answer[key]) for key in ("what", "time")} for site, answer in known.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        bound = "move the file away to see the other state of the run and later answers"
        raise RunError(f"{path} cannot be read ({type(error).__name__}); {bound}") from error


@contextmanager
def mark_running(folder: Path) -> Iterator[None]:
    """Record the id of this process in the run folder during the block, for `fedtune run stop`."""
    write_durably(folder / RUNNING, json.dumps({"pid": os.getpid(), "at": _process_namespace()}).encode())
    try:
        yield
    finally:
        (folder / RUNNING).unlink(missing_ok=True)


def _process_namespace() -> str:
    """Return the namespace in which this process's id is unique: the host name and, on Linux, the PID namespace."""
    link = Path("/proc/self/ns/pid")
    return f"{platform.node()} {os.readlink(link) if link.is_symlink() else ''}"


def find_running_process(folder: Path) -> int | None:
    """Return the id of the process on this machine that executes the run in a folder; None if there is none."""
    try:
        mark = json.loads(read_regular_file(folder / RUNNING))
        pid = int(mark["pid"])
        # os.kill treats 0 and negative ids as process groups.
        if mark.get("at") not in (None, _process_namespace()) or pid <= 0:
            return None
        send_signal(pid, 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return pid


class KitRoster:
    """Roster of a server's kit, reread whenever the file changes.

    A new roster must have a higher number and must not reactivate a revoked key, so that an old copy cannot readmit a
    site.  A restarted process accepts any valid roster, but the server's database still blocks revoked keys.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._mark: tuple[int, int, int] | None = None
        self._newest: Roster | None = None
        self._revoked: frozenset[str] = frozenset()

    def read_newest(self) -> Roster:
        """Return the newest valid roster.

        Raises:
            ConfigError: the kit's roster cannot be read, is not signed by the lead, is older than the current roster,
                or reactivates a revoked key.
        """
        path = self._kit.roster
        try:
            mark = stat_signature(path)
        except OSError as error:
            raise ConfigError("roster", str(path), f"cannot be read ({error.strerror})") from None
        if self._newest is None or mark != self._mark:
            self._newest = self._check_newer(Roster.read_signed(path, kit=self._kit))
            self._mark = mark
        return self._newest

    def _check_newer(self, roster: Roster) -> Roster:
        before = self._newest
        if before is not None and roster != before and roster.number <= before.number:
            bound = f"must be higher than {before.number}, the previous roster's number"
            raise ConfigError("roster.number", roster.number, bound)
        keys = {member.site: compute_key_fingerprint(member.node_key) for member in roster.sites}
        revoked = {member.site for member in roster.sites if member.revoked is not None}
        if back := [site for site, key in keys.items() if site not in revoked and key in self._revoked]:
            bound = "must stay revoked: the federation's folder was restored from a backup, so revoke these sites again"
            raise ConfigError("roster.sites", back, bound)
        self._revoked |= {keys[site] for site in revoked}
        return roster


@dataclass(frozen=True, kw_only=True)
class ServerService:
    """A configured server, ready to start."""

    kit: Kit
    host: str
    port: int | None  # port to listen on; None: the port in the kit's server address
    data: Path | None  # folder of the database and the audit log; None: the folder of the kit
    health: Health  # updated with the state of the server

    @cached_property
    def metrics(self) -> ServerMetrics:
        """The metrics of the server's sites and traffic."""
        return ServerMetrics(kit=self.kit)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ConfigError: the kit is incomplete, its certificate has expired, or its roster is not signed by the lead.
        """
        from fedtune.ops.wire.audit_log import FILE_NAME
        from fedtune.ops.wire.superlink import ServerSettings, serve

        folder = self.data or self.kit.folder
        if not folder.is_dir():
            raise ConfigError("--data", str(folder), "must be a folder")
        roster, certificate = KitRoster(self.kit), KitCertificate(self.kit)

        def read_members() -> Sequence[Member]:
            self.metrics.members = roster.read_newest().sites
            return self.metrics.members

        settings = ServerSettings(
            tls=self.kit.tls(),
            lead=self.kit.lead,
            host=self.host,
            port=self.port or Address.parse_address(self.kit.server).port,
            database=folder / DATABASE,
            roster=read_members,
            audit=folder / FILE_NAME,
        )
        self.metrics.traffic = settings.traffic

        def mark_ready() -> None:
            self.health.update(state="connected", last_contact=datetime.now(UTC))
            until = certificate.certificate.not_after.isoformat()
            about = {"federation": self.kit.federation, "port": settings.port, "certificate_until": until}
            log.info("the server is listening", extra=about)

        serve(settings, ready=mark_ready, works=self._update_health, has_new_certificate=certificate.is_new)
        self.health.update(state="stopping")
        log.info("the server has stopped")

    def _update_health(self, works: bool) -> None:
        """Update the health state: a server whose database does not accept writes is not ready."""
        state = self.health.snapshot()["state"]
        if works and state == "failing":
            self.health.update(state="connected")
        elif not works and state == "connected":
            self.health.update(state="failing")
