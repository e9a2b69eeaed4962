"""Preference tuning (DPO): the model learns to assign more probability to the preferred of two answers to a prompt.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290).  An answer's reward is `beta` times the change
of its log-probability due to the adapters.  The loss of a pair is -log sigmoid(reward of the chosen answer - reward of
the rejected answer).

**The reference is the frozen base with its adapters disabled**, even if a run starts from an earlier adapter, so a run
that continues another run has the same reference.  A site needs only the base, regardless of the round that it joins.
The reference values of a record never change, so they are computed once.  To use a tuned model as the reference, make
it the base with `fedtune export --merge`.

Each pair has its own loss, from its own two answers, so no record affects the loss of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedtune.data.batching import Batch
from fedtune.data.records import Record, make_validator
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED, TextDataset, Tokenizer
from fedtune.data.values import parse_continuation, read_messages
from fedtune.model.spec import TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError, check_positive, spec
from fedtune.tasks.base import Ids, Model
from fedtune.tasks.causal_lm import CausalLM, ExampleFormat, build_examples, sum_token_losses
from fedtune.tasks.chat_template import ASSISTANT, parse_turns, split_last_answer

_ANSWERS = ("chosen", "rejected")
_TIE = 1e-4  # smaller reward differences are ties, because rounding causes them even without adapters


@spec
class PreferenceSettings:
    """Settings of preference tuning (DPO, Rafailov et al. 2023, arXiv 2305.18290).

    Attributes:
        beta: an answer's reward is beta times the difference between its log-probability under the model and under the
            base.  A larger beta counts a pair as learned sooner, and keeps the model closer to its base.
        per_token: true divides an answer's log-probability by its number of tokens, so that rewards do not grow with
            the length of the answer; this requires a larger `beta`, such as 2.
    """

    beta: float = 0.1
    per_token: bool = False

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if self.beta > 1000:
            raise ConfigError("beta", self.beta, "must be at most 1000; above, every pair counts as learned")


class Preference(CausalLM):
    """Preference pairs with the DPO loss -log sigmoid(beta * ((chosen - its reference) - (rejected - its reference))).

    Each of the four terms is the log-probability of an answer's own tokens after the prompt, including its end token;
    with `task_settings.per_token` it is divided by the number of tokens.  A record is

    * a `prompt` with the texts `chosen` and `rejected`, formatted like a prompt and its completion in causal_lm;
    * a conversation up to a user turn, `messages`, with `chosen` and `rejected` continuations;
    * two complete conversations, `chosen` and `rejected`, that differ only in their last answer.
    """

    name = "preference"
    roles = ("prompt", *_ANSWERS)
    answers = frozenset(_ANSWERS)
    settings = PreferenceSettings
    own: PreferenceSettings
    has_reference = True
    primary_metric = "accuracy"
    one_of = ("messages", "prompt")
    layouts = (roles, ("messages", *_ANSWERS), _ANSWERS)

    def list_required_roles(self, data: DataSpec) -> tuple[str, ...]:
        if "messages" in data.columns:
            return self.layouts[1]
        return super().list_required_roles(data) if "prompt" in data.columns else self.layouts[2]

    def count_texts_per_record(self, data: DataSpec) -> int:
        return 2

    def list_input_columns(self, data: DataSpec) -> dict[str, str]:
        return super().list_input_columns(data) or {"messages": "messages"}

    def record_validator(self, data: DataSpec) -> Callable[[Record], DataError | None]:
        return make_validator(_make_pair_splitter(data))

    def tokenize(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Encode two texts per record: the context followed by each of the two answers; only the answers are
        supervised.

        Both answers have the same context, truncated to make room for the longer answer.  A pair has no effect if an
        answer cannot be encoded, or if both texts are equal after truncation.

        Raises:
            ConfigError: as in causal_lm.
            DataError: as in causal_lm, or a record is not a pair.
        """
        layout, both = ExampleFormat.from_tokenizer(tokenizer, data), _make_pair_splitter(data)
        lenient = lenient_within is not None
        examples = build_examples(layout, (half for record in records for half in both(record)), lenient=lenient)
        encoded = layout.encode_examples(examples, tokenizer, within=lenient_within)
        input_ids, targets = [], []
        for pair in zip(encoded, encoded, strict=True):
            longer = max(tokens.answer for tokens in pair)
            fitted = [tokens.truncate(data.max_length, room_for=longer) for tokens in pair]
            is_pair = all(tokens.answer for tokens in pair) and fitted[0].numbers != fitted[1].numbers
            for kept in fitted:
                ids = np.array(kept.numbers or [layout.end], dtype=np.int32)
                is_answer = np.arange(len(ids)) >= max(1, kept.context)
                input_ids.append(ids)
                targets.append(np.where(is_answer & is_pair, ids, UNSUPERVISED).astype(np.int64))
        return TextDataset(tuple(input_ids), tuple(targets), texts=2)

    def prompts_and_references(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec
    ) -> tuple[Ids, Sequence[str]] | None:
        """Return the prompts and the chosen answers."""
        chosen = [_make_pair_splitter(data)(record)[0] for record in records]
        return super().prompts_and_references(chosen, tokenizer, data=data)

    def reference(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute the log-probabilities of both answers, (pairs, 2)."""
        return torch.stack([-total for total, _ in sum_token_losses(model, batch)]).view(-1, 2)

    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute each pair's loss separately, because the rounding of a vectorized loss may depend on the vector's
        length.
        """
        margins = (margin for margin, _ in self._compute_reward_margins(model, batch))
        return torch.stack([-torch.nn.functional.logsigmoid(margin) for margin in margins])

    def outputs_per_example(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        margins, lengths = zip(*self._compute_reward_margins(model, batch), strict=True)
        margin = torch.stack(margins)
        return {
            "loss": -torch.nn.functional.logsigmoid(margin),
            "margin": margin,
            "longer": torch.stack([chosen - rejected for chosen, rejected in lengths]),
            "learned": (batch.targets != UNSUPERVISED).view(len(margin), -1).any(dim=1),
        }

    def postprocess_dataset(
        self, figures: Mapping[str, npt.NDArray[np.float64]]
    ) -> Mapping[str, npt.NDArray[np.float64]]:
        """Check that at least one pair has two different answers, and return the per-pair values unchanged.

        Raises:
            DataError: no pair has two different answers.
        """
        if not figures["learned"].any():
            bound = "must have a pair whose answers differ within data.max_length"
            raise DataError("evaluation data", "no distinguishable pair", bound)
        return figures

    def scores(self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute the scores from the rewards of all pairs with different answers; under the base, all rewards are 0.

        `accuracy` is the share of pairs whose chosen answer has the larger reward; a tie counts as one half, so the
        base has 0.5.  `margin` is the mean difference of the rewards.  Both also exist with the suffix
        `_length_controlled` (`compute_length_controlled_mean`).  `loss` is the mean loss.
        """
        usable = figures["learned"] > 0
        usable |= not usable.any()  # a bootstrap sample without such pairs: all pairs count as ties
        margins, longer = figures["margin"][usable], figures["longer"][usable]
        right = np.where(np.abs(margins) <= _TIE * self.own.beta, 0.5, margins > 0)
        return {
            "accuracy": float(right.mean()),
            "accuracy_length_controlled": compute_length_controlled_mean(right, longer, neutral=0.5),
            "margin": float(margins.mean()),
            "margin_length_controlled": compute_length_controlled_mean(margins, longer, neutral=0.0),
            "loss": float(figures["loss"][usable].mean()),
        }

    def _compute_reward_margins(
        self, model: Model, batch: Batch
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """Yield, for each pair, the reward of the chosen answer minus the reward of the rejected answer, and both token
        counts.
        """
        assert batch.reference is not None, "the reference is computed before the losses"
        rows = sum_token_losses(model, batch)
        for (chosen, its), (rejected, other), base in zip(rows, rows, batch.reference, strict=True):
            gains = -chosen - base[0], -rejected - base[1]
            lengths = its.clamp(min=1), other.clamp(min=1)
            if self.own.per_token:
                gains = gains[0] / lengths[0], gains[1] / lengths[1]
            yield self.own.beta * (gains[0] - gains[1]), lengths


def compute_length_controlled_mean(
    values: npt.NDArray[np.float64], longer: npt.NDArray[np.float64], *, neutral: float
) -> float:
    """Average over pairs, controlling for length, so that a model that only prefers long answers scores `neutral`.

    Pairs with a longer chosen answer and pairs with a longer rejected answer have equal total weight, regardless of
    their numbers.  Pairs of equal length count as in the plain mean.

    Args:
        values: the value of each pair.
        longer: the number of additional tokens of the chosen answer.
        neutral: the value of a random guess, which replaces the pairs of unequal length if the longer answer is always
            the chosen answer, or always the rejected answer.

    >>> compute_length_controlled_mean(np.array([1.0, 1.0, 1.0, 0.0]), np.array([3.0, 5.0, 1.0, -2.0]), neutral=0.5)
    0.5
    """
    above, below, alike = (values[some] for some in (longer > 0, longer < 0, longer == 0))
    unlike = (above.mean() + below.mean()) / 2 if len(above) and len(below) else neutral
    return float((alike.sum() + unlike * (len(above) + len(below))) / len(values))


def _make_pair_splitter(data: DataSpec) -> Callable[[Record], tuple[Record, Record]]:
    """Return a function that converts a preference pair to two causal_lm records, one per answer.

    The function raises a DataError if the record is not a pair.
    """
    with_answer = _to_completion if "prompt" in data.columns else _to_conversation

    def split_pair(record: Record) -> tuple[Record, Record]:
        chosen, rejected = (with_answer(record, role) for role in _ANSWERS)
        if "prompt" not in data.columns:
            turns, other = (split_last_answer(parse_turns(half.fields["messages"]))[0] for half in (chosen, rejected))
            if turns != other:
                bound = "must match the turns of chosen except in the last answer"
                raise DataError(record.at("rejected"), "different turns", bound)
        return chosen, rejected

    return split_pair


def _to_completion(record: Record, role: str) -> Record:
    """Convert a preference pair to a prompt whose completion is the answer in `role`."""
    if parse_continuation(record.fields[role]) is not None:
        bound = "must be text, like the prompt; for conversations, give the prompt's column the role messages"
        raise DataError(record.at(role), "a list of turns", bound)
    others = {name: text for name, text in record.fields.items() if name not in _ANSWERS}
    return replace(record, fields={**others, "completion": record.fields[role]})


def _to_conversation(record: Record, role: str) -> Record:
    """Convert a preference pair to a conversation that ends with the answer in `role`."""
    continuation = parse_continuation(record.fields[role])
    if continuation is None:
        raise DataError(record.at(role), "text", "must be a list of turns, because data.columns has no prompt")
    turns = [turn._asdict() for turn in parse_turns(record.fields.get("messages", "[]"))] + continuation
    if turns[-1]["role"] != ASSISTANT:
        raise DataError(record.at(role), turns[-1]["role"], "must end with an assistant turn")
    return replace(record, fields={"messages": read_messages(turns, at=record.at(role))})
