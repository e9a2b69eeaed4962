"""Interface between a task and the rest of fedtune: its settings, training, scoring, reports and export.

A task object has no state except its own settings.  To add a task, write its module in this folder, with a class for
its settings if it has any, list it in `fedtune.tasks.registry`, and give it an experiment in conf/.  No other code of
fedtune depends on the task of a run.  A custom task outside this folder needs only the names of `fedtune.tasks`
(docs/own_task.md; tests/tasks/test_third_task.py runs one that fedtune does not know).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.codec import decode_value, require
from fedtune.data.batching import Batch
from fedtune.data.features import map_feature_columns
from fedtune.data.json_lists import to_compact_json
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import Targets, TextDataset, Tokenizer
from fedtune.data.values import OPTIONAL_ROLES
from fedtune.formatting import pluralize
from fedtune.model.spec import TaskModelSpec
from fedtune.privacy.distributed_noise import USUAL_BOUND
from fedtune.privacy.mechanism import Unit
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.inputs import Row, get_input_for
from fedtune.tasks.measures import Detail

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedtune.model.layers import OutputLayer


Draws: TypeAlias = np.random.Generator
Ids: TypeAlias = Sequence[Row]  # (t_i,) token ids or (1, w) feature vector of each example
_ROLES_OF_ALL = ("label", "site", "user", "arrival")
"""Roles of every task: records are partitioned or counted by them."""
_OF_SOME_TASKS = frozenset({"prompt_template", "chat_template", "target_range", "windows", "stride"})
_OF_SOME_TASKS |= {"label_separator", "event_values"}
"""Settings of `data` that are used only by tasks that list them in `data_settings`; for other tasks they keep their
default.
"""
FirstTarget: TypeAlias = Callable[[int], int]
"""Function from an example's length to the index of its first target, for targets that belong to tokens."""

Readout: TypeAlias = "tuple[tuple[torch.Tensor, torch.Tensor | None], ...]"
"""Linear layers in order, as weight (out, in) and bias (out,)."""


class Model(Protocol):
    """Protocol of the `fedtune.tasks.task_model.TaskModel` members that tasks use.

    A task that makes a discrete choice for an example, such as an argmax, stores every float on which the choice
    depends in `decided_by`: (rows, ...), one row for each example of the batch, then one row for each padding row.
    Gradients reveal only the choice, so the trial before a run also compares these floats
    (`fedtune.training.batch_invariance`).
    """

    spec: TaskModelSpec
    base: PeftModel
    head: torch.nn.Module | None
    output: OutputLayer | None
    decided_by: torch.Tensor | None

    @property
    def device(self) -> torch.device: ...
    def logits(self, batch: Batch) -> torch.Tensor: ...
    def losses(self, batch: Batch) -> torch.Tensor: ...
    def get_buffer(self, target: str) -> torch.Tensor: ...
    def get_parameter(self, target: str) -> torch.nn.Parameter: ...
    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None: ...


