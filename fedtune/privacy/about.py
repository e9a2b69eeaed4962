"""The purpose and the owner of a release, which no record of a run shows and public registries ask for."""

from __future__ import annotations

from fedtune.spec import spec


@spec
class AboutSpec:
    """Facts for a public registry that only a person can give; "": not given.  No run depends on them.

    Attributes:
        curator: the organisation that answers for the release.
        description: what was trained, for readers who know nothing of it.
        intended_use: what the model is for.
        sector: such as health, banking, public administration.
        published: when the model was or will be released.
        access: who gets what is released: everybody, some by contract, or nobody outside.
        dynamics: whether the records are static, or dynamic: added to or changed between runs.
        preprocessing: what was done to the records before fedtune read them.
        tuning: how the settings were chosen, and on which records, where no search of fedtune's did it.
        justification: why this unit, this epsilon and this delta.
    """

    curator: str = ""
    description: str = ""
    intended_use: str = ""
    sector: str = ""
    published: str = ""
    access: str = ""
    dynamics: str = ""
    preprocessing: str = ""
    tuning: str = ""
    justification: str = ""

    @property
    def purpose(self) -> str | None:
        """The purpose of the training: the intended use, else the description; None: nobody gave either."""
        return self.intended_use or self.description or None
