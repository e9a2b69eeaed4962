"""How the recipe was chosen: the head alone, trained in a second on embeddings that are made once.

    python simulations/own_data/stand_in.py                    the problems of run.py that are for choosing
    python simulations/own_data/stand_in.py --use confirming   the others, once the values were chosen
    python simulations/own_data/stand_in.py --banks            the four banks, 77 labels, scored on validation
    python simulations/own_data/stand_in.py --sst2 FOLDER      SST-2's problems too
    python simulations/own_data/stand_in.py --lengths          Adam 0.04 beside auto, in runs of 4 to 50 rounds

The same clipping, noise multiplier, sampling and averaging as fedtune's.  Noise comes from an ordinary generator, and
there is no LoRA, whose part of a record's gradient is small.  run.py has the real thing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from run import DATA, Problem, problems
from torch.nn import functional

from fedtune.api.compose import compose_run
from fedtune.model.base_model import load_tokenizer
from fedtune.privacy.accountant import calibrate_noise
from fedtune.tasks.inputs import mean_pool
from fedtune.tasks.task_model import build_task_model
from fedtune.training.spec import choose_learning_rate

RATE, ROUNDS, STEPS, SCALE = 0.3, 10, 5, 10.0
USES = ("choosing", "confirming")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared.

    Attributes:
        rate: at the schedule's start; None: as training.learning_rate=auto chooses it.
        momentum: Adam's first beta; the second is 0.999.
    """

    rate: float | None = None
    adam: bool = True
    momentum: float = 0.0
    schedule: str = "constant"


COMPARED = {
    "SGD 24, before": Settings(rate=24, adam=False),
    "SGD 8": Settings(rate=8, adam=False),
    "SGD 3": Settings(rate=3, adam=False),
    "SGD 1": Settings(rate=1, adam=False),
    "Adam 0.04, beta 0.9": Settings(rate=0.04, momentum=0.9),
    "Adam 0.02": Settings(rate=0.02),
    "Adam 0.04": Settings(rate=0.04),
    "Adam 0.08": Settings(rate=0.08),
    "auto": Settings(),
}


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A problem's texts and label names as centred embeddings of norm 1, (n, h), with class numbers, (n,)."""

    names: torch.Tensor
    training: tuple[torch.Tensor, torch.Tensor]
    scored: tuple[torch.Tensor, torch.Tensor]
    num_sites: int
    size: int

    def accuracy(self, head: torch.Tensor) -> float:
        """Of a head (labels, h) on the scored rows."""
        texts, labels = self.scored
        return float(((texts @ head.T).argmax(dim=1) == labels).float().mean())


