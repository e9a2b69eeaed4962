"""What a server can read out of one site's update, without privacy and with it: the same attack, the same script.

python simulations/reconstruction/run.py                         the study, into results.json and README.md here
python simulations/reconstruction/run.py --only one              cases whose keys begin so; the others are kept
python simulations/reconstruction/run.py --quick --into FOLDER   a sample of one case, as the tests run it
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study  # isort: skip  # fedtune comes first: torch reads settings that it makes

import numpy as np
from membership import Candidates, auroc, found_at
from site_update import Released, released, shared_model
from table import table
from text_attack import TextAttack, Told

from fedtune.sites.shared_model import RunModel

DATA = study.ROOT / "simulations" / "data" / "banking77" / "train.jsonl.gz"
PRIVACY = {
    "none": ["privacy=none"],
    "8": ["privacy=dp_sgd", "privacy.epsilon=8"],
    "3": ["privacy=dp_sgd", "privacy.epsilon=3"],
    "1": ["privacy=dp_sgd", "privacy.epsilon=1"],
}
OTHERS = 500
"""Records that were not there, which the same guesses are held against: that is what chance gets right."""


@dataclass(frozen=True)
class Case:
    """One situation.

    Attributes:
        overrides: of the run, beside privacy.
        size: records of the site.
        candidates: records that the server thinks of; `members` of them are the site's.
        reads_text: whether the text attack is tried: it needs LoRA on the first two layers.
    """

    key: str
    title: str
    overrides: tuple[str, ...]
    size: int
    members: int
    seeds: int
    reads_text: bool = True
    candidates: int = 2000


_LAYERS = ("lora=qv", "lora.target_modules=[query]", "lora.layers=[0,1]")
_ALL = ("privacy.sampling_rate=1.0", "federation.num_rounds=1", "training.schedule=constant")
_SGD = ("training=sgd", "training.local_steps=1")
_ONE = (*_LAYERS, *_ALL, "lora.rank=64")
CASES = (
    Case("one", "one record, one SGD step, rank 64", (*_ONE, *_SGD), 1, 1, 10),
    Case("four", "four records, one SGD step, rank 128", (*_LAYERS, *_ALL, *_SGD, "lora.rank=128"), 4, 4, 10),
    Case("one-rank-8", "one record, one SGD step, rank 8", (*_LAYERS, *_ALL, *_SGD, "lora.rank=8"), 1, 1, 10),
    Case("one-5-steps", "one record, five SGD steps, rank 64", (*_ONE, "training=sgd"), 1, 1, 10),
    Case(
        "one-adam",
        "one record, four Adam steps, rank 64",
        (*_ONE, "training=adamw", "training.local_steps=4"),
        1,
        1,
        10,
    ),
    Case("site-step", "2,300 records, one SGD step on a Poisson batch", _SGD, 2300, 1000, 3, False),
    Case("site", "2,300 records, the banks_intents example as it is", (), 2300, 1000, 3, False),
    Case(
        "site-adam",
        "2,300 records, four Adam steps on Poisson batches, rank 8 in all layers",
        ("lora=qv", "training=adamw", "training.local_steps=4", "privacy.sampling_rate=0.2", "federation.num_rounds=5"),
        2300,
        1000,
        3,
        False,
    ),
)


class Attacked:
    """One case under every privacy setting."""

    def __init__(self, case: Case, rows: Sequence[Mapping[str, str]]) -> None:
        self._case, self._rows = case, rows
        self._overrides = ["runtime.num_threads=1", *case.overrides]
        self._shared: RunModel = shared_model([*PRIVACY["none"], *self._overrides])
        tokenizer = self._shared.tokenizer
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        self._text = TextAttack(self._shared.model, special=special) if case.reads_text else None
        self._pool: list[int] = []
        self._candidates: Candidates | None = None

    def run(self, privacy: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """Every seed's outcome, by privacy setting."""
        outcomes = []
        for seed in range(self._case.seeds):
            members = self._choose(seed)
            for key, overrides in privacy.items():
                began = time.monotonic()
                update = released(self._shared, [self._rows[i] for i in members], [*self._overrides, *overrides])
                self._shared.initial_adapter.load_into(self._shared.model)
                outcome = {"privacy": key, "seed": seed, "noise_multiplier": update.plan.noise_multiplier}
                outcome |= self._membership(update, members) | self._labels(update, members)
                if self._text is not None:
                    outcome |= self._texts(update, members)
                outcomes.append(outcome | {"seconds": round(time.monotonic() - began, 1)})
                print(self._case.key, {k: v for k, v in outcomes[-1].items() if k not in ("true", "guess")}, flush=True)
        return outcomes

    def _choose(self, seed: int) -> list[int]:
        """The site's records, the first ones of which are among the candidates."""
        case, rng = self._case, np.random.default_rng(seed)
        order = [int(i) for i in np.random.default_rng(0).permutation(len(self._rows))]
        if case.size == case.members:  # the same candidates for all seeds: their gradients are computed once
            self._think_of(order[: case.candidates])
            return [int(i) for i in rng.choice(self._pool, case.size, replace=False)]
        rng.shuffle(order)
        self._think_of(order[: case.members] + order[case.size : case.size + case.candidates - case.members])
        return order[: case.size]

    def _think_of(self, pool: list[int]) -> None:
        if pool != self._pool:
            self._pool, self._candidates = pool, Candidates(self._shared, [self._rows[i] for i in pool])

    def _membership(self, update: Released, members: Sequence[int]) -> dict[str, Any]:
        case, inside = self._case, np.isin(self._pool, members)
        assert self._candidates is not None
        scores = self._candidates.scores(update, declared_size=case.size, prior=case.members / case.candidates)
        best = np.argsort(-scores)[: min(case.members, 10)]
        return {
            "auroc": round(auroc(scores, inside), 4),
            "found_at_1_percent": round(found_at(scores, inside, 0.01), 4),
            "best_guesses": round(float(inside[best].mean()), 4),
            "best_guesses_chance": round(float(inside.mean()), 6),
        }

    def _labels(self, update: Released, members: Sequence[int]) -> dict[str, Any]:
        """The labels of the head's rows that moved most, as many as there are different ones."""
        names = self._shared.config.data.labels
        true = {names.index(self._rows[i]["label"]) for i in members}
        moved = np.linalg.norm(update.gradient("head.weight"), axis=1)
        guess = set(np.argsort(-moved)[: len(true)].tolist())
        return {"labels": round(len(guess & true) / len(true), 4), "labels_chance": round(len(true) / len(names), 4)}

    def _texts(self, update: Released, members: Sequence[int]) -> dict[str, Any]:
        assert self._text is not None
        tokenizer = self._shared.tokenizer

        def ids_of(i: int) -> list[int]:
            return tokenizer(self._rows[i]["text"], truncation=True, max_length=64)["input_ids"]

        true = [ids_of(i) for i in members]
        found = self._text.run(update, Told.build(true))
        exact = {tuple(ids) for ids in true} & set(found.sentences)
        others = np.random.default_rng(1).choice(len(self._rows), OTHERS, replace=False)
        elsewhere = [ids_of(int(i)) for i in others if int(i) not in members]
        return {
            "tokens": round(_share(found.tokens, true), 4),
            "tokens_chance": round(float(np.mean([_share(found.tokens, [ids]) for ids in elsewhere])), 5),
            "records": len(exact),
            "farthest_taken": max(max(nearest) for nearest in found.nearest if nearest),
            "nearest_left": min(left for left, nearest in zip(found.next, found.nearest, strict=True) if nearest),
            "true": [tokenizer.decode(ids, skip_special_tokens=True) for ids in true],
            "guess": [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.sentences],
        }


def _share(found: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> float:
    """Share of the different (token, position) pairs of the texts that were found; special tokens do not count."""
    pairs = {(place, token) for ids in true for place, token in enumerate(ids[1:-1], 1)}
    guessed = {(place, token) for place, tokens in enumerate(found) for token in tokens}
    return len(pairs & guessed) / len(pairs)


def attacked(runs: Path, *, case: Case, privacy: Mapping[str, Sequence[str]]) -> study.Found:
    """A case under these privacy settings."""
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    about = {"title": case.title, "overrides": list(case.overrides), "records": case.size}
    return {**about, "candidates": case.candidates, "outcomes": Attacked(case, rows).run(privacy)}


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--quick", action="store_true", help="a sample of one case")
    asked = options.parse_args()
    cases, privacy = CASES, dict(PRIVACY)
    if asked.quick:
        cases = tuple(replace(case, seeds=2, candidates=100) for case in CASES if case.key == "one")
        privacy = {key: PRIVACY[key] for key in ("none", "8", "1")}
    lines: dict[str, study.Line] = {case.key: partial(attacked, case=case, privacy=privacy) for case in cases}
    study.carry_out(__file__, lines, None if asked.quick else table, asked=asked)


if __name__ == "__main__":
    main()
