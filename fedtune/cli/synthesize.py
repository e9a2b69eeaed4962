"""Generate synthetic records with a finished run's model, for people without access to the real records.

  fedtune synthesize runs/writer --prompts intents.csv --rows 2000 --to texts.jsonl    generate records
  fedtune synthesize select runs/writer --candidates texts.jsonl --votes runs/liked --rows 500 --to best.jsonl

A card next to the records documents their generation and selection, and the joint guarantee of all runs involved.
Nothing is charged. See docs/using_the_result.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fedtune.api import public
from fedtune.cli.command import AsJson, Option, command, group, print_answer
from fedtune.cli.finished_run import (
    Device,
    MaxNewTokens,
    Run,
    Seed,
    Temperature,
    TopP,
    load_finished_run,
    strip_control_characters,
)
from fedtune.cli.personalize import show_progress
from fedtune.data.records import iter_records, resolve_file
from fedtune.evaluation.spec import WritingSpec
from fedtune.formatting import pluralize
from fedtune.lab.studies import synthetic
from fedtune.show.new_files import write_new_files
from fedtune.show.terminal_tables import Section, build_key_value_section
from fedtune.sites.run_records import (
    LeadRecords,
    RunRecords,
    find_card_path,
    hash_file,
    record_generated_texts,
    require_disjoint,
)
from fedtune.spec import ConfigError, check_at_least, check_at_most
from fedtune.version import find_shipped_folders

To = Annotated[Path, Option(metavar="FILE", help="a new JSON Lines file (.jsonl), with the columns of the run")]
Beside = Annotated[Path | None, Option("public records for comparison in the card", metavar="FILE")]
app = group(__doc__, default="generate")
_SHOWN = 5
_MAX_ROWS = 100_000


class SyntheticFile:
    """A new file of synthetic records with its card."""

    def __init__(
        self,
        to: Path,
        run: Path,
        others: Mapping[str, public.Run],
        *,
        rows: int | None,
        beside: Path | None,
        voting_experiment: Path | None = None,
        device: str = "auto",
    ) -> None:
        """Validate all arguments that can be validated without a model.

        `others` maps options to further runs whose privacy loss the records inherit.
        """
        if rows is not None:
            check_at_least("--rows", rows, 1)
            check_at_most("--rows", rows, _MAX_ROWS)
        if to.suffix != ".jsonl":
            raise ConfigError("--to", str(to), "must be a new JSON Lines file: use a name that ends in .jsonl")
        config, adapter = load_finished_run(run, device=device)
        self.to, self.rows, self.beside, self.own = to, rows, beside, RunRecords(config)
        self.voting_experiment = voting_experiment
        self.writer = public.Run(folder=adapter.absolute().parent, config=config)
        self.columns = tuple(synthetic.map_synthetic_columns(self.writer).values())
        for option, other in others.items():
            if other.config.privacy.unit != (unit := config.privacy.unit):
                bound = f"must have privacy.unit={unit}, like RUN: epsilons of different units cannot be added"
                raise ConfigError(option, str(other.folder), bound)
        self.card = {suffix: find_card_path(to, suffix) for suffix in (".json", ".md")}
        from fedtune.report.synthetic_card import describe_run  # it imports torch, which takes seconds

        runs = (self.writer, *others.values())
        # First, because a run without privacy has no report.
        digests = [synthetic.read_adapter(one).digest for one in runs]
        self.reports = [one.report() for one in runs]
        self.behind = list(map(describe_run, self.reports, digests))
        self._public: list[tuple[str, ...]] = []
        if beside is not None:
            records = LeadRecords.read(str(beside), config, key="--beside").records
            for own in (self.own, *(RunRecords(other.config) for other in others.values())):
                require_disjoint(records, own, key="--beside", file=str(beside))
            roles = synthetic.map_synthetic_columns(self.writer)
            self._public = [tuple(record.fields[role] for role in roles) for record in records]

    def read(self, file: Path, *, option: str) -> tuple[list[dict[str, str]], Mapping[str, Any]]:
        """Read this run's synthetic records with their labels and card, and add the card's runs to `behind`."""
        from fedtune.report.synthetic_card import read_card  # it imports torch, which takes seconds

        place = resolve_file(str(file), find_shipped_folders(), key=option)
        known = read_card(place, self.behind[0], option=option)
        self.behind += known["runs"][1:]
        labels = [one["column"] for one in known["made"].get("labels", ())]
        columns = synthetic.map_synthetic_columns(self.writer)
        columns |= {f"label {column}": column for column in labels if column not in self.columns}
        records = iter_records(place, columns)
        return [{column: one.fields[role] for role, column in columns.items()} for one in records], known

    def open_files(self) -> AbstractContextManager[dict[Path, str]]:
        """Open the new files for `fill_texts`, with the card first, because records without a card count as public."""
        places = [("--to", path) for path in (*self.card.values(), self.to)]
        places += [("--voting-experiment", self.voting_experiment)] if self.voting_experiment else []
        return write_new_files(*places)

    def fill_texts(
        self, texts: dict[Path, str], found: synthetic.Synthetic, made: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Sequence[Section]]:
        """Fill the new files with records and card, and return the card and the terminal sections.

        `made` documents the generation or selection of the records.
        """
        from fedtune.evaluation.generation import measure_shared_bigrams, measure_text_variety
        from fedtune.report import synthetic_card

        left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        if not found.rows:
            bound = f"produced no record in the required format: {left_out or 'no text'}"
            raise ConfigError("--rows", self.rows, bound)
        written = [tuple(row[column] for column in self.columns) for row in found.rows]
        said, theirs = ([text for *_, text in records] for records in (written, self._public))
        missing = 0 if self.rows is None else self.rows - len(written)
        counts = {"rows": len(written), "prompts": len(found.wanted), "missing": missing}
        told = {"candidates": None, "chosen_by": None, "labels": [], **made, **counts, "beside": None}
        told["classified"] = synthetic.measure_classifier_accuracy(written, self._public)
        figures = {"these records": measure_text_variety(said)}
        if self.beside is not None:
            figures[self.beside.name] = measure_text_variety(theirs)
            told["beside"] = {"file": self.beside.name, "shared_pairs": measure_shared_bigrams(said, theirs)}
        texts[self.to] = lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        record_generated_texts(self.writer.folder, said)
        card = synthetic_card.build_card(self.to, lines.encode(), self.behind, made=told, figures=figures)
        texts[self.card[".json"]] = json.dumps(card, indent=1) + "\n"
        texts[self.card[".md"]] = synthetic_card.render_card_markdown(self.reports, card)
        if self.voting_experiment is not None:
            experiment = synthetic.render_voting_experiment(found.rows, self.columns[-1], self.writer.config)
            texts[self.voting_experiment] = experiment
        some = found.rows[:: max(1, len(found.rows) // _SHOWN)][:_SHOWN]
        rows = tuple(tuple(map(strip_control_characters, row.values())) for row in some)
        facts = {"records": f"{len(found.rows):,} of {pluralize(len(found.wanted), 'prompt')}"}
        facts |= ({"resampled": left_out} if left_out else {}) | {"card": str(self.card[".md"])}
        facts |= {"missing": f"{missing:,}: the model generated no more in the required format"} if missing else {}
        examples = Section(title="Examples", headings=tuple(some[0]), rows=rows)
        return card, [build_key_value_section(facts, title=str(self.to)), examples]


@command(app, "generate records (`generate` may be omitted)")
def generate(
    run: Run,
    to: To,
    rows: Annotated[int, Option("number of records")] = 1000,
    prompts: Annotated[Path | None, Option("public prompts to write records for, one per row", metavar="FILE")] = None,
    votes: Annotated[Path | None, Option("a run of task votes, which sets the prompts' shares", metavar="RUN")] = None,
    variations_of: Annotated[
        Path | None, Option("synthetic records of RUN (with their card) to vary", metavar="FILE")
    ] = None,
    voting_experiment: Annotated[
        Path | None, Option("also write an experiment in which sites vote on these records", metavar="FILE")
    ] = None,
    pattern: Annotated[
        str | None, Option("a regular expression that each text must match entirely", metavar="REGEX")
    ] = None,
    beside: Beside = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    guidance: Annotated[float, Option("0: off; higher values avoid texts that other prompts also produce")] = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate synthetic records with a finished run's model, for people without access to the real records.

      fedtune synthesize runs/writer --prompts intents.csv --rows 2000 --to texts.jsonl
      fedtune synthesize runs/writer --votes runs/shares --rows 2000 --to texts.jsonl
      fedtune synthesize runs/writer --variations-of best.jsonl --rows 2000 --to more.jsonl

    A prompt conditions the generated record, for example on the name of a label. Texts that are truncated, broken,
    duplicate or do not match the pattern are sampled again. FILE.card.md and FILE.card.json document the generation,
    the guarantee of the runs involved, and unsuitable uses. Nothing is charged. See docs/using_the_result.md.
    """
    spec = WritingSpec(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, guidance=guidance, seed=seed
    )
    others = {"--votes": public.load(votes)} if votes is not None else {}
    file = SyntheticFile(to, run, others, rows=rows, beside=beside, voting_experiment=voting_experiment, device=device)
    begun, known = file.read(variations_of, option="--variations-of") if variations_of is not None else ([], {})
    named, sha256 = variations_of or prompts, known.get("sha256")
    if prompts is not None:  # read it now: the file may change during generation
        sha256 = hash_file(resolve_file(str(prompts), find_shipped_folders(), key="--prompts"), key="--prompts")
    shares = "varied" if begun else "voted" if others else "declared"
    made = {"prompts_file": named.name if named else None, "prompts_sha256": sha256, "shares": shares, **asdict(spec)}
    with file.open_files() as texts, show_progress() as progress:
        write = partial(synthetic.synthesize, file.writer, prompts, rows=rows, votes=others.get("--votes"))
        found = write(variations_of=begun, spec=spec, pattern=pattern, own=file.own, progress=progress)
        told = file.fill_texts(texts, found, made | {"left_out": dict(found.left_out)})
    print_answer(*told, as_json=as_json)


