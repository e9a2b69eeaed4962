"""The live `report.html` of a run in progress: rewritten after rounds, marked as unfinished, and reloaded by the
browser.

The page is not signed, and the final report replaces it at the end of the run.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.privacy.durable import write_durably
from fedtune.privacy.run_plan import Plan

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.config import RunConfig
    from fedtune.federation.lead import LeadState

log = logging.getLogger(__name__)
_SHARE = 20  # at most one twentieth of the run's time is spent on pages
AGAIN_S = 15  # seconds after which the page reloads itself
_FIRST_S = 1.0  # assumed seconds for the first page


class UnfinishedReport:
    """The writer of a live page for a run in progress. Errors while writing are logged and never stop the run.

    Writing takes at most one twentieth of the run's time, so several short rounds may share one page.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._folder, self._config = folder, config
        self._plan: Plan | None = None
        self._state: LeadState | None = None
        self._due = time.monotonic() + _SHARE * _FIRST_S

    def update(self, state: LeadState) -> None:
        """Write the page for the newest checkpoint's state, unless the last page was written too recently."""
        self._state = state
        if state.round and time.monotonic() >= self._due:
            self._write(state, goes_on=True)

    def stop(self) -> None:
        """Mark the page as that of a stopped run; do nothing before the first finished round."""
        if self._state is not None and self._state.round:
            self._write(self._state, goes_on=False)

    def _write(self, state: LeadState, *, goes_on: bool) -> None:
        began = time.monotonic()
        try:
            self._write_page(state, goes_on=goes_on)
        except Exception as error:
            log.warning("report.html was not written after round %d: %s", state.round, type(error).__name__)
        self._due = time.monotonic() + _SHARE * (time.monotonic() - began)

    def _write_page(self, state: LeadState, *, goes_on: bool) -> None:
        # These draw, which takes a while to import.
        from fedtune.federation.early_stopping import count_rounds
        from fedtune.report import from_run
        from fedtune.report.page.render import render_live
        from fedtune.report.page.translations import load_catalog
        from fedtune.report.verify_report import derive_report

        record = from_run.read_run(self._folder, plan=self._plan)
        self._plan = record.plan
        words = load_catalog(self._config.report.language)
        planned = count_rounds(state.rounds, self._config.federation)
        # Site reports are only included in the run's final report.
        html = render_live(
            derive_report(from_run.collect_run_facts(self._folder, record, own={})),
            language=words.language,
            planned=planned,
            written=words.figure(datetime.now(UTC).isoformat(timespec="seconds"), "moment"),
            seconds=state.seconds_per_round,
            again_s=AGAIN_S if goes_on else None,
        )
        write_durably(self._folder / "report.html", html.encode())
