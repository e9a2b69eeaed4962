"""Settings of a task model: the base, the adapters and the head.

They are plain data without torch, so that reading a configuration takes milliseconds instead of the seconds that
importing transformers and PEFT takes.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from fedtune.spec import ConfigError, check_at_least, check_at_most, check_one_of, check_positive, spec

PACKAGE = "package:"
RANDOM = "random:"
RANDOM_MODELS = ("random:bert", "random:llama")
NO_BASE, NO_ADAPTER = "none", "none"  # `model.path` and `lora.kind` of a model that consists of its head
ADAPTERS = {"lora": "A LoRA adapter", "dora": "A DoRA adapter", "ia3": "An IA3 adapter", NO_ADAPTER: "A model"}
"""Names of the adapter kinds, as the subject of a sentence."""
LORA_A, LORA_B = ".lora_A.", ".lora_B."
"""The part of a tensor's name that marks it as one of LoRA's factors, as PEFT names them."""
_WIDEST, _MAX_LAYERS = 4096, 8
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # old hub ids have no owner
_NOT_PROVEN = {
    "prompt": "virtual tokens change every layer's output, and occupy positions of the record's own tokens",
    "prefix": "virtual keys and values enter a layer through its cache, which training does not use",
    "adalora": "it drops ranks based on gradients, and that choice would be released without noise",
}
"""PEFT's adapter kinds that fedtune refuses, with the reason."""


@spec
class ModelSpec:
    """Settings of the frozen base model.

    Attributes:
        path: a Hugging Face id, a local folder, `package:<module>/<folder>` for weights inside an installed Python
            package, `random:bert` / `random:llama` for a tiny untrained model, or `none`: the model consists of the
            head alone (data.input=features).
        sha256: the required hash of the model, as printed by `fedtune model-hash`; null accepts any model.
        gguf_file: the name of a GGUF file inside `path` (needs the extra `gguf`), expanded to float32 once and cached.
        revision: the branch, tag or commit at the hub.
        dtype: the number format of the frozen base: "float32"; "bfloat16"; "mixed", which computes products inside its
            layers in bfloat16 and everything else in float32; "nf4", bfloat16 with the weights of its layers quantized
            to four bits (not for a GGUF file); or "auto", which `fedtune.training.number_format` replaces before a run.
            A simulation on a CPU measures the model's matrix products, and uses mixed if they are more than 5 % faster
            than in float32 and every site allows it.  All other runs use float32, including real sites and runs with
            `runtime.seeded_noise`.  A resumed run keeps its format.  Adapter, head and losses are always float32.
        cache_dir: the folder for downloads and expanded GGUF files; null: the hub's own cache, and `FEDTUNE_CACHE` or
            `~/.cache/fedtune`.
        license: the license of the weights, for reports.
        public_id: the weights' id at the Hugging Face hub if `path` is not that id, written into saved adapters and
            model cards so that others can load the base.
        adapter: the folder of a trained adapter as the starting point: a run folder, or its `adapter/`.  Base, task
            and LoRA settings must be the same; null: a new adapter, with no effect at its initial values.
        adapter_sha256: the required digest of this adapter; null: recorded when the run starts.
    """

    path: str
    sha256: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "mixed", "nf4", "auto"] = "float32"
    cache_dir: str | None = None
    license: str | None = None
    public_id: str | None = None
    adapter: str | None = None
    adapter_sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", self.path, "must name a model")
        if self.path.startswith(RANDOM):
            check_one_of("path", self.path, RANDOM_MODELS)
        if self.path.startswith(PACKAGE) and not re.fullmatch(r"package:\w+(/[\w.-]*\w)*", self.path):
            raise ConfigError("path", self.path, "must look like package:<module> or package:<module>/<folder>")
        for key in ("sha256", "adapter_sha256"):
            digest = getattr(self, key)
            if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ConfigError(key, digest, "must be 64 lower-case hexadecimal digits")
        if self.gguf_file is not None and not re.fullmatch(r"[\w.-]+\.gguf", self.gguf_file):
            raise ConfigError("gguf_file", self.gguf_file, "must be the plain name of a .gguf file inside model.path")
        if self.public_id is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.public_id, re.ASCII):
            raise ConfigError("public_id", self.public_id, "must be a Hugging Face hub id, owner/name")
        if self.dtype == "nf4" and self.gguf_file is not None:
            raise ConfigError("dtype", self.dtype, "is not available for GGUF files, which are already quantized")

    @property
    def is_built_in(self) -> bool:
        """Whether the model is built from these settings alone, without files: no base, or a tiny random base."""
        return self.path == NO_BASE or self.path.startswith(RANDOM)

    @property
    def public_path(self) -> str:
        """Path for publication: the last part of a local path, without its location on this machine.

        A path in the form of a hub id, such as models/llama, is published in full. The rule reads no files, so that
        reports can be verified on another machine.
        """
        if self.is_built_in or self.path.startswith(PACKAGE) or _HUB_ID.fullmatch(self.path):
            return self.path
        return re.split(r"[\\/]", self.path.rstrip("\\/"))[-1]


