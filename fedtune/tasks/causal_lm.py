"""Causal language modeling on the answers of chats, completions of prompts, or whole texts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.data.bad_rows import Faults
from fedtune.data.batching import Batch
from fedtune.data.records import Record, make_validator
from fedtune.data.spec import DataSpec, fill_template
from fedtune.data.tokenization import (
    UNSUPERVISED,
    MarkedTokenizer,
    Targets,
    TextDataset,
    Tokenizer,
    compute_max_characters,
    encode,
)
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Task
from fedtune.tasks.chat_template import (
    SYSTEM,
    USER,
    ChatFormat,
    NoConversation,
    Piece,
    Turn,
    build_chat_format,
    parse_turns,
    split_last_answer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(Task):
    """Next-token prediction; the loss is the mean over an example's own supervised tokens, and 0 without supervised
    tokens.

    A record is a prompt with its completion, a chat with supervised assistant turns, or a fully supervised plain text.
    `data.columns` determines the kind.
    """

    name = "causal_lm"
    roles: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    answers = frozenset({"completion"})
    data_settings = frozenset({"prompt_template", "chat_template"})
    predicts_tokens = True
    auto_class = "AutoModelForCausalLM"
    hub_name = "text-generation"
    formats = ("peft", "merged", "onnx")
    one_of: ClassVar[tuple[str, ...]] = ("messages", "text", "prompt")
    """Roles that determine the kind of record; columns may contain at most one of them."""
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = (roles, ("messages",), ("text",))

    def list_required_roles(self, data: DataSpec) -> tuple[str, ...]:
        """Return the roles of the layout, the roles in a prompt's template, and the system role for records with
        turns.
        """
        system = (SYSTEM,) if SYSTEM in data.columns and data.chat_template != "none" else ()
        if "text" in data.columns:
            return ("text",)
        return (*(("messages",) if "messages" in data.columns else (*self.roles, *data.template_roles)), *system)

    def check_data(self, data: DataSpec) -> None:
        named = [role for role in self.one_of if role in data.columns]
        if len(named) > 1:
            bound = f"must contain only one of {', '.join(named)}: records are chats, texts, or prompts with answers"
            raise ConfigError("columns", dict(data.columns), bound)
        super().check_data(data)
        if named == ["text"] and data.chat_template != "none":
            bound = "must be none if data.columns has a text, which has no turns"
            raise ConfigError("chat_template", data.chat_template, bound)
        if named not in (["text"], ["prompt"]) and data.chat_template == "none":
            bound = "must be model or plain for conversations, because data.columns has no prompt"
            raise ConfigError("chat_template", "none", bound)
        if named != ["prompt"] and data.prompt_template != "{prompt}":
            bound = "must stay {prompt}, because data.columns has no prompt"
            raise ConfigError("prompt_template", data.prompt_template, bound)

    def record_validator(self, data: DataSpec) -> Callable[[Record], DataError | None]:
        """Return a function that rejects chats without an answer."""
        return make_validator(_require_answer) if "messages" in data.columns else super().record_validator(data)

    def check_base(self, base: PreTrainedModel, *, path: str) -> None:
        from fedtune.model.compatibility import check_causal

        check_causal(base, path=path)

    def check_tokenizer(self, tokenizer: Tokenizer, *, data: DataSpec) -> None:
        ExampleFormat.from_tokenizer(tokenizer, data)

    def tokenize(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Encode the context, the answer, and the tokens that end the answer; the last two are supervised.

        A chat is encoded as a whole, as rendered by its template; a prompt and its completion are encoded separately.
        The begin-of-text token comes first if the tokenizer adds one.  An example longer than `data.max_length` is
        truncated, but keeps its answer: a prompt loses the middle of its longest text, and a chat loses its start.
        Answers that are too long themselves, and plain texts, are truncated at the end.

        Raises:
            ConfigError: the tokenizer has no end-of-text token, or the model's chat template is not supported.
            DataError: a record is not a chat with an answer.
        """
        layout = ExampleFormat.from_tokenizer(tokenizer, data)
        examples = build_examples(layout, records, lenient=lenient_within is not None)
        input_ids, targets = [], []
        for tokens in layout.encode_examples(examples, tokenizer, within=lenient_within):
            fitted = tokens.truncate(data.max_length)
            input_ids.append(np.array(fitted.numbers or [layout.end], dtype=np.int32))
            learned = np.array(fitted.learned or [False])
            learned[0] = False  # the first token has no context
            targets.append(np.where(learned, input_ids[-1], UNSUPERVISED).astype(np.int64))
        return TextDataset(tuple(input_ids), tuple(targets))

    def encode_prompt(
        self, fields: Mapping[str, str], tokenizer: Tokenizer, *, data: DataSpec
    ) -> npt.NDArray[np.int32]:
        """Return the token ids of a prompt as in training, before truncation.

        `fields` may also be a `text` to continue; missing roles of a prompt are blank.

        Raises:
            ConfigError: as in `tokenize`, or the run has no chat template for messages.
            DataError: the messages do not end with a user turn.
        """
        layout = ExampleFormat.from_tokenizer(tokenizer, data)
        try:
            example = _Example(layout.build_prompt(fields))
        except NoConversation as error:
            bound = "must be user and assistant turns that end with a user turn"
            raise DataError("messages", str(error), bound) from None
        (tokens,) = layout.encode_examples([example], tokenizer)
        return np.array(tokens.numbers[: tokens.context], dtype=np.int32)

    def get_eos_token_ids(self, tokenizer: Tokenizer, *, data: DataSpec) -> frozenset[int]:
        """Return the end-of-text token and, for chats, the token that ends an assistant turn."""
        layout = ExampleFormat.from_tokenizer(tokenizer, data)
        return frozenset({layout.end, layout.chat.end} if layout.chat else {layout.end})

    def prompts_and_references(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec
    ) -> tuple[Ids, Sequence[str]] | None:
        """Return the prompts, truncated to `data.max_length` tokens, and the answers; None for plain texts."""
        if "text" in data.columns:
            return None
        layout = ExampleFormat.from_tokenizer(tokenizer, data)
        examples = build_examples(layout, records, lenient=False)
        unanswered = [replace(example, answer=()) for example in examples]
        prompts = []
        for record, tokens in zip(records, layout.encode_examples(unanswered, tokenizer), strict=True):
            prompt = replace(tokens, numbers=tokens.numbers[: tokens.context]).truncate(data.max_length).numbers
            if not prompt:
                raise DataError(record.at("prompt"), "no tokens", "must contain at least one token to generate from")
            prompts.append(np.array(prompt, dtype=np.int32))
        return tuple(prompts), [example.reference for example in examples]

    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute the logits of the token after each position, (rows, t, vocabulary)."""
        logits: torch.Tensor = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.float()

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute each row's mean token loss, (rows,) float32."""
        return torch.stack([total / count.clamp(min=1) for total, count in sum_token_losses(model, batch)])

    def outputs_per_example(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": model.losses(batch), "tokens": (_shift_targets(batch) != UNSUPERVISED).sum(dim=1)}

    def scores(self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute `loss`, the mean over examples in nats, and `perplexity`, exp of the mean over all supervised tokens.

        The two are weighted differently on purpose.  `loss` is the training objective: each example counts once, with
        the mean over its own supervised tokens (0 if truncation removed all of them).  `perplexity` is the usual
        measure of language models: each supervised token counts once.  It is infinite if it overflows.

        Raises:
            DataError: no token is supervised.
        """
        losses, num_tokens = figures["loss"], figures["tokens"]
        if not num_tokens.any():
            raise DataError(
                "evaluation data", "no target tokens", "must have at least one answer that fits within data.max_length"
            )
        of_token = float(losses @ num_tokens / num_tokens.sum())
        return {
            "loss": float(np.mean(losses)),
            "perplexity": math.inf if of_token >= math.log(sys.float_info.max) else math.exp(of_token),
        }

    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return the geometric mean of the answer tokens' probabilities; 0 if truncation removed all answer tokens."""
        learned = bool((_shift_targets(batch)[: batch.texts] != UNSUPERVISED).any())
        return float(np.exp(-float(model.losses(batch)[0]))) if learned else 0.0

    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        learned = ((ids, np.arange(len(ids)) >= first(len(ids))) for ids in input_ids)
        return tuple(np.where(is_learned, ids, UNSUPERVISED).astype(np.int64) for ids, is_learned in learned)


def sum_token_losses(model: Model, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each row's summed token losses, and its number of target positions, an int64 scalar.

    Logits are computed for one row at a time: in a joint computation the results would depend on the other rows. A CPU
    computes them at the row's target positions only, and an accelerator at all positions, because it would wait for
    the process to select them. A row without targets has loss 0.
    """
    assert model.output is not None, "the base has no output layer"
    inputs = model.output.compute_inputs(
        lambda: model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    )
    compute, kept = _compute_losses_at_targets, [True] * len(inputs)
    if inputs.device.type != "cpu":
        compute = _compute_losses
        if batch.empty_rows:  # a graph has none
            kept = (_shift_targets(batch) != UNSUPERVISED).any(dim=1).tolist()
    # unbind instead of indexing, which would add zero gradients of all other rows to each row's gradient.
    for row, targets, keep in zip(inputs[:, :-1].unbind(), _shift_targets(batch), kept, strict=True):
        # Summed over all positions on every device, because the order of summation depends on the number of values.
        yield (compute if keep else _skip_losses)(model, row, targets).sum(), (targets != UNSUPERVISED).sum()


def _compute_losses(model: Model, row: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute a row's loss at each position, (t - 1,) float32, from the output layer's input (t - 1, h)."""
    assert model.output is not None
    return torch.nn.functional.cross_entropy(
        model.output.scores(row), targets, ignore_index=UNSUPERVISED, reduction="none"
    )


def _skip_losses(model: Model, row: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return losses of 0, with a gradient of zero."""
    return row[:0].float().sum().expand(len(targets))


def _compute_losses_at_targets(model: Model, row: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the same losses without logits at other positions, whose loss is 0."""
    places = (targets != UNSUPERVISED).nonzero().flatten()
    if not len(places):
        return _skip_losses(model, row, targets)
    losses = _compute_losses(model, row[places], targets[places])
    return losses.new_zeros(len(targets)).index_copy(0, places, losses)


def _shift_targets(batch: Batch) -> torch.Tensor:
    """Return the target token after each position, (rows, t - 1), or `UNSUPERVISED`."""
    return batch.targets[:, 1:]


@dataclass(frozen=True, slots=True)
class _Example:
    """A record as pieces of text, before tokenization."""

    context: Sequence[Piece]  # the text before the last answer; empty for a plain text
    answer: Sequence[Piece] = ()  # the last supervised text; in a chat including its end mark
    reference: str = ""  # the answer in the record
    longest: str = ""  # the longest text of a prompt

    @property
    def text_parts(self) -> tuple[str, str, str]:
        """Context cut at the middle of its longest field (or empty), full context, and answer."""
        context, answer = ("".join(piece.text for piece in part) for part in (self.context, self.answer))
        at = context.find(self.longest) if self.longest else -1
        return context[: at + len(self.longest) // 2] if at >= 0 else "", context, answer


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Token ids of an example, with the boundaries that truncation preserves."""

    numbers: Sequence[int] = ()  # (t,) token ids
    learned: Sequence[bool] = ()  # (t,) whether each token is supervised
    context: int = 0  # number of tokens before the last answer
    start: int = 0  # number of leading tokens that truncation always keeps
    half: int = 0  # number of tokens up to the middle of a prompt's longest text

    @property
    def answer(self) -> int:
        """Token count of the last answer."""
        return len(self.numbers) - self.context

    def truncate(self, length: int, *, room_for: int = 0) -> _Tokens:
        """Truncate to at most `length` tokens, keeping at least one token before the answer if there is any.

        A prompt is truncated in the middle of its longest text, so that instructions before and after the text stay,
        and a conversation at its start.  Room is left for an answer of at least `room_for` tokens, so that the contexts
        of two answers are truncated equally.
        """
        most = length - max(self.start, min(1, self.context))
        answer = min(self.answer, most)
        room = length - self.start - max(answer, min(room_for, most))
        cut = max(0, self.context - self.start - room)
        begin = min(max(self.start, self.half - (cut + 1) // 2), self.context - cut)
        kept = [*range(begin), *range(begin + cut, self.context + answer)]
        numbers, learned = [self.numbers[place] for place in kept], [self.learned[place] for place in kept]
        return _Tokens(numbers, learned, self.context - cut, self.start)


@dataclass(frozen=True, slots=True)
class ExampleFormat:
    """Conversion of a run's records to training examples."""

    start: tuple[int, ...]  # the begin-of-text token, if the tokenizer adds one
    end: int  # the end-of-text token
    chat: ChatFormat | None  # the format of turns; None: prompt and completion unchanged
    # encodes plain texts, in which names of special tokens are ordinary text; None: records are not plain texts
    literal: MarkedTokenizer | None
    data: DataSpec  # the run's settings

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, data: DataSpec) -> ExampleFormat:
        """Choose the format for a tokenizer and the settings.

        Raises:
            ConfigError: the tokenizer has no end-of-text token, or its chat template is not supported.
        """
        if (end := tokenizer.eos_token_id) is None:
            raise ConfigError("model.path", tokenizer.name_or_path, "its tokenizer must have an end-of-sequence token")
        (ids,) = encode([""], tokenizer, special_tokens=True)
        start = (ids[0],) if ids and ids[0] == tokenizer.bos_token_id else ()
        if data.chat_template == "none":
            return cls(start, end, None, _make_literal_tokenizer(tokenizer) if "text" in data.columns else None, data)
        return cls(start, end, build_chat_format(data.chat_template, tokenizer, start=start, end=end), None, data)

    def build_prompt(self, fields: Mapping[str, str], *, answer: str | None = None) -> Sequence[Piece]:
        """Build the context of an answer from the record's input fields.

        For a prompt in chat format, a given `answer` must be rendered unchanged by the template.

        Raises:
            NoConversation: the messages are not turns, do not end with a user turn, or are changed by the template.
            ConfigError: the fields are messages, but the run has no chat template.
        """
        if "messages" not in fields:
            prompt = fields["text"] if "text" in fields else fill_template(self.data.prompt_template, fields)
            if self.chat is None:
                return [Piece(prompt, said=True)]
            turns = [Turn(SYSTEM, fields.get(SYSTEM, "")), Turn(USER, prompt.strip())]
            return self.chat.build_prompt(turns, answer=answer)
        if self.chat is None:
            raise ConfigError("data.chat_template", "none", "must be model or plain for a conversation")
        return self.chat.build_prompt(_collect_conversation_turns(fields))

    def build_example(self, fields: Mapping[str, str]) -> _Example:
        """Convert a record to an example, with its texts cut to the number of characters that `data.max_length` may
        need.

        Raises:
            NoConversation: the messages are not turns, or contain no answer.
        """
        length, longest = self.data.max_length, ""
        if "text" in fields:
            return _Example((), [Piece(fields["text"][: compute_max_characters(length)], said=True, learned=True)])
        if self.chat is None or "messages" not in fields:
            reference, most = fields["completion"], compute_max_characters(length) // (2 * len(fields))
            fields = {
                role: text if len(text) <= 2 * most else text[:most] + text[-most:] for role, text in fields.items()
            }
            longest = max((fields.get(role, "").strip() for role in self.data.template_roles), key=len, default="")
            context = self.build_prompt(fields, answer=reference)
        else:
            turns, reference = split_last_answer(_collect_conversation_turns(fields))
            context = self.chat.build_prompt(turns, answer=reference)
        shown = reference[: compute_max_characters(length)]
        answer = [Piece(shown, said=True, learned=True)] if self.chat is None else self.chat.build_answer(shown)
        return _Example(_keep_last_pieces(context, length), answer, reference, longest)

    def encode_examples(
        self, examples: Sequence[_Example], tokenizer: Tokenizer, *, within: int | None = None
    ) -> Iterator[_Tokens]:
        """Yield the tokens of each example, or no tokens if a part of the example cannot be encoded.

        A conversation is encoded as one text, so that its tokens are the same as in transformers.  A prompt and its
        completion are encoded separately, because no token marks the boundary between them.
        """
        if self.chat is not None:
            texts = ["".join(example.text_parts[1:]) for example in examples]
            encoded = self.chat.tokenizer.encode(texts, within=within)
            lead, begins = self.chat.lead, len(self.chat.lead) + bool(self.chat.start)
            for example, (ids, places) in zip(examples, encoded, strict=True):
                # A token before the text belongs to the first piece.
                places = [*[(0, 0)] * len(lead), *places]
                yield align_tokens(example, [*lead, *ids], places, start=begins) if ids else _Tokens()
            return
        parts = [text for example in examples for text in example.text_parts]
        if self.literal is not None:
            ids_of_parts: Iterator[list[int]] = (ids for ids, _ in self.literal.encode(parts, within=within))
        else:
            # These texts may contain names of special tokens: a prompt template may use them to mark turns.
            ids_of_parts = (ids for ids in encode(parts, tokenizer, special_tokens=False, within=within))
        whole = ((ids, bool(ids) or not part.strip()) for ids, part in zip(ids_of_parts, parts, strict=True))
        for (half, _), (context, has_context), (answer, has_answer) in zip(whole, whole, whole, strict=True):
            before = [*self.start, *context]
            learned = [False] * len(before) + [True] * (len(answer) + 1)
            first = len(self.start)
            tokens = _Tokens([*before, *answer, self.end], learned, len(before), first, first + len(half))
            yield tokens if has_context and has_answer else _Tokens()


def align_tokens(example: _Example, ids: Sequence[int], places: Sequence[tuple[int, int]], *, start: int) -> _Tokens:
    """Map the tokens of a conversation to its pieces; a token belongs to the piece that contains its last character.

    The result is empty if a nonblank piece has no token.
    """
    pieces = [*example.context, *example.answer]
    ends = np.cumsum([len(piece.text) for piece in pieces], dtype=np.int64)
    first, end = np.array(places, dtype=np.int64).reshape(-1, 2).T
    for piece, until in zip(pieces, ends, strict=True):
        if piece.text.strip() and not ((first < until) & (end > until - len(piece.text))).any():
            return _Tokens()
    of_piece = np.searchsorted(ends, np.maximum(first, end - 1), side="right").clip(max=len(pieces) - 1)
    learned = np.array([piece.learned for piece in pieces])[of_piece]
    context = int(np.searchsorted(of_piece, len(example.context)))
    return _Tokens(ids, learned.tolist(), context, start, int(np.searchsorted(end, len(example.text_parts[0]))))


def _require_answer(record: Record) -> None:
    try:
        split_last_answer(_collect_conversation_turns(record.fields))
    except NoConversation as error:
        raise DataError(record.at("messages"), str(error), "must contain an assistant turn to train on") from None


def _collect_conversation_turns(fields: Mapping[str, str]) -> list[Turn]:
    """Return the turns of a conversation, starting with the record's system text if the turns contain no system
    turn.
    """
    turns, system = parse_turns(fields["messages"]), fields.get(SYSTEM, "")
    return [Turn(SYSTEM, system), *turns] if system.strip() and turns[:1] and turns[0].role != SYSTEM else turns


def build_examples(layout: ExampleFormat, records: Iterable[Record], *, lenient: bool) -> list[_Example]:
    """Convert records to examples; an unusable conversation becomes an empty example.

    Raises:
        DataError: a conversation is unusable and `lenient` is False; the error describes the first unusable
            conversation and counts all of them.
    """
    examples, faults = [], Faults()
    for record in records:
        try:
            examples.append(layout.build_example(record.fields))
        except NoConversation as error:
            examples.append(_Example(()))
            bound = "must alternate user and assistant turns that the chat template renders unchanged"
            faults.add(DataError(record.at("messages"), str(error), bound), record.line)
    if not lenient:
        faults.raise_if_any()
    return examples


def _keep_last_pieces(pieces: Sequence[Piece], length: int) -> list[Piece]:
    """Return the pieces that can contribute to the last `length` tokens of a context, and the template's first piece.

    The record's own texts are cut to the number of characters that an example may need; the template's texts stay
    complete.
    """
    room, kept = compute_max_characters(length), []
    for piece in reversed(pieces):
        if room <= 0:
            break
        kept.append(piece._replace(text=piece.text[-room:]) if piece.said else piece)
        room -= len(piece.text)
    start = [] if pieces[0].said or len(kept) == len(pieces) else [pieces[0]]
    return [*start, *kept[::-1]]


@lru_cache(maxsize=4)
def _make_literal_tokenizer(tokenizer: Tokenizer) -> MarkedTokenizer:
    return MarkedTokenizer.from_tokenizer(tokenizer, ())
