"""Kinds of model input: text, features of a table row, or images.  No other module depends on the kind.

An input defines the roles of its records, the conversion of records to model inputs, the base and the head of its
model, and random inputs for tests of the model.  To add an input, write its class in a module of its own, and add it to
`fedtune.tasks.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.data.features import encode_features
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec, fill_template
from fedtune.data.text_rows import catch_row_error
from fedtune.data.tokenization import tokenize_whole_texts
from fedtune.data.values import FEATURE
from fedtune.model.spec import NO_ADAPTER, NO_BASE, HeadSpec, ModelSpec, TaskModelSpec
from fedtune.process import torch
from fedtune.spec import ConfigError, DataError, check_at_least, check_one_of, format_value

Row: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.float32]
"""(t,) token ids, a (1, w) feature vector, or the (t, w) pixels of an image's patches."""
Rows: TypeAlias = tuple[Sequence[Row], list[bool]]
"""The input of each record, and whether the record could be encoded; a placeholder replaces a failed record
(`Task.tokenize`).
"""


class NoTokenizer:
    """Placeholder tokenizer with an empty vocabulary, for records without text."""

    pad_token_id = 0

    def get_vocab(self) -> Mapping[str, int]:
        return {}


class Input(ABC):
    """Abstract base class for model inputs."""

    modality: ClassVar[str | None] = None  # the kind of record in reports; None: text
    # whether every record has exactly `data.max_length` positions, so that nothing is padded
    is_fixed: ClassVar[bool] = False

    def roles(self, task_roles: tuple[str, ...]) -> tuple[str, ...]:
        """Return the task's roles for this input in `data.columns`; other columns are named by the input's own
        settings.
        """
        return task_roles

    @abstractmethod
    def check_data(self, data: DataSpec) -> None:
        """Check the data settings for this kind of input.

        Raises:
            ConfigError: for a key of `data`.
        """

    @abstractmethod
    def check_model(self, spec: TaskModelSpec) -> None:
        """Check the model settings for this kind of input.

        Raises:
            ConfigError: for a key of the run's settings.
        """

    @abstractmethod
    def load_reader(self, data: DataSpec, model: ModelSpec, *, base: Any = None) -> Any:
        """Load the object that converts records to model inputs, such as a tokenizer.

        If `base` is given, check that it matches the base.
        """

    def check_record(self, data: DataSpec) -> Callable[[Record], object]:
        """Return a function that raises a DataError for a record that cannot become an input."""
        return lambda record: None

    def iter_unusual_values(self, record: Record, data: DataSpec) -> Iterator[tuple[str, str]]:
        """Yield (description, column) for each value of a usable record that differs from its declaration."""
        yield from ()

    @abstractmethod
    def encode_records(
        self, records: Sequence[Record], reader: Any, *, data: DataSpec, lenient_within: int | None
    ) -> Rows:
        """Convert records to model inputs."""

    @abstractmethod
    def build_base(
        self, spec: TaskModelSpec, *, predicts_tokens: bool, check: Callable[[Any], None], device: Any
    ) -> Any:
        """Load the frozen base with its adapters on a device; `check` is called with the base before adapters are
        attached.
        """

    def num_ids(self, base: Any) -> int:
        """Return the number of token ids; 1 for numeric inputs."""
        return 1

    @abstractmethod
    def embed_rows(self, base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute the base's embedding of each row, (rows, h) float32, with an L2 norm of at most 1."""

    @abstractmethod
    def build_head(self, width: int, outputs: int, *, spec: HeadSpec, seed: int, device: Any) -> torch.nn.Module:
        """Build the head's layers, from (rows, width) to (rows, outputs), from public settings alone.

        The last layer is initialized with zeros.
        """

    @abstractmethod
    def generate_dummies(self, base: Any, lengths: Sequence[int], draws: np.random.Generator) -> tuple[Row, ...]:
        """Generate random inputs of these lengths over the full range of possible values, including its extremes."""

    def generate_dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        """Generate a random value for a role that belongs to the input, or return None if any text is valid."""
        return None

    def list_supported_formats(self, task_formats: tuple[str, ...]) -> tuple[str, ...]:
        """Return the formats in which a tuned model can be exported, given the task's formats for text input."""
        return task_formats


class Text(Input):
    """Text input for a transformer with a tokenizer."""

    def check_data(self, data: DataSpec) -> None:
        if data.features:
            bound = f"must be empty for data.input = {data.input}"
            raise ConfigError("features", f"{len(data.features)} entries", bound)
        check_at_least("max_length", data.max_length, 3)

    def check_model(self, spec: TaskModelSpec) -> None:
        bound = f"is not suitable: data.input = {spec.input} requires a base model with an adapter"
        if spec.model.path == NO_BASE:
            raise ConfigError("model.path", NO_BASE, bound)
        if spec.lora.kind == NO_ADAPTER:
            raise ConfigError("lora.kind", NO_ADAPTER, bound)
        if spec.head.hidden:
            raise ConfigError("head.hidden", spec.head.hidden, f"must be empty for data.input = {spec.input}")

    def load_reader(self, data: DataSpec, model: ModelSpec, *, base: Any = None) -> Any:
        from fedtune.model.base_model import load_tokenizer
        from fedtune.model.compatibility import check_tokenizer_fits

        tokenizer = load_tokenizer(model)
        if base is not None:
            check_tokenizer_fits(tokenizer, base.get_base_model(), path=model.path)
        return tokenizer

    def encode_records(
        self, records: Sequence[Record], reader: Any, *, data: DataSpec, lenient_within: int | None
    ) -> Rows:
        roles = ("text", "text_pair") if "text_pair" in data.columns else ("text",)
        if "text" in data.template_roles:
            joined = partial(fill_template, data.prompt_template)
            records = [replace(record, fields={**record.fields, "text": joined(record.fields)}) for record in records]
        fields = [(record, roles) for record in records]
        return tokenize_whole_texts(fields, reader, max_length=data.max_length, lenient_within=lenient_within)

    def build_base(
        self, spec: TaskModelSpec, *, predicts_tokens: bool, check: Callable[[Any], None], device: Any
    ) -> Any:
        from fedtune.model.base_model import load_base
        from fedtune.model.layers import attach_adapters

        images = self.modality == "image"
        frozen = load_base(spec.model, predicts_tokens=predicts_tokens, images=images, device=device)
        check(frozen)
        base = attach_adapters(frozen, spec=spec.lora, predicts_tokens=predicts_tokens, seed=spec.seed)
        self.check_batch_independence(base, spec.model)
        return base

    def check_batch_independence(self, base: Any, model: ModelSpec) -> None:
        """Check that a base with adapters processes the examples of a batch independently."""
        from fedtune.model.compatibility import check_examples_independent

        check_examples_independent(base)

    def num_ids(self, base: Any) -> int:
        return int(base.get_base_model().get_input_embeddings().weight.shape[0])

    def embed_rows(self, base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return mean_pool(hidden, attention_mask)

    def build_head(self, width: int, outputs: int, *, spec: HeadSpec, seed: int, device: Any) -> torch.nn.Module:
        head = torch.nn.Linear(width, outputs, bias=False, device="meta").to_empty(device=device)
        torch.nn.init.zeros_(head.weight)
        return head

    def generate_dummies(self, base: Any, lengths: Sequence[int], draws: np.random.Generator) -> tuple[Row, ...]:
        num_ids = self.num_ids(base)
        dummies = tuple(draws.integers(0, num_ids, size=length).astype(np.int32) for length in lengths)
        for ids in dummies[::2]:  # only half of them, so that examples start with different tokens
            ids[0], ids[-1] = num_ids - 1, 0
        return dummies


class Features(Input):
    """Feature vectors from the columns of a table; the model consists of the head alone."""

    modality = "table"

    def roles(self, task_roles: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(role for role in task_roles if role != "text")

    def check_data(self, data: DataSpec) -> None:
        if not data.features:
            raise ConfigError("features", [], "is empty: declare the columns of the feature vector")
        if data.max_length != 1:
            raise ConfigError("max_length", data.max_length, "must be 1 for data.input = features")

    def check_model(self, spec: TaskModelSpec) -> None:
        require_values(
            "for data.input = features, whose model consists of the head",
            ("model.path", spec.model.path, NO_BASE),
            ("model.dtype", spec.model.dtype, "float32"),
            ("lora.kind", spec.lora.kind, NO_ADAPTER),
            ("head.train", spec.head.train, True),
        )
        require_no_label_texts(spec.head, "for data.input = features, whose model consists of the head")

    def load_reader(self, data: DataSpec, model: ModelSpec, *, base: Any = None) -> Any:
        return NoTokenizer()

    def check_record(self, data: DataSpec) -> Callable[[Record], object]:
        return partial(encode_features, features=data.features)

    def iter_unusual_values(self, record: Record, data: DataSpec) -> Iterator[tuple[str, str]]:
        for feature in data.features:
            for column in feature.columns:
                if what := feature.describe_unusual_value(record.fields[FEATURE + column]):
                    yield what, column

    def encode_records(
        self, records: Sequence[Record], reader: Any, *, data: DataSpec, lenient_within: int | None
    ) -> Rows:
        nothing = np.zeros((1, sum(feature.width for feature in data.features)), dtype=np.float32)
        read, lenient = partial(encode_features, features=data.features), lenient_within is not None
        return read_rows(lambda record: read(record)[None], records, nothing=nothing, lenient=lenient)

    def build_base(
        self, spec: TaskModelSpec, *, predicts_tokens: bool, check: Callable[[Any], None], device: Any
    ) -> Any:
        from fedtune.model.head_only import NoBase

        return NoBase(len(spec.values), device=device)

    def embed_rows(self, base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden[:, 0]

    def build_head(self, width: int, outputs: int, *, spec: HeadSpec, seed: int, device: Any) -> torch.nn.Module:
        """Build a linear layer, or a network of linear layers and ReLU.

        ReLU does not round, so a row's result does not depend on its position in the batch.
        """
        layers: list[torch.nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # drawn on the CPU, so that it is identical on every device
            for size in spec.hidden:
                layer = torch.nn.Linear(width, size)
                torch.nn.init.zeros_(layer.bias)
                torch.nn.init.uniform_(layer.weight, -((6 / size) ** 0.5), (6 / size) ** 0.5)  # preserves norms
                layers += [layer, torch.nn.ReLU()]
                width = size
            last = torch.nn.Linear(width, outputs)
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
        return (torch.nn.Sequential(*layers, last) if layers else last).to(device)

    def generate_dummies(self, base: Any, lengths: Sequence[int], draws: np.random.Generator) -> tuple[Row, ...]:
        width = base.config.hidden_size
        dummies = [draws.uniform(-1, 1, size=(1, width)).astype(np.float32) for _ in lengths]
        for place, vector in enumerate(dummies[::2]):
            vector[:] = (0, 1, -1)[place % 3]
        return tuple(vector / np.float32(width**0.5) for vector in dummies)

    def generate_dummy_field(self, role: str, data: DataSpec, *, draw: Callable[[int], int]) -> str | None:
        column = role.removeprefix(FEATURE)
        return next(
            (spec.generate_dummies(draw) for spec in data.features if column in spec.columns and role != column), None
        )

    def list_supported_formats(self, task_formats: tuple[str, ...]) -> tuple[str, ...]:
        return ("safetensors", "onnx")


INPUTS: dict[str, Input] = {"text": Text(), "features": Features()}
"""Inputs of this module; `fedtune.tasks.registry` adds inputs from other modules."""


def get_input_for(settings: DataSpec | TaskModelSpec) -> Input:
    """Return the input that the settings of the data or the model select."""
    return get_input(settings.input)


def get_input(name: str) -> Input:
    """Return the input with this name.

    Raises:
        ConfigError: for `input`, if the name is unknown.
    """
    check_one_of("input", name, INPUTS)
    return INPUTS[name]


def require_values(why: str, *settings: tuple[str, object, object]) -> None:
    """Require that settings, given as (key, value, wanted), have the wanted values.

    Raises:
        ConfigError: for the first key with another value; the message ends with `why`.
    """
    for key, value, wanted in settings:
        if value != wanted:
            raise ConfigError(key, value, f"must be {format_value(wanted)} {why}")


def require_no_label_texts(head: HeadSpec, why: str) -> None:
    """Require head settings that do not use the labels' texts.

    Raises:
        ConfigError: for the first such setting; the message ends with `why`.
    """
    settings = (("head.center", head.center, False), ("head.init", head.init, "zero"))
    require_values(why, *settings, ("head.label_texts", head.label_texts, ()))


def read_rows(read: Callable[[Record], Row], records: Sequence[Record], *, nothing: Row, lenient: bool) -> Rows:
    """Apply `read` to each record separately, and return the results and whether each call succeeded.

    With `lenient`, `nothing` replaces the result of a failed record; otherwise its error is raised.
    """
    made = [catch_row_error("", read, record) if lenient else read(record) for record in records]
    rows = [nothing if isinstance(row, DataError) else row for row in made]
    return rows, [not isinstance(row, DataError) for row in made]


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average the hidden states of real tokens and L2-normalize the result, (n, h) float32; zeros without tokens.

    Args:
        hidden: (n, t, h) hidden states in any float dtype.
        attention_mask: (n, t), 1 for real tokens.
    """
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    total = (hidden.to(torch.float32) * mask).sum(dim=1)
    return torch.nn.functional.normalize(total / mask.sum(dim=1).clamp(min=1.0), dim=-1)
