"""Settings of local training and of the machine. The machine settings affect only rounding and speed."""

from __future__ import annotations

import math
import re
from typing import Literal

from fedtune.codec import require
from fedtune.spec import ConfigError, check_at_least, check_at_most, check_fraction, check_positive, spec

_LARGEST_RATE = 1e9  # with larger rates, a product of rates overflows float32 and a round fails half-way


@spec
class TrainingSpec:
    """Settings of local training at a site.

    Attributes:
        local_steps: optimizer steps per round.
        optimizer: "adamw" or "sgd"; its state is reset every round.
        learning_rate: the peak learning rate of the LoRA tensors; "auto" (AdamW only) chooses the rates of LoRA and
            head from public numbers before the run begins (docs/own_data.md).
        head_learning_rate: the peak learning rate of the task head; null: `learning_rate`.
        unclipped_learning_rate: replaces `learning_rate` in a run without privacy, whose unclipped gradients are
            several times larger; null: `learning_rate`.
        unclipped_head_learning_rate: replaces `head_learning_rate` in the same way.
        unclipped_local_steps: replaces `local_steps` in a run without privacy, unless that is set explicitly.
        unclipped_schedule: replaces `schedule` in the same way.
        unclipped_sampling_rate: replaces `privacy.sampling_rate` in the same way.
        weight_decay: the weight decay; decoupled with AdamW, added to the gradient with SGD.
        momentum: SGD's momentum.
        betas: AdamW's betas.
        schedule: the learning-rate schedule over the run's global steps, after the warm-up.
        warmup_steps: the number of global steps over which the learning rate rises linearly.
        ignore_weak_signal: true trains even if a run is unlikely to learn anything, because the noise moves the adapter
            much further than all records together can (docs/planning.md); false stops the run before round 1.
    """

    local_steps: int = 5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | Literal["auto"] = 1e-2
    head_learning_rate: float | None = None
    unclipped_learning_rate: float | None = None
    unclipped_head_learning_rate: float | None = None
    unclipped_local_steps: int | None = None
    unclipped_schedule: Literal["constant", "linear", "cosine"] | None = None
    unclipped_sampling_rate: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    ignore_weak_signal: bool = False

    def __post_init__(self) -> None:
        check_at_least("local_steps", self.local_steps, 1)
        if self.learning_rate != "auto":
            _check_rate("learning_rate", self.learning_rate)
        elif self.optimizer != "adamw":
            raise ConfigError("learning_rate", "auto", "requires training.optimizer=adamw")
        for key in ("head_learning_rate", "unclipped_learning_rate", "unclipped_head_learning_rate"):
            if getattr(self, key) is not None:
                if self.learning_rate == "auto":
                    raise ConfigError(key, getattr(self, key), "must be null if training.learning_rate is auto")
                _check_rate(key, getattr(self, key))
        if self.unclipped_local_steps is not None:
            check_at_least("unclipped_local_steps", self.unclipped_local_steps, 1)
        if self.unclipped_sampling_rate is not None:
            check_fraction("unclipped_sampling_rate", self.unclipped_sampling_rate, one=True)
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_most("weight_decay", self.weight_decay, _LARGEST_RATE)
        check_fraction("momentum", self.momentum, zero=True)
        for beta in self.betas:
            check_fraction("betas", beta, zero=True)
        check_at_least("warmup_steps", self.warmup_steps, 0)

    def suggest_lower_rates(self, *, clipped: bool) -> dict[str, float]:
        """Return a third of every learning rate in use, by its key under `training`."""
        rates = {}
        for key, rate in zip(
            ("learning_rate", "head_learning_rate"), self.compute_peak_rates(clipped=clipped), strict=True
        ):
            other = f"unclipped_{key}"
            name = other if not clipped and getattr(self, other) else key
            if getattr(self, name) is not None:
                rates[name] = float(f"{rate / 3:.2g}")
        return rates

    def compute_peak_rates(self, *, clipped: bool) -> tuple[float, float]:
        """Return the peak learning rates of LoRA and head.

        Raises:
            ConfigError: the learning rate is "auto" and has not been chosen yet.
        """
        if self.learning_rate == "auto":
            raise ConfigError("training.learning_rate", "auto", "must be a number: call RunConfig.with_rates first")
        lora, head = self.learning_rate, self.head_learning_rate
        if not clipped:
            lora, head = self.unclipped_learning_rate or lora, self.unclipped_head_learning_rate or head
        return lora, head or lora


_ADAM_PATH, _PATH_WITHOUT_NOISE = 0.2, 0.1
"""The sum of a run's learning rates, divided by the square root of the number of steps (simulations/own_data).

Without noise, longer paths overfit small data sets.
"""
STUDIED_SCALE = 0.5
"""`lora.scale` in the study.

LoRA multiplies B A by this scale, so the learning rate has to be adapted to another scale.
"""


def choose_learning_rate(*, steps: int, schedule: str, private: bool) -> float:
    """Choose AdamW's peak learning rate for a linear head on normalized embeddings, from public numbers only.

    Adam moves a value by about the learning rate in each step, regardless of the size of gradients and noise, so moves
    along the noise add up to rate * sqrt(steps). The best value of this product depends on the records, and no public
    number predicts it: one value for all noise multipliers, sizes and numbers of labels does better on small data sets
    than a formula of them did (simulations/own_data, whose README names its data).

    Args:
        steps: the number of optimizer steps in the whole run.
        schedule: `TrainingSpec.schedule`; with a decay to zero, the mean rate is half of the peak.
        private: whether the steps have noise.
    """
    path = _ADAM_PATH if private else _PATH_WITHOUT_NOISE
    return path / ((1.0 if schedule == "constant" else 0.5) * math.sqrt(steps))


