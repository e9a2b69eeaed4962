"""A new file of synthetic records: what two commands refuse, and what stands in it, on its card and on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from fedtune.api import door
from fedtune.cli.command import Option
from fedtune.cli.finished_run import finished_run, harmless
from fedtune.data.load import shipped_folders
from fedtune.data.records import iter_records, resolve_file
from fedtune.show.new_files import new_files
from fedtune.show.terminal_tables import Section, pairs
from fedtune.sites.run_records import LeadRecords, RunRecords, card_of, note_written, require_apart
from fedtune.spec import ConfigError, check_at_least, check_at_most
from fedtune.studies import synthetic
from fedtune.tasks.measures import classified
from fedtune.words import counted

To = Annotated[Path, Option(metavar="FILE", help="a new .jsonl of JSON lines, with the columns of the run")]
Beside = Annotated[Path | None, Option("public records, with whose figures the card compares", metavar="FILE")]
_SHOWN = 5
_MOST_ROWS = 100_000


class SyntheticFile:
    """A new file of synthetic records of a run, with its card."""

    def __init__(
        self,
        to: Path,
        run: Path,
        others: Mapping[str, door.Run],
        *,
        rows: int | None,
        beside: Path | None,
        ballot: Path | None = None,
        device: str = "auto",
    ) -> None:
        """Check what takes no model; `others`: by option, the runs beside the writer's that the records owe to."""
        if rows is not None:
            check_at_least("--rows", rows, 1)
            check_at_most("--rows", rows, _MOST_ROWS)
        if to.suffix != ".jsonl":
            raise ConfigError("--to", str(to), "must be a new file of JSON lines: its name must end in .jsonl")
        config, adapter = finished_run(run, device=device)
        self.to, self.rows, self.beside, self.ballot, self.own = to, rows, beside, ballot, RunRecords(config)
        self.writer = door.Run(folder=adapter.absolute().parent, config=config)
        self.columns = tuple(synthetic.columns_of(self.writer).values())
        for option, other in others.items():
            if other.config.privacy.unit != config.privacy.unit:
                bound = f"must be of privacy.unit={config.privacy.unit}, as RUN is: other epsilons do not add up"
                raise ConfigError(option, str(other.folder), bound)
        self.card = {suffix: card_of(to, suffix) for suffix in (".json", ".md")}
        from fedtune.report.synthetic_card import run_of  # it imports torch, which takes seconds

        runs = (self.writer, *others.values())
        digests = [synthetic.adapter_of(one).digest for one in runs]  # first: of a private one no report would be found
        self.reports = [one.report() for one in runs]
        self.behind = list(map(run_of, self.reports, digests))
        self._public: list[tuple[str, ...]] = []
        if beside is not None:
            records = LeadRecords.read(str(beside), config, key="--beside").records
            for own in (self.own, *(RunRecords(other.config) for other in others.values())):
                require_apart(records, own, key="--beside", file=str(beside))
            roles = synthetic.columns_of(self.writer)
            self._public = [tuple(record.fields[role] for role in roles) for record in records]

    def read(self, file: Path, *, option: str) -> tuple[list[dict[str, str]], Mapping[str, Any]]:
        """Records that the writer wrote, with their labels, and their card; what is made of them owes to its runs."""
        from fedtune.report.synthetic_card import read_card  # it imports torch, which takes seconds

        place = resolve_file(str(file), shipped_folders(), key=option)
        known = read_card(place, self.behind[0], option=option)
        self.behind += known["runs"][1:]
        labels = [one["column"] for one in known["made"].get("labels", ())]
        columns = synthetic.columns_of(self.writer)
        columns |= {f"label {column}": column for column in labels if column not in self.columns}
        records = iter_records(place, columns)
        return [{column: one.fields[role] for role, column in columns.items()} for one in records], known

    def opened(self) -> AbstractContextManager[dict[Path, str]]:
        """The new files for `fill`, the records behind their card: without it they would pass for public ones."""
        places = [("--to", path) for path in (*self.card.values(), self.to)]
        return new_files(*places, *([("--ballot", self.ballot)] if self.ballot else []))

    def fill(
        self, texts: dict[Path, str], found: synthetic.Synthetic, made: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Sequence[Section]]:
        """Put records and card, with how they were `made`, into the texts of new files, and tell what is shown."""
        from fedtune.evaluation.generation import shared_pairs, variety
        from fedtune.report import synthetic_card

        left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        if not found.rows:
            raise ConfigError("--rows", self.rows, f"gave none that keeps the format: {left_out or 'no text'}")
        written = [tuple(row[column] for column in self.columns) for row in found.rows]
        said, theirs = ([text for *_, text in records] for records in (written, self._public))
        missing = 0 if self.rows is None else self.rows - len(written)
        counts = {"rows": len(written), "codes": len(found.wanted), "missing": missing}
        told = {"candidates": None, "chosen_by": None, "labels": [], **made, **counts, "beside": None}
        told["classified"] = classified(written, self._public)
        figures = {"these records": variety(said)}
        if self.beside is not None:
            figures[self.beside.name] = variety(theirs)
            told["beside"] = {"file": self.beside.name, "shared_pairs": shared_pairs(said, theirs)}
        texts[self.to] = lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        note_written(self.writer.folder, said)
        card = synthetic_card.as_json(self.to, lines.encode(), self.behind, made=told, figures=figures)
        texts[self.card[".json"]] = json.dumps(card, indent=1) + "\n"
        texts[self.card[".md"]] = synthetic_card.card(self.reports, card)
        if self.ballot is not None:
            texts[self.ballot] = synthetic.ballot(found.rows, self.columns[-1], self.writer.config)
        some = found.rows[:: max(1, len(found.rows) // _SHOWN)][:_SHOWN]
        rows = tuple(tuple(map(harmless, row.values())) for row in some)
        facts = {"records": f"{len(found.rows):,} of {counted(len(found.wanted), 'code')}"}
        facts |= ({"drawn again": left_out} if left_out else {}) | {"card": str(self.card[".md"])}
        facts |= {"missing": f"{missing:,}: the model wrote no more that keep the format"} if missing else {}
        examples = Section(title="Some of them", headings=tuple(some[0]), rows=rows)
        return card, [pairs(facts, title=str(self.to)), examples]
