"""Service of `fedtune site start`, the single long-running process of a site.

The process waits for the lead's questions at the server, answers them, and keeps its model loaded in between.

It opens no port except a health endpoint on loopback.  `fedtune.federation.site_round` determines its answers.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.data.formats import require_reader
from fedtune.flower.client import SiteApp
from fedtune.flower.site_socket import listen_at, serve_connection
from fedtune.ops.files import find_write_problem, handle_signals
from fedtune.ops.health import Health, State
from fedtune.ops.kits.certificates import check_private
from fedtune.ops.kits.kit_file import Kit, KitCertificate, require_model_reader
from fedtune.ops.services.site_state import SiteState, lock_ledger
from fedtune.ops.wire.line_errors import Expired, MessageGone, Unauthorized, Unreachable
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Refusal
from fedtune.privacy.site_files import SiteFiles
from fedtune.sites.site_settings import read_site_settings
from fedtune.spec import ConfigError, RunError

if TYPE_CHECKING:  # fedtune.ops.wire imports Flower's internals, which a site behind a socket does not load
    from fedtune.flower.grid_transport import Message, RecordDict
    from fedtune.ops.wire.fleet import Fleet
    from fedtune.ops.wire.waiting import Bell
    from fedtune.sites.real_site import SiteProcess

log = logging.getLogger(__name__)

_MAX_WAIT_S, _UNAUTHORISED_S, _FETCHED_S = 15.0, 30.0, 3.0
_POLL_S, _MAX_POLL_S = 0.3, 1.0
"""Initial and maximum polling interval while no messages arrive; the interval grows geometrically."""
_RUNG_POLL_S = 30.0  # polling interval while long polling works
_LEDGER_S = 15.0  # interval between tests of the ledger's disk
_LOOK_S = 0.25  # polling interval for stop, leave and pause


@dataclass(frozen=True, kw_only=True)
class SiteService:
    """A site that is ready to start from its kit and its policy."""

    kit: Kit
    site_toml: Path
    health: Health  # updated with the state of the site
    # called with each answer: "update", or the reason for a missing update
    answered: Callable[[str], None] = lambda _: None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; the first signal finishes a round in progress, the second aborts it.

        Raises:
            ConfigError: kit and policy do not match, another process serves the ledger, or a package for reading the
                site's files or models is missing.
            RunError: the ledger is missing, inconsistent or not writable, or the site has left the federation.
        """
        state = SiteState.in_kit(self.kit.folder)
        files = self._check_files(state)
        certificate = None if files.policy.socket else KitCertificate(self.kit)  # a Unix socket needs no certificate
        if self.kit.lead not in files.policy.allow.leads:
            log.warning("the policy's allow.leads does not contain the kit's lead: all its requests will be refused")
        with lock_ledger(files.ledger), _stop_on_signal() as stop:
            state.open_ledger(files)
            process = cache(lambda: self._create_site_process(state))
            app = SiteApp(lambda settings: process().site(settings), name=files.policy.site)
            find_problem = partial(find_write_problem, files.ledger, *([files.anchor] if files.anchor else []))
            if certificate is None:
                place = self.site_toml.parent / files.policy.socket
                _SocketLoop(app, state, self.health, stop, self.answered, find_problem).run(place)
            else:
                self._serve_over_network(app, state, stop, certificate=certificate, find_problem=find_problem)
            log.info("the site has stopped", extra={"site": files.policy.site})

    def _serve_over_network(
        self,
        app: SiteApp,
        state: SiteState,
        stop: threading.Event,
        *,
        certificate: KitCertificate,
        find_problem: Callable[[], str],
    ) -> None:
        """Connect to the server and answer its messages until the site stops."""
        from fedtune.ops.wire.fleet import Fleet
        from fedtune.ops.wire.waiting import Bell

        fleet = Fleet(self.kit.server, self.kit.tls(), heard=lambda: self.health.update(last_contact=datetime.now(UTC)))
        log.info("the site is up", extra={"site": self.kit.site, "server": self.kit.server})
        bell = Bell(self.kit.server, self.kit.tls(), threading.Event())

        def renew_certificate() -> datetime:
            if certificate.is_new():
                fleet.reload_certificate()
                bell.reload_certificate()
            return certificate.certificate.not_after

        try:
            about = dict[str, Any](until=renew_certificate, answered=self.answered, find_problem=find_problem)
            _Loop(fleet, bell, app, state, self.health, stop, **about).run()
        finally:
            self.health.update(state="stopping")
            bell.close()
            fleet.close()

    def _create_site_process(self, state: SiteState) -> SiteProcess:
        """Create the `SiteProcess`, which loads models and trains.

        The caller delays the call until the first message, because the imported libraries take seconds and most of the
        memory.
        """
        from fedtune.ops.kits.models import find_installed_model
        from fedtune.sites.real_site import SiteProcess

        return SiteProcess(
            site_toml=self.site_toml,
            installed=lambda sha256: find_installed_model(self.kit.folder, sha256),
            paused=lambda: state.paused_file.exists() or state.left_file.exists(),
            runs=state.run_settings_folder,
            adapters=self.kit.folder / "adapters",
            awaits=partial(_queue_for_approval, state),
            open_ledger=state.open_ledger,
        )

    def _check_files(self, state: SiteState) -> SiteFiles:
        files = self.kit.find_site_files(self.site_toml)
        read_site_settings(self.site_toml)  # validate the settings before the first answer
        if not (files.policy.key_command or files.site_key.is_file()):
            bound = "is missing: `fedtune site init` created it, and the ledger cannot be continued without it"
            raise ConfigError("site_key", str(files.site_key), bound)
        if files.site_key.is_file():
            check_private(files.site_key)
        files.load_key()  # test the passphrase or command before the first answer
        if state.left_file.exists():
            raise RunError(f"this site has left the federation; remove {state.left_file} to take part again")
        for dataset in files.policy.dataset:
            require_reader(self.site_toml.parent / dataset.path)
        for sha256 in files.policy.allow.base_models:
            require_model_reader(self.kit.folder, sha256)
        return files


