"""The attacked run: its model before and after training, members of the training data, and non-members.

Members and non-members must have the same distribution; otherwise an attack measures the distribution shift instead of
memorization.  The held-out records of a simulation, selected by a keyed hash, have the same distribution; the lead's
test records are the second-best choice.
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
MIN_RECORDS = 20  # minimum size of a group; smaller groups cannot distinguish an attack from chance
_TRIED = 16  # number of records in the timing estimate
_LARGEST_LOSS = 1e30


@dataclass(frozen=True)
class ScoredRecords:
    """Losses and outputs of the model for a group of records, before and after training.

    Attributes:
        before: (records,) losses of the base model.
        after: (records,) losses of the tuned model.
        embeddings: (records, h) pooled embeddings of the tuned model; (records, 0) for tasks without embeddings.
        classes: (records,) true classes; -1 for tasks without classes.
        predicted: (records,) classes predicted by the tuned model; -1 for tasks without classes.
    """

    before: Values
    after: Values
    embeddings: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]

    @property
    def gain(self) -> Values:
        """(records,) loss before training minus loss after training: the log-likelihood ratio of the two models."""
        difference: Values = self.before - self.after
        return difference


class Target:
    """A finished run with groups of members and non-members.

    Args:
        config: the run's configuration.
        adapter: the adapter's folder.
        members: a file of training records; None: the simulation's records.
        others: a file of non-members; None: held-out records, otherwise the lead's test records.

    Attributes:
        members: site -> its training records; the key is "" for records from a file.
        others: records that no site trained on.

    Raises:
        ConfigError: a group is not on this machine, or is too small.
    """

    def __init__(
        self, config: RunConfig, adapter: Path, *, members: str | None = None, others: str | None = None
    ) -> None:
        self.config = config
        self.members, self.others = _read_groups(config, members, others)
        for option, count in (("members", self.num_members), ("others", len(self.others))):
            if count < MIN_RECORDS:
                bound = f"must have at least {MIN_RECORDS} records to distinguish an attack from chance"
                raise ConfigError(option, count, bound)
        self.saved = SavedModel(config, {TUNED: adapter})

    @property
    def num_members(self) -> int:
        """Total number of members at all sites."""
        return sum(map(len, self.members.values()))

    def fit_to_minutes(self, minutes: float, *, shadows: int, tell: Callable[[str], None]) -> None:
        """Report the estimated time of the attacks, and subsample the groups to fit into `minutes`.

        The estimate is extrapolated from a few records, and ignores the shadow models, which cost less than scoring.
        The sample is random with the run's seed, and independent of scores.
        """
        began, tried, count = time.monotonic(), self.others[:_TRIED], self.num_members + len(self.others)
        self.score_records(tried)
        each = (time.monotonic() - began) / len(tried)  # seconds to score a record before and after training
        share, draws = min(1.0, 60 * minutes / max(each * count, 1e-9)), np.random.default_rng(self.config.seed)

        def sample(records: Sequence[Record]) -> list[Record]:
            kept = min(len(records), max(MIN_RECORDS, int(share * len(records))))
            return [records[place] for place in sorted(draws.permutation(len(records))[:kept])]

        if share < 1:
            self.members = {site: sample(records) for site, records in self.members.items()}
            self.others = sample(self.others)
        taken = self.num_members + len(self.others)
        told = f"scoring {taken:,} of {count:,} records before and after training, and fitting {shadows} shadow heads"
        tell(f"{told}: about {each * taken:,.0f} s; no run is started, and no privacy budget is spent")

    def score_records(self, records: Sequence[Record]) -> ScoredRecords:
        """Compute losses, embeddings and predictions of both models for at least one record."""
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
                    pooled = model.embed(batch)
                    if not embeddings.size:
                        embeddings = np.zeros((count, pooled.shape[1]), dtype=np.float32)
                    embeddings[places] = pooled.float().cpu().numpy()
                    if isinstance(task, Classification):
                        classes[0, places] = batch.targets.cpu().numpy()
                        classes[1, places] = task.score_embeddings(model, pooled).argmax(dim=1).cpu().numpy()
            # A diverged model gives NaN for some records; the attack treats them as the largest loss.
            found[name] = np.where(np.isfinite(losses), losses, _LARGEST_LOSS)
        return ScoredRecords(found[BASE], found[TUNED], embeddings, classes[0], classes[1])


def _read_groups(
    config: RunConfig, members: str | None, others: str | None
) -> tuple[dict[str, list[Record]], list[Record]]:
    files = {"members": members, "others": others}
    for option in [one for one, file in files.items() if file is None and config.runtime.kind == "deployment"]:
        bound = "is missing: pass a file, or let the sites run this attack, since only they have their records"
        raise ConfigError(option, None, bound)
    given = {key: LeadRecords.read(file, config, key=key).records for key, file in files.items() if file is not None}
    if len(given) == 2:
        return {"": given["members"]}, given["others"]
    records = RunRecords(config)
    dealt = dict(zip(config.federation.names, records.dealt.sites, strict=True))
    at_sites = {site: list(dealt[site].training) for site in config.federation.active}
    if members is not None:
        at_sites = {"": given["members"]}
    if others is not None:
        return at_sites, given["others"]
    unused = [record for site in config.federation.active for record in dealt[site].heldout]
    if not unused and records.test is not None:
        unused = list(records.test.records)
    if not unused:
        bound = "is missing: pass a file, because the run has no held-out records and no test records"
        raise ConfigError("others", None, bound)
    return at_sites, unused
