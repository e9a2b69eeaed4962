"""The run under attack: its model before and after training, records that it trained on, and others that it never saw.

Both groups must come from one distribution, or an attack finds the difference between the groups and not the training.
A simulation's held-out records, picked by a keyed hash, fulfill this; next best are the lead's test records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.evaluation.scoring import enter_evaluation_mode, iter_batches_by_length
from fedtune.lab.audit.guesses import Values
from fedtune.runs.saved_model import BASE, SavedModel
from fedtune.sites.run_records import LeadRecords, RunRecords
from fedtune.spec import ConfigError
from fedtune.tasks.classification import Classification
from fedtune.tasks.pooled import PooledTask

TUNED = "tuned"
FEWEST_RECORDS = 20  # of each group: fewer cannot tell an attack from chance
_TRIED = 16  # records whose scoring is timed for the price
_LARGEST_LOSS = 1e30


@dataclass(frozen=True)
class Scored:
    """Records as the model sees them before and after training.

    Attributes:
        before: (records,) loss of the base.
        after: (records,) loss of the tuned model.
        embeddings: (records, h) pooled by the tuned model; (records, 0) for a task without them.
        classes: (records,) the true class; -1 for another task.
        predicted: (records,) the class that the tuned model predicts; -1 for another task.
    """

    before: Values
    after: Values
    embeddings: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]

    @property
    def gain(self) -> Values:
        """(records,) the loss before training minus the loss after: the log likelihood ratio of the two models."""
        difference: Values = self.before - self.after
        return difference


class Target:
    """A finished run with members and non-members for an attacker to tell apart.

    Args:
        config: the run's configuration.
        adapter: the folder of its adapter.
        members: a file of records that it trained on; None: those of the simulation.
        others: a file of records that it never saw; None: held-out records, else the lead's test records.

    Attributes:
        members: site -> records that it trained on; the key "" if a file has them.
        others: records that no site trained on.

    Raises:
        ConfigError: a group is not on this machine, or too small.
    """

    def __init__(
        self, config: RunConfig, adapter: Path, *, members: str | None = None, others: str | None = None
    ) -> None:
        self.config = config
        self.members, self.others = _read_groups(config, members, others)
        for option, count in (("--members", self.num_members), ("--others", len(self.others))):
            if count < FEWEST_RECORDS:
                bound = f"must have at least {FEWEST_RECORDS} records: fewer cannot tell an attack from chance"
                raise ConfigError(option, count, bound)
        self.saved = SavedModel(config, {TUNED: adapter})

    @property
    def num_members(self) -> int:
        """The number of records that the run trained on."""
        return sum(map(len, self.members.values()))

    def time_record(self) -> float:
        """Return the seconds that it takes to score one record before and after training, by a short trial."""
        began, tried = time.monotonic(), self.others[:_TRIED]
        self.score_records(tried)
        return (time.monotonic() - began) / len(tried)

    def shrink_groups(self, share: float) -> None:
        """Keep a `share` of each group, chosen at random with the run's seed and without regard to any score."""
        draws = np.random.default_rng(self.config.seed)

        def sample(records: Sequence[Record]) -> list[Record]:
            count = min(len(records), max(FEWEST_RECORDS, int(share * len(records))))
            return [records[place] for place in sorted(draws.permutation(len(records))[:count])]

        self.members = {site: sample(records) for site, records in self.members.items()}
        self.others = sample(self.others)

    def score_records(self, records: Sequence[Record]) -> Scored:
        """Compute what an attacker who has both models sees of each record.

        Args:
            records: at least one, in the columns of the run.
        """
        saved, model, task = self.saved, self.saved.model, self.saved.model.task
        examples = task.tokenize(list(records), saved.tokenizer, data=self.config.data)
        count, found = len(records), dict[str, Values]()
        classes = np.full((2, count), -1, dtype=np.int64)
        embeddings = np.zeros((count, 0), dtype=np.float32)
        pad_id, max_tokens = saved.tokenizer.pad_token_id, self.config.evaluation.max_tokens
        for name in (BASE, TUNED):
            saved.use_adapter(name)
            losses = np.zeros(count)
            with enter_evaluation_mode(model), torch.no_grad():
                for places, batch in iter_batches_by_length(examples, pad_id=pad_id, max_tokens=max_tokens):
                    batch = batch.to(model.device)
                    losses[places] = model.losses(batch).double().cpu().numpy()
                    if name == BASE or not isinstance(task, PooledTask):
                        continue
                    pooled = task.embed(model, batch.input_ids, batch.attention_mask)
                    if not embeddings.size:
                        embeddings = np.zeros((count, pooled.shape[1]), dtype=np.float32)
                    embeddings[places] = pooled.float().cpu().numpy()
                    if isinstance(task, Classification):
                        classes[0, places] = batch.targets.cpu().numpy()
                        classes[1, places] = task.score_embeddings(model, pooled).argmax(dim=1).cpu().numpy()
            # A model that diverged gives no number for some; to the attack that is the largest loss.
            found[name] = np.where(np.isfinite(losses), losses, _LARGEST_LOSS)
        return Scored(found[BASE], found[TUNED], embeddings, classes[0], classes[1])


def fit_to_minutes(target: Target, *, minutes: float, shadows: int, tell: Callable[[str], None]) -> None:
    """Say what the attacks will cost, and shrink the groups of records until they fit into `minutes`.

    The seconds come from a trial of a few records; the heads cost less than the scoring and are not counted.
    """
    each, count = target.time_record(), target.num_members + len(target.others)
    whole = each * count
    share = min(1.0, 60 * minutes / max(whole, 1e-9))
    if share < 1:
        target.shrink_groups(share)
    taken = target.num_members + len(target.others)
    told = f"price: scoring {taken:,} of {count:,} records before and after training, and {shadows} shadow heads"
    tell(f"{told}: about {each * taken:,.0f} s; no shadow model is trained, no site is asked, no budget is spent")


def _read_groups(
    config: RunConfig, members: str | None, others: str | None
) -> tuple[dict[str, list[Record]], list[Record]]:
    if config.runtime.kind == "deployment":
        for option, file in (("--members", members), ("--others", others)):
            if file is None:
                bound = (
                    "must name a file: real sites' records are at the sites, and only a site can attack with its own"
                )
                raise ConfigError(option, None, bound)
    if members is not None and others is not None:
        known = LeadRecords.read(members, config, key="--members").records
        return {"": known}, LeadRecords.read(others, config, key="--others").records
    records = RunRecords(config)
    dealt = dict(zip(config.federation.names, records.dealt.sites, strict=True))
    at_sites = {site: list(dealt[site].training) for site in config.federation.active}
    if members is not None:
        at_sites = {"": LeadRecords.read(members, config, key="--members").records}
    if others is not None:
        return at_sites, LeadRecords.read(others, config, key="--others").records
    unused = [record for site in config.federation.active for record in dealt[site].heldout]
    if not unused and records.test is not None:
        unused = list(records.test.records)
    if not unused:
        bound = "must name a file: the run held out no record, and has no test records"
        raise ConfigError("--others", None, bound)
    return at_sites, unused
