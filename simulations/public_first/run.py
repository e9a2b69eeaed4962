"""What private records add to public ones: four banks by secure sums, after a public stage in the same experiment.

    python simulations/public_first/run.py --runs RUNS            all; what is finished in RUNS is taken from there
    python simulations/public_first/run.py --runs RUNS --only 8   one epsilon; the others stay

The public file is the validation slice of banks_intents, 728 questions that no bank gets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import fedtune
from fedtune.privacy.durable import write_durably

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import readme  # noqa: E402
import shared_states  # noqa: E402

PUBLIC = HERE.parent / "data" / "banking77" / "validation.jsonl.gz"
# At epsilon 1 a third of the rates of simulations/utility there, as a public stage takes of the recipe's.
EPSILONS: dict[int, dict[str, float]] = {
    1: {"training.learning_rate": 0.07, "training.head_learning_rate": 4.4},
    3: {},
    8: {},
}
SEEDS = (0, 1)


def scores(runs: Path, epsilon: int, seed: int) -> dict[str, float]:
    """Right answers on the 3,080 test questions after the public stage and after both."""
    name = f"e{epsilon}-{seed}"
    settings: dict[str, Any] = {
        "privacy.epsilon": epsilon,
        "public.train_file": str(PUBLIC),
        "data.validation_file": None,
        "federation.aggregation": "secure",
        "seed": seed,
        "name": name,
        "tracking": "quiet",
        "tracking.output_dir": str(runs),
        **EPSILONS[epsilon],
    }
    if not (runs / name / "adapter").exists():
        print(f"--- {name}", flush=True)
        fedtune.simulate("banks_intents", settings, progress=lambda _: None)
    final = fedtune.load(runs / name).result.final
    return {"public": final.metrics_before["accuracy"], "both": final.metrics["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", type=int, nargs="+", choices=EPSILONS)
    options = parser.parse_args()
    runs, path = options.runs.absolute(), HERE / "results.json"
    runs.mkdir(parents=True, exist_ok=True)
    lines = json.loads(path.read_text()) if path.exists() else {}
    with shared_states.shared_frozen_states(runs / "states.pt"):
        for epsilon in options.only or EPSILONS:
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
