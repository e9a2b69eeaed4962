"""Text generation, token by token for one prompt or in batches, with BLEU and ROUGE-L as scores."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from statistics import quantiles
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fedtune.data.batching import cut_micro_batches
from fedtune.evaluation.scoring import enter_evaluation_mode, report_out_of_memory
from fedtune.evaluation.spec import WritingSpec
from fedtune.model.compatibility import get_max_positions
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.task_model import TaskModel

IndexArray: TypeAlias = npt.NDArray[np.int64]
Choose: TypeAlias = Callable[[torch.Tensor, IndexArray], torch.Tensor]
_LIKELIEST = 1024  # tokens that nearly always cover `top_p`; sorting a whole vocabulary takes ten times as long
_LEAVE = 3 / 4  # finished rows are removed from a batch when at most this fraction of rows is unfinished


def choose_greedily(logits: torch.Tensor, places: IndexArray) -> torch.Tensor:
    """Return the likeliest token of each row, (n,)."""
    return logits.argmax(dim=-1)


def stream_tokens(
    task_model: TaskModel, prompt: npt.NDArray[np.int32], *, end_ids: Collection[int], spec: WritingSpec
) -> Iterator[int]:
    """Generate the continuation of one prompt token by token, and stop at any of `end_ids` or at a length limit.

    The limits are `spec.max_new_tokens` and the model's number of positions. With a key-value cache, each token costs a
    forward pass over a single position. The same seed gives the same text on the same machine. As in
    `generate_batches`, the model's own generation settings are ignored.

    Args:
        task_model: a model whose task generates text; its adapter must not change between two tokens.
        prompt: (t,) token ids, t at least 1.
        end_ids: tokens that end the text; they are not part of it.
        spec: the sampling settings.

    Yields:
        The new token ids.

    Raises:
        ConfigError: for `adapter`, if the logits are not finite because training has diverged.
    """
    positions = get_max_positions(task_model.base.get_base_model())
    room = spec.max_new_tokens if positions is None else min(spec.max_new_tokens, positions - len(prompt))
    draws = torch.Generator().manual_seed(spec.seed)
    token_ids, cache = torch.as_tensor(prompt, dtype=torch.int64, device=task_model.device)[None], None
    for _ in range(room):
        # Entered for each token, because the caller's code between two tokens may need gradients.
        with enter_evaluation_mode(task_model):
            output = task_model.base(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        chosen = _choose_token(output.logits[0, -1].float().cpu(), spec, draws)
        if chosen in end_ids:
            return
        yield chosen
        token_ids = torch.tensor([[chosen]], device=task_model.device)


def decode_stream(token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Decode a stream of token ids, and yield the text that each token adds, without special tokens and surrounding
    space.

    A character that takes several tokens is yielded with the last of these tokens, and a space with the text that
    follows it. The concatenated parts equal the decoding of all tokens at once.
    """
    kept: list[int] = []
    shown = ""
    for token in token_ids:
        kept.append(token)
        text = _decode_tokens(kept, tokenizer)
        # The tokenizer decodes an incomplete character to the replacement character.
        if not text.endswith(_BROKEN) and text.startswith(shown) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = _decode_tokens(kept, tokenizer)
    if len(rest) > len(shown) and rest.startswith(shown):
        yield rest[len(shown) :]


_BROKEN = "\N{REPLACEMENT CHARACTER}"


