"""How the rates were chosen: the head alone, on embeddings that are made once, scored on the lead's own questions.

    python simulations/warm_start/stand_in.py

Each fifth of the validation slice is scored by starts that were tuned on the other four, so that neither the test file
nor a scored question has a part in the choice.  The training is that of simulations/own_data/stand_in.py.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "own_data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stand_in import Embedded, Embedder, Settings, banks, train

FOLDS, DRAWS = 5, 2
START_RATES = (28.0, 14.0, 14 / 3, 14 / 9)
BANK_RATES = (24.0, 8.0, 8 / 3, 8 / 9, 8 / 27)


def folds(data: Embedded) -> list[tuple[Embedded, Embedded]]:
    """For each fifth of the slice: the lead alone with the rest, and the banks; both are scored on the fifth."""
    texts, labels = data.scored
    part = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)) % FOLDS
    found = []
    for number in range(FOLDS):
        rest, scored = part != number, (texts[part == number], labels[part == number])
        lead = replace(data, training=(texts[rest], labels[rest]), scored=scored, num_sites=1, size=int(rest.sum()))
        found.append((lead, replace(data, scored=scored)))
    return found


def main() -> None:
    torch.set_num_threads(1)
    made = folds(Embedder().problem(banks()))
    sizes = [len(one.scored[0]) for one, _ in made]

    def over_all(accuracies: list[float]) -> float:
        return sum(size * one for size, one in zip(sizes, accuracies, strict=True)) / sum(sizes)

    print(
        "| the start's head rate | the start alone | "
        + " | ".join(f"banks at {rate:.3g}" for rate in BANK_RATES)
        + " |"
    )
    print("| ---: | ---: |" + " ---: |" * len(BANK_RATES))
    for start_rate in (None, *START_RATES):
        rate = Settings(rate=start_rate or 0.0, adam=False)
        heads = [lead.names if start_rate is None else train(lead, rate, epsilon=None, seed=1) for lead, _ in made]
        alone = over_all([lead.accuracy(head) for (lead, _), head in zip(made, heads, strict=True)])
        scores = []
        for bank_rate in BANK_RATES:
            begun = [replace(all_banks, names=head) for (_, all_banks), head in zip(made, heads, strict=True)]
            settings = Settings(rate=bank_rate, adam=False)
            each = [
                over_all([one.accuracy(train(one, settings, epsilon=1.0, seed=seed)) for one in begun])
                for seed in range(DRAWS)
            ]
            scores.append(statistics.fmean(each))
        shown = " | ".join(f"{score:.3f}" for score in scores)
        print(f"| {'none' if start_rate is None else f'{start_rate:.3g}'} | {alone:.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
