"""Reading the site's texts off the gradient of LoRA's B.

While B is zero, its gradient is the sum over token positions of delta_t (A x_t)^T.  A is the server's own, so the rows
of the released B span just the A x_t of the tokens that occurred, as long as the rank is above their number.  For the
first layer x_t depends on (token, position) alone: each pair of the vocabulary is tested by its distance to that span.
For the second layer x_t depends on the whole sentence, which tells which tokens belong together.  The check of spans is
that of DAGER (Petrov et al. 2024, arXiv 2405.15586), here through LoRA's projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from site_update import Released

from fedtune.tasks.task_model import TaskModel

FIRST, SECOND = "layer.0.", "layer.1."
_RESTARTS, _SWEEPS = 6, 6
_EXACT = 1e-3
"""A distance below this is no accident: other sentences and tokens were measured above 0.01."""


@dataclass(frozen=True)
class Told:
    """What the attacker is given, so that noise alone stands between it and the texts.

    Attributes:
        lengths: tokens of each record, special ones included.
        at: how many different tokens there are at each position, special ones not counted.
        pairs: number of different (token, position) pairs.
    """

    lengths: tuple[int, ...]
    at: tuple[int, ...]
    pairs: int

    @classmethod
    def build(cls, records: Sequence[Sequence[int]]) -> Told:
        """The facts about these token ids."""
        longest = max(map(len, records))
        at = tuple(len({ids[p] for ids in records if 0 < p < len(ids) - 1}) for p in range(longest))
        pairs = {(token, place) for ids in records for place, token in enumerate(ids)}
        return cls(tuple(map(len, records)), at, len(pairs))


@dataclass(frozen=True)
class Found:
    """What came out.

    Attributes:
        tokens: the likeliest tokens at each position, best first.
        nearest: their distances to the span.
        next: the distance of the first token that was not taken, at each position.
        sentences: token ids of each guessed record.
    """

    tokens: tuple[tuple[int, ...], ...]
    nearest: tuple[tuple[float, ...], ...]
    next: tuple[float, ...]
    sentences: tuple[tuple[int, ...], ...]


class TextAttack:
    """The attack on the releases of runs that start from one adapter.

    Args:
        model: the public base with the server's adapter in it.
        special: ids of the tokens that are no text: begin first, then end, then others.
    """

    def __init__(self, model: TaskModel, *, special: Sequence[int]) -> None:
        self._model, self._base, self._special = model, model.base.get_base_model(), list(special)
        self._projected: dict[int, torch.Tensor] = {}

    def run(self, released: Released, told: Told) -> Found:
        """Guess tokens and sentences from one release."""
        first = _span(released, FIRST, told.pairs)
        guesses = [self._at(place, first, count) for place, count in enumerate(told.at)]
        tokens = tuple(guess[0] for guess in guesses)
        second = _span(released, SECOND, sum(told.lengths))
        rng = np.random.default_rng(0)
        sentences: list[tuple[int, ...]] = []
        for length in sorted(set(told.lengths)):
            sentences += self._sentences(tokens, length, told.lengths.count(length), second, rng)
        return Found(tokens, tuple(g[1] for g in guesses), tuple(g[2] for g in guesses), tuple(sentences))

    def _at(self, place: int, span: torch.Tensor, count: int) -> tuple[tuple[int, ...], tuple[float, ...], float]:
        """The `count` tokens nearest to the span at a position, and the distance of the next one."""
        distances = _distances(self._embedded(place), span)
        distances[self._special] = torch.inf
        values, ids = distances.topk(count + 1, largest=False)
        return tuple(ids[:count].tolist()), tuple(values[:count].tolist()), float(values[count])

    def _embedded(self, place: int) -> torch.Tensor:
        """A x of every token at a position, (vocabulary, rank)."""
        if place not in self._projected:
            ids = torch.arange(self._base.config.vocab_size)[:, None]
            with torch.no_grad():
                x = self._base.embeddings(input_ids=ids, position_ids=torch.full_like(ids, place))[:, 0]
                self._projected[place] = x @ self._a(FIRST).T
        return self._projected[place]

    def _a(self, layer: str) -> torch.Tensor:
        return next(
            p for name, p in self._model.collect_adapter_parameters().items() if layer in name and "lora_A" in name
        )

    @cached_property
    def _second_a(self) -> torch.Tensor:
        return self._a(SECOND).detach()

    def _sentences(
        self, tokens: Sequence[Sequence[int]], length: int, wanted: int, span: torch.Tensor, rng: np.random.Generator
    ) -> list[tuple[int, ...]]:
        """The `wanted` sentences of a length that fit the second layer best, of the tokens found at each position."""
        choices = [[self._special[0]], *tokens[1 : length - 1], [self._special[1]]]
        found: dict[tuple[int, ...], float] = {}
        for _ in range(_RESTARTS * wanted):
            start = [int(rng.choice(options)) for options in choices]
            sentence, score = self._climb(start, choices, span)
            found[sentence] = score
            if sum(score < _EXACT for score in found.values()) >= wanted:
                break
            if all(len(options) == 1 for options in choices):
                break
        return sorted(found, key=found.__getitem__)[:wanted]

    def _climb(
        self, sentence: list[int], choices: Sequence[Sequence[int]], span: torch.Tensor
    ) -> tuple[tuple[int, ...], float]:
        """Change one token at a time for the better until nothing gets better."""
        best = self._misfit([sentence], span)[0]
        for _ in range(_SWEEPS):
            before = best
            for place in np.argsort([-len(options) for options in choices]):
                variants = [[*sentence[:place], token, *sentence[place + 1 :]] for token in choices[place]]
                if len(variants) > 1:
                    scores = self._misfit(variants, span)
                    best, sentence = min(zip(scores, variants, strict=True))
            if best == before:
                break
        return tuple(sentence), best

    def _misfit(self, sentences: list[list[int]], span: torch.Tensor) -> list[float]:
        """Mean distance to the span, over a sentence's positions, of what enters the second layer; one each."""
        with torch.no_grad():
            states = self._base.encoder.layer[0](self._base.embeddings(input_ids=torch.tensor(sentences)))
            states = states[0] if isinstance(states, tuple) else states
            projected = states @ self._second_a.T
            return [float(_distances(each, span).mean()) for each in projected]


def _span(released: Released, layer: str, count: int) -> torch.Tensor:
    """The `count` strongest directions (count, rank) of the rows of B's gradient in a layer; orthonormal."""
    (name,) = (name for name in released.names("lora_B") if layer in name)
    _, _, directions = np.linalg.svd(released.gradient(name), full_matrices=False)
    # The whole space would be at no distance from anything.
    return torch.from_numpy(directions[: min(count, len(directions) - 1)]).float()


def _distances(vectors: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The part of each row that lies outside the span, as a share of its length, in [0, 1]."""
    rest = vectors - (vectors @ span.T) @ span
    return rest.norm(dim=1) / vectors.norm(dim=1)
