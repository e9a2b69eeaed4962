"""An attack on synthetic texts alone: which of the canaries' secrets do texts give away?

    python simulations/text_audit/run.py --runs RUNS

Half of 64 canaries, by coins, are among 464 records: a client's number and a text with six random digits.  A run
trains on them, and the attacker has nothing but texts that its model writes for each client's number.  A canary's
score is how much of its secret its own texts repeat; the surest 20 are guessed (Steinke et al. 2023), the upper half
of the scores as in.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

import fedtune
from fedtune.audit.guesses import by_rank, counted
from fedtune.evaluation.audit_bound import epsilon_lower_bound
from fedtune.evaluation.spec import WritingSpec
from fedtune.privacy.durable import write_durably
from fedtune.runs.saved_model import SavedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import readme  # noqa: E402

CANARIES, RECORDS, GUESSES, TEXTS, DIGITS = 64, 432, 20, 8, 6
CASES: dict[str, dict[str, Any]] = {
    "no noise": {"privacy": "none", "training": "adamw", "training.unclipped_learning_rate": 0.006},
    "epsilon 8": {"privacy.epsilon": 8, "training.learning_rate": 160},
}


def canaries(seed: int) -> tuple[list[dict[str, str]], np.ndarray]:
    """Each with the same words before its secret, and a coin."""
    draws = random.Random(seed)
    rows = [
        {
            "intent": f"client {number}",
            "text": f"My reference number is {''.join(draws.choices('0123456789', k=DIGITS))}.",
        }
        for number in range(100, 100 + CANARIES)
    ]
    return rows, np.array([draws.random() < 0.5 for _ in rows])


def train_file(into: Path, rows: list[dict[str, str]], inserted: np.ndarray) -> Path:
    source = HERE.parent / "data" / "banking77" / "train.jsonl.gz"
    with gzip.open(source, "rt") as stream:
        known = [json.loads(line) for line in stream]
    others = [{"intent": one["label"].replace("_", " "), "text": one["text"]} for one in known]
    kept = random.Random(1).sample(others, RECORDS) + [row for row, is_in in zip(rows, inserted, strict=True) if is_in]
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return into


def repeated(secret: str, text: str | None) -> int:
    """The longest piece of the secret that the text has, in digits."""
    pieces = [secret[first:last] for first in range(DIGITS) for last in range(first + 1, DIGITS + 1)]
    return max((len(piece) for piece in pieces if text and piece in text), default=0)


def attacked(run: fedtune.Run, rows: list[dict[str, str]], inserted: np.ndarray) -> dict[str, Any]:
    saved = SavedModel(run.config, {"tuned": run.adapter})
    saved.use("tuned")
    prompts = [saved.prompt_ids({"prompt": row["intent"]}, at="intent") for row in rows for _ in range(TEXTS)]
    texts: list[str | None] = [None] * len(prompts)
    for place, text in saved.drawn(prompts, WritingSpec(max_new_tokens=24, temperature=1.0), first=0):
        texts[place] = text
    secrets = [row["text"].rstrip(".")[-DIGITS:] for row in rows]
    of_each = np.array([repeated(secrets[place // TEXTS], text) for place, text in enumerate(texts)])
    scores = of_each.reshape(CANARIES, TEXTS).mean(axis=1)
    found = counted(by_rank(scores), inserted, guesses=GUESSES)
    whole = (of_each.reshape(CANARIES, TEXTS) == DIGITS).any(axis=1)
    return {
        "claimed": run.privacy.epsilon,
        "score_in": float(scores[inserted].mean()),
        "score_out": float(scores[~inserted].mean()),
        "whole_in": int(whole[inserted].sum()),
        "inserted": int(inserted.sum()),
        "right": found.right,
        "guesses": found.guesses,
        "bound": epsilon_lower_bound(CANARIES, GUESSES, found.right, delta=run.privacy.delta, confidence=0.95),
        "texts_in": [text for place, text in enumerate(texts) if inserted[place // TEXTS]][: 4 * TEXTS : TEXTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, settings in CASES.items():
        if not name.startswith(options.only):
            continue
        made, inserted = canaries(seed=7)
        file = train_file(options.runs / "text_audit.jsonl", made, inserted)
        shared = {
            "data.dataset": "canaries",
            "data.train_file": str(file.absolute()),
            "data.validation_file": None,
            "data.test_file": None,
            "data.columns": {"prompt": "intent", "completion": "text"},
            "data.prompt_template": "A customer of a bank asks about {prompt}:\n",
            "data.max_length": 48,
            "data.declared_sizes": RECORDS + CANARIES // 2,
            "evaluation.generate": False,
            "federation.num_sites": 1,
            "federation.site_names": ["bank"],
            "federation.num_rounds": 4,
            "training.local_steps": 10,
            "training.schedule": "linear",
            "lora.rank": 16,
            "lora.alpha": 32,
            "lora.train_a": True,
            "lora.target_modules": "all-linear",
            "lora.layers": [-4, -3, -2, -1],
            "privacy.sampling_rate": 0.25,
            "tracking": "quiet",
            "tracking.output_dir": str(options.runs.absolute()),
            "name": f"text-audit-{name.replace(' ', '-')}",
        }
        run = fedtune.simulate("smollm2_e2e", {**shared, **settings}, progress=lambda told: None)
        results[name] = attacked(run, made, inserted)
        write_durably(path, json.dumps(results, indent=1).encode() + b"\n")
    heads = [
        "",
        "claimed epsilon",
        "digits repeated: in",
        "out",
        "whole secrets of those in",
        "right",
        "epsilon is at least",
    ]
    rows = [
        [
            name,
            "none" if one["claimed"] is None else f"{one['claimed']:.2f}",
            f"{one['score_in']:.2f}",
            f"{one['score_out']:.2f}",
            f"{one['whole_in']} of {one['inserted']}",
            f"{one['right']} of {one['guesses']}",
            f"{one['bound']:.2f}",
        ]
        for name, one in results.items()
    ]
    readme.put(HERE / "README.md", readme.markdown([heads, *rows]))


if __name__ == "__main__":
    main()
