"""Result of detection in a data file: kind, column roles, and options that override the roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.data.text_rows import Row
from fedtune.lab.preparation.columns import WORDS, DataColumn
from fedtune.spec import DataError

Kind: TypeAlias = str  # one of `KINDS`
KINDS: Mapping[Kind, Sequence[str]] = {kind: said.split(" = ") for kind, said in WORDS["kind"].items()}
"""Description and base experiment in conf/ by kind of file."""
OPEN = "???"  # mandatory setting without a value
_ROLES = """text label prompt completion system messages chosen rejected tokens tags spans time event image anchor
positive negative other user site"""
_OTHERWISE = {"context": "input", "score": "target", "text-pair": "text_pair"}
OPTIONS: Mapping[str, str] = {role: role for role in _ROLES.split()} | _OTHERWISE
"""Column roles in settings by command-line option."""
OPTION_OF = {role: option for option, role in OPTIONS.items()} | {"labels": "label"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectedFile:
    """The detected kind of a file and the roles of its columns."""

    path: Path
    rows: int  # number of readable rows
    faults: Sequence[DataError]  # errors of the first unreadable rows
    num_faults: int  # number of unreadable rows
    columns: Mapping[str, DataColumn]
    first: Sequence[Row]
    kind: Kind
    roles: Mapping[str, str]  # role to column; includes `user` if a column contains person ids
    why: Mapping[str, str]  # role to the reason for its column
    notes: tuple[str, ...]  # notes about the columns, for the user
    features: tuple[str, ...] = ()  # feature columns of a table

    @property
    def labels(self) -> dict[str, int]:
        """Number of records per label, or of entities per type, in descending order; empty without labels."""
        column_of = {role: self.columns[name] for role, name in self.roles.items()}
        if marked := column_of.get("tags") or column_of.get("spans"):
            return dict(marked.entities.most_common())
        if several := column_of.get("labels"):
            return dict(several.parts[several.separator or "["].most_common())
        return dict(column_of["label"].labels.most_common()) if "label" in column_of else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `data` that describe the answers, except `data.labels`."""
        if "target" in self.roles:
            return {"target_range": self.columns[self.roles["target"]].scale or OPEN}
        if "event" in self.roles:
            values = self.columns[self.roles["event"]].event_values
            return {} if values in (("0", "1"), ("false", "true")) else {"event_values": values}
        separator = self.columns[self.roles["labels"]].separator if "labels" in self.roles else None
        return {"label_separator": separator} if separator not in (None, "[") else {}

    @property
    def options(self) -> Iterator[tuple[str, str, str, str]]:
        """Iterator over (role, column, reason, option that overrides the column)."""
        for role, one in ((role, self.columns[name]) for role, name in self.roles.items()):
            more = f"; it holds numbers from {one.least:g} to {one.most:g}" if role in ("time", "target") else ""
            yield role, one.name, self.why[role] + more, f"--{OPTION_OF[role]} COLUMN"

    @property
    def unread(self) -> Iterator[tuple[str, str]]:
        """Iterator over (column, reason) for unused columns."""
        for one in self.columns.values():
            if one.name not in (*self.roles.values(), *self.features):
                why, teaches = one.explain("unread"), {"prompt", "messages"} & set(self.roles)
                yield one.name, why.replace("--text-pair", "--context") if teaches else why
            elif one.is_chat:
                yield from ((f"{one.name}: {key}", "runs ignore it in a turn") for key in one.beside)
