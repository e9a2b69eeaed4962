"""What a resumed run needs, written whole after every round."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedtune.federation.lead import LeadState, RoundResult
from fedtune.model import Adapter
from fedtune.privacy.durable import write_durably
from fedtune.privacy.release import Receipt
from fedtune.spec import ConfigError, RunError

_KEPT = 2


class Checkpoints:
    """The folder `checkpoints/` of a run: `round-0003.safetensors` and the journal of rounds that were asked for.

    Args:
        folder: made when missing.
        config_sha256: digest of the configuration; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, config_sha256: str) -> None:
        self._folder = folder
        self._config = config_sha256
        self._asked = folder / "asked.jsonl"

    def ask(self, round: int, sites: list[str]) -> None:
        """Note, before a request is sent, that `sites` may be charged for `round`."""
        line = json.dumps({"round": round, "sites": sites}).encode() + b"\n"
        write_durably(self._asked, b"".join(self._whole_lines()) + line)

    def save(self, state: LeadState) -> None:
        """Write `state`; a crash leaves the checkpoint before it."""
        tensors = {f"adapter/{name}": value for name, value in state.adapter.tensors.items()}
        tensors |= {f"strategy/{name}": np.asarray(value) for name, value in state.strategy.items()}
        about = {
            "config_sha256": self._config,
            "round": state.round,
            "adapter": list(state.adapter.tensors),
            "strategy": list(state.strategy),
            "receipts": {site: asdict(receipt) for site, receipt in state.receipts.items()},
            "unanswered": dict(state.unanswered),
            "rounds": [asdict(result) for result in state.rounds],
            "seconds": state.seconds,
            "metrics_before": dict(state.metrics_before),
        }
        write_durably(self._path(state.round), save_tensors(tensors, metadata={"fedtune": json.dumps(about)}))
        for old in sorted(self._folder.glob("round-*.safetensors"))[:-_KEPT]:
            old.unlink()

    def load(self) -> LeadState:
        """The newest state, with every round that was asked for after it counted as unanswered.

        Raises:
            ConfigError: there is no checkpoint, or it belongs to another configuration.
            RunError: the newest checkpoint is damaged.
        """
        found = sorted(self._folder.glob("round-*.safetensors"))
        if not found:
            raise ConfigError("resume", str(self._folder.parent), "must be a run folder with a checkpoint")
        data = found[-1].read_bytes()
        try:
            tensors = load_tensors(data)
            size = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedtune"])
            other = about["config_sha256"] != self._config
            state = LeadState(
                round=about["round"],
                adapter=Adapter({name: tensors[f"adapter/{name}"] for name in about["adapter"]}),
                strategy={name: tensors[f"strategy/{name}"] for name in about["strategy"]},
                receipts={site: Receipt(**fields) for site, fields in about["receipts"].items()},
                unanswered=about["unanswered"],
                rounds=[_round(fields) for fields in about["rounds"]],
                seconds=about["seconds"],
                metrics_before=about["metrics_before"],
            )
        except Exception as error:
            raise RunError(f"checkpoint {found[-1]} is damaged: {error}") from error
        if other:
            raise ConfigError("resume", str(self._folder.parent), "was made with another configuration")
        return self._with_unanswered(state)

    def _with_unanswered(self, state: LeadState) -> LeadState:
        try:
            for asked in map(json.loads, self._whole_lines()):
                if asked["round"] > state.round:
                    state = state.asked(asked["sites"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RunError(f"{self._asked} is damaged; which rounds were asked for is not known") from error
        return state

    def _whole_lines(self) -> list[bytes]:
        """A line without its end was cut short by a crash, before any request of its round was sent."""
        lines = self._asked.read_bytes().splitlines(keepends=True) if self._asked.exists() else []
        return [line for line in lines if line.endswith(b"\n")]

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}.safetensors"


def _round(fields: dict[str, Any]) -> RoundResult:
    """The result that `asdict` and JSON made `fields` of: both write tuples as lists."""
    scores = {site: tuple(values) for site, values in fields["site_scores"].items()}
    return RoundResult(**{**fields, "sites": tuple(fields["sites"]), "site_scores": scores})