class Embedder:
    """The frozen base; remembers each text."""

    def __init__(self) -> None:
        given = ["model.dtype=float32", "data.train_file=x.csv", "data.declared_sizes=9", "data.labels=[a,b]", "name=x"]
        config = compose_run(["experiment=own_data", *given])
        self._model, self._tokenizer = build_task_model(config.task_model()), load_tokenizer(config.model)
        self._known: dict[tuple[str, int], torch.Tensor] = {}

    @torch.no_grad()
    def of(self, texts: Sequence[str], *, max_length: int) -> torch.Tensor:
        """Texts to mean-pooled states (n, h)."""
        new = sorted({text for text in texts if (text, max_length) not in self._known}, key=len)
        for start in range(0, len(new), 16):
            part = new[start : start + 16]
            batch = self._tokenizer(part, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            given = {key: batch[key] for key in ("input_ids", "attention_mask")}
            pooled = mean_pool(self._model.base(**given).last_hidden_state, batch["attention_mask"])
            self._known |= {(text, max_length): row for text, row in zip(part, pooled, strict=True)}
        return torch.stack([self._known[text, max_length] for text in texts])

    def problem(self, problem: Problem) -> Embedded:
        """All of one problem."""
        training, scored = problem.parts()
        labels = list(problem.labels)
        names = self.of([label.replace("_", " ") for label in labels], max_length=problem.max_length)
        centre = names.mean(dim=0)

        def centred(rows: torch.Tensor) -> torch.Tensor:
            return functional.normalize(rows - centre, dim=-1)

        def part(rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
            texts = self.of([row["text"] for row in rows], max_length=problem.max_length)
            return centred(texts), torch.tensor([labels.index(row["label"]) for row in rows])

        return Embedded(
            names=centred(names),
            training=part(training),
            scored=part(scored),
            num_sites=problem.num_sites,
            size=problem.size,
        )


@lru_cache
def noise_for(epsilon: float | None, num_rounds: int) -> float:
    """The noise multiplier of a whole run."""
    if epsilon is None:
        return 0.0
    return calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=RATE, steps=num_rounds * STEPS, also=[])


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: for how long, and under which epsilon; None is no privacy."""

    num_rounds: int
    epsilon: float | None

    @property
    def noise(self) -> float:
        """The noise multiplier."""
        return noise_for(self.epsilon, self.num_rounds)


def peak_rate(data: Embedded, settings: Settings, run: Run) -> float:
    """The rate at the schedule's start."""
    if settings.rate is not None:
        return settings.rate
    return choose_learning_rate(
        steps=run.num_rounds * STEPS, schedule=settings.schedule, private=run.epsilon is not None
    )


def train(data: Embedded, settings: Settings, run: Run, *, seed: int) -> torch.Tensor:
    """The head after all rounds."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.training[0]), generator=generator)
    head = data.names.clone()
    for number in range(run.num_rounds):
        parts = [order[site * data.size : (site + 1) * data.size] for site in range(data.num_sites)]
        rounds = [_round(head, data, part, settings, (number, run), generator) for part in parts]
        head = torch.stack(rounds).mean(dim=0)
    return head


def _round(
    head: torch.Tensor,
    data: Embedded,
    part: torch.Tensor,
    settings: Settings,
    place: tuple[int, Run],
    generator: torch.Generator,
) -> torch.Tensor:
    number, run = place
    rate = peak_rate(data, settings, run)
    first, second = torch.zeros_like(head), torch.zeros_like(head)
    for step in range(1, STEPS + 1):
        factor = 1 - (settings.schedule != "constant") * (number * STEPS + step - 1) / (run.num_rounds * STEPS)
        sampled = part[torch.rand(len(part), generator=generator) < RATE]
        texts, labels = data.training[0][sampled], data.training[1][sampled]
        errors = torch.softmax(SCALE * texts @ head.T, dim=-1) - functional.one_hot(labels, len(head))
        errors = SCALE * errors  # (n, labels); a record's gradient is its error times its embedding, which has norm 1
        if run.epsilon is not None:
            errors = errors / errors.norm(dim=1, keepdim=True).clamp(min=1.0)
        noise = run.noise * torch.randn(head.shape, generator=generator)
        gradient = (errors.T @ texts + noise) / (RATE * data.size)
        if settings.adam:
            first = settings.momentum * first + (1 - settings.momentum) * gradient
            second = 0.999 * second + 0.001 * gradient**2
            mean, square = first / (1 - settings.momentum**step), second / (1 - 0.999**step)
            gradient = mean / (square.sqrt() + 1e-8)
        head = head - rate * factor * gradient
    return head


def banks() -> Problem:
    """The four banks: all that the sites have, scored on the validation slice."""
    folder = DATA / "banking77"
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        labels = sorted({json.loads(line)["label"] for line in lines})
    return Problem(
        key="banks-77-2300",
        use="choosing",
        train=folder / "train.jsonl.gz",
        test=folder / "validation.jsonl.gz",
        labels={label: label for label in labels},
        num_sites=4,
        size=2300,
        test_rows=1000,
    )


def mean_score(data: Embedded, settings: Settings, run: Run, *, draws: int) -> float:
    """Accuracy after training, over draws of noise and order."""
    return statistics.fmean(data.accuracy(train(data, settings, run, seed=seed)) for seed in range(draws))


def compare_lengths(made: Sequence[tuple[Problem, Embedded]], *, draws: int) -> None:
    """A fixed rate beside the automatic one, over runs of other lengths: means, and the worst against the start."""
    names = ("Adam 0.04", "auto")
    print("| rounds | epsilon | " + " | ".join(f"{use}, {name}" for use in USES for name in names), end="")
    print(" | " + " | ".join(f"worst, {name}" for name in names) + " |")
    print("| ---: | ---: |" + " ---: |" * 6)
    starts = [data.accuracy(data.names) for _, data in made]
    for num_rounds in (4, 10, 20, 50):
        for epsilon in (1.0, 3.0, 8.0, None):
            run = Run(num_rounds=num_rounds, epsilon=epsilon)
            means, worst = {}, []
            for name in names:
                scores = [mean_score(data, COMPARED[name], run, draws=draws) for _, data in made]
                for use in USES:
                    of_use = [score for score, (one, _) in zip(scores, made, strict=True) if one.use == use]
                    means[use, name] = f"{statistics.fmean(of_use):.3f}"
                gains = zip((score - start for score, start in zip(scores, starts, strict=True)), made, strict=True)
                gain, key = min((gain, one.key) for gain, (one, _) in gains)
                worst.append(f"{gain:+.3f} ({key})")
            shown = [means[use, name] for use in USES for name in names] + worst
            print(f"| {num_rounds} | {epsilon or 'none'} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", default="choosing", choices=USES)
    parser.add_argument("--banks", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--lengths", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    embedder = Embedder()
    if options.lengths:
        everything = [*problems(options.data, options.sst2), banks()]
        compare_lengths([(one, embedder.problem(one)) for one in everything], draws=options.draws)
        return
    chosen = [problem for problem in problems(options.data, options.sst2) if problem.use == options.use]
    made = {problem.key: embedder.problem(problem) for problem in ([banks()] if options.banks else chosen)}
    print("| | epsilon | mean | " + " | ".join(made) + " |")
    print("| --- | ---: | ---: |" + " ---: |" * len(made))
    starts = [data.accuracy(data.names) for data in made.values()]
    print(f"| start | | {statistics.fmean(starts):.3f} | " + " | ".join(f"{start:.3f}" for start in starts) + " |")
    for epsilon in (1.0, 3.0, 8.0, None):
        run = Run(num_rounds=ROUNDS, epsilon=epsilon)
        for name, settings in COMPARED.items():
            scores = [mean_score(data, settings, run, draws=options.draws) for data in made.values()]
            shown = " | ".join(f"{score:.3f}" for score in scores)
            print(f"| {name} | {epsilon or 'none'} | {statistics.fmean(scores):.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
