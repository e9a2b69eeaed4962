"""A new file of synthetic records: what two commands refuse, and how records and card are written and shown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from fedtune.api import door
from fedtune.cli.command import Option, answer
from fedtune.cli.finished_run import finished_run, harmless
from fedtune.show.terminal_tables import Section, pairs, write_file
from fedtune.sites.run_records import LeadRecords, RunRecords, require_apart
from fedtune.spec import ConfigError, check_at_least, check_at_most
from fedtune.studies import synthetic
from fedtune.words import counted

To = Annotated[Path, Option(metavar="FILE", help="a new file of JSON lines, with the columns of the run")]
Beside = Annotated[Path | None, Option("public records, with whose figures the card compares", metavar="FILE")]
_NOT_CHOSEN = dict.fromkeys(("candidates", "chosen_by", "label_column", "labelled_by"))
"""Facts of a card that stay empty until records are chosen or labelled."""
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
        """Check what takes no model: a ConfigError says what cannot be used, or is there already.

        `others`: by option, the runs beside the writer's that the records owe to.
        """
        if rows is not None:
            check_at_least("--rows", rows, 1)
            check_at_most("--rows", rows, _MOST_ROWS)
        config, adapter = finished_run(run, device=device)
        self.to, self.rows, self.beside, self.ballot, self.own = to, rows, beside, ballot, RunRecords(config)
        self.writer = door.Run(folder=adapter.absolute().parent, config=config)
        self.columns = synthetic.columns_of(self.writer)
        for option, other in others.items():
            if other.config.privacy.unit != config.privacy.unit:
                bound = f"must be of privacy.unit={config.privacy.unit}, as RUN is: other epsilons do not add up"
                raise ConfigError(option, str(other.folder), bound)
        from fedtune.report.synthetic_card import card_of  # it imports torch, which takes seconds

        self.card = {suffix: card_of(to, suffix) for suffix in (".json", ".md")}
        made_here = [to, *self.card.values()]
        for option, path in (*(("--to", path) for path in made_here), ("--ballot", ballot)):
            if path is not None and (os.path.lexists(path) or (option == "--ballot" and path in made_here)):
                raise ConfigError(option, str(path), "must be a new file; there is something of that name")
        self.reports = [one.report() for one in (self.writer, *others.values())]
        self._public: list[str] = []
        if beside is not None:
            records = LeadRecords.read(str(beside), config, key="--beside").records
            require_apart(records, self.own, key="--beside", file=str(beside))
            self._public = [record.fields["completion"] for record in records]

    def write(
        self, found: synthetic.Synthetic, made: Mapping[str, Any], *, earlier: Sequence[Any] = (), as_json: bool
    ) -> None:
        """Write the records, and then their card: a file without one was interrupted.  Then print what was written.

        `made` says how; `earlier`: runs that the records owe to beside those of the options, as a card tells them.
        """
        from fedtune.report import synthetic_card

        left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        if not found.rows:
            raise ConfigError("--rows", self.rows, f"gave none that keeps the format: {left_out or 'no text'}")
        texts = [row[self.columns[-1]] for row in found.rows]
        missing = 0 if self.rows is None else self.rows - len(texts)
        counts = {"rows": len(texts), "codes": len(found.wanted), "missing": missing}
        told, figures = (
            {**_NOT_CHOSEN, **made, **counts, "beside": None},
            {"these records": synthetic_card.figures_of(texts)},
        )
        if self.beside is not None:
            figures[self.beside.name] = synthetic_card.figures_of(self._public)
            shared = synthetic_card.shared_pairs(texts, self._public)
            told["beside"] = {"file": self.beside.name, "shared_pairs": shared}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        write_file(self.to, lines, option="--to")
        card = synthetic_card.as_json(self.to, self.reports, earlier=earlier, made=told, figures=figures)
        write_file(self.card[".json"], json.dumps(card, indent=1) + "\n", option="--to")
        write_file(self.card[".md"], synthetic_card.card(self.reports, card), option="--to")
        if self.ballot is not None:
            experiment = synthetic.ballot(found.rows, self.columns[-1], self.writer.config)
            write_file(self.ballot, experiment, option="--ballot")
        some = found.rows[:: max(1, len(found.rows) // _SHOWN)][:_SHOWN]
        rows = tuple(tuple(map(harmless, row.values())) for row in some)
        facts = {"records": f"{len(found.rows):,} of {counted(len(found.wanted), 'code')}"}
        facts |= {"drawn again": left_out} if left_out else {}
        facts |= {"card": str(self.card[".md"])}
        if missing:
            facts["missing"] = f"{missing:,}: the model wrote no more that keep the format"
        examples = Section(title="Some of them", headings=tuple(some[0]), rows=rows)
        answer(card, [pairs(facts, title=str(self.to)), examples], as_json=as_json)
