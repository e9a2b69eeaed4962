"""The model of a finished run, for generation, prediction, and comparison with the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.batching import collate
from fedtune.data.tokenization import UNSUPERVISED
from fedtune.evaluation.generation import decode_stream, sample_completions, stream_tokens
from fedtune.evaluation.scoring import enter_evaluation_mode
from fedtune.evaluation.spec import WritingSpec
from fedtune.model.adapter import AdapterError, copy_tensors
from fedtune.model.compatibility import get_max_positions
from fedtune.runs.needed_packages import require_scoring_packages
from fedtune.sites.shared_model import Evaluation, LeadData, load_tokenizer_and_model
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.saved import SavedAdapter
from fedtune.tasks.task_model import TaskModel
from fedtune.training.machine import do_frozen_states_fit, resolve_device

BASE = "base"
"""Name of the model before training: the base model with adapters that have no effect, and the initial head."""
_TIMES_AS_MANY = 4
"""Ratio of generation to scoring batches in tokens, because generation computes logits only for the last token."""


class SavedModel:
    """A run's base model in memory with several saved adapters, one of which is loaded at a time.

    Args:
        config: the run's configuration.
        adapters: name -> folder of a saved adapter, at least one; the first is the run's own.

    Attributes:
        names: `BASE`, and the names of the adapters.
        positions: maximum sequence length of the model in tokens; None without a limit.

    Raises:
        ConfigError: an adapter cannot be read, or belongs to another model; or a package for scoring generated texts is
            missing.
    """

    def __init__(self, config: RunConfig, adapters: Mapping[str, Path]) -> None:
        require_scoring_packages(config)
        self.config = config
        saved = {name: SavedAdapter.read(folder, model=config.model, private=True) for name, folder in adapters.items()}
        first = next(iter(saved.values()))
        self.tokenizer, self.model = load_tokenizer_and_model(
            config, lambda: first.build(device=resolve_device(config.runtime.device))
        )
        self.model.task.init_head(self.model)
        self._tensors = {BASE: _copy_adapter_tensors(self.model)}
        for name, adapter in saved.items():
            adapter.require_same_model(first.spec)
            try:
                adapter.load_into(self.model)
            except AdapterError as error:
                bound = f"is incomplete or does not match the run's model: {error}"
                raise ConfigError("adapter", str(adapter.folder), bound) from None
            self._tensors[name] = _copy_adapter_tensors(self.model)
        self.names = tuple(self._tensors)
        self.positions = get_max_positions(self.model.base.get_base_model())

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a generated text."""
        return self.model.task.get_eos_token_ids(self.tokenizer, data=self.config.data)

    def use_adapter(self, name: str) -> None:
        """Load a saved adapter into the model."""
        copy_tensors(self._tensors[name], _map_adapter_tensors(self.model))

    def parse_text_fields(self, text: str, *, at: str) -> dict[str, str]:
        """Parse a text into the fields of an unanswered record (`Task.prompt_fields`)."""
        return self.model.task.prompt_fields(text, self.config.data, at=at)

    def encode_prompt(self, fields: Mapping[str, str], *, at: str) -> npt.NDArray[np.int32]:
        """Tokenize a prompt for generation.

        Args:
            fields: role -> text, without the role to be generated.
            at: name of the prompt in error messages.

        Returns:
            (tokens,), the token ids of the prompt.

        Raises:
            DataError: the prompt has no tokens, or leaves no position for the answer.
        """
        ids = self.model.task.encode_prompt(fields, self.tokenizer, data=self.config.data)
        if not len(ids):
            raise DataError(at, "no tokens", "must contain at least one token")
        if self.positions is not None and len(ids) >= self.positions:
            bound = f"must have at most {self.positions - 1}: the model accepts at most {self.positions} tokens"
            raise DataError(at, f"{len(ids)} tokens", bound)
        return ids

    def tokenize_answers(self, fields: Sequence[Mapping[str, str]]) -> list[npt.NDArray[np.int32]]:
        """Tokenize each record's answer as in training, without the prompt and the end tokens."""
        task, data = self.model.task, self.config.data
        examples = task.tokenize([Record(row) for row in fields], self.tokenizer, data=data)
        pairs = zip(examples.input_ids, examples.targets, strict=True)
        return [ids[(learned != UNSUPERVISED) & ~np.isin(ids, list(self._end_ids))] for ids, learned in pairs]

    def generate_answer(self, prompt: npt.NDArray[np.int32], spec: WritingSpec) -> Iterator[str]:
        """Generate the answer to a prompt with the current adapter, and yield the decoded text in pieces."""
        return decode_stream(stream_tokens(self.model, prompt, end_ids=self._end_ids, spec=spec), self.tokenizer)

    def sample_texts(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        spec: WritingSpec,
        *,
        first: int,
        against: Sequence[npt.NDArray[np.int32]] = (),
        begun: Sequence[npt.NDArray[np.int32]] = (),
    ) -> Iterator[tuple[int, str | None]]:
        """Sample texts for many prompts with the current adapter (`generation.sample_completions`)."""
        return sample_completions(
            self.model,
            prompts,
            tokenizer=self.tokenizer,
            end_ids=self._end_ids,
            spec=spec,
            first=first,
            max_tokens=_TIMES_AS_MANY * self.config.evaluation.max_tokens,
            against=against,
            begun=begun,
        )

    def evaluate_models(self, data: LeadData) -> dict[str, Evaluation]:
        """Evaluate the base model and each adapter on the data, with one pass through the frozen layers."""
        num_tokens = data.examples.num_tokens
        keeps = do_frozen_states_fit(self.model, self.config.runtime, num_tokens=num_tokens)
        data = replace(data, kept={} if keeps else None)
        measured = {}
        for name in self.names:
            self.use_adapter(name)
            measured[name] = Evaluation.build(self.model, self.tokenizer, data, self.config, generate=True)
        return measured

    def answer_record(self, record: Record) -> tuple[str, object]:
        """Predict the answer to a record, and return it as text and as JSON."""
        task, data = self.model.task, self.config.data
        unlabeled = task.without_answer(record, data)
        return task.answer_record(unlabeled, self.logits(unlabeled), self.tokenizer, data=data, spec=self.model.spec)

    def logits(self, asked: Record) -> torch.Tensor:
        """Compute the logits (1, classes) of a record.  The record's answer is ignored, but must be valid."""
        examples = self.model.task.tokenize([asked], self.tokenizer, data=self.config.data)
        batch = collate(examples, [0], pad_id=self.tokenizer.pad_token_id)
        with enter_evaluation_mode(self.model):
            return self.model.logits(batch.to(self.model.device)).cpu()


def _map_adapter_tensors(model: TaskModel) -> dict[str, torch.Tensor]:
    """Map the name of each tensor in a saved adapter, public constants of the head included, to the model's tensor."""
    return {**model.collect_adapter_parameters(), **dict(model.named_buffers(recurse=False))}


def _copy_adapter_tensors(model: TaskModel) -> dict[str, npt.NDArray[np.float32]]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in _map_adapter_tensors(model).items()}
