"""One frozen base model with its tokenizer, shared by all sites in a process and by the lead."""

from __future__ import annotations

import hashlib
import logging
import secrets
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.config import RunConfig
from fedtune.data import Record, Shapes, TextDataset
from fedtune.data.bad_rows import NONE_LEFT_OUT, SkippedRows
from fedtune.data.records import record_key
from fedtune.evaluation import generation
from fedtune.evaluation.bootstrap import Figures
from fedtune.evaluation.label_signal import LabelSignal, has_enough_records, measure_label_signal
from fedtune.evaluation.scoring import KeptBatches, embed_examples, evaluate_examples
from fedtune.federation.planner import check_signal
from fedtune.model.adapter import Adapter
from fedtune.model.frozen_linear import depends_on_row_count
from fedtune.model.ranks import count_trained_values
from fedtune.sites.run_cache import RunCache
from fedtune.sites.run_records import LeadRecords, RunRecords
from fedtune.spec import ConfigError, RunError
from fedtune.tasks.inputs import get_input_for
from fedtune.tasks.measures import Detail
from fedtune.tasks.pooled import OneLabelTask
from fedtune.tasks.registry import tokenize_separately
from fedtune.tasks.saved import SavedAdapter
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training.accelerators import disable_fused_attention, uses_unfused_attention
from fedtune.training.batch_invariance import fit_to_memory, max_batch_influence, require_batch_invariance
from fedtune.training.devices import Devices, DeviceTrial, Outcome
from fedtune.training.examples import SiteExamples
from fedtune.training.machine import (
    choose_hidden_states_location,
    choose_micro_batch_shapes,
    choose_num_processes,
    compute_step_bytes,
    do_frozen_states_fit,
    find_frozen_states_folder,
    measure_frozen_states_mib,
    prepare_model,
    resolve_device,
)
from fedtune.training.spec import Machine, RuntimeSpec

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Callback with a description of the current work, the number of finished items, and the total (0: unknown)."""
_ModelKey = tuple[Hashable, ...]
_MEANS_BYTES = 512 * 2**20  # upper limit; larger batches are not faster
_measured: dict[_ModelKey, tuple[Shapes, float]] = {}
"""Results of batch-invariance tests in this process, so that a repeated test has the same result."""


def ignore_progress(what: str, done: int, total: int) -> None:
    """Display no progress. Real sites use this function, because progress would reveal the number of records."""


class LoadedModel:
    """A task model on this machine's device, tested for batch invariance and shared by several runs.

    The model has no state of a run. Before training or scoring, load an adapter, which sets all trainable tensors.

    Args:
        config: configuration of the first run.
        declared_size: declared number of privacy units that train in this process; None: the sum over all sites.
        inexact_allowed: accept hardware where the rest of a batch affects an example's rounding.
        trains: whether this process trains; a real lead only scores, and skips the batch-invariance test.
        leads: whether this is the lead of a simulation, which refuses a run with too weak a signal before the test.
        alone: use one process unless the settings contain a number, because other processes would not share the cached
            outputs of the frozen layers.
        progress: callback for slow steps.

    Attributes:
        config: the configuration, with the selected number of devices.
        initial_adapter: a new adapter, which does not change the model's outputs.
        shapes: shapes of micro-batches.
        keeps_states: whether the frozen layers' outputs fit into the memory or folder reserved for them.
        states_folder: folder for these outputs if they do not fit into memory.
        moved: largest change of an example's clipped gradient caused by other examples in the batch, in clip norms;
            0.0: bitwise invariance.

    Raises:
        ConfigError: the model cannot be loaded, or does not support per-example clipping.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        declared_size: int | None = None,
        inexact_allowed: bool = False,
        trains: bool = True,
        leads: bool = False,
        alone: bool = False,
        progress: Progress = ignore_progress,
    ) -> None:
        tried = config.privacy.private and trains
        original = config
        if tried:
            config = replace(config, runtime=choose_num_devices(config, alone=alone))
        self.config: Final = config
        progress("loading the model", 0, 0)
        self.device: Final = resolve_device(config.runtime.device)
        tokenizer, model = load_tokenizer_and_model(
            config, lambda: build_task_model(config.task_model(), device=self.device)
        )
        self.tokenizer: Final = tokenizer
        self.model: Final = model
        self.initial_adapter: Final = Adapter.from_task_model(model)
        tokens = _estimate_tokens(config, declared_size)
        keeps_states, states_folder = choose_hidden_states_location(model, config.runtime, num_tokens=tokens)
        self.keeps_states: Final = keeps_states
        self.states_folder: Final = states_folder
        self._facts: Final = self._build_model_key(original, declared_size)
        shapes, moved = choose_micro_batch_shapes(model, config.runtime, max_length=config.data.max_length), 0.0
        # Before the test of the model, which takes minutes.
        if tried and leads and config.resume is None and not config.training.ignore_weak_signal:
            values = count_trained_values(self.initial_adapter.tensors, config.federation.site_ranks)
            check_signal(config.plan(), config.declared_sizes(), values=fmean(values.values()))
        devices: Devices | None = None
        if tried and config.runtime.devices > 1:  # other devices load the model during the test
            devices = Devices(model, config.task_model(), config.runtime, max_length=config.data.max_length)
        self._devices: Final = devices
        self._may_be_one: Final = original.runtime.num_devices is None
        if tried:
            shapes, moved, outcome = self._test_model(shapes, progress)
            require_batch_invariance(moved, path=config.model.path, inexact_allowed=inexact_allowed)
            trial = self._make_trial(shapes)
            trial.capture_batches(model)
            if devices is not None:
                devices.start_trials(trial, outcome or trial.run_trial(model, secrets.randbits(63)))
                if not self._may_be_one:
                    devices.prepare_workers()  # raise errors before the run begins
        self.shapes: Final = shapes
        self.moved: Final = moved

    def is_reusable_for(self, config: RunConfig, *, declared_size: int | None, inexact_allowed: bool) -> bool:
        """Return True if another run needs the same model on the same machine and accepts the test result."""
        return self._facts == self._build_model_key(config, declared_size) and (inexact_allowed or self.moved == 0)

    @cached_property
    def devices(self) -> Devices | None:
        """Devices that share each step with the first device; None with a single device or without privacy.

        Raises:
            ConfigError: the configured devices cannot be used.
            RunError: the process of a device failed.
        """
        try:
            if self._devices is not None:
                self._devices.prepare_workers()
        except (ConfigError, RunError) as error:
            if not self._may_be_one:
                raise
            log.warning("the run continues in one process: %s", error)
            return None
        return self._devices

    def _build_model_key(self, config: RunConfig, declared_size: int | None) -> _ModelKey:
        """Build the cache key of all settings that determine the model and its test result."""
        return (
            config.task_model(),
            *(getattr(config.runtime, machine_field.name) for machine_field in fields(Machine)),
            config.data.max_length,
            config.data.chat_template,
            config.privacy.private,
            config.privacy.max_grad_norm,
            config.privacy.unit,
            choose_hidden_states_location(
                self.model, config.runtime, num_tokens=_estimate_tokens(config, declared_size)
            ),
            torch.get_num_threads(),
        )

    def has_room_for(self, num_tokens: int) -> bool:
        """Return True if the frozen layers' outputs for `num_tokens` tokens fit into the reserved memory or folder."""
        if self.states_folder is None:
            return do_frozen_states_fit(self.model, self.config.runtime, num_tokens=num_tokens)
        return find_frozen_states_folder(self.model, self.config.runtime, num_tokens=num_tokens) is not None

    def _test_model(self, plain: Shapes, progress: Progress) -> tuple[Shapes, float, Outcome | None]:
        """Find micro-batch shapes that are batch-invariant, and measure the influence of a batch on its examples.

        Returns:
            The shapes, the largest influence in clip norms (0.0: invariant), and the outcome of a new trial if other
            devices have to repeat it.
        """
        outcome: Outcome | None = None
        if self._facts not in _measured:
            progress("checking the model on this machine", 0, 0)
            shapes = self._choose_shapes(plain)
            moved, outcome = self._measure_influence(shapes, progress)
            if moved > 0 and self.device.type != "cpu" and not uses_unfused_attention():
                disable_fused_attention()  # fused kernels may split their work by the number of rows
                shapes = self._choose_shapes(plain)
                moved, outcome = self._measure_influence(shapes, progress)
            if moved > 0 and len(shapes.row_shares) > 1:
                # Some kernels depend on the number of rows, so use one number of rows per length.
                shapes = replace(shapes, row_shares=(1,))
                moved, outcome = self._measure_influence(shapes, progress)
            _measured[self._facts] = shapes, moved
        return *_measured[self._facts], outcome

    def _choose_shapes(self, shapes: Shapes) -> Shapes:
        fitted = fit_to_memory(
            self.model,
            shapes,
            most_bytes=compute_step_bytes(self.model, self.config.runtime) - self.user_means_bytes,
            keeps_states=self.keeps_states,
            pad_id=self.tokenizer.pad_token_id,
        )
        # The trial would have the same result, but would take seconds.
        by_rows = depends_on_row_count(self.config.model.dtype, self.device)
        return replace(fitted, row_shares=(1,)) if by_rows else fitted

    @property
    def user_means_bytes(self) -> int:
        """Memory budget in bytes for the float64 mean gradients of the users in one batch; 0 for unit "record"."""
        by_user = self.config.privacy.unit == "user"
        return min(_MEANS_BYTES, compute_step_bytes(self.model, self.config.runtime) // 4) if by_user else 0

    def _measure_influence(self, shapes: Shapes, progress: Progress) -> tuple[float, Outcome | None]:
        trial, report_progress = self._make_trial(shapes), partial(progress, "checking the model on this machine")
        if self._devices is None:
            return max_batch_influence(self.model, **trial.trial_arguments, told=report_progress), None
        outcome = trial.run_trial(self.model, secrets.randbits(63), report_progress)
        return outcome.moved, outcome

    def _make_trial(self, shapes: Shapes) -> DeviceTrial:
        return DeviceTrial(
            shapes=shapes,
            keeps_states=self.keeps_states,
            max_grad_norm=self.config.privacy.max_grad_norm,
            pad_id=self.tokenizer.pad_token_id,
            weights_chosen=not self.config.model.is_built_in,
            disable_fused_attention=uses_unfused_attention(),
            captures=self.config.privacy.unit == "record",
        )


def _estimate_tokens(config: RunConfig, declared_size: int | None) -> int:
    """Estimate the number of training tokens from public values only: declared sizes and maximum lengths."""
    size = sum(config.declared_sizes().values()) if declared_size is None else declared_size
    return size * config.privacy.contribution * config.data.max_length * config.task_model().texts


class RunModel:
    """A loaded model with the settings, the start adapter and the lead's data of one run.

    Args:
        loaded: the model, which other runs may share.
        config: the run's configuration.
        records: the run's records, if they have already been read.
        progress: callback for slow steps, also during training.
        cache: cache of results for later runs; None: no cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: RunConfig,
        *,
        records: RunRecords | None = None,
        progress: Progress = ignore_progress,
        cache: RunCache | None = None,
    ) -> None:
        self.loaded, self.config = loaded, replace(config, runtime=loaded.config.runtime)
        self.records = RunRecords(config) if records is None else records
        self.progress, self._cache = progress, cache
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.initial_adapter = loaded.initial_adapter

    @property
    def states_mib(self) -> float:
        """Memory for the frozen layers' outputs on all sites' records, in MiB."""
        return measure_frozen_states_mib(self.model, num_tokens=_estimate_tokens(self.config, None))

    def first_adapter(self) -> Adapter:
        """Load the run's start adapter: `model.adapter`, or a new adapter that does not change the model's outputs.

        Raises:
            ConfigError: `model.adapter` does not fit the run, or differs from the adapter in the proposal.
        """
        named = self.config.model
        if named.adapter is None and named.adapter_sha256 is None:
            return self.initial_adapter
        start = SavedAdapter.read_initial(named.adapter or "")
        if start.digest != named.adapter_sha256:
            bound = f"must be {start.digest}, the digest of model.adapter"
            raise ConfigError("model.adapter_sha256", named.adapter_sha256, bound)
        return start.find_initial_adapter(self.model)

    def tokenize_records(self, records: Sequence[Record], *, lenient: bool = False) -> TextDataset:
        """Tokenize records for this model.

        Args:
            records: the records.
            lenient: turn a record that cannot be tokenized into an empty example, as with `data.on_bad_record=skip`,
                instead of raising.
        """
        within = self.model.num_ids if lenient or self.config.data.skips_bad_records else None
        data = self.config.data
        return tokenize_separately(self.model.task, records, self.tokenizer, data=data, lenient_within=within)

    @cached_property
    def validation(self) -> LeadData | None:
        """The lead's validation data; None without a validation file."""
        return self._load_lead_data(self.records.validation)

    @cached_property
    def test(self) -> LeadData | None:
        """The lead's test data; None without test data."""
        return self._load_lead_data(self.records.test)

    def _load_lead_data(self, records: LeadRecords | None) -> LeadData | None:
        """Tokenize the lead's records, and cache the frozen layers' outputs if they fit into memory."""
        if records is None:
            return None
        data = LeadData.build(records, self.config, self.tokenizer)
        if not do_frozen_states_fit(self.model, self.config.runtime, num_tokens=data.examples.num_tokens):
            return data
        cache, about = self._cache, f"batches of {self.config.evaluation.max_tokens}"
        return replace(data, kept={} if cache is None else cache.get_cached_states(about, data.examples, dict))

    def make_site_examples(self, dataset: TextDataset) -> SiteExamples:
        """Convert a site's tokenized records to training examples."""

        def make() -> SiteExamples:
            pad_id = self.tokenizer.pad_token_id
            return SiteExamples(dataset, pad_id=pad_id, shapes=self.loaded.shapes, device=self.device)

        return make() if self._cache is None else self._cache.get_cached_states("examples", dataset, make)

    def score(self, adapter: Adapter, data: LeadData | None) -> dict[str, float]:
        """Score an adapter on the lead's data after a round. Without data, the result is empty."""
        if data is None:
            return {}
        adapter.load_into(self.model)
        return Evaluation.build(self.model, self.tokenizer, data, self.config, generate=False).scores(self.model)

    def measure_label_signal(self) -> LabelSignal | None:
        """Measure whether the loaded model's embeddings predict the labels of the lead's validation or test records.

        None if the task does not predict one of several classes, or if there are too few records.
        """
        data, task = self.validation or self.test, self.model.task
        if data is None or not isinstance(task, OneLabelTask):
            return None
        if not has_enough_records(len(data.records), len(self.config.data.labels)):
            return None
        most, pad_id = self.config.evaluation.max_tokens, self.tokenizer.pad_token_id
        embeddings = embed_examples(self.model, data.examples, pad_id=pad_id, max_tokens=most, kept=data.kept)
        classes = np.asarray(data.examples.targets, dtype=np.int64)
        supervised = classes >= 0
        return measure_label_signal(embeddings[supervised], classes[supervised])

    def evaluate_final(self, adapter: Adapter) -> Evaluation | None:
        """Evaluate the final adapter on the test data, including generated texts. None without data."""
        if self.test is None:
            return None
        adapter.load_into(self.model)
        test = self.test

        def make() -> Evaluation:
            return Evaluation.build(self.model, self.tokenizer, test, self.config, generate=True)

        if self._cache is None or adapter.digest() != self.initial_adapter.digest():
            return make()
        references = hashlib.sha256(b"".join(map(record_key, test.records))).hexdigest()
        return self._cache.get_cached_baseline(test.examples, f"{references} {self.config.evaluation}", make)


def choose_num_devices(config: RunConfig, *, alone: bool) -> RuntimeSpec:
    """Choose the number of devices, unless the runtime settings contain it.

    Args:
        config: the run's configuration.
        alone: use a single device unless the settings contain a number.

    Returns:
        The runtime settings with a number of devices.
    """
    steps = config.federation.num_rounds * config.training.local_steps
    sampled = config.privacy.sampling_rate * config.privacy.contribution * sum(config.declared_sizes().values())
    # A child process imports the main module again, which has no side effects only in fedtune's own.
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    alone = alone or (main.name != "fedtune" and main.parts[-2:] != ("fedtune", "__main__.py"))
    chosen = choose_num_processes(config.runtime, gradients=0.0 if alone else steps * sampled)
    return replace(config.runtime, num_devices=chosen)


@dataclass(frozen=True)
class LeadData:
    """The lead's own records, raw and tokenized. The privacy guarantee does not cover these records."""

    records: list[Record]  # raw
    examples: TextDataset  # tokenized
    # cached outputs of the frozen layers; None: no cache
    kept: KeptBatches | None = field(default=None, repr=False, compare=False)
    left_out: SkippedRows = NONE_LEFT_OUT  # skipped rows of the file

    @classmethod
    def build(cls, own: LeadRecords, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> LeadData:
        """Tokenize the lead's records."""
        examples = config.bound_task.tokenize(own.records, tokenizer, data=config.data)
        return cls(own.records, examples, left_out=own.left_out)


def load_tokenizer_and_model(
    config: RunConfig, build: Callable[[], TaskModel]
) -> tuple[PreTrainedTokenizerBase, TaskModel]:
    """Load the tokenizer and the model for training or scoring.

    Raises:
        ConfigError: they cannot be loaded, or are incompatible with each other or with the settings.
    """
    model = prepare_model(build, config.runtime, max_length=config.data.max_length)
    tokenizer = get_input_for(config.data).load_reader(config.data, model.spec.model, base=model.base)
    model.task.check_tokenizer(tokenizer, data=config.data)
    return tokenizer, model


@dataclass(frozen=True)
class Evaluation:
    """The model's outputs per record and per generated text, from which scores are computed."""

    examples: Figures  # name -> figures per record
    texts: Figures  # name -> figures per generated text; empty without generation

    @classmethod
    def build(
        cls, model: TaskModel, tokenizer: PreTrainedTokenizerBase, data: LeadData, config: RunConfig, *, generate: bool
    ) -> Evaluation:
        """Run the model on the data, and optionally generate texts if task and settings allow it."""
        spec = config.evaluation
        pad_id, most = tokenizer.pad_token_id, spec.max_tokens
        examples = evaluate_examples(model, data.examples, pad_id=pad_id, max_tokens=most, kept=data.kept)
        asked = generate and spec.generate
        inputs = model.task.prompts_and_references(data.records, tokenizer, data=config.data) if asked else None
        if inputs is None:
            return cls(examples, {})
        prompts, references = generation.group_by_prompt(*inputs, rows=spec.generation_rows)
        ends = model.task.get_eos_token_ids(tokenizer, data=config.data)
        sizes: dict[str, Any] = {"max_new_tokens": spec.max_new_tokens, "max_tokens": most}
        written = sorted(generation.generate_batches(model, prompts, tokenizer=tokenizer, end_ids=ends, **sizes))
        return cls(examples, generation.compute_text_statistics([text for _, text, _ in written], references))

    def scores(self, model: TaskModel) -> dict[str, float]:
        """Compute the scores of a round: name -> value."""
        return model.task.scores(self.examples, spec=model.spec)

    def compute_final_scores(self, model: TaskModel) -> dict[str, float]:
        """Compute the scores of a finished run, including those of generated texts: name -> value."""
        return model.task.compute_final_scores(self.examples, spec=model.spec) | (
            generation.compute_text_scores(self.texts) if self.texts else {}
        )

    def detail(self, model: TaskModel) -> Detail | None:
        """Compute detailed scores, such as scores per label. None if the task has no detailed scores."""
        return model.task.detail(self.examples, spec=model.spec)
