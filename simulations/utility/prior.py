"""Does it help to know how frequent each label is?  The exact shares for nothing, beside a run that does not know them.

    python simulations/utility/prior.py        into prior.json and README.md, after head_alone.py's way

Medical abstracts, cut so that 63 % have one label, as in a set where the majority is hard to beat.  A head with a bias
(a constant beside each embedding) that starts at zero, or at the logarithm of the shares: a noised histogram could tell
no more than these, and would cost epsilon.  Scores are weighted to the same shares.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from fedtune.privacy.accountant import calibrate_noise
from fedtune.privacy.durable import write_durably

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]

import readme  # noqa: E402
from head_alone import DELTA, EPSILONS, Change, Texts, known_of, last_layer, trained  # noqa: E402

SHARES = (0.63, 0.17, 0.1, 0.06, 0.04)
RATES = (0.3, 1.0, 2.0, 4.0, 8.0, 13.0)
SEEDS = range(4)
BIAS = 0.3
BEGIN, END = "<!-- results: written by prior.py -->", "<!-- end of priors -->"


def cut(texts: Texts, records: int) -> torch.Tensor:
    """Places of so many records in the shares."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for label, share in enumerate(SHARES):
        places = (texts.labels == label).nonzero().flatten()
        found.append(places[torch.randperm(len(places), generator=draws)][: int(share * records)])
    return torch.cat(found)


def main() -> None:
    change, results = Change(), {}
    known = known_of(HERE.parent / "data" / "medical_abstracts")
    train, validation, test = (last_layer(one.states, known) for one in (known.train, known.validation, known.test))
    names = last_layer(known.names[:, 0], known)
    rows = [["records, epsilon", "no bias", "a bias from 0", "a bias from the exact shares"]]
    for records in (300, 600):
        places = cut(known.train, records)
        labels = known.train.labels[places]
        shares = torch.bincount(labels, minlength=len(SHARES)) / len(labels)

        def accuracy(head: torch.Tensor, inputs: torch.Tensor, texts: Texts, shares: torch.Tensor = shares) -> float:
            weights = (shares / torch.bincount(texts.labels, minlength=len(SHARES)))[texts.labels]
            return float((weights * ((inputs @ head.T).argmax(dim=1) == texts.labels)).sum() / weights.sum())

        for epsilon in EPSILONS:
            noise = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=change.rate, steps=change.steps)
            found = {}
            for title, width, start in (
                ("no bias", 0.0, torch.zeros(len(SHARES))),
                ("a bias from 0", BIAS, torch.zeros(len(SHARES))),
                ("a bias from the exact shares", BIAS, shares.log() / change.scale / BIAS),
            ):
                wide = [
                    torch.cat([one, torch.full((len(one), 1), width)], 1) for one in (train[places], validation, test)
                ]
                first = torch.cat([names, start[:, None]], 1)
                heads = {
                    rate: [trained(change, wide[0], labels, first, rate=rate, noise=noise, seed=seed) for seed in SEEDS]
                    for rate in RATES
                }
                chosen = {
                    rate: statistics.fmean(accuracy(head, wide[1], known.validation) for head in of_rate)
                    for rate, of_rate in heads.items()
                }
                best = max(RATES, key=chosen.__getitem__)
                found[title] = [accuracy(head, wide[2], known.test) for head in heads[best]]
            results[f"{records}, {epsilon:g}"] = found
            rows.append([f"{records}, {epsilon:g}", *(f"{statistics.fmean(one):.3f}" for one in found.values())])
            print(rows[-1], flush=True)
    write_durably(HERE / "prior.json", json.dumps(results, indent=1).encode() + b"\n")
    readme.put(HERE / "README.md", readme.markdown(rows), begin=BEGIN, end=END)


if __name__ == "__main__":
    main()
