"""Messages between a site's commands and its running process, as files in the kit's folder `state/`."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.codec import decode, parse_json
from fedtune.privacy.durable import write_durably
from fedtune.privacy.proposal import Proposal
from fedtune.spec import ConfigError, RunError

MOST_WAITING = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A run that waits for a person's approval."""

    proposal: Proposal  # exactly what is to be approved
    settings: str  # JSON of the run's configuration; its digest is in the name of the proposal's run
    since: str  # when it was first asked for, in UTC
    software: str = ""  # the lead's fedtune, version and build, by its own word


@dataclass(frozen=True)
class SiteState:
    """The folder `state/` of a site's kit."""

    folder: Path

    @classmethod
    def of(cls, kit_folder: Path) -> SiteState:
        """The state beside a kit; made when missing."""
        folder = kit_folder / "state"
        folder.mkdir(exist_ok=True)
        return cls(folder)

    @property
    def paused(self) -> Path:
        """A file that exists while the site takes part in nothing."""
        return self.folder / "paused"

    @property
    def left(self) -> Path:
        """A file that exists once the site has left the federation."""
        return self.folder / "left"

    @property
    def runs(self) -> Path:
        """Settings of runs, as leads sent them."""
        made = self.folder / "runs"
        made.mkdir(exist_ok=True)
        return made

    def set_paused(self, paused: bool) -> None:
        """Pause the site, or resume it."""
        if paused:
            write_durably(self.paused, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        else:
            self.paused.unlink(missing_ok=True)

    def wait_for_approval(self, proposal: Proposal, settings: str, *, software: str = "") -> bool:
        """Queue a run for a person's approval; returns whether it is new.

        Raises:
            RunError: too many runs wait already.
        """
        path, waiting = self._pending(proposal), self._waiting_files()
        try:
            since = self._read(path).since if path in waiting else None  # a repeated request keeps its place
        except RunError:
            since = None  # damaged, so that it is written anew
        if path not in waiting and len(waiting) >= MOST_WAITING:
            raise RunError(f"{MOST_WAITING} runs wait for approval already; approve some, or remove {path.parent}")
        fields = {
            "proposal": proposal.to_json(),
            "settings": settings,
            "since": since or datetime.now(UTC).isoformat(timespec="seconds"),
            "software": software,
        }
        write_durably(path, json.dumps(fields, indent=1).encode() + b"\n")
        return since is None

    def waiting(self) -> list[Pending]:
        """The runs that wait, oldest first."""
        return sorted(map(self._read, self._waiting_files()), key=lambda pending: pending.since)

    def forget(self, proposal: Proposal) -> None:
        """Remove a run from the queue."""
        self._pending(proposal).unlink(missing_ok=True)

    def check_ledger(self, ledger: str) -> None:
        """Require the ledger with this id to be the one that was served before, and remember it.

        Raises:
            RunError: it is another one, under which the spent budget would be forgotten.
        """
        path = self.folder / "ledger_id"
        if path.exists() and (before := path.read_text().strip()) != ledger:
            raise RunError(
                f"this site served ledger {before} before, and now there is ledger {ledger}: put the old one back, or "
                f"remove {path} if its budget really ended with it"
            )
        write_durably(path, f"{ledger}\n".encode())

    def has_served(self) -> bool:
        """A ledger was served before."""
        return (self.folder / "ledger_id").exists()

    def _waiting_files(self) -> set[Path]:
        return set((self.folder / "pending").glob("*.json"))

    def _pending(self, proposal: Proposal) -> Path:
        folder = self.folder / "pending"
        folder.mkdir(exist_ok=True)
        # Named by digest, because two leads may give their runs the same name.
        return folder / f"{proposal.digest()[:32]}.json"

    @staticmethod
    def _read(path: Path) -> Pending:
        try:
            pending = decode(Pending, parse_json(path.read_bytes(), key="file", bound="must be JSON"))
            parse_json(pending.settings, key="settings", bound="must be JSON")
        except ConfigError as error:
            raise RunError(f"{path} is damaged; remove it, and the lead's next request writes it anew") from error
        return pending


@contextmanager
def serving(ledger: Path) -> Iterator[None]:
    """Serve `ledger` in this process alone.

    Raises:
        ConfigError: another process serves it.
    """
    path = ledger.with_name(f"{ledger.name}.serving")
    path.parent.mkdir(parents=True, exist_ok=True)  # as for the ledger, which may be yet to be made
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError("ledger", str(path), f"must be a file that can be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            said = os.read(descriptor, 32).strip()
            holder = said.decode() if said.isdigit() else "another"
            bound = f"is being served by process {holder} already; stop that one first"
            raise ConfigError("ledger", str(ledger), bound) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