def _check_rate(key: str, value: float) -> None:
    check_positive(key, value)
    check_at_most(key, value, _LARGEST_RATE)


@spec
class Machine:
    """Machine settings of a run or a site, which affect only rounding and speed.

    In a `site.toml`, 0 means null for `num_threads`, `micro_batch_tokens` and `step_mib`, and "" for
    `kept_states_folder`.

    Attributes:
        device: "auto" (an accelerator if the torch build can use one), "cpu" or "cuda".
        num_devices: the number of GPUs that share each step of a site, with one process per GPU; on a CPU, the number
            of processes. The result is bit-identical. A run without privacy uses one device. null: 1, except for
            `fedtune simulate` on a CPU, which uses one process per core, at most 4, if the run has enough gradients.
        num_threads: the number of torch threads in every process; null: one per core, divided among the processes, or
            the value of OMP_NUM_THREADS if that is lower.
        micro_batch_tokens: the maximum number of padded tokens in a micro-batch; the results of a private run are
            bit-identical for every value. null: 512 per CPU thread, at most 2,048; 16,384 on a GPU.
        step_mib: the memory in MiB for a micro-batch with its per-example gradients, and for the mean gradients of
            users. null: a quarter of the machine's memory, divided among the processes, or two fifths of a GPU's
            memory, both minus the model.
        kept_states_mib: the memory in MiB for caching each record's output of the frozen layers below the adapters, for
            all sites of a process together, and the same again for each of the lead's data sets. If the outputs do not
            fit, they are written to `kept_states_folder`. Without that folder nothing is cached: the run takes several
            times as long. null: a quarter of the machine's available memory. 0 caches nothing in memory.
        kept_states_folder: a folder on a fast disk for the outputs that do not fit in memory, limited to half of the
            free space. No other process can open the cached data, which disappears with the process.
        onednn: true multiplies with frozen float32 weights by oneDNN on an x86 CPU, which is twice as fast on AMD CPUs
            and equally exact; false uses torch's default.
        gradient_checkpointing: true recomputes activations in the backward pass, for large models.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_devices: int | None = None
    num_threads: int | None = None
    micro_batch_tokens: int | None = None
    step_mib: int | None = None
    kept_states_mib: int | None = None
    kept_states_folder: str | None = None
    onednn: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("micro_batch_tokens", "step_mib", "kept_states_mib"), (0, math.inf))
        # Each device needs a process with its own copy of the model; above these limits a system runs out of threads.
        for key, (least, most) in {"num_devices": (1, 64), "num_threads": (0, 1024), **sizes}.items():
            if (number := getattr(self, key)) is not None:
                require(key, number, number >= least, f"must be a whole number of at least {least}")
                check_at_most(key, number, most)


@spec
class RuntimeSpec(Machine):
    """Settings that determine where and how fast a run executes.

    Only `seeded_noise` affects the guarantee, and it marks the run.

    Attributes:
        kind: "simulation" (in this process), "ray" (Flower's simulation engine, by `flwr run`) or "deployment" (real
            sites).
        seeded_noise: true derives noise and samples from `seed`: a repeatable study WITHOUT a guarantee.
        sites_dir: the folder in which simulated sites store policy, key and ledger across runs; null: each run creates
            new files in its run folder.
        ray_address: the address of a running Ray cluster with a node on this machine, "HOST:PORT" or "auto"; null: with
            runtime=ray, a cluster is started for the run, on this machine only.
        sites_per_gpu: the number of sites that share a GPU with runtime=ray; null: the smallest number with which all
            sites train at the same time on this machine's GPUs, and no GPU on a Ray cluster.
    """

    kind: Literal["simulation", "ray", "deployment"] = "simulation"
    seeded_noise: bool = False
    sites_dir: str | None = None
    ray_address: str | None = None
    sites_per_gpu: int | None = None

    def __post_init__(self) -> None:
        for key in ("num_threads", "micro_batch_tokens", "step_mib"):  # 0 for null is allowed in a site.toml only
            if getattr(self, key) is not None:
                check_at_least(key, getattr(self, key), 1)
        Machine.__post_init__(self)
        for key in ("ray_address", "sites_per_gpu"):
            if getattr(self, key) is not None and self.kind != "ray":
                raise ConfigError(key, getattr(self, key), "requires runtime=ray")
        if self.ray_address is not None:
            if not re.fullmatch(r"auto|[^\s/]+:\d+", self.ray_address):
                raise ConfigError("ray_address", self.ray_address, "must be HOST:PORT, or auto")
            if self.num_threads is None:
                bound = "must be the number of CPUs per site on a node if runtime.ray_address is set"
                raise ConfigError("num_threads", None, bound)
        if self.sites_per_gpu is not None:
            check_at_least("sites_per_gpu", self.sites_per_gpu, 1)
            if self.device == "cpu":
                raise ConfigError("sites_per_gpu", self.sites_per_gpu, "must be null with runtime.device=cpu")

    @property
    def devices(self) -> int:
        """The number of devices that share each training step, 1 by default."""
        return self.num_devices or 1
