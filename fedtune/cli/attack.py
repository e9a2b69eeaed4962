"""`fedtune attack`: known privacy attacks on a finished run, compared with the limits of its guarantee."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console

from fedtune.cli.command import AsJson, Option, print_answer
from fedtune.cli.finished_run import Columns, Device, Run, load_finished_run
from fedtune.show.terminal_tables import Section, say
from fedtune.spec import check_at_least, check_positive


def attack(
    run: Run,
    members: Annotated[
        str | None, Option("training records (default: those of the simulation)", metavar="FILE")
    ] = None,
    others: Annotated[
        str | None, Option("records outside the training data (default: held-out or test records)", metavar="FILE")
    ] = None,
    secrets: Annotated[Path | None, Option("planted secrets: JSON Lines with a field `secret`", metavar="FILE")] = None,
    minutes: Annotated[float, Option("time limit, met by attacking fewer records")] = 10.0,
    shadows: Annotated[int, Option("number of head-only shadow models")] = 32,
    columns: Columns = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run known attacks on a finished run: membership inference, site inference, reconstruction, extraction, and
    attribute inference.

      fedtune attack runs/banks                                        a simulated run, on its own records
      fedtune attack runs/banks --members ours.csv --others new.csv    a site's own records
      fedtune attack runs/chats --secrets planted.jsonl                exposure of planted secrets

    `fedtune audit` trains with canaries and tests the guarantee. This command attacks an existing run, and prints each
    attack's success with an interval next to the limit that the guarantee sets for any attack. It writes attack.json
    and attack.html to the run folder. All figures are exact scores of private records: show them only to people who
    may see the records.
    """
    check_positive("--minutes", minutes)
    check_at_least("--shadows", shadows, 2)
    config, adapter = load_finished_run(run, device=device, columns=columns)
    from fedtune.lab.attack.run_attacks import attack_run
    from fedtune.report.attacks import FILE, PAGE, format_table_cells

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
    rows = [format_table_cells(one) for one in found.findings]
    headings = ("attack", "measure", "guessing", "reached", f"{found.confidence:.0%} interval", "guarantee allows")
    notes = [*(one.sentence for one in found.findings), f"written: {folder / FILE}, {folder / PAGE}"]
    notes.append(f"fedtune report {folder} includes them in the report, for fedtune gate")
    figures = {"folder": str(folder), "result": found}
    print_answer(figures, [Section(f"Attacks on {run}", headings, rows, words={0, 1}, notes=notes)], as_json=as_json)