def _queue_for_approval(state: SiteState, proposal: Proposal, settings: str, software: str) -> None:
    if state.queue_for_approval(proposal, settings, software=software):
        log.warning("a run waits for approval", extra={"run": proposal.run, "lead_software": software})


class _IdleHealth:
    """Determines the health state of an idle site: connected, paused, or failing if the ledger is not writable.

    Args:
        state: the site's state folder.
        find_problem: returns the reason why the ledger is not writable; empty if it is writable.
    """

    def __init__(self, state: SiteState, find_problem: Callable[[], str]) -> None:
        self._state, self._find_problem = state, find_problem
        self._looked, self._said = -math.inf, ""

    def check_current_state(self) -> State:
        """Return the current state.

        Every `_LEDGER_S` seconds, the call tests whether the ledger is writable, and logs a change of the result.
        """
        if self._state.paused_file.exists():
            return "paused"
        if time.monotonic() - self._looked > _LEDGER_S:
            before, self._said, self._looked = self._said, self._find_problem(), time.monotonic()
            if self._said != before:
                log.error("%s", self._said or "the ledger can be written again")
        return "failing" if self._said else "connected"


@dataclass
class _Loop:
    """Main loop of a connected site, which receives messages and sends the answers; errors do not end the loop."""

    fleet: Fleet
    bell: Bell
    app: SiteApp
    state: SiteState
    health: Health
    stop: threading.Event
    until: Callable[[], datetime]
    answered: Callable[[str], None] = lambda _: None
    # returns the reason why the ledger is not writable; empty if it is writable
    find_problem: Callable[[], str] = lambda: ""

    _active, _rounds, _sent = False, 0, -math.inf
    _wait_s, _poll_s = 1.0, _POLL_S

    def __post_init__(self) -> None:
        self._standing = _IdleHealth(self.state, lambda: self.find_problem())

    def run(self) -> None:
        while not self.stop.is_set() and not self.state.left_file.exists():
            self.bell.rung.clear()
            if (message := self._receive_next()) is not None:
                self._poll_s = _POLL_S
                try:
                    self._answer(message)
                except Exception:  # a message type without a reply in Flower
                    log.exception("a message of an unknown type was dropped")
            elif self._active:
                self._wait_for_question()
        # Flower withholds the answers of offline nodes, so wait until the lead has had time to fetch the last answer.
        time.sleep(max(0.0, self._sent + _FETCHED_S - time.monotonic()))

    def _wait_for_question(self) -> None:
        """Wait until a question may be available, or the site must stop or leave."""
        until = time.monotonic() + (_RUNG_POLL_S if self.bell.works else self._poll_s)
        self._poll_s = min(1.05 * self._poll_s, _MAX_POLL_S)
        while not (self.stop.is_set() or self.state.left_file.exists() or self.bell.rung.is_set()):
            if (left := until - time.monotonic()) <= 0:
                return
            self.health.update(state=self._standing.check_current_state())
            self.until()
            self.bell.rung.wait(min(left, _LOOK_S))

    def _receive_next(self) -> Message | None:
        try:
            self._require_certificate()
            if not self._active:
                self.fleet.activate()
                self._active = True
                self._record_contact()  # the next call may take a long time
            message = self.fleet.receive()
        except (Unreachable, Unauthorized) as error:
            self._handle_connection_error(error)
            return None
        except MessageGone as error:
            log.info("a message was removed at the server before it was fetched", extra={"reason": str(error)})
            return None
        self._wait_s = 1.0
        self._record_contact()
        return message

    def _require_certificate(self) -> None:
        """Check that the site's certificate is still valid; raise Expired otherwise.

        The check is required because an open connection stays usable after the certificate has expired.
        """
        ends = self.until()
        if datetime.now(UTC) > ends:
            raise Expired(
                f"this site's certificate expired at {ends:%Y-%m-%d %H:%M} UTC: ask the lead for a new kit, and "
                "unzip it over this one"
            )

    def _record_contact(self) -> None:
        self.health.update(state=self._standing.check_current_state(), last_contact=datetime.now(UTC))

    def _answer(self, message: Message) -> None:
        self.health.update(state="training")
        began = time.monotonic()
        reply = self.app.answer(message)
        about, seconds = message.metadata.message_type, time.monotonic() - began
        self._rounds += _log_answer(about, reply.content, seconds=seconds, answered=self.answered)
        self.health.update(rounds_answered=self._rounds)
        self._send(message, reply)

    def _send(self, message: Message, reply: Message) -> None:
        """Send the answer and retry while the server is unreachable, because the only other copy is in the ledger."""
        from fedtune.ops.wire.fleet import Fleet

        while not Fleet.is_past_deadline(message, now=time.time()):
            try:
                self._require_certificate()
                self.fleet.reply(reply)
                self._sent = time.monotonic()
                return
            except MessageGone as error:
                log.info("the server no longer accepts this answer", extra={"reason": str(error)})
                return
            except (Unreachable, Unauthorized) as error:
                self._handle_connection_error(error)
            if self.stop.is_set() or self.state.left_file.exists():
                return  # the ledger stores the answer, and the lead will repeat the question

    def _handle_connection_error(self, error: Unreachable | Unauthorized) -> None:
        expired = isinstance(error, Expired)
        self.health.update(state="expired" if expired else "disconnected")
        wait_s = self._wait_s if isinstance(error, Unreachable) else _UNAUTHORISED_S
        log.warning("no contact: %s%s", error, "" if expired else f"; trying again in {wait_s:.0f} s")
        self._active = self._active and isinstance(error, Unreachable)
        self.stop.wait(wait_s)
        self._wait_s = min(2 * self._wait_s, _MAX_WAIT_S)


