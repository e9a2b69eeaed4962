"""Prometheus metrics of a process: `GET /metrics` in text format, on loopback only.

All metrics are derived from settings, the policy, the ledger's charges, and the times of messages; none is computed
from a record.  A round counts as answered when its reply can be sent, after the padding of `reply_after_s`, and the
contact time is updated during training.  Frequent scrapes therefore reveal no more about the duration of training than
the replies do.  The CPU and memory metrics of the Prometheus library would reveal the duration, and are disabled.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.extras import require_extra
from fedtune.ops.health import Health, serve_locally
from fedtune.ops.kits.certificates import Certificate, read_certificate
from fedtune.ops.kits.kit_file import Kit, stat_signature
from fedtune.privacy.durable import write_durably
from fedtune.privacy.release import Reason
from fedtune.show.budget_text import compute_remaining_epsilon, count_remaining_reference_runs
from fedtune.spec import ConfigError, RunError

if TYPE_CHECKING:  # Flower takes seconds to import, and prometheus-client may be missing
    from prometheus_client import Metric

    from fedtune.federation.lead import LeadState
    from fedtune.ops.kits.members import Member
    from fedtune.ops.wire.gate import Traffic
    from fedtune.privacy.ledger.history import History

_KEY, _TEXT_FILE, _FILE_S = "--metrics", ".prom", 15.0
_ANSWER_S = 20.0  # timeout of a scrape, which verifies a changed ledger from its first event


@dataclass(frozen=True, slots=True)
class Figure:
    """Definition of one metric."""

    says: str  # the help text in the Prometheus output
    label: str = ""  # the label of a metric with several values; empty: a single value
    grows: bool = False  # whether the metric is a counter; otherwise it is a gauge


FIGURES = {
    "fedtune_certificate_days_left": Figure("Whole days until the kit's certificate expires; negative afterwards."),
    "fedtune_site_contact_age_seconds": Figure("Seconds since the last answer of the server, or since the start."),
    "fedtune_site_answers": Figure(
        "Answers to the lead by type: update, offer, or the reason for a refusal.", "answer", True
    ),
    "fedtune_site_ledger_usable": Figure(
        "1: the ledger is intact and may be charged; 0: it is missing, damaged, rolled back, in doubt or frozen."
    ),
    "fedtune_site_epsilon_spent": Figure(
        "Lifetime epsilon of the population by the filter: charged, or including reservations of open runs.", "part"
    ),
    "fedtune_site_epsilon_cap": Figure("Lifetime cap of the policy; infinite without a cap."),
    "fedtune_site_epsilon_remaining": Figure(
        "Epsilon left for new runs now under the lifetime and period caps; infinite without a cap."
    ),
    "fedtune_site_remaining_runs": Figure(
        "Number of runs like the policy's reference that fit now; infinite without a cap."
    ),
    "fedtune_server_sites": Figure("Number of sites in the roster, or with an open connection.", "which"),
    "fedtune_server_site_silent_seconds": Figure(
        "Seconds since the last call of a site, or since the start of the server.", "site"
    ),
    "fedtune_server_waiting_calls": Figure("Number of site calls that wait for the lead's next question."),
    "fedtune_server_bytes": Figure("Bytes received or sent in the bodies of all calls.", "direction", True),
    "fedtune_lead_rounds": Figure("Number of finished or planned rounds of the run.", "which"),
    "fedtune_lead_sites_answered": Figure("Number of sites whose update for the current round has arrived."),
    "fedtune_lead_round_seconds": Figure("Duration of the latest finished round; 0 before the first round ends."),
    "fedtune_lead_answers": Figure("Answers of the sites: update, or the reason for a refusal.", "answer", True),
}
"""Metric name, with its unit as suffix -> definition."""

Values = Iterable[tuple[str, float | Mapping[str, float]]]
"""Pairs of a metric's name and its current value, or its values by label."""


