"""Where does LoRA learn most per unit of noise?  Asked of public records, and tried on Banking77, which chose nothing.

    python simulations/public_probe/run.py --runs RUNS                 all; what is finished in RUNS is taken from there
    python simulations/public_probe/run.py --runs RUNS --only probe    the probe alone, which trains nothing

The probe: MiniLM with its labels' names for a head and LoRA of rank 4 on every linear module, B at zero and fixed A, as
a run begins.  Of 500 records each gradient is clipped to 1 over all modules; what a module's B gets from their mean,
divided by the root of its number of values, is its signal beside the same noise.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.api.compose import compose_run
from fedtune.data.records import Record
from fedtune.privacy.durable import write_durably
from fedtune.sites.shared_model import SharedModel
from fedtune.training.per_example import attached

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import readme  # noqa: E402
import shared_states  # noqa: E402
from kept_runs import asked, finished  # noqa: E402

DATA, RECORDS = HERE.parent / "data", 500
RECIPES = {
    "medical abstracts": "hospitals_abstracts",
    "restaurants' food": "banks_intents",
    "Banking77": "banks_intents",
}
EVERYWHERE = ["lora.target_modules=all-linear", "lora.layers=null", "lora.rank=4", "lora.alpha=2", "lora.train_a=false"]
MODULES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output of the attention",
    "intermediate.dense": "into the feed-forward",
    "output.dense": "out of the feed-forward",
}
PLACES: dict[str, dict[str, Any]] = {
    "value and output of layer 6": {},
    "value of layer 5": {"lora.target_modules": ["value"], "lora.layers": [-2]},
    "value of layers 5 and 6": {"lora.target_modules": ["value"], "lora.layers": [-2, -1]},
}
# At epsilon 1 the rates of simulations/utility.
EPSILONS: dict[int, dict[str, Any]] = {
    8: {},
    1: {"training.schedule": "linear", "training.learning_rate": 0.2, "training.head_learning_rate": 13.3},
}


def records_of(name: str) -> list[Record]:
    """Public records, each a text with a label; of restaurants those whose text does not say the food are in, too."""
    file = {"medical abstracts": "medical_abstracts/train", "restaurants' food": "e2e_nlg/train"}
    with gzip.open(DATA / f"{file.get(name, 'banking77/validation')}.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in stream]
    if name == "restaurants' food":
        foods = [re.search(r"food\[([^]]*)\]", row["mr"]) for row in rows]
        rows = [{"text": row["ref"], "label": food[1]} for row, food in zip(rows, foods, strict=True) if food]
    chosen = np.random.default_rng(5).permutation(len(rows))[:RECORDS]
    return [Record({"text": rows[place]["text"], "label": rows[place]["label"]}) for place in chosen]


def signals(name: str) -> dict[str, float]:
    """By layer and module: the norm of the mean clipped gradient of B, by the root of its number of values."""
    records, settings = records_of(name), [f"experiment={RECIPES[name]}", *EVERYWHERE, "data.validation_file=null"]
    if name == "restaurants' food":
        labels = sorted(Counter(record.fields["label"] for record in records))
        settings += [f"data.labels=[{','.join(labels)}]", "data.test_file=null"]
    shared = SharedModel(compose_run(settings), trains=False)
    examples, found = shared.examples_of(shared.tokenised(records)), defaultdict(float)
    total: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    with attached(shared.model) as gradients:
        for batch in examples.cut(np.arange(len(examples))):
            of_each = gradients.of(batch)
            norms = torch.stack([one.flatten(1).square().sum(1) for one in of_each.values()]).sum(0).sqrt()
            for key, one in of_each.items():
                total[key] = total[key] + torch.einsum("n,n...->...", 1 / norms.clamp(min=1), one) / RECORDS
    for key, mean in total.items():
        if place := re.search(r"layer\.(\d+)\.(.*)\.lora_B", key):
            found[f"{int(place[1]) + 1} {MODULES[place[2]]}"] = float(mean.norm()) / mean.numel() ** 0.5
    return dict(found)


def lines(kept: dict[str, Any], only: list[str] | None, runs: Path) -> Iterator[tuple[str, Any]]:
    if not only or "probe" in only:
        yield "probe", {name: signals(name) for name in RECIPES}
    if not only or "runs" in only:
        for number, (name, place) in enumerate(PLACES.items()):
            with shared_states.shared_frozen_states(runs / f"states-{place.get('lora.layers')}.pt"):
                for epsilon, rates in EPSILONS.items():
                    settings = {"federation.aggregation": "secure", "privacy.epsilon": epsilon, "tracking": "quiet"}
                    settings |= place | rates
                    run = finished(runs, f"place{number}-e{epsilon}", "banks_intents", settings)
                    yield f"{name}, epsilon {epsilon}", run.metrics["accuracy"]


def _score(accuracy: float | None) -> str:
    return "not run" if accuracy is None else f"{accuracy:.4f}"


def main() -> None:
    (runs, only), path = asked(__doc__, ("probe", "runs")), HERE / "results.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, found in lines(kept, only, runs):
        kept[name] = found
        write_durably(path, json.dumps(kept, indent=1).encode() + b"\n")
    probe = kept["probe"]
    order = sorted(
        probe["Banking77"],
        key=lambda place: -sum(probe[name][place] / max(probe[name].values()) for name in list(RECIPES)[:2]),
    )
    rows = [
        [place, *(f"{probe[name][place] / max(probe[name].values()):.2f}" for name in RECIPES)] for place in order[:12]
    ]
    tables = readme.markdown([["layer and module", *RECIPES], *rows])
    found = [[name, *(_score(kept.get(f"{name}, epsilon {epsilon}")) for epsilon in EPSILONS)] for name in PLACES]
    tables += "\n\n" + readme.markdown([["LoRA on", *(f"epsilon {epsilon}" for epsilon in EPSILONS)], *found])
    readme.put(HERE / "README.md", tables)


if __name__ == "__main__":
    main()
