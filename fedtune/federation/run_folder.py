"""The layout of a run folder, `runs/<name>/`: which file lies where.

It imports next to nothing, so that a command that only looks for a file waits for no torch.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from fedtune.spec import ConfigError

_MOST_NAMED = 10
LABEL = "label.svg"
"""The privacy label, beside an adapter's card."""
ASKED = "asked.jsonl"
"""The journal of rounds that were asked for, in the folder of a run's checkpoints."""


def checkpoint_name(round: int | None = None) -> str:
    """The name of a round's checkpoint, `round-0003.safetensors`; without a round, the pattern of all."""
    return f"round-{'*' if round is None else f'{round:04d}'}.safetensors"


def saved_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run's checkpoints, oldest first."""
    # By length first: after round 9999 come names with a digit more.
    return sorted(folder.glob(checkpoint_name()), key=lambda path: (len(path.name), path.name))


def run_folders_near(folder: Path) -> str:
    """The end of a message about a folder that holds no run: the one that may be meant, or those that there are.

    They are looked for beside it, in it, and in runs/; empty where there are none.
    """
    for place in filter(os.path.isdir, (folder.parent, folder, Path("runs"))):
        named = {path.parent.name: str(path.parent) for path in sorted(place.glob("*/config.yaml"))}
        if alike := difflib.get_close_matches(folder.name, named, n=1):
            return f"; did you mean {named[alike[0]]}?"
        if named:
            more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
            return f"; there are {', '.join(list(named.values())[:_MOST_NAMED])}{more}"
    return ""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run; none of them needs to be there."""

    path: Path

    @property
    def config(self) -> Path:
        """The composed configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def result(self) -> Path:
        """What the run came to: `fedtune.runs.results`."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """The log; locked by the process that runs the folder."""
        return self.path / "log.txt"

    @property
    def adapter(self) -> Path:
        """The folder of the final adapter, with the task head beside it."""
        return self.path / "adapter"

    def finished_adapter(self) -> Path:
        """`adapter`, where the run has finished and anybody may use it.

        Raises:
            ConfigError: it has not, or is an audit's.
        """
        if not self.adapter.is_dir():
            raise ConfigError("run folder", str(self.path), "must hold a finished adapter/; resume the run first")
        if self.audit_mark.exists():
            mark = self.audit_mark.name
            bound = f"is an audit: made-up records were planted in its training data ({mark}); its scores mean nothing"
            raise ConfigError("run folder", str(self.path), bound)
        return self.adapter

    @property
    def checkpoints(self) -> Path:
        """The folder of what a resumed run needs: `fedtune.federation.lead.Checkpoints`."""
        return self.path / "checkpoints"

    @property
    def asked(self) -> Path:
        """The journal of rounds that were asked for."""
        return self.checkpoints / ASKED

    @property
    def sites(self) -> Path:
        """The folder of a simulation's sites, unless they are kept elsewhere."""
        return self.path / "sites"

    @property
    def environment(self) -> Path:
        """What the run was made on and with."""
        return self.path / "environment.json"

    @property
    def answers(self) -> Path:
        """What each real site answered last."""
        return self.path / "answers.json"

    @property
    def site_reports(self) -> Path:
        """The folder of the reports that sites released."""
        return self.path / "site_reports"

    @property
    def selection(self) -> Path:
        """That the run was picked in a search: `fedtune.privacy.selection`."""
        return self.path / "selection.json"

    @property
    def audit(self) -> Path:
        """What an audit of the run found."""
        return self.path / "audit.json"

    @property
    def audit_mark(self) -> Path:
        """There from before an audit trains: canaries are among the training data."""
        return self.path / "AUDIT.txt"

    @property
    def saved_checkpoints(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return saved_checkpoints(self.checkpoints)
