"""Markdown tables, and their place between two marks of a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.privacy.durable import write_durably

END = "<!-- end of results -->"


def markdown(rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Format a Markdown table of a heading and its rows; the first `texts` columns hold text, the others numbers."""
    ruled = [rows[0], ["---"] * texts + ["---:"] * (len(rows[0]) - texts), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def put(readme: Path, text: str, *, begin: str, end: str = END) -> None:
    """Replace the text between the marks of a README."""
    before, rest = readme.read_text().split(begin)
    write_durably(readme, f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}".encode())
