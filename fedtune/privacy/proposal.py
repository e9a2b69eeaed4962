"""A lead's proposal to a site, or a site's own release: everything that the site's policy decides on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from fedtune.codec import require
from fedtune.privacy.run_plan import Plan
from fedtune.spec import spec

_MOST_TEXT = 300
_TEXT = f"must be printable text of 1 to {_MOST_TEXT} characters"

UNVERIFIED = "unverified"  # stands for the base model's SHA-256 where a run names none


@spec
class Proposal:
    """A proposed run, on which a site decides.

    Attributes:
        run: the run's identifier.
        lead: public key of the lead that proposes the run, in hex; "" for a release of the site's own, which no lead
            can propose.
        dataset: id of the site's data set to train on.
        task: name of the training task.
        base_model: SHA-256 of the base model's weights; "unverified" if the run names none.
        target_modules: modules that receive an adapter.
        rank: of the LoRA matrices; 1 for adapters without a rank.
        train_head: whether a task head is trained and released too.
        seeded_noise: whether the noise comes from a seed: a study without a guarantee.
        dtype: number format of the frozen weights.
        lora_scale: the factor of an adapter's product of matrices; `head_scale` is the factor of the head's scores.
            Rounding error, which the accounting does not cover, grows with both.
        num_sites: the number of participating sites according to the lead: an unverified claim, shown as such.
        plan: the parameters that determine the cost of the releases.
        adapter: the kind of adapter, such as "lora".
        algorithm: what the site does around its noisy steps, such as "fedavg" or "scaffold"; none of them changes a
            guarantee.
        start_adapter: digest of the earlier adapter from which the run starts; "" for a new adapter.
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

    def __post_init__(self) -> None:
        # A proposal comes from a server: the reader checks types, this the form of each value, the policy its content.
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
            right = type(value) is float and math.isfinite(value) and value >= 0  # 1 would have another digest than 1.0
            require(name, value, right, "must be a number of at least 0")
        right = re.fullmatch(r"([0-9a-f]{64})?", self.start_adapter, re.ASCII) is not None
        require("start_adapter", self.start_adapter, right, "must be 64 lower-case hexadecimal digits, or empty")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON in the canonical form that `digest` hashes; `codec.decode` reads it."""
        fields = dataclasses.asdict(self)
        for key, before in (("start_adapter", ""), ("adapter", "lora"), ("algorithm", "fedavg")):
            if fields[key] == before:
                del fields[key]  # what is usual is not said, so that one proposal has one digest
        return fields | {"target_modules": list(self.target_modules), "plan": self.plan.to_json()}

    def digest(self) -> str:
        """Return the SHA-256 of the proposal's canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _is_text(value: str) -> bool:
    # A lone half of a surrogate pair is a text to Python, but cannot be written down.
    return 1 <= len(value) <= _MOST_TEXT and value.isprintable()
