"""State that a site's commands share with its running process, stored as files in the kit's folder `state/`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune import system
from fedtune.codec import decode, parse_json, read_regular_file
from fedtune.ops.files import translate_write_errors
from fedtune.privacy.durable import write_durably
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, RunError

log = logging.getLogger(__name__)

MAX_WAITING = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """Run that awaits a person's approval, as stored in the approval queue.

    Guarantee: the displayed settings match the digest in the run's name, even if another process changed the file.
    """

    proposal: Proposal  # the proposal to approve
    settings: str  # JSON of all settings that affect the result, as hashed by `RunConfig.digest`
    since: str  # UTC time of the first request
    software: str = ""  # version and build of fedtune at the lead, unverified

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.settings.encode(errors="surrogatepass")).hexdigest()
        if not self.proposal.run.endswith(f"-{digest[:32]}"):
            raise ConfigError("settings", "the given JSON", "must match the digest in the run's name")


@dataclass(frozen=True)
class SiteState:
    """The folder `state/` of a site's kit."""

    folder: Path

    @classmethod
    def in_kit(cls, kit_folder: Path) -> SiteState:
        """Return the state folder of a kit; create it if it is missing."""
        folder = kit_folder / "state"
        folder.mkdir(exist_ok=True)
        return cls(folder)

    @property
    def paused_file(self) -> Path:
        """The path of the file that exists while the site is paused."""
        return self.folder / "paused"

    @property
    def left_file(self) -> Path:
        """The path of the file that exists after the site has left the federation."""
        return self.folder / "left"

    @property
    def run_settings_folder(self) -> Path:
        """The folder with the settings of runs, as received from the leads."""
        made = self.folder / "runs"
        made.mkdir(exist_ok=True)
        return made

    def set_paused(self, paused: bool) -> None:
        """Pause or resume the site."""
        if paused:
            write_durably(self.paused_file, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        else:
            self.paused_file.unlink(missing_ok=True)

    def queue_for_approval(self, proposal: Proposal, settings: str, *, software: str = "") -> bool:
        """Queue a run for a person's approval; return True if the run is new in the queue.

        Raises:
            ConfigError: the digest of the settings differs from the digest in the run's name.
            RunError: the queue is full.
        """
        path, waiting = self._find_pending_path(proposal), self._list_pending_files()
        if path not in waiting and len(waiting) >= MAX_WAITING:
            raise RunError(f"{MAX_WAITING} runs already await approval; approve some, or remove {path.parent}")
        # A repeated request does not change the time of the first request.
        known = self._read(path) if path in waiting else None
        since = known.since if known else datetime.now(UTC).isoformat(timespec="seconds")
        made = Pending(proposal=proposal, settings=settings, since=since, software=software)
        fields = {"proposal": proposal.to_json(), "settings": made.settings, "since": since, "software": software}
        write_durably(path, json.dumps(fields, indent=1).encode() + b"\n")
        return known is None

    def list_pending_runs(self) -> list[Pending]:
        """List the runs that await approval, oldest first; unreadable files are skipped."""
        return sorted(filter(None, map(self._read, self._list_pending_files())), key=lambda pending: pending.since)

    def remove_pending(self, proposal: Proposal) -> None:
        """Remove a run from the approval queue."""
        self._find_pending_path(proposal).unlink(missing_ok=True)

    def open_ledger(self, files: SiteFiles) -> SiteLedger:
        """Open the site's ledger. Only a site that never had a ledger gets a new one, whose id is stored.

        Guarantee: a ledger that is lost or replaced while the site is in use is an error, not a new budget.

        Raises:
            ConfigError: the key is missing or cannot be read.
            RunError: the ledger is missing or cannot be used, or is not the one that this site used before.
        """
        path = self.folder / "ledger_id"
        before = read_regular_file(path).strip() if path.exists() else None
        opened = files.open_ledger(create=before is None)
        ledger = opened.history.opening.ledger
        if before is None:
            write_durably(path, f"{ledger}\n".encode())
        elif before != ledger.encode():  # a link's content is not quoted
            raise RunError(
                f"this site used another ledger before, but now has ledger {ledger}: restore the old ledger, or "
                f"remove {path} if the old ledger's budget has really ended"
            )
        return opened

    def _list_pending_files(self) -> set[Path]:
        return set((self.folder / "pending").glob("*.json"))

    def _find_pending_path(self, proposal: Proposal) -> Path:
        folder = self.folder / "pending"
        folder.mkdir(exist_ok=True)
        # Use the digest as the name, because two leads may give their runs the same name.
        return folder / f"{proposal.digest()[:32]}.json"

    @staticmethod
    def _read(path: Path) -> Pending | None:
        try:
            return decode(Pending, parse_json(read_regular_file(path), key="file", bound="must be JSON"))
        except (ConfigError, OSError):
            log.warning("%s is damaged; remove it, or wait for the lead's next request, which rewrites it", path)
            return None


@contextmanager
def lock_ledger(ledger: Path) -> Iterator[None]:
    """Lock `ledger` during the block, so that no other process charges it.

    Raises:
        ConfigError: another process serves the ledger, or the lock file cannot be written.
    """
    path = ledger.with_name(f"{ledger.name}.serving")
    path.parent.mkdir(parents=True, exist_ok=True)  # the ledger and its folder may not exist yet
    with translate_write_errors(path, key="ledger"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | system.NO_FOLLOW, 0o600)
    try:
        try:
            system.lock(descriptor)
        except OSError:
            content = os.read(descriptor, 32).strip()
            holder = content.decode() if content.isdigit() else "another"
            bound = f"is already in use by process {holder}; stop that process first"
            raise ConfigError("ledger", str(ledger), bound) from None
        with translate_write_errors(path, key="ledger"):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
