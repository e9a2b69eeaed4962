"""The report of a run at its end: `report.json` and `report.html` in its folder."""

from __future__ import annotations

from pathlib import Path

from fedtune.privacy.durable import write_durably
from fedtune.report import from_run, page, signing


def write_report(folder: Path, *, language: str = "en") -> None:
    """Write both files into a run folder.

    Raises:
        ConfigError: the folder holds no run, or there is no such language.
        RunError: what it holds is damaged.
    """
    report = from_run.build(folder)
    html = page.render(report, language=language)
    write_durably(folder / "report.json", signing.to_text(report).encode())
    write_durably(folder / "report.html", html.encode())
