"""Purpose and owner of a release: facts that public registries require and that no training record contains."""

from __future__ import annotations

from fedtune.spec import spec


@spec
class AboutSpec:
    """Facts about a release for a public registry, supplied by a person.

    An empty string means "not given".  No run depends on these facts.

    Attributes:
        curator: the organization that is responsible for the release.
        description: what was trained, for readers without background knowledge.
        intended_use: what the model is for.
        sector: such as health, banking, public administration.
        published: the release date, past or planned.
        access: who receives the release: everybody, some organizations by contract, or nobody outside.
        dynamics: whether the records are static, or dynamic (added to or changed between runs).
        preprocessing: how the records were processed before fedtune read them.
        tuning: how the settings were chosen, and on which records, unless a fedtune search chose them.
        justification: the reason for this privacy unit, this epsilon and this delta.
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
        """The purpose of the training: the intended use, or else the description; None if neither was given."""
        return self.intended_use or self.description or None
