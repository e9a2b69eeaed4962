"""Sites of 50 to 300 records: which rate does no harm, where there may be nothing to learn?

    python simulations/own_data/small_sites.py explore [--sst2 FOLDER]   every rate on the cuts for choosing
    python simulations/own_data/small_sites.py confirm [--sst2 FOLDER]   auto on the others, which chose nothing
    python simulations/own_data/small_sites.py compare [--sst2 FOLDER]   every rate and auto on all but shuffled ones

The head alone, as in stand_in.py.  Each problem is cut in four ways: as it is; skewed (each label has half of the
records of the one before); shuffled (labels drawn from all, so that there is nothing to learn); and both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from run import ABSTRACTS, BANK, DATA, OTHER_BANK, SPEAKERS, Problem
from stand_in import RATE, SCALE, STEPS, Embedded, Embedder, Run, Settings, peak_rate
from torch.nn import functional

from fedtune.evaluation.label_signal import measure_label_signal

WAYS = ("as it is", "skewed", "shuffled", "skewed, shuffled")
EPSILONS = (1.0, 3.0, 8.0)
RATES = (0.008, 0.016, 0.024, 0.032, 0.045, 0.064)


@dataclass(frozen=True, kw_only=True)
class Cut(Problem):
    """A small problem, cut in one of `WAYS`."""

    way: str = "as it is"

    def parts(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """The sites' rows, and those to score."""
        rows = self._cut(self.rows(self.train))
        needed = self.num_sites * self.size
        scored = rows[needed:] if self.test is None else self._cut(self.rows(self.test))
        assert len(rows) >= needed, f"{self.key} ({self.way}): {len(rows)} rows"
        return rows[:needed], scored[: self.test_rows]

    def _cut(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        draws = random.Random(self.key)
        if "skewed" in self.way:
            share = {label: 0.5**place for place, label in enumerate(self.labels)}
            rows = [row for row in rows if draws.random() < share[row["label"]]]
        if "shuffled" in self.way:
            labels = [row["label"] for row in rows]
            draws.shuffle(labels)
            rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        return rows


def cuts(use: str, data: Path, sst2: Path | None) -> Iterator[Cut]:
    """All cuts for choosing, or for confirming."""
    bank, abstracts = data / "banking77", data / "medical_abstracts"
    plays, tables = data / "users_shakespeare", data / "e2e_nlg"
    prices, feelings = {one: one for one in ("high", "moderate", "cheap")}, {"positive": 1, "negative": 0}
    train, test = "train.jsonl.gz", "test.jsonl.gz"

    def of(folder: Path, labels: list[str] | dict, sizes: tuple, sites: int, **more: object) -> Iterator[Cut]:
        names = labels if isinstance(labels, dict) else {label: label for label in labels}
        for size in sizes:
            key = f"{folder.name}-{len(names)}-{size}"
            for way in WAYS:
                cut = Cut(
                    key=key, use=use, train=folder / train, labels=names, num_sites=sites, size=size, way=way, **more
                )
                try:
                    _, scored = cut.parts()
                except AssertionError:
                    continue
                if len(scored) >= 60:
                    yield cut

    if use == "choosing":
        yield from of(bank, BANK[3], (50, 80), 2)
        yield from of(bank, BANK[4], (50, 100), 3)
        yield from of(tables, prices, (50, 100, 300), 2, column="price")
        yield from of(plays, SPEAKERS[0], (50, 80), 2, column="user")
        if sst2 is not None:
            yield from of(sst2, feelings, (50, 150, 300), 2)
        return
    yield from of(abstracts, ABSTRACTS, (50, 100, 250), 3, max_length=96, test=abstracts / test)
    yield from of(
        abstracts, [ABSTRACTS[3], ABSTRACTS[2], ABSTRACTS[4]], (100, 200), 2, max_length=96, test=abstracts / test
    )
    yield from of(bank, OTHER_BANK[3], (50, 80), 2, test=bank / test)
    yield from of(bank, OTHER_BANK[5], (50, 100), 3, test=bank / test)
    yield from of(plays, SPEAKERS[1], (50, 80), 2, column="user")
    if sst2 is not None:
        yield from of(sst2, feelings, (100, 250), 2, test=sst2 / "dev.jsonl.gz", test_rows=872)


def trained(
    data: Embedded, runs: list[Run], rates: list[float], *, draws: int, decays: list[bool], seed: int
) -> torch.Tensor:
    """Heads (runs, draws, labels, h) after all rounds: `stand_in.train` without privacy left out, all at a time."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.tensor([float(one) for one in decays]).repeat_interleave(draws)[:, None, None]
    noise = torch.tensor([run.noise for run in runs]).repeat_interleave(draws)[:, None, None]
    rate = torch.tensor(rates).repeat_interleave(draws)[:, None, None]
    rounds = runs[0].num_rounds
    order = torch.randperm(len(data.training[0]), generator=generator)
    parts = [order[site * data.size : (site + 1) * data.size] for site in range(data.num_sites)]
    head = data.names.repeat(len(noise), 1, 1)
    for number in range(rounds):
        after = []
        for part in parts:
            texts, labels = data.training[0][part], data.training[1][part]
            mine, square = head.clone(), torch.zeros_like(head)
            for step in range(1, STEPS + 1):
                factor = 1 - decay * (number * STEPS + step - 1) / (rounds * STEPS)
                errors = torch.softmax(SCALE * texts @ mine.mT, dim=-1) - functional.one_hot(labels, head.shape[1])
                errors = SCALE * errors
                errors = errors / errors.norm(dim=-1, keepdim=True).clamp(min=1.0)
                sampled = torch.rand(len(noise), len(part), generator=generator) < RATE
                total = (errors * sampled[..., None]).mT @ texts
                gradient = (total + noise * torch.randn(head.shape, generator=generator)) / (RATE * data.size)
                square = 0.999 * square + 0.001 * gradient**2
                mine = mine - rate * factor * gradient / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            after.append(mine)
        head = torch.stack(after).mean(dim=0)
    return head.unflatten(0, (len(runs), draws))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("explore", "confirm", "compare"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    embedder = Embedder()
    use = "choosing" if options.what == "explore" else "confirming"
    for cut in cuts(use, options.data, options.sst2):
        if options.what == "compare" and "shuffled" in cut.way:
            continue
        data = embedder.problem(cut)
        _, scored = cut.parts()
        counts = Counter(row["label"] for row in scored)
        common = Counter(cut.parts()[0][i]["label"] for i in range(len(data.training[0]))).most_common(1)[0][0]
        line = {"key": cut.key, "way": cut.way, "rows": len(scored), "sites": cut.num_sites}
        line |= {"majority": max(counts.values()) / len(scored), "common": counts[common] / len(scored)}
        line |= {"size": cut.size, "labels": len(cut.labels), "start": data.accuracy(data.names)}
        signal = measure_label_signal(data.scored[0].double().numpy(), data.scored[1].numpy())
        line |= {"signal": signal.z, "readout": signal.accuracy}
        runs = [Run(num_rounds=10, epsilon=epsilon) for epsilon in EPSILONS]
        tried = [
            (f"{run.epsilon:g}/{'linear' if decays else 'constant'}/{rate}", run, rate, decays)
            for run in runs
            for decays in (True, False)
            for rate in RATES
        ]
        auto = [(f"{run.epsilon:g}/auto", run, peak_rate(data, Settings(), run), False) for run in runs]
        pairs = tried * (options.what != "confirm") + auto * (options.what != "explore")
        _, asked, rates, decays = zip(*pairs, strict=True)
        line |= {name: 0.0 for name, *_ in pairs}
        for seed in (0, 1):
            heads = trained(data, list(asked), list(rates), draws=options.draws, decays=list(decays), seed=seed)
            for (name, *_), some in zip(pairs, heads, strict=True):
                line[name] += statistics.fmean(data.accuracy(head) for head in some) / 2
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