def serve_metrics(address: str | None, values: Callable[[], Values]) -> AbstractContextManager[str]:
    """Serve `GET /metrics` at `address` during the block; yield the address, with the actual port if 0 was given.

    None disables the endpoint.  An address that ends in .prom is a file that is rewritten regularly for
    node_exporter, so that a process without network access can publish its metrics.

    Raises:
        ConfigError: the address is invalid, is not loopback, or cannot be bound; or prometheus-client is not installed.
    """
    if address is None:
        return nullcontext("")
    require_extra(_KEY, address, "metrics", "prometheus_client")
    from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

    collector = _Collector(values)
    if address.endswith(_TEXT_FILE):
        return _write_periodically(Path(address), lambda: generate_latest(collector))

    async def respond(path: str) -> tuple[int, str, bytes]:
        if path != "/metrics":
            return 404, "text/plain", b""
        return 200, CONTENT_TYPE_PLAIN_0_0_4, await asyncio.to_thread(generate_latest, collector)

    far = "is reachable from other machines: use a loopback address, and run Prometheus's agent on this machine"
    return serve_locally(address, respond, key=_KEY, most_s=_ANSWER_S, far=far)


@contextmanager
def _write_periodically(file: Path, figures: Callable[[], bytes]) -> Iterator[str]:
    """Write the metrics to a file every few seconds, atomically; remove the file at the end."""
    stop = threading.Event()

    def write() -> None:
        write_durably(file, figures(), world_readable=True)  # node_exporter runs as another user

    def keep_writing() -> None:
        while not stop.wait(_FILE_S):
            with suppress(OSError):  # ignore a disk that is temporarily full
                write()

    try:
        file.parent.stat()  # a missing folder is an error
        write()
    except OSError as error:
        raise ConfigError(_KEY, str(file), f"must be a file that can be written ({error.strerror})") from None
    thread = threading.Thread(target=keep_writing, name="metrics", daemon=True)
    thread.start()
    try:
        yield str(file)
    finally:
        stop.set()
        thread.join()
        file.unlink(missing_ok=True)


class _Collector:
    """Prometheus collector that converts the metrics to the library's types."""

    def __init__(self, values: Callable[[], Values]) -> None:
        self._values = values

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, values in self._values():
            figure = FIGURES[name]
            kind = CounterMetricFamily if figure.grows else GaugeMetricFamily
            family = kind(name, figure.says, labels=[figure.label] if figure.label else [])
            for value, number in values.items() if isinstance(values, Mapping) else [("", values)]:
                family.add_metric([value] if figure.label else [], number)
            yield family


class SiteMetrics:
    """Metrics of a site: budget, certificate, answers and last contact."""

    def __init__(self, *, kit: Kit, site_toml: Path, health: Health) -> None:
        self._kit, self._site_toml, self._health = kit, site_toml, health
        self._began = datetime.now(UTC)
        # Prometheus computes the rate of a counter only from an initial 0.
        self._answers: Counter[str] = Counter({"update": 0, Reason.SITE_ERROR: 0})
        self._read: tuple[object, History | None] = (None, None)

    def record_answer(self, answer: str) -> None:
        """Count an answer: "update", or the reason for a missing update."""
        self._answers[answer] += 1

    def collect_values(self) -> Values:
        """Yield the current values of all metrics."""
        last = self._health.snapshot()["last_contact"]
        silent = datetime.now(UTC) - (datetime.fromisoformat(last) if last else self._began)
        yield from _list_certificate_values(self._kit)
        yield "fedtune_site_contact_age_seconds", max(timedelta(), silent).total_seconds()
        yield "fedtune_site_answers", dict(self._answers)
        history = self._read_history()
        usable = history is not None and not history.is_frozen and history.furthest_doubt is None
        yield "fedtune_site_ledger_usable", float(usable)
        if history is not None:
            yield from _list_budget_values(history)

    def _read_history(self) -> History | None:
        """Return the history of the verified ledger; None if the ledger cannot be trusted.

        The history is cached until the ledger or its anchor changes.
        """
        try:
            files = self._kit.find_site_files(self._site_toml)
            places = [files.ledger, *([files.anchor] if files.anchor else [])]
            marks = [stat_signature(place) for place in places]
            if self._read[0] != marks:
                verified = files.verify_ledger()
                self._read = marks, verified.history if verified else None
        except (ConfigError, RunError, OSError):
            self._read = None, None
        return self._read[1]


