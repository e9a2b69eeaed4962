"""One frozen base model with its tokenizer, shared by everybody in a process: sites, and the lead with its own data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedtune.config import RunConfig
from fedtune.data import Record, TextDataset
from fedtune.data.load import lead_records, tokenise
from fedtune.evaluation.evaluate import evaluate
from fedtune.evaluation.generation import PromptSet
from fedtune.model import Adapter, TaskModel, load_task_model, load_tokenizer
from fedtune.model.fits import check_tokenizer_fits
from fedtune.training.machine import device_for, keeps_frozen_states, ready_model
from fedtune.training.preflight import check_examples_alone


class SharedModel:
    """A run's task model on this machine's device.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = device_for(config.runtime.device)
        self.tokenizer = load_tokenizer(config.model)
        self.model = ready_model(
            config.task_model(), config.runtime, max_length=config.data.max_length, device=self.device
        )
        check_tokenizer_fits(self.tokenizer, self.model.base.get_base_model(), path=config.model.path)
        self.initial_adapter = Adapter.of(self.model)

    def for_run(self, config: RunConfig) -> SharedModel:
        """The same loaded model for another run that trains it."""
        other = copy.copy(self)
        other.config = config
        for name in ("validation", "test"):
            other.__dict__.pop(name, None)
        return other

    def check(self) -> None:
        """Try a training pass on made-up examples.

        Raises:
            ConfigError: the model cannot be trained with per-example clipping.
        """
        if self.config.privacy.private:
            check_examples_alone(self.model, task=self.config.task)

    def keeps_frozen_states(self, declared_size: int) -> bool:
        """Whether what the frozen layers make of a site's records fits the memory set aside for it.

        An estimate from public numbers, so that no record decides: full length, and of a user the records of a step.
        """
        num_records = declared_size * self.config.privacy.contribution
        return keeps_frozen_states(
            self.model, self.config.runtime, num_tokens=num_records * self.config.data.max_length
        )

    def tokenised(self, records: Sequence[Record], *, lenient: bool = False) -> TextDataset:
        """Records as this model reads them; `lenient`: whatever they are."""
        return tokenise(records, self.tokenizer, spec=self.config.data, task=self.config.task, lenient=lenient)

    @cached_property
    def validation(self) -> LeadData | None:
        """The lead's validation data, if it has a file."""
        data = self.config.data
        return self.lead_data(data.validation_file, rows=data.validation_rows, key="data.validation_file")

    @cached_property
    def test(self) -> LeadData | None:
        """The lead's test data, if it has a file."""
        data = self.config.data
        return self.lead_data(data.test_file, rows=data.test_rows, key="data.test_file")

    def lead_data(self, file: str | None, *, rows: int | None, key: str) -> LeadData | None:
        """Records of the lead's own, tokenised; None for no file."""
        if file is None:
            return None
        return LeadData.read(file, self.config, self.tokenizer, rows=rows, key=key)

    def score(self, adapter: Adapter, data: LeadData | None, *, generate: bool = False) -> dict[str, float]:
        """Scores of `adapter` on the lead's data; empty without data."""
        if data is None:
            return {}
        adapter.load_into(self.model)
        return _score(self.model, self.tokenizer, data, self.config, generate=generate)


@dataclass(frozen=True)
class LeadData:
    """Records that the lead may look at, and the same tokenised; not covered by the guarantee."""

    records: list[Record]
    examples: TextDataset

    @classmethod
    def read(
        cls, file: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, key: str
    ) -> LeadData:
        """Read and tokenise a file that the setting `key` named."""
        records = lead_records(config.data, file, task=config.task, rows=rows, key=key)
        return cls(records, tokenise(records, tokenizer, spec=config.data, task=config.task))


def score_saved(config: RunConfig, adapter_folder: Path, data_file: str) -> dict[str, float]:
    """Scores of a saved adapter on a file that has the columns of `config`."""
    model = load_task_model(adapter_folder, model=config.model, device=device_for(config.runtime.device))
    tokenizer = load_tokenizer(model.spec.model)
    check_tokenizer_fits(tokenizer, model.base.get_base_model(), path=config.model.path)
    data = LeadData.read(data_file, config, tokenizer, rows=None, key="--data")
    return _score(model, tokenizer, data, config, generate=True)


def _score(
    model: TaskModel, tokenizer: PreTrainedTokenizerBase, data: LeadData, config: RunConfig, *, generate: bool
) -> dict[str, float]:
    spec = config.evaluation
    wanted = generate and spec.generate and config.task == "causal_lm"
    prompts = PromptSet.of(data.examples, data.records, rows=spec.generation_rows) if wanted else None
    return evaluate(model, data.examples, task=config.task, tokenizer=tokenizer, spec=spec, prompts=prompts)
