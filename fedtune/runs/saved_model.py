"""A finished run's model in use: it writes texts, names labels, and is scored beside its start."""

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
from fedtune.data.tokenise import UNSUPERVISED
from fedtune.evaluation.generation import as_text, draw, write
from fedtune.evaluation.scoring import scoring
from fedtune.evaluation.spec import WritingSpec
from fedtune.model.adapter import AdapterError, copy_tensors
from fedtune.model.fits import usable_positions
from fedtune.runs.needed_packages import require_to_score
from fedtune.sites.shared_model import LeadData, Measured, ready
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.saved import SavedAdapter
from fedtune.tasks.task_model import TaskModel
from fedtune.training.machine import device_for, keeps_frozen_states

BASE = "base"
"""The name of the run's start: the base model with adapters that change nothing, and the head as it begins."""
_TIMES_AS_MANY = 4
"""As scoring has tokens in a batch: where texts are written, scores are computed of the last token alone."""


class SavedModel:
    """A run's model with several adapters by name: one base in memory, into which one adapter at a time is put.

    Args:
        config: of the run.
        adapters: the folders of saved adapters by name, at least one; the first is the run's own.

    Attributes:
        names: `BASE`, and those of the adapters.
        positions: how many tokens the model takes in all; None where nothing bounds it.

    Raises:
        ConfigError: an adapter cannot be read, or is of another model; a package that scores its texts is missing.
    """

    def __init__(self, config: RunConfig, adapters: Mapping[str, Path]) -> None:
        require_to_score(config)
        self.config = config
        saved = {name: SavedAdapter.read(folder, model=config.model, private=True) for name, folder in adapters.items()}
        own = next(iter(saved.values()))
        self.tokenizer, self.model = ready(config, lambda: own.build(device=device_for(config.runtime.device)))
        self.model.task.start_head(self.model)
        self._tensors = {BASE: _tensors_of(self.model)}
        for name, adapter in saved.items():
            adapter.require_same_model(own.spec)
            try:
                adapter.load_into(self.model)
            except AdapterError as error:
                bound = f"must be whole, and fit the run's model: {error}"
                raise ConfigError("adapter", str(adapter.folder), bound) from None
            self._tensors[name] = _tensors_of(self.model)
        self.names = tuple(self._tensors)
        self.positions = usable_positions(self.model.base.get_base_model())

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """The tokens that end what a language model writes."""
        return self.model.task.end_ids(self.tokenizer, data=self.config.data)

    def use(self, name: str) -> None:
        """Put an adapter into the model."""
        copy_tensors(self._tensors[name], _places_in(self.model))

    def fields_of(self, text: str, *, at: str) -> dict[str, str]:
        """A text as the fields of a record to be answered; see `Task.prompt_fields`."""
        return self.model.task.prompt_fields(text, self.config.data, at=at)

    def prompt_ids(self, fields: Mapping[str, str], *, at: str) -> npt.NDArray[np.int32]:
        """The tokens from which an answer is written.

        Args:
            fields: role to text, without the role that is written.
            at: names the prompt in a message.

        Raises:
            DataError: there is no token to start from, or no position is left for the answer.
        """
        ids = self.model.task.prompt_ids(fields, self.tokenizer, data=self.config.data)
        if not len(ids):
            raise DataError(at, "no tokens", "must give a token to write from")
        if self.positions is not None and len(ids) >= self.positions:
            bound = f"must have at most {self.positions - 1}: the model takes {self.positions} tokens in all"
            raise DataError(at, f"{len(ids)} tokens", bound)
        return ids

    def answer_ids(self, fields: Sequence[Mapping[str, str]]) -> list[npt.NDArray[np.int32]]:
        """The tokens of records' answers, as training has them after the prompt's, without those that end them."""
        task, data = self.model.task, self.config.data
        examples = task.tokenise([Record(one) for one in fields], self.tokenizer, data=data)
        pairs = zip(examples.input_ids, examples.targets, strict=True)
        return [ids[(learnt != UNSUPERVISED) & ~np.isin(ids, list(self._end_ids))] for ids, learnt in pairs]

    def written(self, prompt: npt.NDArray[np.int32], spec: WritingSpec) -> Iterator[str]:
        """The answer to a prompt by the adapter in use, as it is written; see `as_text`."""
        return as_text(write(self.model, prompt, end_ids=self._end_ids, spec=spec), self.tokenizer)

    def drawn(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        spec: WritingSpec,
        *,
        first: int,
        against: Sequence[npt.NDArray[np.int32]] = (),
        begun: Sequence[npt.NDArray[np.int32]] = (),
    ) -> Iterator[tuple[int, str | None]]:
        """Texts of many prompts by the adapter in use; see `fedtune.evaluation.generation.draw`."""
        return draw(
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

    def measured(self, data: LeadData) -> dict[str, Measured]:
        """Figures of the base and of each adapter, for their scores; the frozen layers run once for all."""
        num_tokens = data.examples.num_tokens
        keeps = keeps_frozen_states(self.model, self.config.runtime, num_tokens=num_tokens)
        data = replace(data, kept={} if keeps else None)
        measured = {}
        for name in self.names:
            self.use(name)
            measured[name] = Measured.of(self.model, self.tokenizer, data, self.config, generate=True)
        return measured

    def answer(self, record: Record) -> tuple[str, object]:
        """The adapter's answer to a record, which needs none of its own: as text, and as JSON."""
        task, data = self.model.task, self.config.data
        asked = task.as_asked(record, data)
        examples = task.tokenise([asked], self.tokenizer, data=data)
        batch = collate(examples, [0], pad_id=self.tokenizer.pad_token_id)
        with scoring(self.model):
            logits = self.model.logits(batch.to(self.model.device)).cpu()
        return task.answer_to(asked, logits, self.tokenizer, data=data, spec=self.model.spec)


def _places_in(model: TaskModel) -> dict[str, torch.Tensor]:
    """Where a saved adapter's tensors lie in a model, public constants of its head among them."""
    return {**model.adapter_parameters(), **dict(model.named_buffers(recurse=False))}


def _tensors_of(model: TaskModel) -> dict[str, npt.NDArray[np.float32]]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in _places_in(model).items()}
