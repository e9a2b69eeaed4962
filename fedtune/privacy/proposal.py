"""The proposal of a run or of a site's own release: the input of every policy decision."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from fedtune.codec import hash_json, require
from fedtune.privacy.run_plan import Plan
from fedtune.spec import spec

_MAX_TEXT = 300
_TEXT = f"must be printable text of 1 to {_MAX_TEXT} characters"

UNVERIFIED = "unverified"  # instead of a SHA-256, if a run names no base model


@spec
class Proposal:
    """A proposed run, the subject of a policy decision.

    Attributes:
        run: the run's identifier.
        lead: public key of the lead, in hex; "" for a site's own release, which no lead can propose.
        dataset: id of the site's data set to train on.
        task: name of the training task.
        base_model: SHA-256 of the base model's weights; "unverified" if the run names none.
        target_modules: modules that receive an adapter.
        rank: rank of the LoRA matrices; 1 for adapters without a rank.
        train_head: whether a task head is also trained and released.
        seeded_noise: whether the noise comes from a seed, as in studies without a guarantee.
        dtype: floating-point or quantized format of the frozen weights.
        lora_scale: scaling factor of the adapter's matrix product. Rounding error, which the accounting does not cover,
            grows with `lora_scale` and `head_scale`.
        head_scale: scaling factor of the task head's scores.
        num_sites: number of participating sites according to the lead. Reports mark this claim as unverified.
        plan: the parameters that determine the cost of the releases.
        adapter: type of adapter, such as "lora".
        algorithm: federated algorithm, such as "fedavg" or "scaffold": the site's computations around its noisy steps.
            No algorithm changes the guarantee.
        start_adapter: digest of the initial adapter, which an earlier run trained; "" for a new adapter.
        ranks: site -> the rank that it trains, if the sites' ranks differ; empty: every site trains `rank`.
    """

    run: str
    lead: str
    dataset: str
    task: str
    base_model: str
    target_modules: tuple[str, ...]
    rank: int
    train_head: bool
    seeded_noise: bool
    num_sites: int
    plan: Plan
    dtype: str
    lora_scale: float
    head_scale: float
    adapter: str = "lora"
    algorithm: str = "fedavg"
    start_adapter: str = ""
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # A proposal comes from a server: the decoder checks types, this method formats, and the policy values.
        for name in (
            "run",
            *(["lead"] if self.lead else []),
            "dataset",
            "task",
            "base_model",
            "dtype",
            "adapter",
            "algorithm",
        ):
            require(name, getattr(self, name), _is_text(getattr(self, name)), _TEXT)
        noise = self.plan.noise
        require("plan.noise", noise, noise == "gaussian" or not self.lead, "must be gaussian in a lead's run")
        modules = self.target_modules
        right = all(map(_is_text, modules)) and len(set(modules)) == len(modules)
        require("target_modules", modules, right, "must be distinct module names")
        for name in ("rank", "num_sites"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "must be a whole number of at least 1")
        for name in ("lora_scale", "head_scale"):
            value = getattr(self, name)
            # 1 and 1.0 would have different digests
            right = type(value) is float and math.isfinite(value) and value >= 0
            require(name, value, right, "must be a number of at least 0")
        right = re.fullmatch(r"([0-9a-f]{64})?", self.start_adapter, re.ASCII) is not None
        require("start_adapter", self.start_adapter, right, "must be 64 lower-case hexadecimal digits, or empty")
        right = all(_is_text(site) and 1 <= rank <= self.rank for site, rank in self.ranks.items())
        require("ranks", dict(self.ranks), right, f"must be whole numbers from 1 to the rank {self.rank}, by site")

    def find_rank(self, site: str) -> int | None:
        """Return the rank that a site trains; None: all of `rank`, and the site's updates are complete."""
        return self.ranks.get(site)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON object that `digest` hashes. `codec.decode` reads this object."""
        fields = dataclasses.asdict(self)
        for key, before in (("start_adapter", ""), ("adapter", "lora"), ("algorithm", "fedavg"), ("ranks", {})):
            if fields[key] == before:
                del fields[key]  # defaults are omitted, so that the encoding is unique
        return fields | {"target_modules": list(self.target_modules), "plan": self.plan.to_json()}

    def digest(self) -> str:
        """Return the SHA-256 of the proposal's canonical JSON, in hex."""
        return hash_json(self.to_json())

    def with_noise(self, noise_multiplier: float) -> Proposal:
        """Return a copy of the proposal whose plan has another noise multiplier."""
        return dataclasses.replace(self, plan=self.plan.with_noise(noise_multiplier))


def _is_text(value: str) -> bool:
    # A lone surrogate is a valid str, but cannot be encoded.
    return 1 <= len(value) <= _MAX_TEXT and value.isprintable()
