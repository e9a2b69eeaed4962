"""`fedtune synthesize`: records that a finished run's language model writes, with a card of what they promise."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fedtune.api import door
from fedtune.cli.command import AsJson, Option, single
from fedtune.cli.finished_run import Device, MaxNewTokens, Run, Seed, Temperature, TopP, finished_run, harmless
from fedtune.cli.personalise import shown_progress
from fedtune.config import RunConfig
from fedtune.data.load import shipped_folders
from fedtune.data.records import Record, iter_records, resolve_file
from fedtune.evaluation.spec import WritingSpec
from fedtune.report.model import Report
from fedtune.show.terminal_tables import Section, pairs, print_json, show, write_file
from fedtune.spec import ConfigError, DataError, check_at_least, check_at_most
from fedtune.studies import synthetic
from fedtune.tasks import task_named
from fedtune.words import counted

_SHOWN = 5
_MOST_ROWS = 100_000


def synthesize(
    run: Run,
    to: Annotated[Path, Option(metavar="FILE", help="a new file of JSON lines, with the columns of the run")],
    rows: Annotated[int, Option("how many records")] = 1000,
    codes: Annotated[
        str | None, Option("a public file: what records are written for, a code a row", metavar="FILE")
    ] = None,
    votes: Annotated[
        Path | None, Option("a run of task votes: the codes' shares, or what is chosen", metavar="RUN")
    ] = None,
    candidates: Annotated[
        str | None, Option("choose from these synthetic records by --votes, and write none", metavar="FILE")
    ] = None,
    ballot: Annotated[
        Path | None, Option("also an experiment in which the run's sites vote on these records", metavar="FILE")
    ] = None,
    pattern: Annotated[str | None, Option("a regular expression that a whole text must match", metavar="REGEX")] = None,
    beside: Annotated[
        str | None, Option("public records, with whose figures the card compares", metavar="FILE")
    ] = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    guidance: Annotated[
        float, Option("above 0: prefer tokens that another code makes less likely, the more the higher")
    ] = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write synthetic records with a finished run's model, for people who may not read the real ones.

      fedtune synthesize runs/writer --codes intents.csv --rows 2000 --to texts.jsonl
      fedtune synthesize runs/writer --votes runs/shares --rows 2000 --to texts.jsonl
      fedtune synthesize runs/writer --candidates texts.jsonl --votes runs/liked --rows 1000 --to best.jsonl

    A code is what the model is asked with, such as a label's name. A text that does not end, is broken, comes twice or
    does not match is drawn again. FILE.card.md and FILE.card.json say how the records were made, what the runs promise
    of them, and what they are not for. Nothing is charged. docs/synthetic_texts.md says more.
    """
    check_at_least("--rows", rows, 1)
    check_at_most("--rows", rows, _MOST_ROWS)
    spec = WritingSpec(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, guidance=guidance, seed=seed
    )
    config, adapter = finished_run(run, device=device)
    writer = door.Run(folder=adapter.absolute().parent, config=config)
    voted = door.load(votes) if votes is not None else None
    made_here = [to, _card_of(to, ".json"), _card_of(to, ".md")]
    for option, path in (*(("--to", path) for path in made_here), ("--ballot", ballot)):
        if path is not None and (os.path.lexists(path) or (option == "--ballot" and path in made_here)):
            raise ConfigError(option, str(path), "must be a new file; there is something of that name")
    if voted is not None and voted.config.privacy.unit != config.privacy.unit:
        bound = f"must be of privacy.unit={config.privacy.unit}, as RUN is: other epsilons do not add up"
        raise ConfigError("--votes", str(votes), bound)
    columns, known = synthetic.columns_of(writer), None
    from fedtune.report import synthetic_card

    codes_sha256 = None
    if codes is not None:  # before hours in which it may change
        codes_sha256 = synthetic_card.digest(resolve_file(codes, shipped_folders(), key="--codes"))
    reports = [writer.report(), *([voted.report()] if voted is not None else [])]
    public = None
    if beside is not None:
        from fedtune.sites.run_records import require_apart

        others = _rows_of(beside, config, option="--beside")
        require_apart(others, config, key="--beside", file=beside)
        public = _by_column(others, config)
    if candidates is None:
        with shown_progress() as progress:
            made = synthetic.synthesize(
                writer, codes, rows=rows, votes=voted, spec=spec, pattern=pattern, progress=progress
            )
        if not made.rows:
            raise ConfigError(
                "--rows", rows, f"gave none that keeps the format: {_reasons(made.left_out) or 'no text'}"
            )
    elif voted is None or codes is not None:
        raise ConfigError("--candidates", candidates, "goes with --votes, which choose from them, and without --codes")
    else:
        place = resolve_file(os.path.expanduser(candidates), shipped_folders(), key="--candidates")
        known = synthetic_card.read_card(place, reports[0], option="--candidates")
        written = _by_column(_rows_of(candidates, config, option="--candidates"), config)
        made = synthetic.chosen(written, columns[-1], voted, keep=rows)
    told: dict[str, Any] = {
        "rows": len(made.rows),
        "codes": len(made.wanted),
        "codes_file": Path(codes).name if codes is not None else None,
        "codes_sha256": codes_sha256,
        "shares": "voted" if voted is not None and candidates is None else "declared",
        "candidates": sum(made.wanted.values()) if candidates is not None else None,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "guidance": spec.guidance,
        "max_new_tokens": spec.max_new_tokens,
        "seed": spec.seed,
        "left_out": dict(made.left_out),
        "missing": rows - len(made.rows),
        "beside": None,
    }
    if known is not None:  # what is chosen was written with these, and then owes to these runs too
        told = known["made"] | {key: told[key] for key in ("rows", "codes", "candidates", "missing", "beside")}
    earlier = known["runs"][1:] if known is not None else ()
    card = _write(to, made.rows, columns, reports=reports, told=told, public=public, beside=beside, earlier=earlier)
    if ballot is not None:
        write_file(ballot, synthetic.ballot(made.rows, columns[-1], config), option="--ballot")
    if as_json:
        print_json(card)
        return
    show(Console(), _sections(made, told, to, columns))