class _SocketLoop:
    """Main loop of a site that answers messages on a Unix socket, in a process without network access."""

    def __init__(
        self,
        app: SiteApp,
        state: SiteState,
        health: Health,
        stop: threading.Event,
        answered: Callable[[str], None],
        find_problem: Callable[[], str],
    ) -> None:
        self._app, self._state, self._health, self._stop, self._answered = app, state, health, stop, answered
        self._standing, self._rounds = _IdleHealth(state, find_problem), 0

    def run(self, place: Path) -> None:
        with listen_at(place) as server:
            log.info("the site is up", extra={"socket": str(place)})
            while not self._stop.is_set() and not self._state.left_file.exists():
                self._health.update(state=self._standing.check_current_state())
                serve_connection(server, self._answer, wait_s=_LOOK_S)
            self._health.update(state="stopping")

    def _answer(self, kind: str, created_at: float, content: RecordDict) -> RecordDict:
        began = time.monotonic()
        self._health.update(state="training", last_contact=datetime.now(UTC))
        reply = self._app.answering(kind, created_at, content)
        self._rounds += _log_answer(kind, reply, seconds=time.monotonic() - began, answered=self._answered)
        self._health.update(rounds_answered=self._rounds)
        return reply


def _log_answer(kind: str, reply: RecordDict, *, seconds: float, answered: Callable[[str], None]) -> bool:
    """Log an answer and pass its type to the callback `answered`; return True if it is an update."""
    body = SiteApp.read_answer(reply)
    if body is None or isinstance(body, Offer):
        log.info("answered", extra={"what": kind})
        answered("offer" if body else "other")
        return False
    refused = body.reason if isinstance(body, Refusal) else None
    what = "update" if refused is None else refused.value
    answered(what)
    log.info("answered", extra={"what": what, "run": body.run, "round": body.round, "seconds": round(seconds, 2)})
    return refused is None


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that is set by the first SIGTERM or SIGINT; a second signal kills the process."""
    stop = threading.Event()

    def request_stop(number: int, frame: object) -> None:
        stop.set()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)

    with handle_signals(request_stop):
        yield stop
