"""An attack on synthetic texts alone: which of the canaries' secrets do texts give away?

    python simulations/text_audit/run.py --runs RUNS

Half of 64 canaries, by coins, are among 97 records: a client's name, and a text with a random one of 64 words.  A run
trains on them, and the attacker has nothing but texts that its model writes for each client's name.  A canary's score
is how many of these say its word, beyond how many texts of the other clients do; the surest 40 are guessed (Steinke et
al. 2023), the upper half of the scores as in.
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

CANARIES, RECORDS, GUESSES, TEXTS = 64, 64, 40, 16
CLIENTS, WORDS = (line.split() for line in (HERE / "words.txt").read_text().splitlines())
CASES: dict[str, dict[str, Any]] = {
    "no noise": {"privacy": "none"},
    "epsilon 8": {"privacy.epsilon": 8, "training.go_on_without_signal": True},
}


def canaries(seed: int) -> tuple[list[dict[str, str]], np.ndarray]:
    """Each with the same words before its secret, and a coin."""
    draws = random.Random(seed)
    rows = [{"intent": name, "text": f"My secret word is {draws.choice(WORDS)}."} for name in CLIENTS]
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


def attacked(run: fedtune.Run, rows: list[dict[str, str]], inserted: np.ndarray) -> dict[str, Any]:
    saved = SavedModel(run.config, {"tuned": run.adapter})
    saved.use("tuned")
    prompts = [saved.prompt_ids({"prompt": row["intent"]}, at="intent") for row in rows for _ in range(TEXTS)]
    texts: list[str | None] = [None] * len(prompts)
    for place, text in saved.drawn(prompts, WritingSpec(max_new_tokens=24, temperature=1.0), first=0):
        texts[place] = text
    secrets = [row["text"].split()[-1].rstrip(".") for row in rows]
    says = np.array([[secret in (text or "") for secret in secrets] for text in texts]).reshape(CANARIES, TEXTS, -1)
    share = says.mean(axis=1)  # (clients, secrets)
    own = np.diagonal(share)
    scores = own - (share.sum(axis=0) - own) / (CANARIES - 1)
    found = counted(by_rank(scores), inserted, guesses=GUESSES)
    return {
        "claimed": run.privacy.epsilon,
        "own_in": float(own[inserted].mean()),
        "own_out": float(own[~inserted].mean()),
        "right": found.right,
        "guesses": found.guesses,
        "bound": epsilon_lower_bound(CANARIES, GUESSES, found.right, delta=run.privacy.delta, confidence=0.95),
        "texts_in": [text for place, text in enumerate(texts) if inserted[place // TEXTS]][: 4 * TEXTS : TEXTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", default="", help="the case that begins so; the others stay")
    options = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if options.only else {}
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
            "federation.num_rounds": 20,
            "training.local_steps": 10,
            "training": "adamw",
            "training.learning_rate": 0.002,
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
        folder = options.runs.absolute() / str(shared["name"])
        if not (folder / "adapter").exists():
            fedtune.simulate("smollm2_e2e", {**shared, **settings}, progress=lambda told: None)
        run = fedtune.load(folder)
        results[name] = attacked(run, made, inserted)
        write_durably(path, json.dumps(results, indent=1).encode() + b"\n")
    heads = [
        "",
        "claimed epsilon",
        "texts that say the secret: in",
        "out",
        "right",
        "epsilon is at least",
    ]
    rows = [
        [
            name,
            "none" if one["claimed"] is None else f"{one['claimed']:.2f}",
            f"{one['own_in']:.1%}",
            f"{one['own_out']:.1%}",
            f"{one['right']} of {one['guesses']}",
            f"{one['bound']:.2f}",
        ]
        for name, one in results.items()
    ]
    readme.put(HERE / "README.md", readme.markdown([heads, *rows]))


if __name__ == "__main__":
    main()