def _write(
    to: Path,
    rows: Any,
    columns: tuple[str, ...],
    *,
    reports: Sequence[Report],
    told: dict[str, Any],
    public: list[Mapping[str, str]] | None,
    beside: str | None,
    earlier: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The records and their card, which is returned; it comes last, so that a file without one was interrupted."""
    from fedtune.report import synthetic_card

    texts = [row[columns[-1]] for row in rows]
    figures = {"these records": synthetic_card.figures_of(texts)}
    if public is not None:
        others, name = [row[columns[-1]] for row in public], Path(str(beside)).name
        figures[name] = synthetic_card.figures_of(others)
        told["beside"] = {"file": name, "shared_pairs": synthetic_card.shared_pairs(texts, others)}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(to, lines, option="--to")
    written = synthetic_card.as_json(to, reports, earlier=earlier, made=told, figures=figures)
    write_file(_card_of(to, ".json"), json.dumps(written, indent=1) + "\n", option="--to")
    write_file(_card_of(to, ".md"), synthetic_card.card(reports, written), option="--to")
    return written


def _card_of(to: Path, suffix: str) -> Path:
    return to.with_name(f"{to.name}.card{suffix}")


def _rows_of(name: str, config: RunConfig, *, option: str) -> list[Record]:
    """The records of a file with the columns of the run."""
    path = resolve_file(os.path.expanduser(name), shipped_folders(), key=option)
    found = list(iter_records(path, task_named(config.task).columns(config.data)))
    if not found:
        raise DataError(option, name, "must hold at least one record")
    return found


def _by_column(records: Sequence[Record], config: RunConfig) -> list[Mapping[str, str]]:
    return [{config.data.columns[role]: text for role, text in record.fields.items()} for record in records]


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _sections(made: synthetic.Synthetic, told: Mapping[str, Any], to: Path, columns: tuple[str, ...]) -> list[Section]:
    rows = tuple(
        tuple(harmless(row[column]) for column in columns) for row in made.rows[:: max(1, len(made.rows) // _SHOWN)]
    )
    facts = {
        "records": f"{len(made.rows):,} of {counted(len(made.wanted), 'code')}",
        "drawn again": _reasons(made.left_out) or "none",
        "card": str(_card_of(to, ".md")),
    }
    if told["missing"]:
        facts["missing"] = f"{told['missing']:,}: the model wrote no more that keep the format"
    return [pairs(facts, title=str(to)), Section(title="Some of them", headings=columns, rows=rows[:_SHOWN])]


app = single(synthesize)
