"""A report's files: `report.json`, `report.html` and, where asked for, `report.pdf`."""

from __future__ import annotations

from pathlib import Path

from fedtune.privacy.durable import write_durably
from fedtune.report import page, signing
from fedtune.report.model import Report
from fedtune.spec import ConfigError


def write_report(folder: Path, *, language: str = "en") -> None:
    """Write the report of a run into its folder.

    Raises:
        ConfigError: the folder holds no run, or there is no such language.
        RunError: what it holds is damaged.
    """
    from fedtune.report import from_run  # reads checkpoints, which takes torch; a ledger's report does without

    write_files(folder, from_run.build(folder), language=language)


def write_files(folder: Path, report: Report, *, language: str, pdf: bool = False) -> list[Path]:
    """Write a report's files; each is whole at any moment.

    Returns:
        The files.

    Raises:
        ConfigError: there is no such language, what makes a PDF is not installed, or the folder cannot be written.
    """
    html = page.render(report, language=language)
    files = {"report.json": signing.to_text(report).encode(), "report.html": html.encode()}
    if pdf:
        from fedtune.report.pdf import made

        files["report.pdf"] = made(html)
    try:
        for name, data in files.items():
            write_durably(folder / name, data)
    except OSError as error:
        raise ConfigError("--output", str(folder), f"must be a folder that can be written ({error.strerror})") from None
    return [folder / name for name in files]
