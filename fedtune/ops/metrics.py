"""Figures for a monitoring system: `GET /metrics` in Prometheus's text format, on this machine alone.

A figure follows from settings, the policy, the ledger's charges, and the times at which messages came and went; nothing
here is computed from a record.  A round counts as answered when its reply is ready to leave, after the schedule of
`reply_after_s`, and contact is noted while a round is trained: so figures that are read often tell no more of how long
training took than the replies do.  The library's own figures of CPU and memory, which would tell, are left out.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.ops.health import Health, serve_locally
from fedtune.ops.kits.certificates import Certificate, read_certificate
from fedtune.ops.kits.kit_file import Kit
from fedtune.privacy import filter
from fedtune.privacy.release import Reason
from fedtune.show.budget_text import epsilon_left, reference_runs_left
from fedtune.spec import ConfigError, RunError

if TYPE_CHECKING:  # Flower takes seconds to import, and prometheus-client may be missing
    from prometheus_client import Metric

    from fedtune.federation.lead import LeadState
    from fedtune.ops.wire.gate import Registered, Traffic
    from fedtune.privacy.ledger.history import History

_KEY = "--metrics"
_ANSWER_S = 20.0
"""A scrape may take so long: a ledger that has changed is verified from its first event on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure at one moment.

    Attributes:
        name: with its unit at the end.
        says: what it is, for people.
        values: by the value of `label`; without a label, one value under the empty text.
        label: what tells the values apart.
        grows: it counts since the process began.
    """

    name: str
    says: str
    values: Mapping[str, float]
    label: str = ""
    grows: bool = False


Figures = Callable[[], Iterable[Figure]]


@contextmanager
def serve_metrics(address: str, figures: Figures) -> Iterator[str]:
    """Answer `GET /metrics` at `address` while the block runs; yields the address, with its port where 0 was asked for.

    Raises:
        ConfigError: the address is none, is not loopback, or cannot be had; or prometheus-client is not installed.
    """
    try:
        from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
    except ImportError:
        raise ConfigError(_KEY, address, "needs the extra: pip install 'fedtune[metrics]'") from None
    collector = _Collector(figures)

    async def respond(path: str) -> tuple[int, str, bytes]:
        if path != "/metrics":
            return 404, "text/plain", b""
        return 200, CONTENT_TYPE_PLAIN_0_0_4, await asyncio.to_thread(generate_latest, collector)

    far = "could be read by other machines: give a loopback address, and let Prometheus's agent read it on this machine"
    with serve_locally(address, respond, key=_KEY, most_s=_ANSWER_S, far=far) as bound:
        yield bound


class _Collector:
    """Figures as the library's own types."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for figure in self._figures():
            kind = CounterMetricFamily if figure.grows else GaugeMetricFamily
            family = kind(figure.name, figure.says, labels=[figure.label] if figure.label else [])
            for value, number in figure.values.items():
                family.add_metric([value] if figure.label else [], number)
            yield family


class SiteMetrics:
    """A site's figures: its budget, its certificate, its answers and its contact."""

    def __init__(self, *, kit: Kit, site_toml: Path, health: Health) -> None:
        self._kit, self._site_toml, self._health = kit, site_toml, health
        self._began = datetime.now(UTC)
        self._answers: Counter[str] = Counter({"update": 0, Reason.SITE_ERROR: 0})  # what begins at 1 does not increase
        self._read: tuple[object, History | None] = (None, None)

    def answered(self, answer: str) -> None:
        """Count an answer: "update", or the reason for none."""
        self._answers[answer] += 1

    def figures(self) -> Iterator[Figure]:
        """All of them, now."""
        last = self._health.snapshot()["last_contact"]
        silent = datetime.now(UTC) - (datetime.fromisoformat(last) if last else self._began)
        yield from _of_certificate(self._kit)
        yield Figure(
            name="fedtune_site_contact_age_seconds",
            says="Since the server last answered; since the start where it never has.",
            values={"": max(timedelta(), silent).total_seconds()},
        )
        yield Figure(
            name="fedtune_site_answers",
            says="Rounds and questions answered: by an update, or by the reason for none.",
            values=dict(self._answers),
            label="answer",
            grows=True,
        )
        history = self._history()
        usable = history is not None and not history.frozen and history.in_doubt is None
        yield Figure(
            name="fedtune_site_ledger_usable",
            says="1: the ledger is whole and may be charged; 0: it is missing, damaged, put back, in doubt or frozen.",
            values={"": float(usable)},
        )
        if history is not None:
            yield from _of_budget(history)

    def _history(self) -> History | None:
        """The verified ledger; None for one that cannot be trusted.  Read again when file or anchor have changed."""
        try:
            files = self._kit.site_files(self._site_toml)
            places = [files.ledger, *([files.anchor] if files.anchor else [])]
            found = [(one.st_ino, one.st_size, one.st_mtime_ns) for one in (place.stat() for place in places)]
            if self._read[0] != found:
                verified = files.verified()
                self._read = found, verified.history if verified else None
        except (ConfigError, RunError, OSError):
            self._read = None, None
        return self._read[1]