class Task(ABC):
    """Abstract base class of a task, which defines the layout of records, the loss, the scores and the export.

    `fedtune.process` delays the import of torch until a method needs it, so that commands that only read settings start
    fast.
    """

    name: ClassVar[str]  # in settings, policies and reports
    roles: ClassVar[tuple[str, ...]]  # required roles of a record, in the first of the task's layouts
    # roles that the tuned model predicts, which a prompt therefore lacks; empty: the model only scores
    answers: ClassVar[frozenset[str]] = frozenset()
    # the class of the task's own settings (`task_settings` of a run), each with a default; None: no settings
    settings: ClassVar[type[Any] | None] = None
    data_settings: ClassVar[frozenset[str]] = frozenset()  # optional keys of `data` that this task uses
    # supported kinds of records (`fedtune.tasks.inputs`)
    inputs: ClassVar[frozenset[str]] = frozenset({"text"})
    has_labels: ClassVar[bool] = False  # whether `data.labels` declares the classes
    fewest_labels: ClassVar[int] = 2  # minimum number of labels, if the task has labels
    has_head: ClassVar[bool] = False  # whether a head is trained with the adapters, by the settings under `head`
    # whether losses compare the model with its base without adapters (`reference`)
    has_reference: ClassVar[bool] = False
    # whether the base is a decoder with its output layer; otherwise its output is the hidden states
    predicts_tokens: ClassVar[bool] = False
    hub_name: ClassVar[str] = ""  # the task's name at the Hugging Face hub; empty: none
    # export formats: the adapter, then the most common format of the whole model, then other formats.  A whole
    # model has its base's output layer, or `list_readout_layers`
    formats: ClassVar[tuple[str, ...]] = ("peft",)
    # whether all units may put their full gradient into the same value, so that sums are larger than usual
    counts_units: ClassVar[bool] = False
    # the score that measures the benefit of training; higher is better, except for "loss"
    primary_metric: ClassVar[str] = "loss"
    # `primary_metric` of the best constant answer, if it is the same number for every data set; None: it is not
    baseline: ClassVar[float | None] = None
    # the factors of LoRA and head on the automatic learning rate; None: not studied for the task
    auto_lr_shares: ClassVar[tuple[float, float] | None] = None
    studied: ClassVar[Mapping[float, str]] = {}
    """Share of the non-private gain that private runs achieved in studies (docs/planning.md), by signal-to-noise
    ratio.
    """
    reads_tokens: ClassVar[bool] = False  # whether the readout applies to each token's hidden state instead of the mean
    auto_class: ClassVar[str] = "AutoModel"  # the class of transformers that loads a whole model
    own: Any  # an instance of `settings`, or None

    def __init__(self, own: object = None) -> None:
        self.own = self.settings() if own is None and self.settings else own

    def with_settings(self, given: object) -> Self:
        """Return a new task with the settings in `given`, a mapping or a settings object; others keep their defaults.

        Raises:
            ConfigError: a key is unknown, or a value is out of range; errors name keys of the run.
        """
        table: Any = asdict(given) if is_dataclass(given) and not isinstance(given, type) else given
        require("task_settings", table, isinstance(table, Mapping), "must be keys and values, such as {text: body}")
        known = [field.name for field in fields(self.settings)] if self.settings else []
        for key in table:
            bound = f"is not a setting of task {self.name}; its own settings: {', '.join(known) or 'none'}"
            require(f"task_settings.{key}", table[key], key in known, bound)
        return type(self)(decode_value("task_settings", dict(table), self.settings) if self.settings else None)

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """Supported layouts, each a tuple of roles; `data.columns` must match one of them."""
        return (self.roles,)

    def list_required_roles(self, data: DataSpec) -> tuple[str, ...]:
        """Return the roles that a record must have under these settings."""
        return self.roles

    def count_texts_per_record(self, data: DataSpec) -> int:
        """Return the number of texts per record, 1 to 8, that the base processes separately.

        The trainable modules must see these rows: hooks compute one gradient per row, and a record's gradient is their
        sum.
        """
        return 1

    def primary_metric_for(self, data: DataSpec) -> str:
        """Return the name of the primary metric, which may depend on the layout of the records."""
        return self.primary_metric

    def columns(self, data: DataSpec, *, partition: bool = False, unit: Unit = "record") -> dict[str, str]:
        """Map each role that is read from a file to its column: the roles of the task, the privacy unit and the
        partition.
        """
        return data.map_required_columns(self.list_required_roles(data), partition=partition, unit=unit)

    def list_input_columns(self, data: DataSpec) -> dict[str, str]:
        """Map the input roles of a record, which are all roles except the answer, to their columns."""
        return data.map_required_columns(set(self.list_required_roles(data)) - self.answers)

    def prompt_fields(self, text: str, data: DataSpec, *, at: str) -> dict[str, str]:
        """Convert the text of a prompt to a record's fields; `at` is the text's key in error messages.

        Raises:
            ConfigError: the text is blank or not valid text, or records of the run have several input roles.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(at, text, "must not be blank" if isinstance(text, str) else "must be a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(at, "bytes that are not text", "must be UTF-8") from None
        roles = self.list_input_columns(data)
        if "messages" in roles:
            return {"messages": to_compact_json([{"role": "user", "content": text}])}
        main = next((role for role in ("text", "prompt", "image", "tokens") if role in roles), None)
        if main is None or set(roles) - OPTIONAL_ROLES != {main}:
            wanted = ", ".join(roles)
            bound = f"is a single text or path, but a prompt of this run requires {wanted}: use a file (--file)"
            raise ConfigError(at, text, bound)
        return {role: text if role == main else "" for role in roles}

    def check_data(self, data: DataSpec) -> None:
        """Check that the columns, the labels and the other data settings match the task.

        Raises:
            ConfigError: for a key of `data`, if a role has no column, a column has a role that is not read, labels are
                declared for a task without labels, or another setting has no effect.
        """
        self.check_input(data)
        for role in self.list_required_roles(data):
            if role not in data.columns:
                raise ConfigError("columns", dict(data.columns), f"has no column for role {role!r}")
        if data.labels and not self.has_labels:
            raise ConfigError("labels", data.labels, f"must be empty for task {self.name}")
        if answer := [role for role in data.template_roles if role in self.answers | {"completion"}]:
            raise ConfigError("prompt_template", data.prompt_template, f"must not contain the answer, {{{answer[0]}}}")
        known = {*self.list_required_roles(data), *_ROLES_OF_ALL, *map_feature_columns(data.features, {})}
        if unknown := [role for role in data.columns if role not in known]:
            bound = f"is not a role of this run: task {self.name} with these settings reads {', '.join(sorted(known))}"
            raise ConfigError(f"columns.{unknown[0]}", data.columns[unknown[0]], bound)
        for setting in fields(data):
            value = getattr(data, setting.name)
            if setting.name in _OF_SOME_TASKS - self.data_settings and value != setting.default:
                only = "null" if setting.default is None else setting.default
                raise ConfigError(setting.name, value, f"must stay {only}: task {self.name} does not use it")

    def check_input(self, data: DataSpec) -> None:
        """Check that the task supports `data.input`, and check the data settings for this kind of input.

        Raises:
            ConfigError: for a key of `data`.
        """
        if data.input not in self.inputs:
            raise ConfigError("input", data.input, f"must be {' or '.join(sorted(self.inputs))} for task {self.name}")
        get_input_for(data).check_data(data)

    def check_own(self, data: DataSpec) -> None:  # noqa: B027
        """Check the task's own settings against the settings of the data; errors name keys of the run."""

    def check_spec(self, spec: TaskModelSpec) -> None:
        """Check a model's settings for the input, the labels and the task (`check_model`).

        Raises:
            ConfigError: for a key of the run's settings.
        """
        get_input_for(spec).check_model(spec)
        if self.has_labels and len(set(spec.labels)) < max(self.fewest_labels, len(spec.labels)):
            bound = f"must declare at least {pluralize(self.fewest_labels, 'label')} for task {self.name}, each once"
            raise ConfigError("data.labels", spec.labels, bound)
        self.check_model(spec)

    def check_model(self, spec: TaskModelSpec) -> None:  # noqa: B027
        """Check the settings of a new or saved model for this task.

        Raises:
            ConfigError: for a key of the run's settings.
        """

    def check_base(self, base: PreTrainedModel, *, path: str) -> None:  # noqa: B027
        """Check a loaded base before adapters are attached.

        Raises:
            ConfigError: for `model.path`.
        """

    def check_tokenizer(self, tokenizer: Tokenizer, *, data: DataSpec) -> None:  # noqa: B027
        """Check that a tokenizer has all required features, before an error on a record could reveal the record.

        Raises:
            ConfigError: for `model.path`, or for a setting of `data` that the tokenizer does not support.
        """

    def record_validator(self, data: DataSpec) -> Callable[[Record], DataError | None]:
        """Return a function that returns the reason why the run cannot use a record, or None.

        The reason quotes no content.  A real site skips such records.
        """
        return lambda record: None

    @abstractmethod
    def tokenize(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec, lenient_within: int | None = None
    ) -> TextDataset:
        """Compute token ids and targets, separately for each record.

        Args:
            records: the records; may be empty.
            tokenizer: the base's tokenizer.
            data: the maximum length of an example, and the task's other settings.
            lenient_within: an upper bound for token ids.  A record with an id at or above it, or a record that cannot
                be encoded, becomes an example without effect, so that no record can stop the others.  None: such a
                record raises an error.

        Raises:
            DataError: a record does not match the settings.
        """

    def find_ignored_annotations(self, dataset: TextDataset, *, data: DataSpec) -> Sequence[bool]:
        """Whether each example has an annotation that training ignores, such as an entity in a word with another
        entity's label.
        """
        return [False] * len(dataset)

    def encode_prompt(
        self, fields: Mapping[str, str], tokenizer: Tokenizer, *, data: DataSpec
    ) -> npt.NDArray[np.int32]:
        """Return the (t,) token ids of a prompt, identical to the tokens before the answer in training.

        `fields` maps roles to texts, without the role of the answer; `messages` must end with a user turn.  Only for
        tasks that generate text.
        """
        raise NotImplementedError

    def get_eos_token_ids(self, tokenizer: Tokenizer, *, data: DataSpec) -> frozenset[int]:
        """Return the ids of the tokens that end a generated text."""
        raise NotImplementedError

    def prompts_and_references(
        self, records: Sequence[Record], tokenizer: Tokenizer, *, data: DataSpec
    ) -> tuple[Ids, Sequence[str]] | None:
        """Return each record's prompt, as token ids, and its reference text; None for a task without texts to score."""
        return None

    def num_outputs(self, spec: TaskModelSpec) -> int:
        """Return the number of the head's outputs."""
        return len(spec.labels)

    def add_head(self, model: Model) -> None:
        """Add the task's own tensors to a new model: trainable tensors under `model.head`, public constants as buffers.

        The tensors must depend only on the model's settings, because a saved adapter is loaded into them.
        """
        if self.has_head:
            spec, width = model.spec, model.base.config.get_text_config().hidden_size
            head = get_input_for(spec).build_head(
                width, self.num_outputs(spec), spec=spec.head, seed=spec.seed, device=model.device
            )
            model.head = head.requires_grad_(spec.head.train)

    def init_head(self, model: Model) -> None:  # noqa: B027
        """Initialize the head of a new model, from public settings alone."""

    @abstractmethod
    def logits(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute float32 logits, whose first axis is the row: an example or one of its texts."""

    def reference(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute the reference values of the losses from the base with disabled adapters, (examples, ...), including
        empty rows.

        Each example's values depend on that example alone; they are computed once and passed back as `batch.reference`.
        """
        raise NotImplementedError

    @abstractmethod
    def losses(self, model: Model, batch: Batch) -> torch.Tensor:
        """Compute each example's loss, (examples,) float32.

        An example's loss and gradient depend on that example alone.  Empty rows of the batch are included; their losses
        are ignored, but must be finite.
        """

    def outputs_per_example(self, model: Model, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the per-example values from which `scores` computes all scores, by name, (examples, ...) each."""
        return {"loss": model.losses(batch)}

    def postprocess_dataset(
        self, figures: Mapping[str, npt.NDArray[np.float64]]
    ) -> Mapping[str, npt.NDArray[np.float64]]:
        """Convert the outputs of all examples of a data set to values that depend on them together, such as ranks."""
        return figures

    def scores(self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec) -> dict[str, float]:
        """Compute the scores of a data set by name, from the outputs of all its examples, (examples, ...) each.

        The scores are those of `compute_task_scores`, followed by `loss`, the mean loss.

        Raises:
            DataError: the data set has nothing to score.
        """
        return {**self.compute_task_scores(figures, spec=spec), "loss": float(np.mean(figures["loss"]))}

    def compute_task_scores(
        self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec
    ) -> dict[str, float]:
        """Compute the task's own scores, without the loss."""
        return {}

    def compute_final_scores(
        self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec
    ) -> dict[str, float]:
        """Compute the scores of a finished run, which may include slower or more detailed scores than `scores`."""
        return self.scores(figures, spec=spec)

    def detail(self, figures: Mapping[str, npt.NDArray[np.float64]], *, spec: TaskModelSpec) -> Detail | None:
        """Compute per-label scores and reliability bins for the report; None for a task that has neither."""
        return None

    def majority_baseline(self, dataset: TextDataset) -> float | None:
        """Return the primary metric of the best constant answer for `dataset`; None if it is not defined."""
        return self.baseline

    @abstractmethod
    def score_unit(self, model: Model, batch: Batch) -> float:
        """Return a score in [0, 1] for the only example in `batch`; a site releases the noised sum over its
        examples.
        """

    def answer(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> tuple[str, object]:
        """Return the answer for one record from its logits, as text and as JSON, for tasks that do not generate
        text.
        """
        raise NotImplementedError

    def without_answer(self, record: Record, data: DataSpec) -> Record:
        """Return the record with a valid placeholder as its answer, so that it can be tokenized."""
        stand_in = {role: self.dummy_field(role, data, draw=lambda _: 0) or "" for role in self.answers}
        return replace(record, fields={**record.fields, **stand_in})

    def answer_record(
        self, record: Record, logits: torch.Tensor, tokenizer: Tokenizer, *, data: DataSpec, spec: TaskModelSpec
    ) -> tuple[str, object]:
        """Return the answer for one record, as `answer` does, for tasks whose answers quote parts of the record."""
        return self.answer(logits[0], spec=spec)

    def max_aggregated_value(self, sizes: Iterable[int]) -> int:
        """Return the largest absolute value in a site's secure-aggregation share, in clip norms, from the sites'
        declared sizes.

        In a task that counts units, the gradients of all units of a site may fall on the same value; twice the declared
        size leaves room for their sum.
        """
        return max(USUAL_BOUND, 2 * max(sizes)) if self.counts_units else USUAL_BOUND

    def dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        """Generate a random value for a role of a record, or return None if any text is valid.

        `draw(n)` returns a random integer below n.
        """
        return repr(data.target_range[draw(2)]) if role == "target" and data.target_range is not None else None

    @abstractmethod
    def dummy_targets(self, input_ids: Ids, *, spec: TaskModelSpec, draws: Draws, first: FirstTarget) -> Targets:
        """Generate targets for synthetic examples, which are used to test a model and to measure its cost.

        The model's settings determine the number of texts per example.
        """

    def list_readout_layers(self, model: Model) -> Readout:
        """Return the linear layers from the base's mean hidden state to `compute_exported_output`.

        Each layer's input is L2-normalized.  With `reads_tokens`, the layers apply to each hidden state, without
        normalization.  Without layers, the output is the normalized state itself, or the output of the base's own
        output layer.
        """
        return ()

    def compute_exported_output(self, logits: torch.Tensor, *, spec: TaskModelSpec) -> torch.Tensor:
        """Convert logits to the output of an exported model."""
        return logits

    def name_outputs(self, labels: Sequence[str]) -> Sequence[str]:
        """Return the name of each logit of an exported model, for tasks with labels."""
        return labels

    def export_model(self, base: PreTrainedModel, readout: Readout) -> PreTrainedModel:
        """Return an exported base as a model that `auto_class` can load: the base alone, or with transformers' own
        head.
        """
        return base


def require_target_range(data: DataSpec) -> tuple[float, float]:
    """Return the declared range of a numeric target.

    Raises:
        ConfigError: for `target_range`, if it is not declared.
    """
    if data.target_range is None:
        raise ConfigError("target_range", None, "is missing: set the smallest and the largest allowed target")
    return data.target_range


def read_target_number(record: Record, bounds: tuple[float, float]) -> float:
    """Return the record's number in the role `target`.

    Raises:
        DataError: the number is outside the range.
    """
    number, (low, high) = float(record.fields["target"]), bounds
    if not low <= number <= high:
        bound = f"must be in data.target_range: {low:g} to {high:g}"
        raise DataError(record.at("target"), "outside the range", bound)
    return number
