"""What a site's commands and its running process tell each other, as files in the kit's folder `state/`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.privacy.durable import write_durably
from fedtune.privacy.proposal import Proposal
from fedtune.spec import ConfigError, RunError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A run that waits for a person's approval.

    Attributes:
        proposal: what is to be approved, to the letter.
        since: when it was first asked for, in UTC.
    """

    proposal: Proposal
    since: str


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
        """There while the site takes part in nothing."""
        return self.folder / "paused"

    @property
    def left(self) -> Path:
        """There once the site has left the federation."""
        return self.folder / "left"

    @property
    def runs(self) -> Path:
        """Settings of runs, as leads sent them."""
        made = self.folder / "runs"
        made.mkdir(exist_ok=True)
        return made

    def set_paused(self, paused: bool) -> None:
        """Pause, or go on."""
        if paused:
            write_durably(self.paused, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        else:
            self.paused.unlink(missing_ok=True)

    def wait_for_approval(self, proposal: Proposal) -> bool:
        """Keep a run for a person to approve; says whether it is new."""
        path = self._pending(proposal.run)
        try:
            since = self._read(path).since if path.exists() else None
        except RunError:
            since = None  # damaged, so that it is written anew
        fields = {"proposal": proposal.to_json(), "since": since or datetime.now(UTC).isoformat(timespec="seconds")}
        write_durably(path, json.dumps(fields, indent=1).encode() + b"\n")
        return since is None

    def waiting(self) -> list[Pending]:
        """The runs that wait, oldest first."""
        found = [self._read(path) for path in (self.folder / "pending").glob("*.json")]
        return sorted(found, key=lambda pending: pending.since)

    def forget(self, run: str) -> None:
        """The run waits no longer."""
        self._pending(run).unlink(missing_ok=True)

    def _pending(self, run: str) -> Path:
        folder = self.folder / "pending"
        folder.mkdir(exist_ok=True)
        # By its hash, since nobody has yet checked the name that a lead gave the run.
        return folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"

    @staticmethod
    def _read(path: Path) -> Pending:
        try:
            fields = json.loads(path.read_bytes())
            return Pending(proposal=Proposal.from_json(fields["proposal"]), since=str(fields["since"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RunError(f"{path} is damaged; remove it, and the lead's next request writes it anew") from error


@contextmanager
def serving(ledger: Path) -> Iterator[None]:
    """Serve `ledger` in this process alone.

    Raises:
        ConfigError: another process serves it.
    """
    path = ledger.with_name(f"{ledger.name}.serving")
    path.parent.mkdir(parents=True, exist_ok=True)  # as for the ledger, which may be yet to be made
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "another"
            bound = f"is being served by process {holder} already; stop that one first"
            raise ConfigError("ledger", str(ledger), bound) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