def _decode_tokens(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def _choose_token(
    logits: torch.Tensor, spec: WritingSpec, draws: torch.Generator, *, against: torch.Tensor | None = None
) -> int:
    """Choose the next token from its logits (vocabulary,); `against` are the logits of a contrasting prompt with the
    same text.
    """
    if not logits.max().isfinite():
        bound = "has infinite or NaN logits: its training has diverged, so train it again"
        raise ConfigError("adapter", float(logits.max()), bound)
    if spec.temperature == 0:
        return int(logits.argmax())
    # float64, and no positive value is divided, so that the smallest temperature does not overflow.
    scaled = (logits - logits.max()).double() / spec.temperature
    chances = torch.softmax(scaled, dim=-1)
    if spec.top_p == 1 and against is None:
        return int(torch.multinomial(chances, 1, generator=draws))
    likeliest, order = chances.topk(min(_LIKELIEST, len(chances)))
    if likeliest.sum() < spec.top_p:
        likeliest, order = chances.sort(descending=True, stable=True)
    # Drop tokens after a cumulative probability of top_p; the likeliest token always stays.
    likeliest[likeliest.cumsum(dim=-1) - likeliest >= spec.top_p] = 0.0
    if against is not None:
        # Only among the likeliest tokens: an unlikely token could win by its difference alone.
        kept = order[likeliest > 0]
        lift = (logits[kept] - against[kept]).double() * (spec.guidance / spec.temperature)
        likeliest[likeliest > 0] *= (lift - lift.max()).exp()
    return int(order[torch.multinomial(likeliest, 1, generator=draws)])


def group_by_prompt(
    prompts: Sequence[np.ndarray], references: Sequence[str], *, rows: int | None = None
) -> tuple[list[np.ndarray], list[list[str]]]:
    """Group n references by the token ids of their prompts.

    Args:
        prompts: the prompt of each reference; prompts that are equal after truncation are merged.
        references: the reference texts.
        rows: keep only the first `rows` distinct prompts, with all their references.

    Returns:
        The (t,) token ids of each distinct prompt, in file order, and the list of reference texts of each.

    Raises:
        DataError: there is no prompt.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for prompt, reference in zip(prompts, references, strict=True):
        groups.setdefault(tuple(prompt.tolist()), []).append(reference)
    kept = list(groups)[:rows]
    if not kept:
        raise DataError("evaluation data", 0, "must contain at least one prompt to generate from")
    return [np.array(prompt, dtype=np.int32) for prompt in kept], [groups[prompt] for prompt in kept]


def sample_completions(
    task_model: TaskModel,
    prompts: Sequence[np.ndarray],
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
    spec: WritingSpec,
    first: int,
    max_tokens: int,
    against: Sequence[np.ndarray] = (),
    begun: Sequence[np.ndarray] = (),
) -> Iterator[tuple[int, str | None]]:
    """Sample a text for each prompt, in batches; each text has its own random generator.

    Args:
        task_model: a model whose task generates text.
        prompts: the (t,) token ids of each prompt, t at least 1.
        tokenizer: decodes the new tokens.
        end_ids: tokens that end a text.
        spec: the settings for choosing the next token.
        first: the number of the first text; together with `spec.seed`, a text's number seeds its generator.
        max_tokens: the maximum number of padded tokens per batch, prompt and text together.
        against: one contrasting prompt per prompt, for `spec.guidance`; empty: no guidance.
        begun: the initial tokens of each text; empty: the whole text is sampled.

    Yields:
        (index of the prompt, text), in no particular order; the text is None if it did not end within
        `spec.max_new_tokens`.

    Raises:
        ConfigError: as in `generate_batches`.
    """
    streams = [torch.Generator() for _ in prompts]
    for number, stream in enumerate(streams, first):
        stream.manual_seed(int(np.random.SeedSequence([spec.seed, number]).generate_state(1, np.uint64)[0] >> 1))

    def choose(logits: torch.Tensor, places: IndexArray) -> torch.Tensor:
        rows = logits.float().cpu()
        others = rows[len(places) :] if against else [None] * len(places)
        chosen = [
            _choose_token(row, spec, streams[place], against=other)
            for row, other, place in zip(rows, others, places, strict=False)
        ]
        return torch.tensor(chosen, device=logits.device)

    written = generate_batches(
        task_model,
        prompts,
        tokenizer=tokenizer,
        end_ids=end_ids,
        max_new_tokens=spec.max_new_tokens,
        max_tokens=max_tokens,
        choose=choose,
        against=against,
        begun=begun,
    )
    yield from ((index, text if ended else None) for index, text, ended in written)


def generate_batches(
    task_model: TaskModel,
    prompts: Sequence[np.ndarray],
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
    max_new_tokens: int,
    max_tokens: int,
    choose: Choose = choose_greedily,
    against: Sequence[np.ndarray] = (),
    begun: Sequence[np.ndarray] = (),
) -> Iterator[tuple[int, str, bool]]:
    """Generate a continuation of each prompt, up to a token of `end_ids` or `max_new_tokens`.

    Prompts are batched by length and padded on the left, so a text does not depend on the other prompts of its batch
    beyond rounding (two tokens with equal logits may swap). The model's own generation settings (temperature,
    penalties) are ignored.

    Args:
        task_model: a model whose task generates text.
        prompts: the (t,) token ids of each prompt, t at least 1.
        tokenizer: decodes the new tokens.
        end_ids: tokens that end a text, as in training.
        max_new_tokens: the maximum length of a text, in tokens.
        max_tokens: the maximum number of padded tokens per batch, prompt and text together.
        choose: chooses the next tokens, as in `generate_batch`; the default is greedy.
        against: empty, or one contrasting prompt per prompt.
        begun: the initial tokens of each text; empty: the whole text is generated.

    Yields:
        (index of the prompt, text with its given beginning, whether the text ended), without special tokens and
        surrounding space.

    Raises:
        ConfigError: a prompt and its text exceed the model's positions, or a batch exceeds the device's memory.
    """
    if begun:
        pairs = (zip(them, begun, strict=False) for them in (prompts, against))
        prompts, against = ([*map(np.concatenate, them)] for them in pairs)
    both = zip(prompts, against or prompts, strict=True)
    lengths = np.array([max(map(len, pair)) for pair in both], dtype=np.int32) + max_new_tokens
    longest, most = int(lengths.max(initial=0)), get_max_positions(task_model.base.get_base_model())
    if most is not None and longest > most:
        bound = f"must be smaller: the longest prompt has {longest - max_new_tokens} of the model's {most} tokens"
        raise ConfigError("evaluation.max_new_tokens", max_new_tokens, bound)
    rows_each = 2 if against else 1
    for indices in cut_micro_batches(np.arange(len(prompts)), lengths * rows_each, max_tokens=max_tokens):
        with enter_evaluation_mode(task_model), report_out_of_memory(max_tokens):
            written = generate_batch(
                task_model,
                {index: prompts[index] for index in indices.tolist()},
                end_ids=end_ids,
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
                choose=choose,
                against=[against[index] for index in indices] if against else (),
            )
        for index, token_ids in written.items():
            text = list(takewhile(lambda token_id: token_id not in end_ids, token_ids))
            whole = _decode_tokens([*(begun[index] if begun else ()), *text], tokenizer)
            yield index, whole, len(text) < len(token_ids)


def compute_text_statistics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, npt.NDArray[np.float64]]:
    """Compute the inputs of `compute_text_scores` for each text, against all references of its prompt.

    Args:
        hypotheses: n texts.
        references: n groups of one or more texts; the groups may differ in size.

    Returns:
        `bleu`: (n, 10) matched n-grams of orders 1 to 4, n-grams of orders 1 to 4, length, and length of the closest
            reference, by sacrebleu with its defaults (case-sensitive, tokenizer 13a).
        `rouge_l`: (n,) by rouge-score, in [0, 1]: F1 of the longest common subsequence with the best reference.  Its
            tokenizer lower-cases and keeps only a-z and 0-9, without stemming: use it for English.
    """
    # Imported late: only a run that generates text needs the two libraries, and rouge-score loads nltk.
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    bleu, rouge = BLEU(effective_order=True), RougeScorer(["rougeL"])
    counts, best = [], []
    for text, group in zip(hypotheses, references, strict=True):
        score = bleu.sentence_score(text, list(group))
        counts.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
        best.append(rouge.score_multi(group, text)["rougeL"].fmeasure)
    return {"bleu": np.array(counts, dtype=np.float64).reshape(-1, 10), "rouge_l": np.array(best, dtype=np.float64)}


def compute_text_scores(figures: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
    """Compute corpus BLEU with exponential smoothing, in [0, 100], and mean ROUGE-L, in [0, 1].

    Args:
        figures: the values of `compute_text_statistics` for n texts, n at least 1.

    Returns:
        The scores `bleu` and `rouge_l`.
    """
    from sacrebleu.metrics.bleu import BLEU

    total = figures["bleu"].sum(axis=0).astype(int).tolist()
    bleu = BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp")
    return {"bleu": float(bleu.score), "rouge_l": float(np.mean(figures["rouge_l"]))}


def generate_batch(
    task_model: TaskModel,
    prompts: Mapping[int, np.ndarray],
    *,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    choose: Choose,
    against: Sequence[np.ndarray] = (),
) -> Mapping[int, list[int]]:
    """Append tokens to each prompt until each text has one of `end_ids`, or `max_new_tokens`.

    Transformers' own `generate` would apply a checkpoint's sampling settings and penalties, even under an explicit
    greedy configuration; this loop ignores them.

    Args:
        task_model: a model in evaluation mode whose task generates text.
        prompts: index of a prompt -> its (t,) token ids.
        end_ids: tokens that end a text.
        pad_id: pads shorter prompts.
        max_new_tokens: the maximum length of a text, in tokens.
        choose: chooses each row's next token from (n, vocabulary) logits and the indices of the rows' prompts.  With
            `against`, it gets (2n, vocabulary) logits: those of the prompts, then those of the contrasting prompts.
        against: empty, or one contrasting prompt per prompt, in the same order.

    Returns:
        Index of a prompt -> its new token ids, including the token that ends the text and any tokens after it.
    """
    model, device = task_model.base, task_model.device
    begun, halves = [*prompts.values(), *against], 2 if against else 1  # both halves continue with the same text
    # Right-aligned, (n, longest), so that every row's last token is real.
    ids = [torch.from_numpy(prompt).long() for prompt in begun]
    token_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left").to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Models that derive distances from the mask (ALiBi) have no position ids.
    takes_positions = "position_ids" in inspect.signature(model.get_base_model().forward).parameters
    cache = None
    rows: dict[int, list[int]] = {place: [] for place in prompts}
    places = np.array([*prompts])  # indices of the unfinished rows' prompts
    for _ in range(max_new_tokens):
        placed = {"position_ids": positions} if takes_positions else {}
        # Only the last position's logits are computed; all of them would need prompt length x vocabulary.
        output = model(
            input_ids=token_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **placed
        )
        cache = output.past_key_values
        chosen = choose(output.logits[:, -1], places)
        token_ids = chosen.repeat(halves)[:, None]
        for place, token_id in zip(places, chosen.tolist(), strict=True):
            rows[place].append(token_id)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        goes_on = [end_ids.isdisjoint(rows[place]) for place in places]
        if not any(goes_on):
            break
        if sum(goes_on) <= _LEAVE * len(places):  # a few long texts should not carry finished rows along
            kept = torch.tensor(goes_on * halves, device=device).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            token_ids, mask, positions, places = token_ids[kept], mask[kept], positions[kept], places[goes_on]
    return rows


def measure_text_variety(texts: Sequence[str]) -> dict[str, Any]:
    """Compute length and diversity statistics of at least one text, for the card of synthetic records.

    Words are split at whitespace.
    """
    times, lengths = Counter(texts), [len(text.split()) for text in texts]
    cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return {
        "texts": len(texts),
        "distinct": sum(count == 1 for count in times.values()) / len(texts),
        "words": (round(cuts[0]), round(cuts[9]), round(cuts[18])),
        "distinct_pairs": len(set(pairs)) / len(pairs) if pairs else 0.0,
    }


def measure_shared_bigrams(texts: Sequence[str], others: Sequence[str]) -> float:
    """Return the share of word bigrams in `others`, counted with repetition, that also occur in `texts`."""
    known = {pair for text in texts for pair in pairwise(text.lower().split())}
    shared = [pair in known for text in others for pair in pairwise(text.lower().split())]
    return sum(shared) / len(shared) if shared else 0.0
