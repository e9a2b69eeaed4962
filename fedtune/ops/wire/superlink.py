"""The server process: Flower's SuperLink behind a gate, over mutual TLS.

The server stores messages in a database on disk until their receiver fetches them.  It runs no app, installs nothing,
and has neither the lead's key nor a model.  Flower 1.41 serves its Fleet, Runtime and Control APIs on one port, without
authentication for Runtime and Control.  The gate therefore forwards only the calls of sites, which Flower also
authenticates, and the signed calls of the lead.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before the import of Flower, which reads the variable.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import uvicorn
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from fedtune.flower.internals import constant, create_superlink_app
from fedtune.ops.files import handle_signals
from fedtune.ops.kits.members import Member
from fedtune.ops.wire.audit_log import AuditLog
from fedtune.ops.wire.connections import ConnectionLimits, Http, TlsListener, create_server_context
from fedtune.ops.wire.gate import Gate, Roster, Traffic
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.site_calls import SiteCalls

if TYPE_CHECKING:
    from fedtune.flower.internals import SqlLinkState

log = logging.getLogger(__name__)

_ROSTER_S = 2.0  # interval of the checks of roster and database
_HEAD_BYTES = 16 << 10  # maximum size of the request line and headers
_WRITE_TABLE = text("CREATE TABLE IF NOT EXISTS fedtune_alive (id INTEGER PRIMARY KEY, moment TEXT)")
_WRITE = text("INSERT OR REPLACE INTO fedtune_alive VALUES (1, hex(randomblob(2048)))")
"""Write about one database page, which fails on a full disk as any other write would."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server."""

    tls: Tls
    lead: str  # public key of the lead, who may start runs
    host: str  # address to listen on
    port: int
    database: Path  # file with messages and nodes; created if it does not exist
    roster: Roster  # returns the current members; called every two seconds
    audit: Path | None = None  # file of the audit log; None disables the log
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    traffic: Traffic = field(default_factory=Traffic)  # counters to update


def serve(
    settings: ServerSettings,
    *,
    ready: Callable[[], None],
    works: Callable[[bool], None] = lambda _: None,
    has_new_certificate: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the calls in progress and return.

    Args:
        settings: the settings of the server.
        ready: called when the server has started to listen.
        works: called every two seconds with whether the database accepts writes.
        has_new_certificate: called every two seconds; returns whether the server's files contain a new certificate.
    """
    app, state = create_superlink_app(
        **asdict(settings.tls), host=settings.host, port=settings.port, database=settings.database
    )
    audit = AuditLog(settings.audit)
    roster = _CurrentRoster(settings.roster, state, audit)
    roster.refresh_roster()
    gate = Gate(
        app,
        lead=settings.lead,
        roster=lambda: roster.members,
        rules=SiteCalls(state),
        audit=audit,
        traffic=settings.traffic,
    )
    door = TlsListener(
        create_server_context(settings.tls),
        settings.limits,
        member=gate.find_member_name,
        audit=audit,
        of_certificate=settings.traffic.connections,
    )

    def listens() -> None:
        audit.log_event("server started")
        ready()

    http = uvicorn.Config(
        gate,
        host=settings.host,
        port=settings.port,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=_HEAD_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = _Server(http, door, listens, gate.close)

    def look() -> None:
        works(roster.accepts_writes())
        audit.flush()
        if has_new_certificate():
            door.context = create_server_context(settings.tls)
        roster.refresh_roster()

    with handle_signals(lambda *_: None):  # uvicorn raises the signal again after it has stopped
        try:
            with _call_periodically(look):
                server.run()
        finally:
            audit.flush(all_=True)
            audit.log_event("server stopped")


def apply_roster(state: SqlLinkState, roster: Sequence[Member], audit: AuditLog) -> None:
    """Register new sites with Flower and remove revoked sites; other nodes are unchanged.

    A key that is missing from the roster stays registered, because Flower never accepts a removed key again and the
    roster may be an old copy.  The gate blocks calls with such a key.
    """
    for member in roster:
        node_id = state.get_node_id_by_public_key(member.node_key)
        if member.revoked and node_id is not None:
            state.delete_node(constant.NOOP_FLWR_AID, node_id)
            log.warning("%s was revoked", member.site)
            audit.log_event("member revoked", member=member.site)
        elif not member.revoked and node_id is None:
            try:
                state.create_node(
                    constant.NOOP_FLWR_AID, constant.NOOP_ACCOUNT_NAME, member.node_key, 0, name=member.site
                )
            except ValueError:
                log.error("%s: its connection key was revoked; provision the site with a new key", member.site)
                audit.log_event("member not registered", member=member.site, reason="its key was revoked before")
            else:
                log.info("%s is registered", member.site)
                audit.log_event("member registered", member=member.site)


class _CurrentRoster:
    """The last valid roster, which the gate uses and which is applied to Flower's nodes."""

    def __init__(self, read: Roster, state: SqlLinkState, audit: AuditLog) -> None:
        self._read, self.state, self.audit = read, state, audit
        self._took = True
        self.members: Sequence[Member] = ()

    def refresh_roster(self) -> None:
        # First, so that a revoked site is blocked even if the database does not accept writes.
        self.members = self._read()
        apply_roster(self.state, self.members, self.audit)

    def accepts_writes(self) -> bool:
        """Return True if the database accepts writes, which fail on a full disk; log every change."""
        before = self._took
        try:
            with self.state.session() as session:
                session.execute(_WRITE_TABLE)
                session.execute(_WRITE)
            self._took = True
        except SQLAlchemyError:
            self._took = False
        if self._took is not before:
            what = "accepts writes again" if self._took else "does not accept writes"
            log.error("the database %s", what)
        return self._took


@contextmanager
def _call_periodically(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` in a thread every two seconds during the block, and log its errors."""
    stop = threading.Event()

    def watch() -> None:
        last_error = ""
        while not stop.wait(_ROSTER_S):
            try:
                look()
                last_error = ""
            except Exception as error:  # for example a partly copied roster, which is complete at the next check
                if last_error != (last_error := str(error)):
                    log.exception("the roster could not be read; the sites stay unchanged")

    watching = threading.Thread(target=watch, name="roster", daemon=True)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join(timeout=2 * _ROSTER_S)


class _Server(uvicorn.Server):
    """A uvicorn server that accepts connections through a `TlsListener`, and calls `ready` when it listens."""

    def __init__(
        self, config: uvicorn.Config, door: TlsListener, ready: Callable[[], None], ends: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._door, self._ready, self._ends = door, ready, ends

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets=[])  # everything except listening
        if self.should_exit:
            return

        def make(address: str) -> Http:
            return Http(self.config, self.server_state, self.lifespan.state, door=self._door, address=address)

        try:
            self._door.open(self.config.host, self.config.port, make)
        except OSError as error:
            log.error("%s", error)
            await self.lifespan.shutdown()
            sys.exit(1)
        self._ready()

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        self._ends()
        await self._door.close()
        await super().shutdown(sockets)
