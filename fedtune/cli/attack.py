"""`fedtune attack`: attack a finished run by the names that checkers know, beside what its guarantee allows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console

from fedtune.cli.command import AsJson, Option, print_answer
from fedtune.cli.finished_run import Columns, Device, Run, load_finished_run
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, say
from fedtune.spec import check_at_least, check_positive


def attack(
    run: Run,
    members: Annotated[
        str | None, Option("records that were trained on (default: a simulation's)", metavar="FILE")
    ] = None,
    others: Annotated[
        str | None, Option("records never used (default: held-out or test records)", metavar="FILE")
    ] = None,
    secrets: Annotated[Path | None, Option("planted secrets, JSON lines with `secret`", metavar="FILE")] = None,
    minutes: Annotated[float, Option("use fewer records if scoring takes longer")] = 10.0,
    shadows: Annotated[int, Option("head-only shadow models")] = 32,
    columns: Columns = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack a finished run: membership, sites, reconstruction, extraction, attributes.

      fedtune attack runs/banks                                        a simulation: its records are here
      fedtune attack runs/banks --members ours.csv --others new.csv    a site's own records
      fedtune attack runs/chats --secrets planted.jsonl                how far planted secrets are exposed

    `fedtune audit` plants canaries before training and tests the guarantee. This command takes a run as it is, and says
    how far known attacks get, with intervals, beside what the guarantee allows any attack. Writes attack.json and
    attack.html into the run folder. All figures come from exact scores of private records: they are for the eyes of
    those who may see the records.
    """
    check_positive("--minutes", minutes)
    check_at_least("--shadows", shadows, 2)
    config, adapter = load_finished_run(run, device=device, columns=columns)
    from fedtune.lab.attack.run_attacks import attack_run
    from fedtune.report.attacks import FILE, NAMES, PAGE, list_figures

    folder = adapter.absolute().parent
    found = attack_run(
        config,
        adapter,
        folder,
        members=members,
        others=others,
        secrets=secrets,
        minutes=minutes,
        shadows=shadows,
        tell=partial(say, console=Console(stderr=True)),
    )
    rows = [(NAMES[one.attack], *list_figures(one)) for one in found.findings]
    headings = ("attack", "measure", "guessing", "reached", f"{found.confidence:.0%} interval", "guarantee allows")
    notes = [*(one.sentence for one in found.findings), f"written: {folder / FILE}, {folder / PAGE}"]
    figures = {"schema_version": SCHEMA_VERSION, "folder": str(folder), "result": found}
    print_answer(figures, [Section(f"Attacks on {run}", headings, rows, words={0, 1}, notes=notes)], as_json=as_json)