@command(app, "select records by the sites' votes, or relabel them")
def select(
    run: Run,
    candidates: Annotated[Path, Option("records of fedtune synthesize with RUN, and their card", metavar="FILE")],
    to: To,
    votes: Annotated[Path | None, Option("a run of task votes on these records; with --rows", metavar="RUN")] = None,
    rows: Annotated[int | None, Option("number of records to keep, by --votes")] = None,
    labels: Annotated[
        Path | None, Option("a classifier of the same sites, to relabel the records", metavar="RUN")
    ] = None,
    beside: Beside = None,
    as_json: AsJson = False,
) -> None:
    """Select synthetic records by the sites' votes, or relabel them with a classifier trained at the sites.

      fedtune synthesize select runs/writer --candidates texts.jsonl --votes runs/liked --rows 500 --to best.jsonl
      fedtune synthesize select runs/writer --candidates texts.jsonl --labels runs/classifier --to labeled.jsonl

    The candidates must be output of fedtune synthesize RUN, whose option --voting-experiment writes the experiment for
    the votes. FILE.card.md and FILE.card.json document generation and selection, and the joint guarantee of all runs
    involved. Nothing is charged. See docs/using_the_result.md.
    """
    if votes is None and labels is None:
        raise ConfigError("--votes", None, "is missing: give --votes to select records, or --labels to label them")
    if (votes is None) != (rows is None):
        raise ConfigError("--rows", rows, "is required with --votes, and not allowed without it")
    by = {"--votes": votes, "--labels": labels}
    others = {option: public.load(folder) for option, folder in by.items() if folder is not None}
    file = SyntheticFile(to, run, others, rows=rows, beside=beside)
    written, known = file.read(candidates, option="--candidates")
    made = {"labels": [], **known["made"]}
    with file.open_files() as texts:
        found = synthetic.load_synthetic(written, file.columns)
        if rows is not None:
            made |= {"candidates": len(found.rows), "chosen_by": others["--votes"].config.name}
            found = synthetic.select_by_votes(found, file.columns[-1], others["--votes"], keep=rows)
        if classifier := others.get("--labels"):
            found = synthetic.relabel(found, file.columns[-1], classifier)
            new = {"column": classifier.config.data.columns["label"], "by": classifier.config.name}
            made["labels"] = [*(one for one in made["labels"] if one["column"] != new["column"]), new]
        told = file.fill_texts(texts, found, made)
    print_answer(*told, as_json=as_json)
