"""Do sites of ranks 4, 8 and 16 train as good a model as sites of rank 8?  Four banks on Banking77 at epsilon 8.

    python simulations/heterogeneity/ranks.py --runs runs/ranks             every row, into ranks.json
    python simulations/heterogeneity/ranks.py --runs runs/ranks --missing   go on after an interruption
    python simulations/heterogeneity/ranks.py --only b-                     the recipe's rows: B alone trains
    python simulations/heterogeneity/ranks.py --smoke --into FOLDER         a tiny model, in a minute

All rows have the same scale alpha / rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study

LAYOUTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "equal": ("rank 8 at each bank", ("lora.rank=8", "lora.alpha=4")),
    "mixed": ("ranks 4, 8, 16, 4", ("lora.rank=16", "lora.alpha=8", "federation.ranks=[4,8,16]")),
    "largest": ("rank 16 at each bank", ("lora.rank=16", "lora.alpha=8")),
}
FACTORS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "b": ("B alone", ("lora.train_a=false",)),
    "both": ("A and B", ("lora.train_a=true",)),
}
SEEDS = (0, 1, 2)
SMOKE = ("training.ignore_weak_signal=true", "training.local_steps=2")


def rows(*, smoke: bool) -> Iterator[tuple[str, study.Line]]:
    """Yield each row's key and the function that computes it."""
    for (factors, trained), (layout, ranks) in product(FACTORS.items(), LAYOUTS.items()):
        if smoke and layout == "largest":
            continue
        key = f"{factors}-{layout}"
        line: study.Found = {
            "key": key,
            "title": f"{trained[0]}: {ranks[0]}",
            "overrides": ["privacy.epsilon=8", *trained[1], *ranks[1], *(SMOKE if smoke else ())],
            "seeds": SEEDS[:1] if smoke else SEEDS,
        }
        experiment = "debug" if smoke else "simulations/recipes/banks_sampled.yaml"
        yield key, partial(study.run_line, experiment=experiment, line=line)


def main() -> None:
    options = study.parser(__doc__, Path(__file__).parent)
    options.add_argument("--smoke", action="store_true", help="rows of a tiny model; give --into")
    asked = options.parse_args()
    if asked.smoke and asked.into == Path(__file__).parent:
        options.error("--smoke needs --into FOLDER: its rows are no results")
    study.carry_out(__file__, dict(rows(smoke=asked.smoke)), study.table, asked=asked, file="ranks.json")


if __name__ == "__main__":
    main()
