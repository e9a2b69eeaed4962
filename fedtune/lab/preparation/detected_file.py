"""What was detected in a data file: its kind, the role of each column, and the options that choose other columns."""

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
"""In words, and the experiment of conf/ that such records begin in."""
OPEN = "???"  # in place of a setting that a person must give
_ROLES = """text label prompt completion system messages chosen rejected tokens tags spans time event image anchor
positive negative other user site"""
_OTHERWISE = {"context": "input", "score": "target", "text-pair": "text_pair"}
OPTIONS: Mapping[str, str] = {role: role for role in _ROLES.split()} | _OTHERWISE
"""Role of a column: on the command line, and in settings."""
OPTION_OF = {role: option for option, role in OPTIONS.items()} | {"labels": "label"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectedFile:
    """The detected kind of a file and the roles of its columns."""

    path: Path
    rows: int  # that can be read
    faults: Sequence[DataError]  # what is wrong with the first of the others
    num_faults: int  # all of them
    columns: Mapping[str, DataColumn]
    first: Sequence[Row]
    kind: Kind
    roles: Mapping[str, str]  # role to column; `user` where a column says whose each record is
    why: Mapping[str, str]  # by role, why this column has it
    notes: tuple[str, ...]  # what else the person should know of the columns
    features: tuple[str, ...] = ()  # columns of a table that are a record's vector

    @property
    def labels(self) -> dict[str, int]:
        """Counts of labels, or of entities by type, most frequent first; empty for kinds without labels."""
        column_of = {role: self.columns[name] for role, name in self.roles.items()}
        if marked := column_of.get("tags") or column_of.get("spans"):
            return dict(marked.entities.most_common())
        if several := column_of.get("labels"):
            return dict(several.parts[several.separator or "["].most_common())
        return dict(column_of["label"].labels.most_common()) if "label" in column_of else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `data` that describe the answers, apart from the labels."""
        if "target" in self.roles:
            return {"target_range": self.columns[self.roles["target"]].scale or OPEN}
        if "event" in self.roles:
            values = self.columns[self.roles["event"]].event_values
            return {} if values in (("0", "1"), ("false", "true")) else {"event_values": values}
        separator = self.columns[self.roles["labels"]].separator if "labels" in self.roles else None
        return {"label_separator": separator} if separator not in (None, "[") else {}

    @property
    def options(self) -> Iterator[tuple[str, str, str, str]]:
        """(role, column, reason, option that selects another column) for each role."""
        for role, one in ((role, self.columns[name]) for role, name in self.roles.items()):
            more = f"; it holds numbers from {one.least:g} to {one.most:g}" if role in ("time", "target") else ""
            yield role, one.name, self.why[role] + more, f"--{OPTION_OF[role]} COLUMN"

    @property
    def unread(self) -> Iterator[tuple[str, str]]:
        """(column, reason) for each column that no run reads."""
        for one in self.columns.values():
            if one.name not in (*self.roles.values(), *self.features):
                why, teaches = one.explain("unread"), {"prompt", "messages"} & set(self.roles)
                yield one.name, why.replace("--text-pair", "--context") if teaches else why
            elif one.is_chat:
                yield from ((f"{one.name}: {key}", "runs ignore it in a turn") for key in one.beside)
