"""A site's machine in a test: folder, process, ledger and log."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.privacy.ledger.chain import Event
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.spec import RunError

from ..books import Books
from ..processes import FEDTUNE, RUN_S, Process, wait_for

if TYPE_CHECKING:
    from .federation import Federation

HELD_SITE = Path(__file__).with_name("held_site.py")


@dataclass
class SiteFolder(Books):
    name: str
    federation: Federation = field(repr=False)
    site_key: str = ""
    up: Any = None
    """The site's process, once it was started."""
    _events: tuple[Event, ...] = ()
    _written: list[tuple[int, int]] = field(default_factory=list)

    @property
    def kit(self) -> Path:
        return self.folder / "kit"

    @property
    def args(self) -> tuple[str, ...]:
        return ("--kit", str(self.kit), "--site", str(self.site_toml))

    def start(self, *options: str, held: bool = False, wait: bool = True, env: dict[str, str] | None = None) -> Process:
        program = [sys.executable, str(HELD_SITE), str(self.folder)] if held else list(FEDTUNE)
        words = [*program, "site", "start", *self.args, *options]
        self.up = self.federation.run(self.name, self.name, words, env=env)
        if wait:
            self.wait_until_up()
        return self.up

    def wait_until_up(self) -> None:
        self.up.wait_for_text("the site is up")

    def hold(self, held: bool) -> None:
        """Pause or resume the site's training."""
        (self.folder / "hold").touch() if held else (self.folder / "hold").unlink(missing_ok=True)

    def hold_in_first_round(self, run: str, *overrides: str) -> Process:
        """Start a run and pause this site's training in the first round; return the lead."""
        self.hold(True)
        lead = self.federation.lead(run, *overrides)
        self.wait_for(run, "reserve", round=1, lead=lead)
        return lead

    def verified(self) -> VerifiedLedger:
        """The ledger, verified from the first event to the last."""
        return verify(self.ledger, site_key=self.site_key or None)

    def events(self, run: str, kind: str = "") -> list[Event]:
        """List the events of the run `run`, or those of one kind, also while the site writes."""
        written = [_stat_file(self.folder / name) for name in ("ledger.db", "ledger.db-journal")]
        if written != self._written:  # verification is slow, and a waiting test polls it
            with suppress(RunError):  # it has no ledger yet
                self._events = self.verified().events
                self._written = written
        return [e for e in self._events if e.run.rpartition("-")[0] == run and kind in ("", e.kind.value)]

    def notes(self, run: str) -> list[str]:
        return [event.detail["what"] for event in self.events(run, "note")]

    def wait_for(self, run: str, kind: str, *, round: int, lead: Process | None = None) -> None:
        """Wait until the ledger contains an event of a kind for a round, or until `lead` has ended."""

        def has_event() -> bool:
            return any(event.round == round for event in self.events(run, kind))

        wait_for(has_event, seconds=RUN_S, what=f"{self.name} to {kind} round {round} of {run}", needs=lead)

    def count_answers(self, kind: str, run: str) -> int:
        lines = self.up.lines("answered")
        return sum(line["what"] == kind and line.get("run", "").rpartition("-")[0] == run for line in lines)


def _stat_file(path: Path) -> tuple[int, int]:
    """Return a file's modification time and size; zeros if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
