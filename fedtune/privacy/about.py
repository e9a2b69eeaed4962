"""What a release is for, and whose it is: what no record of a run shows, and public registries ask for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fedtune.spec import ConfigError, spec


@spec
class AboutSpec:
    """What only a person can say of a run, for an entry in a public registry of such runs; null: not said.

    Attributes:
        curator: the organisation that answers for the release.
        description: what was trained, for readers who know nothing of it.
        intended_use: what the model is for.
        sector: such as health, banking, public administration.
        published: when the model was or will be released.
        access: who gets the model: "public", "restricted" (on request, by contract) or "internal".
        dynamics: whether the records are "static", or "dynamic": added to or changed between runs.
        preprocessing: what was done to the records before fedtune read them.
        tuning: how the settings were chosen, and on which records, where no search of fedtune's did it.
        justification: why this unit, this epsilon and this delta.
    """

    curator: str | None = None
    description: str | None = None
    intended_use: str | None = None
    sector: str | None = None
    published: str | None = None
    access: Literal["public", "restricted", "internal"] | None = None
    dynamics: Literal["static", "dynamic"] | None = None
    preprocessing: str | None = None
    tuning: str | None = None
    justification: str | None = None

    def __post_init__(self) -> None:
        for name, said in dataclasses.asdict(self).items():
            if said is not None and not said.strip():
                raise ConfigError(name, said, "must say something; null is for what nobody has said")
