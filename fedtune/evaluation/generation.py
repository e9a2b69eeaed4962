"""Greedy text generation and its scores, BLEU and ROUGE-L."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedtune.data.batching import micro_batches
from fedtune.evaluation.scoring import scoring
from fedtune.spec import ConfigError, DataError
from fedtune.tasks import TaskModel


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Distinct prompts in file order, each with every reference text that the data has for it.

    Attributes:
        input_ids: the (t,) token ids of each prompt, t at least 1.
        references: one or more texts a prompt.
    """

    input_ids: tuple[np.ndarray, ...]
    references: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], references: Sequence[str], *, rows: int | None = None) -> PromptSet:
        """Group n references by their prompt's tokens.

        Args:
            prompts: of each reference; those that their cutting made equal are one.
            references: the texts.
            rows: keep the first so many distinct prompts, with all their references.

        Raises:
            DataError: when there is no prompt.
        """
        groups: dict[tuple[int, ...], list[str]] = {}
        for prompt, reference in zip(prompts, references, strict=True):
            groups.setdefault(tuple(prompt.tolist()), []).append(reference)
        kept = list(groups)[:rows]
        if not kept:
            raise DataError("evaluation data", 0, "must hold at least one prompt to generate from")
        return cls(
            input_ids=tuple(np.array(prompt, dtype=np.int32) for prompt in kept),
            references=tuple(tuple(groups[prompt]) for prompt in kept),
        )


def evaluate_generation(
    task_model: TaskModel,
    prompts: PromptSet,
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
    max_new_tokens: int,
    max_tokens: int,
) -> dict[str, float]:
    """Write one text for each prompt and score it against the prompt's references.

    Returns:
        `bleu` in [0, 100] and `rouge_l` in [0, 1]; see `text_scores`.
    """
    sizes = {"max_new_tokens": max_new_tokens, "max_tokens": max_tokens}
    hypotheses = generate(task_model, prompts.input_ids, tokenizer=tokenizer, end_ids=end_ids, **sizes)
    return text_scores(hypotheses, prompts.references)


def generate(
    task_model: TaskModel,
    prompts: Sequence[np.ndarray],
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
    max_new_tokens: int,
    max_tokens: int,
) -> list[str]:
    """Continue each prompt greedily until a token of `end_ids` or `max_new_tokens`.

    Prompts are batched by length and padded on the left, so a text does not depend on its
    neighbours beyond rounding (two tokens that tie to the last bit may swap).  The model's own
    generation settings (temperature, penalties) are not used.

    Args:
        task_model: one whose task writes text.
        prompts: (t,) token ids each, t at least 1.
        tokenizer: decodes.
        end_ids: what ends a text, as training has it.
        max_new_tokens: longest text, in tokens.
        max_tokens: padded tokens of a batch, prompt and text together.

    Returns:
        One text a prompt, in the order given, without special tokens and surrounding space.

    Raises:
        ConfigError: when a prompt and its text exceed the positions that the model has.
    """
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32) + max_new_tokens
    _check_positions(task_model, longest=int(lengths.max(initial=0)), max_new_tokens=max_new_tokens)
    texts = [""] * len(prompts)
    with scoring(task_model):
        for indices in micro_batches(np.arange(len(prompts)), lengths, max_tokens=max_tokens):
            written = write_greedily(
                task_model.base,
                [prompts[index] for index in indices],
                end_ids=end_ids,
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
                device=task_model.device,
            )
            for index, token_ids in zip(indices, written, strict=True):
                texts[index] = str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
    return texts


def text_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L of one hypothesis a prompt, against all of the prompt's references.

    Args:
        hypotheses: n texts, n at least 1.
        references: n groups of one or more texts; the groups may differ in size.

    Returns:
        `bleu`: corpus BLEU by sacrebleu with its defaults (case kept, tokeniser 13a, exponential
            smoothing), in [0, 100].
        `rouge_l`: by rouge-score, in [0, 1]: F1 of the longest common subsequence with the best
            reference, averaged over hypotheses.  Its tokeniser lower-cases and keeps only a-z and
            0-9, without stemming: use it for English.
    """
    # Imported here: only a run that generates needs the two libraries, and rouge-score loads nltk.
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    # sacrebleu wants stream k to hold the k-th reference of every hypothesis, None where there is none.
    streams = [list(stream) for stream in zip_longest(*references)]
    scorer = RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(group, text)["rougeL"].fmeasure for group, text in zip(references, hypotheses, strict=True)
    ]
    return {
        "bleu": float(BLEU().corpus_score(list(hypotheses), streams).score),
        "rouge_l": float(np.mean(best)),
    }


def _check_positions(task_model: TaskModel, *, longest: int, max_new_tokens: int) -> None:
    most = getattr(task_model.base.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise ConfigError(
            "evaluation.max_new_tokens",
            max_new_tokens,
            f"the longest prompt has {longest - max_new_tokens} tokens, and the model takes {most} in all",
        )


def write_greedily(
    model: PeftModel,
    prompts: Sequence[np.ndarray],
    *,
    end_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Append the likeliest token to each prompt until one of `end_ids` or `max_new_tokens`.

    Transformers' own `generate` would mix in the sampling settings and penalties that a checkpoint
    ships, also under an explicit greedy configuration; this loop has none.

    Returns:
        The new token ids of each prompt, without the one that ends them.
    """
    token_ids, mask = _pad_left(prompts, pad_id=pad_id, device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    takes_positions = _takes_positions(model)
    cache = None
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ends = torch.tensor(sorted(end_ids), device=device, dtype=torch.int64)
    written: list[torch.Tensor] = []
    for _ in range(max_new_tokens):
        placed = {"position_ids": positions} if takes_positions else {}
        # Only the last position's logits are read; all of them would take prompt length x vocabulary.
        output = model(
            input_ids=token_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **placed,
        )
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(dim=-1)  # (n,)
        written.append(chosen)
        finished |= torch.isin(chosen, ends)
        if bool(finished.all()):
            break
        token_ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [_until(row, end_ids) for row in torch.stack(written, dim=1).tolist()]


def _pad_left(prompts: Sequence[np.ndarray], *, pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-aligned token ids and attention mask, both (n, longest), so that every row's last token is real."""
    longest = max(len(prompt) for prompt in prompts)
    token_ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(token_ids).to(device), torch.from_numpy(mask).to(device)


def _takes_positions(model: PeftModel) -> bool:
    """Whether the base takes position ids; families that read distances off the mask (ALiBi) take none."""
    return "position_ids" in inspect.signature(model.get_base_model().forward).parameters


def _until(token_ids: list[int], end_ids: frozenset[int]) -> list[int]:
    """The tokens before the first of `end_ids`; what a finished row wrote on is noise."""
    return list(takewhile(lambda token_id: token_id not in end_ids, token_ids))
