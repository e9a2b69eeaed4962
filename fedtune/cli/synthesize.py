"""`fedtune synthesize`: records that a finished run's language model writes, with a card of what they promise."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

from fedtune.api import door
from fedtune.cli.command import AsJson, Option, answer
from fedtune.cli.finished_run import Device, MaxNewTokens, Run, Seed, Temperature, TopP
from fedtune.cli.personalise import shown_progress
from fedtune.cli.synthetic_file import Beside, SyntheticFile, To
from fedtune.data.load import shipped_folders
from fedtune.data.records import resolve_file
from fedtune.evaluation.spec import WritingSpec
from fedtune.sites.run_records import file_sha256
from fedtune.studies import synthetic


def synthesize(
    run: Run,
    to: To,
    rows: Annotated[int, Option("how many records")] = 1000,
    codes: Annotated[Path | None, Option("public: what records are written for, a code a row", metavar="FILE")] = None,
    votes: Annotated[Path | None, Option("a run of task votes: the codes' shares", metavar="RUN")] = None,
    beginnings: Annotated[Path | None, Option("records of RUN with their card, to be varied", metavar="FILE")] = None,
    ballot: Annotated[Path | None, Option("also an experiment in which sites vote on these", metavar="FILE")] = None,
    pattern: Annotated[str | None, Option("a regular expression that a whole text must match", metavar="REGEX")] = None,
    beside: Beside = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    guidance: Annotated[float, Option("above 0: prefer what other codes make less likely, the more the higher")] = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write synthetic records with a finished run's model, for people who may not read the real ones.

      fedtune synthesize runs/writer --codes intents.csv --rows 2000 --to texts.jsonl
      fedtune synthesize runs/writer --votes runs/shares --rows 2000 --to texts.jsonl
      fedtune synthesize runs/writer --beginnings best.jsonl --rows 2000 --to more.jsonl

    A code is what the model is asked with, such as a label's name. A text that does not end, is broken, comes twice or
    does not match is drawn again. FILE.card.md and FILE.card.json say how the records were made, what the runs promise
    of them, and what they are not for. Nothing is charged. docs/synthetic_texts.md says more.
    """
    spec = WritingSpec(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, guidance=guidance, seed=seed
    )
    others = {"--votes": door.load(votes)} if votes is not None else {}
    file = SyntheticFile(to, run, others, rows=rows, beside=beside, ballot=ballot, device=device)
    begun, known = file.read(beginnings, option="--beginnings") if beginnings is not None else ([], {})
    named, sha256 = beginnings or codes, known.get("sha256")
    if codes is not None:  # before hours in which it may change
        sha256 = file_sha256(resolve_file(str(codes), shipped_folders(), key="--codes"), key="--codes")
    shares = "varied" if begun else "voted" if others else "declared"
    made = {"codes_file": named.name if named else None, "codes_sha256": sha256, "shares": shares, **asdict(spec)}
    with file.opened() as texts, shown_progress() as progress:
        write = partial(synthetic.synthesize, file.writer, codes, rows=rows, votes=others.get("--votes"))
        found = write(beginnings=begun, spec=spec, pattern=pattern, own=file.own, progress=progress)
        told = file.fill(texts, found, made | {"left_out": dict(found.left_out)})
    answer(*told, as_json=as_json)