def _of_budget(history: History) -> Iterator[Figure]:
    order, delta = history.order, history.delta
    charged, held = history.charged(), history.set_aside(history.now())
    taken = {"charged": charged, "with_set_aside": charged + held}
    yield Figure(
        name="fedtune_site_epsilon_spent",
        says="Of the population's whole life, by the filter: charged, and with all that open runs have set aside.",
        values={name: filter.epsilon_filter(spent, order=order, delta=delta) for name, spent in taken.items()},
        label="part",
    )
    yield Figure(
        name="fedtune_site_epsilon_cap",
        says="The policy's lifetime cap; infinite for none.",
        values={"": history.cap},
    )
    yield Figure(
        name="fedtune_site_epsilon_left",
        says="That the lifetime cap leaves for new runs; infinite without a cap.",
        values={"": epsilon_left(history)},
    )
    runs = reference_runs_left(history)
    yield Figure(
        name="fedtune_site_runs_left",
        says="Runs like the policy's reference for which the lifetime cap has room; infinite without a cap.",
        values={"": math.inf if runs is None else runs},
    )


class ServerMetrics:
    """A server's figures: its certificate, its sites and its traffic."""

    def __init__(self, *, kit: Kit) -> None:
        self._kit = kit
        self.traffic: Traffic | None = None
        self.members: Sequence[Registered] = ()
        """As the roster was read last."""

    def figures(self) -> Iterator[Figure]:
        """All of them, now; before the server begins, its certificate's alone."""
        yield from _of_certificate(self._kit)
        if self.traffic is not None:
            yield from self._of_traffic(self.traffic, time.time())

    def _of_traffic(self, traffic: Traffic, now: float) -> Iterator[Figure]:
        sites = {member.site: member.node_key for member in self.members if not member.revoked}
        heard = {site: now - traffic.heard.get(site, traffic.began) for site in sites}
        yield Figure(
            name="fedtune_server_sites",
            says="Sites of the roster, and those with an open connection.",
            values={"known": len(sites), "connected": sum(key in traffic.connections for key in sites.values())},
            label="which",
        )
        yield Figure(
            name="fedtune_server_site_silent_seconds",
            says="Since a site last called; since the server's start where it never has.",
            values={site: max(0.0, since) for site, since in heard.items()},
            label="site",
        )
        yield Figure(
            name="fedtune_server_waiting_calls",
            says="Sites' calls that are held until the lead asks something.",
            values={"": traffic.waiting},
        )
        yield Figure(
            name="fedtune_server_bytes",
            says="Of the bodies of all calls.",
            values={"received": traffic.received, "sent": traffic.sent},
            label="direction",
            grows=True,
        )


class LeadMetrics:
    """A lead's figures: its certificate and how far its run is."""

    def __init__(self, *, kit: Kit) -> None:
        self._kit = kit
        self._round, self._num_rounds, self._seconds = 0, 0, 0.0
        self._answers: Counter[str] = Counter(update=0)
        self._sites: frozenset[str] = frozenset()

    def began(self, state: LeadState, *, num_rounds: int) -> None:
        """Training is about to begin, or goes on."""
        self._num_rounds = num_rounds
        self.finished(state)

    def answered(self, site: str, what: str) -> None:
        """A site's answer came in: "update", or why there is none."""
        self._answers[what] += 1
        if what == "update":
            self._sites |= {site}

    def finished(self, state: LeadState) -> None:
        """A round is over."""
        self._round, self._sites = state.round, frozenset()
        self._seconds = state.rounds[-1].seconds if state.rounds else 0.0

    def figures(self) -> Iterator[Figure]:
        """All of them, now."""
        yield from _of_certificate(self._kit)
        yield Figure(
            name="fedtune_lead_rounds",
            says="Of the run: finished, and planned.",
            values={"finished": self._round, "planned": self._num_rounds},
            label="which",
        )
        yield Figure(
            name="fedtune_lead_sites_answered",
            says="Sites whose update for the round in progress has come.",
            values={"": len(self._sites)},
        )
        yield Figure(
            name="fedtune_lead_round_seconds",
            says="That the newest finished round took; 0 before the first.",
            values={"": self._seconds},
        )
        yield Figure(
            name="fedtune_lead_answers",
            says="Sites' answers: updates, or the reason for none.",
            values=dict(self._answers),
            label="answer",
            grows=True,
        )


def _of_certificate(kit: Kit) -> Iterator[Figure]:
    """None while a new certificate is being copied."""
    try:
        certificate = Certificate.of(read_certificate(kit.certificate))
    except ConfigError:
        return
    yield Figure(
        name="fedtune_certificate_days_left",
        says="Whole days until the certificate in the kit ends; negative once it has.",
        values={"": certificate.days_left(datetime.now(UTC))},
    )
