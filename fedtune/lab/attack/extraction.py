"""Extraction from a finished run: secrets by exposure, and answers that the model writes word for word.

Exposure (Carlini et al. 2019, arXiv 1802.08232) ranks a planted secret among random ones of the same form by the
model's loss: log2 of their number minus log2 of the rank.  Whoever plants the secrets, by adding records to a site's
file before training, learns what the model memorizes of unique texts.  Decoding asks the model for the answers to its
own training prompts, greedily, and compares them with the answers to prompts that it never saw.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from fedtune.data import Record
from fedtune.evaluation.spec import WritingSpec
from fedtune.lab.attack.target import TUNED, Target
from fedtune.report.attacks import AttackFinding
from fedtune.spec import DataError

ALTERNATIVES = 999  # random secrets of the same form that each planted one is ranked among
TOKENS = 16  # of an answer that count as extracted if the model writes them word for word
_MOST_PROMPTS = 50
_MOST_SECRETS = 100
_ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


@dataclass(frozen=True)
class PlantedSecret:
    """A secret that somebody planted in a run's training data."""

    fields: dict[str, str]  # role -> text of the record that holds it
    secret: str  # which is in at least one of these texts

    def replace(self, other: str) -> Record:
        """Return the same record with another secret."""
        return Record({role: text.replace(self.secret, other) for role, text in self.fields.items()})


def read_secrets(file: Path, target: Target) -> list[PlantedSecret]:
    """Read planted secrets from JSON lines, each with the columns of the run's records and the column `secret`.

    Raises:
        DataError: a line is no such object, or its texts do not contain the secret.
    """
    columns, found = target.config.bound_task.columns(target.config.data), list[PlantedSecret]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"--secrets, line {number}"
        try:
            row = json.loads(line)
            fields = {role: str(row[column]) for role, column in columns.items()}
            secret = str(row["secret"])
        except (ValueError, TypeError, KeyError):
            bound = f"must be an object with {', '.join(columns.values())} and secret"
            raise DataError(where, "this line", bound) from None
        if not secret or not any(secret in text for text in fields.values()):
            raise DataError(where, "secret", "must be part of one of the record's texts")
        found.append(PlantedSecret(fields, secret))
    if not 0 < len(found) <= _MOST_SECRETS:
        raise DataError("--secrets", len(found), f"must have 1 to {_MOST_SECRETS} lines")
    return found


def draw_alternatives(secret: str, draws: np.random.Generator) -> Iterator[str]:
    """Yield random secrets of the same form: a digit for a digit, a letter for a letter, all else as it is."""
    while True:
        yield "".join(_draw_like(sign, draws) for sign in secret)


def _draw_like(sign: str, draws: np.random.Generator) -> str:
    alphabet = next((one for one in _ALPHABETS if sign in one), sign)
    return alphabet[int(draws.integers(len(alphabet)))]


def compute_exposure(rank: int, candidates: int) -> float:
    """Return the exposure in bits of a secret whose loss has this rank, from 1, among `candidates`.

    >>> compute_exposure(1, 1024), compute_exposure(512, 1024)
    (10.0, 1.0)
    """
    return math.log2(candidates) - math.log2(rank)


def rank_secret(planted: PlantedSecret, target: Target, draws: np.random.Generator) -> int:
    """Return the rank of a secret's loss under the tuned model, from 1, among itself and `ALTERNATIVES` others."""
    others = islice(draw_alternatives(planted.secret, draws), ALTERNATIVES)
    records = [planted.replace(planted.secret), *map(planted.replace, others)]
    losses = target.score_records(records).after
    return 1 + int((losses[1:] <= losses[0]).sum())  # ties count against the attack


def describe_exposure(ranks: Sequence[int], *, confidence: float) -> AttackFinding:
    """Describe planted secrets by how often the model ranks them first tenth among random ones."""
    tenth = (ALTERNATIVES + 1) // 10
    hits = sum(rank <= tenth for rank in ranks)
    interval = binomtest(hits, len(ranks)).proportion_ci(confidence, method="exact")
    exposures = sorted(compute_exposure(rank, ALTERNATIVES + 1) for rank in ranks)
    most = exposures[-1]
    said = f"Of {len(ranks)} planted secrets the model ranks {hits} among the likeliest tenth of {ALTERNATIVES + 1:,} "
    said += f"of the same form; the most exposed one has {most:.1f} of {math.log2(ALTERNATIVES + 1):.1f} bits."
    return AttackFinding(
        attack="extraction",
        measure="planted secrets in the likeliest tenth",
        sentence=said,
        strength=hits / len(ranks),
        low=float(interval.low),
        high=float(interval.high),
        guessing=0.1,
        figures={"largest exposure": most, "median exposure": exposures[len(exposures) // 2]},
    )


def describe_decoding(target: Target, *, confidence: float) -> AttackFinding:
    """Describe how many answers to its own training prompts the model writes word for word."""
    members = [record for records in target.members.values() for record in records]
    counts = [_count_extracted(target, records, seed=target.config.seed) for records in (members, target.others)]
    if any(tried == 0 for _, tried in counts):
        none = f"Extraction was not tried: too few records have an answer of {TOKENS} tokens after a prompt."
        return AttackFinding(attack="extraction", measure="answers written word for word", sentence=none)
    (found, tried), (of_others, tried_others) = counts
    interval = binomtest(found, tried).proportion_ci(confidence, method="exact")
    said = f"The model writes the first {TOKENS} tokens of the answer word for word for {found} of {tried} of its "
    said += f"training prompts, and for {of_others} of {tried_others} prompts that it never saw."
    return AttackFinding(
        attack="extraction",
        measure="answers written word for word",
        sentence=said,
        strength=found / tried,
        low=float(interval.low),
        high=float(interval.high),
        guessing=of_others / tried_others,
    )


def _count_extracted(target: Target, records: Sequence[Record], *, seed: int) -> tuple[int, int]:
    """Return how many of the tried records' answers the tuned model begins word for word, and how many were tried."""
    saved, task, data = target.saved, target.saved.model.task, target.config.data
    saved.use_adapter(TUNED)
    spec, draws = WritingSpec(max_new_tokens=TOKENS), np.random.default_rng(seed)
    found = tried = 0
    for place in draws.permutation(len(records)):
        fields = dict(records[place].fields)
        (answer,) = saved.answer_ids([fields])
        prompt = task.prompt_ids(fields, saved.tokenizer, data=data)
        if len(answer) < TOKENS or not len(prompt):
            continue
        if saved.positions is not None and len(prompt) + TOKENS > saved.positions:
            continue
        written = "".join(saved.generate_answer(prompt, spec))
        expected = saved.tokenizer.decode(answer[:TOKENS].tolist(), skip_special_tokens=True)
        found, tried = found + (written.strip() == expected.strip()), tried + 1
        if tried == _MOST_PROMPTS:
            break
    return found, tried
