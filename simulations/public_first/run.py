"""What private records add to public ones: four banks by secure sums, after a public stage in the same experiment.

    python simulations/public_first/run.py --runs RUNS            all; what is finished in RUNS is taken from there
    python simulations/public_first/run.py --runs RUNS --only 8   one epsilon; the others stay

The public file is the validation slice of banks_intents, 728 questions that no bank gets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fedtune.privacy.durable import write_durably

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import readme  # noqa: E402
import shared_states  # noqa: E402
from kept_runs import asked, finished  # noqa: E402

PUBLIC = HERE.parent / "data" / "banking77" / "validation.jsonl.gz"
# At epsilon 1 a third of the rates of simulations/utility there, as a public stage takes of the recipe's.
EPSILONS: dict[str, dict[str, float]] = {
    "1": {"training.learning_rate": 0.07, "training.head_learning_rate": 4.4},
    "3": {},
    "8": {},
}
SEEDS = (0, 1)


def scores(runs: Path, epsilon: str, seed: int) -> dict[str, float]:
    """Right answers on the 3,080 test questions after the public stage and after both."""
    settings: dict[str, Any] = {
        "privacy.epsilon": int(epsilon),
        "public.train_file": str(PUBLIC),
        "data.validation_file": None,
        "federation.aggregation": "secure",
        "seed": seed,
        "tracking": "quiet",
        **EPSILONS[epsilon],
    }
    final = finished(runs, f"e{epsilon}-{seed}", "banks_intents", settings).result.final
    return {"public": final.metrics_before["accuracy"], "both": final.metrics["accuracy"]}


def main() -> None:
    (runs, only), path = asked(__doc__, EPSILONS), HERE / "results.json"
    lines = json.loads(path.read_text()) if path.exists() else {}
    with shared_states.shared_frozen_states(runs / "states.pt"):
        for epsilon in only or EPSILONS:
            for seed in SEEDS:
                lines[f"{epsilon}, seed {seed}"] = scores(runs, epsilon, seed)
    write_durably(path, json.dumps(dict(sorted(lines.items())), indent=1).encode() + b"\n")
    heads = ["epsilon", "public alone", "public, then private", "points added"]
    rows = [
        [name, f"{one['public']:.4f}", f"{one['both']:.4f}", f"{100 * (one['both'] - one['public']):+.1f}"]
        for name, one in sorted(lines.items())
    ]
    readme.put(HERE / "README.md", readme.markdown([heads, *rows]))


if __name__ == "__main__":
    main()