@spec
class LoraSpec:
    """Settings of the adapters: LoRA, W + (alpha / rank) B A (Hu et al. 2021, arXiv 2106.09685), or another kind.

    Attributes:
        kind: "lora"; "dora", which also trains a norm for each row of the sum (Liu et al. 2024, arXiv 2402.09353);
            "ia3", which only trains one factor for each output of a module (Liu et al. 2022, arXiv 2205.05638) and
            ignores rank, alpha, rslora and train_a; or "none", if there is no base to adapt.
        rank: the number of rows of A and of columns of B.
        alpha: the numerator of the scale.
        target_modules: last names of the linear modules to adapt ("q_proj"), or "all-linear". Only modules inside the
            stack of transformer layers are adapted, so tied embeddings, output layers and poolers stay frozen.
        layers: the transformer layers to adapt; negative numbers count from the end; null: all layers.
        rslora: true scales by alpha / sqrt(rank), Kalajdzievski 2023, arXiv 2312.03732.
        train_a: false freezes every A at its initial value (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313):
            averaging over sites is then exact, and noise enters B only.
        init: initial values of A: "random", or "principal": the leading right singular vectors of the module's public
            frozen weights (from PiSSA: Meng et al. 2024, arXiv 2404.02948).
        alternate: true trains every B in odd rounds and every A in even rounds (Chen et al. 2025, arXiv 2502.01755):
            averaging is exact in each round, and each matrix gets half of the noise.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    layers: tuple[int, ...] | None = None
    rslora: bool = False
    train_a: bool = True
    init: Literal["random", "principal"] = "random"
    alternate: bool = False

    def get_frozen_name_part(self, round: int) -> str | None:
        """Return the name part of the tensors that are frozen in a round (counted from 1), or None if all tensors
        train.

        B trains first, because A has no gradient while B is zero.
        """
        return (LORA_B, LORA_A)[round % 2] if self.alternate else None

    @property
    def trains_both_factors(self) -> bool:
        """Whether A and B train in the same round, so that an average of factors is no average of products."""
        return self.train_a and not self.alternate

    @property
    def scale(self) -> float:
        """Factor of the product B A; 1 for adapters without these matrices."""
        without = self.kind in ("ia3", NO_ADAPTER)
        return 1.0 if without else self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def effective_rank(self) -> int:
        """Rank that a site compares with its limits; 1 for adapters without low-rank matrices."""
        return 1 if self.kind in ("ia3", NO_ADAPTER) else self.rank

    @property
    def adapted_modules(self) -> tuple[str, ...]:
        """Names of the adapted modules, as in the request to a site; empty without adapters."""
        named = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        return () if self.kind == NO_ADAPTER else named

    def __post_init__(self) -> None:
        if self.kind in _NOT_PROVEN:
            bound = f"is not supported: {_NOT_PROVEN[self.kind]}; it must be one of {', '.join(ADAPTERS)}"
            raise ConfigError("kind", self.kind, bound)
        check_one_of("kind", self.kind, ADAPTERS)
        check_at_least("rank", self.rank, 1)
        check_positive("alpha", self.alpha)
        if isinstance(self.target_modules, str):
            check_one_of("target_modules", self.target_modules, ("all-linear",))
        elif not self.target_modules or not all(self.target_modules) or "all-linear" in self.target_modules:
            bound = "must list at least one module name, or be the text all-linear"
            raise ConfigError("target_modules", self.target_modules, bound)
        if self.init != "random" and self.kind not in ("lora", "dora"):
            raise ConfigError("init", self.init, f"requires an adapter with a matrix A, not lora.kind={self.kind}")
        if self.layers is not None and not self.layers:
            raise ConfigError("layers", self.layers, "must name at least one layer; use null for all layers")
        if self.alternate and (self.kind != "lora" or not self.train_a):
            raise ConfigError("alternate", True, "requires lora.kind=lora and lora.train_a=true")


@spec
class HeadSpec:
    """Settings of the head of tasks that predict labels or a number.

    The head computes scale * W x, without a bias, from the mean-pooled and L2-normalized hidden state x.  For features,
    x is the record's feature vector, and each layer has a bias.

    Attributes:
        scale: the scale of the logits (an inverse temperature).
        center: true subtracts the mean embedding of the labels' texts from x and normalizes the result again.  Sentence
            embeddings share a large component that does not depend on the class, and this mean is a public estimate of
            it.
        init: "zero", or "label_names", which initializes each row with the frozen base's embedding of the label's text.
            Label names are declared and public, so this costs no privacy.
        train: false freezes the head at its initial values.
        label_texts: a description of each label, in the order of the labels, which "label_names" embeds instead of the
            label's name.
        hidden: for features, the widths of the hidden layers, each followed by a ReLU and initialized randomly from the
            run's seed.
    """

    scale: float = 20.0
    center: bool = False
    init: Literal["zero", "label_names"] = "zero"
    train: bool = True
    label_texts: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        for width in self.hidden:
            check_at_least("hidden", width, 1)
            check_at_most("hidden", width, _WIDEST)
        check_at_most("hidden", len(self.hidden), _MAX_LAYERS)


@spec
class TaskModelSpec:
    """Complete definition of a task model, stored with each saved adapter.

    Attributes:
        model: the frozen base.
        lora: its adapters.
        head: the head, for tasks that have one.
        task: the name of the task, see `fedtune.tasks`.
        labels: the declared labels, in order; empty for a task without labels.
        target_range: the declared range of a numeric target; null for a task without a numeric target.
        seed: the public seed of the adapters' initial values.
        texts: the number of texts per record that the base processes separately: 1, the number of compared texts, or
            the number of windows of a long text.
        input: the kind of input, as `data.input`.
        values: the name and range of each value in a record's feature vector; empty for text.
        task_settings: the task's own settings, an instance of its settings class; null for a task without settings.
    """

    model: ModelSpec
    lora: LoraSpec
    task: str
    head: HeadSpec = HeadSpec()
    labels: tuple[str, ...] = ()
    target_range: tuple[float, float] | None = None
    seed: int = 0
    texts: int = 1
    input: str = "text"
    values: tuple[str, ...] = ()
    task_settings: Any = None

    def __post_init__(self) -> None:
        check_at_least("seed", self.seed, 0)
        check_one_of("texts", self.texts, range(1, 9))
