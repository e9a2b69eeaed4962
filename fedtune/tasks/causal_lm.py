"""Causal language modelling: a prompt is given, and the model learns to write the completion behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenise import UNSUPERVISED, Targets, TextDataset, Tokenizer, cut, encode
from fedtune.model.spec import TaskModelSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.base import FirstTarget, Ids, Model, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from fedtune.data.batching import Batch


class CausalLM(Task):
    """Next-token prediction; the loss is the mean over an example's own supervised tokens, zero when it has none."""

    name = "causal_lm"
    roles = ("prompt", "completion")
    predicts_tokens = True
    writes = "completion"
    hub_name = "text-generation"
    formats = ("peft", "merged", "onnx")

    def roles_in(self, data: DataSpec) -> tuple[str, ...]:
        """The template's, too."""
        return (*self.roles, *data.template_roles)

    def check_base(self, base: PreTrainedModel, *, path: str) -> None:
        from fedtune.model.fits import check_causal

        check_causal(base, path=path)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        end_of_text(tokenizer)

    def tokenise(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Prompt, completion and end-of-text token; the completion and that token are supervised.

        Prompt and completion are encoded apart, so that the prompt's tokens are what generation starts from.  The
        tokenizer's begin-of-text token leads where it is one that adds it.  What exceeds `data.max_length` is cut off
        at the end; an example may so lose all its supervised tokens.

        Raises:
            ConfigError: the tokenizer has no end-of-text token.
        """
        length = data.max_length
        end, start = end_of_text(tokenizer), _start_ids(tokenizer)
        prompts = [_prompt(data.prompt_template, record, max_length=length) for record in records]
        completions = [cut(record.fields["completion"], length) for record in records]
        input_ids, targets = [], []
        for texts, prompt, completion in zip(
            zip(prompts, completions, strict=True),
            encode(prompts, tokenizer, special_tokens=False, within=lenient_within),
            encode(completions, tokenizer, special_tokens=False, within=lenient_within),
            strict=True,
        ):
            given, supervised = [*start, *prompt], [*completion, end]
            # A text that could not be encoded has no ids, and its record adds nothing: half of it is another record.
            if any(text.strip() and not ids for text, ids in zip(texts, (prompt, completion), strict=True)):
                given, supervised = [*given, *supervised], []
            input_ids.append(np.array([*given, *supervised][:length], dtype=np.int32))
            targets.append(np.array([*[UNSUPERVISED] * len(given), *supervised][:length], dtype=np.int64))
        return TextDataset(tuple(input_ids), tuple(targets))

    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """(rows, t, vocabulary) for the token after each place."""
        logits: torch.Tensor = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.float()

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        import torch

        wanted = batch.targets[:, 1:]
        supervised = wanted != UNSUPERVISED
        # At every place but the last: to leave out those that no example needs would let neighbours choose the shape.
        places = torch.arange(wanted.shape[1], device=wanted.device)
        output = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=places)
        token_losses = torch.nn.functional.cross_entropy(
            output.logits.float().flatten(0, 1), wanted.flatten(), ignore_index=UNSUPERVISED, reduction="none"
        ).view(wanted.shape)
        return token_losses.sum(dim=1) / supervised.sum(dim=1).clamp(min=1)

    def figures(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        # The first token has no predecessor to be predicted from: the model shifts by one.
        return {"loss": model.losses(batch), "tokens": (batch.targets[:, 1:] != UNSUPERVISED).sum(dim=1)}

    def scores(self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec) -> dict[str, float]:
        """`loss`, the mean over examples in nats, and `perplexity`, exp of the mean over all supervised tokens.

        The two weigh differently on purpose.  `loss` is what training minimises: each example counts once, with the
        mean over its own supervised tokens (zero when truncation left it none).  `perplexity` is the usual one of
        language models: each supervised token counts once.  It is infinite where it overflows.
        """
        losses, num_tokens = figures["loss"], figures["tokens"]
        if not num_tokens.any():
            bound = "needs a completion that data.max_length does not cut off"
            raise DataError("evaluation data", "no token to predict", bound)
        return {
            "loss": float(np.mean(losses)),
            "perplexity": _perplexity(float(losses @ num_tokens / num_tokens.sum())),
        }

    def unit_score(self, model: Model, batch: Batch) -> float:
        """exp(-loss)."""
        return float(np.exp(-float(model.losses(batch)[0])))

    def made_up_targets(
        self, input_ids: Ids, *, spec: TaskModelSpec, draws: np.random.Generator, first: FirstTarget
    ) -> Targets:
        return tuple(
            np.where(np.arange(len(ids)) >= first(len(ids)), ids, UNSUPERVISED).astype(np.int64) for ids in input_ids
        )

    def prompt_ids(self, fields: Mapping[str, str], tokenizer: Tokenizer, *, data: DataSpec) -> npt.NDArray[np.int32]:
        if "messages" in fields:
            turns = json.loads(fields["messages"])
            text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"
        else:
            text = fields["text"] if "text" in fields else data.prompt_template.format_map(fields)
        (ids,) = encode([text], tokenizer, special_tokens=False)
        return np.array([*_start_ids(tokenizer), *ids], dtype=np.int32)

    def end_ids(self, tokenizer: Tokenizer, *, data: DataSpec) -> frozenset[int]:
        return frozenset({end_of_text(tokenizer)})


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a completion.

    Raises:
        ConfigError: for `model.path`, when there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("model.path", tokenizer.name_or_path, "its tokenizer must have an end-of-text token")
    return tokenizer.eos_token_id


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token, where the tokenizer puts one before a text."""
    (ids,) = encode([""], tokenizer, special_tokens=True)
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def _prompt(template: str, record: Record, *, max_length: int) -> str:
    fields = {role: cut(text, max_length) for role, text in record.fields.items()}
    return cut(template.format_map(fields), max_length)


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
