"""How far one unit moves the clean sum of a step: a search over every shipped model, head and unit, by the hour.

    python simulations/sensitivity/run.py --minutes 60

Each line is `fedtune audit audit.kind=sensitivity` with other settings, in turns of a few tries with new seeds until
the time is up.  results.json is written after every turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
_MINILM = ("experiment=banks_intents",)
_SMOLLM2 = ("experiment=smollm2_e2e", "runtime.micro_batch_tokens=256", "data.max_length=48")
_BY_USER = ("privacy.unit=user", "+data.columns.user=user")
LINES: dict[str, tuple[int, tuple[str, ...]]] = {
    "random:bert, head and LoRA on all": (150, ("experiment=debug",)),
    "random:bert, LoRA on all, head not trained": (
        150,
        ("experiment=debug", "head.init=label_names", "head.train=false"),
    ),
    "random:bert, by user": (60, ("experiment=debug", *_BY_USER)),
    "random:llama, LoRA on all": (100, ("experiment=debug_users", "privacy.unit=record")),
    "random:llama, LoRA on all, by user": (40, ("experiment=debug_users",)),
    "MiniLM, the main job": (40, _MINILM),
    "MiniLM, head and LoRA on all linear layers": (15, (*_MINILM, "lora=all_linear")),
    "MiniLM, LoRA on query and value, head not trained": (15, (*_MINILM, "lora=qv", "head.train=false")),
    "MiniLM, by user": (15, (*_MINILM, *_BY_USER)),
    "SmolLM2-135M, the shipped LoRA": (2, _SMOLLM2),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=60)
    arguments.add_argument("--only", nargs="*", help="names of lines, or parts of them")
    arguments.add_argument("--first-seed", type=int, default=1)
    options = arguments.parse_args()
    lines = {name: one for name, one in LINES.items() if not options.only or any(o in name for o in options.only)}
    path, until, seed = FOLDER / "results.json", time.monotonic() + 60 * options.minutes, options.first_seed
    results = json.loads(path.read_text()) if path.exists() else {"lines": {}}
    results["machine"] = f"{platform.machine()}, CPU only"
    while time.monotonic() < until:
        for name, (tries, overrides) in lines.items():
            if time.monotonic() < until:
                add(results["lines"].setdefault(name, {}), turn(tries, overrides, seed))
                path.write_text(json.dumps(results, indent=1) + "\n")
        seed += 1


def turn(tries: int, overrides: tuple[str, ...], seed: int) -> dict[str, object]:
    """One turn of a line, in a process of its own."""
    with tempfile.TemporaryDirectory() as runs:
        settings = ("name=turn", f"seed={seed}", f"audit.tries={tries}", f"tracking.output_dir={runs}")
        command = (sys.executable, "-m", "fedtune", "audit", "audit.kind=sensitivity", *overrides, *settings)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = Path(runs, "turn", "sensitivity.json")
        if not found.exists():
            sys.exit(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
        return dict(json.loads(found.read_text()))


def add(line: dict[str, object], found: dict[str, object]) -> None:
    """Add a turn to what a line has so far."""
    if not line or found["moved"] > line["moved"]:
        line |= {key: found[key] for key in ("unit", "moved", "max_grad_norm", "adapter", "others")}
    for key in ("tries", "exceeded", "others_moved"):
        line[key] = line.get(key, 0) + found[key]


if __name__ == "__main__":
    main()
