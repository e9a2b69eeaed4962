"""Take the gallery's pictures of reports and terminals from real runs into docs/pictures/.

    python tools/take_pictures.py FOLDER    # runs are made in FOLDER, or found there; needs fedtune and Chromium

The runs: `fedtune simulate experiment=./tickets.yaml` (two sites, minutes) with its report half-way, and two runs of
`experiment=debug` on the same sites, of which the second finds the budget spent.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "docs" / "pictures"
EXAMPLES = REPOSITORY / "simulations" / "data" / "examples"
COLUMNS, PHONE_COLUMNS = 88, 46
LINE = 20
NO_BREAK = "\N{NO-BREAK SPACE}"
"""Browsers put several plain spaces together."""


def run_command(folder: Path, *words: str, columns: int = COLUMNS) -> str:
    """Run a fedtune command in a folder and return what it printed, whatever its exit code."""
    done = subprocess.run(
        ["fedtune", *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"},
        check=False,
    )
    return done.stdout


def take_page(page: Path, picture: str, *, width: int = 900, height: int = 1100) -> None:
    """Save the top of an HTML page as a PNG."""
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium") or "chromium"
    subprocess.run(
        [
            *(browser, "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"),
            *(f"--window-size={width},{height}", f"--screenshot={PICTURES / picture}", page.resolve().as_uri()),
        ],
        check=True,
        capture_output=True,
    )


def draw_terminal(command: str, printed: str, picture: str, *, columns: int, most: int) -> None:
    """Write a terminal's text as an SVG with its own dark ground."""
    wrapped = (textwrap.wrap(line, columns) or [""] for line in printed.strip().splitlines())
    typed = textwrap.wrap(f"$ {command}", columns)
    lines = [*typed, *(part for parts in wrapped for part in parts)]
    if len(lines) > most:
        lines = [*lines[: most - 1], "..."]
    width, height = 20 + round(8.5 * max(columns, *map(len, lines))), 30 + LINE * len(lines)
    colors = [*["#7fb8e6"] * len(typed), *["#e6edf3"] * (len(lines) - len(typed))]
    texts = "\n".join(
        f'<text x="14" y="{30 + LINE * number}" fill="{color}">{html.escape(line).replace(" ", NO_BREAK)}</text>'
        for number, (color, line) in enumerate(zip(colors, lines, strict=True))
    )
    (PICTURES / picture).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{html.escape(command, quote=True)}" '
        'font-family="\'Liberation Mono\',Menlo,monospace" font-size="14">\n'
        f'<rect width="{width}" height="{height}" rx="6" fill="#0d1117"/>\n{texts}\n</svg>\n',
        encoding="utf-8",
    )


def take_terminal(folder: Path, picture: str, *words: str, new: Path | None = None) -> None:
    """Draw what a command prints, for pages and for phones; `new`: a folder that each run of the command creates."""
    for columns, most, ending in ((COLUMNS, 30, ""), (PHONE_COLUMNS, 40, "-phone")):
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        printed = run_command(folder, *words, columns=columns)
        draw_terminal(f"fedtune {' '.join(words)}", printed, f"{picture}{ending}.svg", columns=columns, most=most)


def take_run(folder: Path) -> Path:
    """Run the tutorial's tickets, unless they have run, and save the report while rounds are missing."""
    run = folder / "runs" / "tickets"
    if not (run / "run.json").exists():
        with (folder / "tickets.txt").open("w") as printed:
            command = ["fedtune", "simulate", "experiment=./tickets.yaml"]
            started = subprocess.Popen(command, cwd=folder, stdout=printed)
            while started.poll() is None and not (run / "report.html").exists():
                time.sleep(1)
            take_page(run / "report.html", "live.png")
            started.wait()
    return run


def main(folder: Path) -> None:
    """Take every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXAMPLES / "tickets.csv", folder)
    if not (folder / "tickets.yaml").exists():
        run_command(folder, "data", "init", "tickets.csv")
    take_terminal(folder, "check", "data", "check", "tickets.yaml")
    run = take_run(folder)
    for language in ("de", "en"):
        run_command(folder, "report", str(run), "--label", "--language", language)
        shutil.copy(run / "label.svg", PICTURES / f"label_{language}.svg")
    take_page(run / "report.html", "report.png")
    words = ("simulate", "experiment=debug", "runtime.sites_dir=sites")
    if not (folder / "sites").exists():
        run_command(folder, *words, "name=one")
    take_terminal(folder, "refusal", *words, "name=two", new=folder / "runs" / "two")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