def _list_budget_values(history: History) -> Values:
    taken = {
        "charged": history.count_total_charges(),
        "with_reserved": history.count_charges_and_reservations(history.now()),
    }
    yield "fedtune_site_epsilon_spent", {name: history.epsilon(spent) for name, spent in taken.items()}
    yield "fedtune_site_epsilon_cap", history.cap
    yield "fedtune_site_epsilon_remaining", compute_remaining_epsilon(history)
    runs = count_remaining_reference_runs(history)
    yield "fedtune_site_remaining_runs", math.inf if runs is None else runs


class ServerMetrics:
    """Metrics of a server: certificate, sites and traffic."""

    def __init__(self, *, kit: Kit) -> None:
        self._kit = kit
        self.traffic: Traffic | None = None
        self.members: Sequence[Member] = ()
        """The members in the newest roster."""

    def collect_values(self) -> Values:
        """Yield the current values of all metrics; before the server starts, only those of the certificate."""
        yield from _list_certificate_values(self._kit)
        if (traffic := self.traffic) is None:
            return
        now = time.time()
        sites = {member.site: member.node_key for member in self.members if not member.revoked}
        heard = {site: now - traffic.heard.get(site, traffic.began) for site in sites}
        connected = sum(key in traffic.connections for key in sites.values())
        yield "fedtune_server_sites", {"known": len(sites), "connected": connected}
        yield "fedtune_server_site_silent_seconds", {site: max(0.0, since) for site, since in heard.items()}
        yield "fedtune_server_waiting_calls", traffic.waiting
        yield "fedtune_server_bytes", {"received": traffic.received, "sent": traffic.sent}


class LeadMetrics:
    """Metrics of a lead: certificate and progress of the run."""

    def __init__(self, *, kit: Kit) -> None:
        self._kit = kit
        self._round, self._num_rounds, self._seconds = 0, 0, 0.0
        self._answers: Counter[str] = Counter(update=0)
        self._sites: frozenset[str] = frozenset()

    def record_start(self, state: LeadState, *, num_rounds: int) -> None:
        """Record the start or resumption of training."""
        self._num_rounds = num_rounds
        self.record_round(state)

    def record_answer(self, site: str, what: str) -> None:
        """Record a site's answer: "update", or the reason for a missing update."""
        self._answers[what] += 1
        if what == "update":
            self._sites |= {site}

    def record_round(self, state: LeadState) -> None:
        """Record a finished round."""
        self._round, self._sites = state.round, frozenset()
        self._seconds = state.rounds[-1].seconds if state.rounds else 0.0

    def collect_values(self) -> Values:
        """Yield the current values of all metrics."""
        yield from _list_certificate_values(self._kit)
        yield "fedtune_lead_rounds", {"finished": self._round, "planned": self._num_rounds}
        yield "fedtune_lead_sites_answered", len(self._sites)
        yield "fedtune_lead_round_seconds", self._seconds
        yield "fedtune_lead_answers", dict(self._answers)


def _list_certificate_values(kit: Kit) -> Values:
    """Yield the number of days until the kit's certificate expires; yields nothing while the file is incomplete."""
    try:
        certificate = Certificate.from_x509(read_certificate(kit.certificate))
    except ConfigError:
        return
    yield "fedtune_certificate_days_left", certificate.count_days_left(datetime.now(UTC))
