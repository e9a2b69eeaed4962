"""`fedtune site doctor`: everything that a site needs before it starts, each thing looked at on its own.

Nothing is trained, and neither ledger nor policy is written.  What the lines hold is in `check.Check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.deploy.doctor import file_checks, ledger_checks, machine_checks
from fedtune.deploy.doctor.check import Check, PrivateLog, from_error, ok, skipped
from fedtune.deploy.doctor.connection_checks import AUTHENTICATION, DNS, TCP, TLS, Connection
from fedtune.deploy.kits.certificates import Certificate, read_certificate
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.kits.models import install_model
from fedtune.privacy.ledger.history import History
from fedtune.privacy.policy import Policy
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, DataError, FedtuneError

_KIT, _POLICY, _LEDGER = "the kit", "the policy", "the ledger"


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What to look at.

    Attributes:
        kit: the kit's folder.
        site_toml: the policy.
        model: a base model to install first, as `install_model` takes it.
        run: settings of a run to try out; None: none was named.
        timeout_s: of each connection.
    """

    kit: Path
    site_toml: Path
    model: Path | None = None
    run: Callable[[], RunConfig] | None = None
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class _Look:
    """One thing to look at: the names of its lines, what must have been read for it, and how it is done."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    look: Callable[[], Iterable[Check]]


def examine(visit: Visit) -> Iterator[Check]:
    """Look at everything, one line after another; a check that goes wrong keeps no other from being made."""
    return _Examination(visit).checks()


class _Examination:
    """What was read on the way, for the checks that come later."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._log = PrivateLog(visit.kit / "state" / "doctor.log")
        self._kit: Kit | None = None
        self._files: SiteFiles | None = None
        self._certificate: Certificate | None = None
        self._history: History | None = None
        self._clock_ahead_s: tuple[float, float] | None = None

    def checks(self) -> Iterator[Check]:
        """All of them."""
        for look in self._looks():
            there = {_KIT: self._kit, _POLICY: self._files, _LEDGER: self._history}
            missing = [need for need in look.needs if there[need] is None]
            if missing:
                yield from (skipped(name, f"{missing[0]} cannot be used") for name in look.names)
                continue
            try:
                yield from look.look()
            except Exception as error:
                yield self._gone_wrong(look.names[0], error)

    def _gone_wrong(self, name: str, error: Exception) -> Check:
        # A DataError's words are for whoever owns the file; other errors of ours are made to be shown.
        if isinstance(error, FedtuneError) and not isinstance(error, DataError):
            return from_error(name, error, fix="Correct what is named here.")
        return file_checks.unforeseen(name, error, self._log)

    def _looks(self) -> tuple[_Look, ...]:
        visit = self._visit
        importing = (_Look(("import",), (_KIT,), self._import),) if visit.model is not None else ()
        return (
            _Look(("policy",), (), self._read_policy),
            _Look(("kit",), (), self._read_kit),
            _Look(("files",), (), lambda: file_checks.owners(visit.kit, visit.site_toml, self._files)),
            _Look(("certificate",), (_KIT,), self._read_certificate),
            _Look(("site's name",), (_KIT, _POLICY), lambda: [file_checks.names(self.kit, self.policy)]),
            _Look(("lead",), (_KIT, _POLICY), lambda: [file_checks.lead(self.kit, self.policy)]),
            _Look(("time of replies",), (_POLICY,), lambda: [file_checks.replies(self.policy)]),
            _Look((DNS, TCP, TLS, AUTHENTICATION), (_KIT,), self._connect),
            _Look(("clock",), (), self._clock),
            _Look(("disks",), (), self._disks),
            *importing,
            _Look(("base models",), (_KIT, _POLICY), lambda: file_checks.base_models(self.kit, self.policy)),
            _Look(("memory",), (), self._memory),
            _Look(("GPU",), (_POLICY,), self._gpu),
            _Look(("data",), (_POLICY,), lambda: file_checks.data_sets(self.policy, visit.site_toml.parent, self._log)),
            _Look(("ledger",), (_POLICY,), self._read_ledger),
            _Look(("site key",), (_POLICY,), lambda: [ledger_checks.site_key(self.files, self._history)]),
            _Look(("budget",), (_POLICY, _LEDGER), lambda: [ledger_checks.budget(self.history, self.policy)]),
            _Look(("serving",), (_POLICY,), self._serving),
            self._trying_out(),
        )

    @property
    def kit(self) -> Kit:
        """The kit, for a check that needs it."""
        assert self._kit is not None
        return self._kit

    @property
    def files(self) -> SiteFiles:
        """The policy and what it names, likewise."""
        assert self._files is not None
        return self._files

    @property
    def policy(self) -> Policy:
        """The policy, likewise."""
        return self.files.policy

    @property
    def history(self) -> History:
        """The ledger's, likewise."""
        assert self._history is not None
        return self._history

    def _read_policy(self) -> Iterator[Check]:
        try:
            self._files = SiteFiles.of(self._visit.site_toml)
        except ConfigError as error:
            yield from_error(
                "policy", error, fix="Correct what is named here; `fedtune site template` explains every key."
            )
            return
        yield ok("policy", f"can be read, for site {self.policy.site} and population {self.policy.population.name}")

    def _read_kit(self) -> Iterator[Check]:
        try:
            self._kit = Kit.read(self._visit.kit, kind="site")
        except ConfigError as error:
            yield from_error("kit", error, fix="Unzip the kit that the lead sent, whole, into this folder.")
            return
        yield ok("kit", f"whole, for federation {self.kit.federation} at {self.kit.server}; its key is private")

    def _read_certificate(self) -> Iterator[Check]:
        yield file_checks.certificate(self.kit, datetime.now(UTC))
        with suppress(ConfigError):  # that it cannot be read is said by then
            self._certificate = Certificate.of(read_certificate(self.kit.certificate))

    def _connect(self) -> Iterator[Check]:
        connection = Connection(self.kit, timeout_s=self._visit.timeout_s)
        yield from connection.checks()
        self._clock_ahead_s = connection.clock_ahead_s

    def _clock(self) -> Iterator[Check]:
        now = datetime.now(UTC)
        yield machine_checks.clock(self._clock_ahead_s, certificate=self._certificate, now=now)

    def _disks(self) -> Iterator[Check]:
        folders = {"kit": self._visit.kit}
        if self._files is not None:
            folders["ledger"] = self.files.ledger.parent
            if self.files.anchor is not None:
                folders["anchor"] = self.files.anchor.parent
        yield from machine_checks.disks(folders)
        if self._files is not None:
            yield machine_checks.ledger_place(self.files.ledger)
            yield machine_checks.anchor_place(self.files.ledger, self.files.anchor)

    def _import(self) -> Iterator[Check]:
        assert self._visit.model is not None
        installed = install_model(self._visit.model, self.kit)
        state = "is installed now" if installed.new else "was installed before, and is unchanged"
        yield ok("import", f"{installed.model.name} {state}, in {installed.folder}")

    def _memory(self) -> Iterator[Check]:
        both = self._kit is not None and self._files is not None
        yield machine_checks.memory(file_checks.largest_model_bytes(self.kit, self.policy) if both else None)

    def _gpu(self) -> Iterator[Check]:
        yield machine_checks.gpu(self.policy.machine.device, ask=machine_checks.this_gpu)

    def _read_ledger(self) -> Iterator[Check]:
        check, self._history = ledger_checks.ledger(self.files)
        yield check

    def _serving(self) -> Iterator[Check]:
        yield ledger_checks.serving(self.files, state=self._visit.kit / "state")

    def _trying_out(self) -> _Look:
        run = self._visit.run
        if run is None:
            return _Look(("run",), (), lambda: [skipped("run", "no experiment was named to try out")])

        def try_out() -> list[Check]:
            return [
                ledger_checks.experiment(
                    run(),
                    kit=self.kit,
                    site_toml=self._visit.site_toml,
                    policy=self.policy,
                    history=self.history,
                )
            ]

        return _Look(("run",), (_KIT, _POLICY, _LEDGER), try_out)
