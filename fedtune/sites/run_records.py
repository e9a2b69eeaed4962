"""The records that the person who starts a run may look at, read before there is a model.

They are the lead's, and simulated sites'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.faults import NONE_LEFT_OUT, LeftOut
from fedtune.data.load import Dealt, chosen_rows, deal, lead_records
from fedtune.privacy.mechanism import Unit
from fedtune.tasks import task_named


@dataclass(frozen=True, slots=True)
class LeadRecords:
    """Records that the lead may look at, and what of their file could not be used."""

    records: list[Record]
    left_out: LeftOut = NONE_LEFT_OUT

    @classmethod
    def read(
        cls, file: str, config: RunConfig, *, key: str, rows: int | None = None, unit: Unit = "record"
    ) -> LeadRecords:
        """`rows` records of the file that the setting `key` names; with unit "user" they name their users.

        Raises:
            DataError: the file cannot be read, or has rows that cannot be used where the settings leave none out.
        """
        task, data = task_named(config.task), config.data
        columns, fault = task.columns(data, unit=unit), task.fault(data)
        records, left_out = lead_records(file, columns=columns, key=key, fault=fault, leave_out=data.skips_unusable)
        return cls(chosen_rows(records, rows), left_out)


class RunRecords:
    """A run's records, each file read once."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def read(self) -> None:
        """Read all there is, so that what is wrong with a file is said before a model is loaded.

        Raises:
            DataError: as `LeadRecords.read`, or a site would have no record.
        """
        _ = self.validation, self.test
        if self._config.runtime.kind != "deployment":
            _ = self.dealt

    @cached_property
    def dealt(self) -> Dealt:
        """All records of a simulation, dealt out."""
        return deal_out(self._config)

    @cached_property
    def validation(self) -> LeadRecords | None:
        """The lead's validation records, if it has any."""
        data = self._config.data
        if data.validation_fraction:
            return LeadRecords(chosen_rows(self.dealt.validation, data.validation_rows))
        return self._of(data.validation_file, rows=data.validation_rows, key="data.validation_file")

    @cached_property
    def test(self) -> LeadRecords | None:
        """The lead's test records, if it has any."""
        data = self._config.data
        if data.test_fraction:
            return LeadRecords(chosen_rows(self.dealt.test, data.test_rows))
        return self._of(data.test_file, rows=data.test_rows, key="data.test_file")

    def _of(self, file: str | None, *, rows: int | None, key: str) -> LeadRecords | None:
        return None if file is None else LeadRecords.read(file, self._config, key=key, rows=rows)


def deal_out(config: RunConfig) -> Dealt:
    """Deal out the records of a simulation."""
    task, unit = task_named(config.task), config.privacy.unit
    columns = task.columns(config.data, partition=True, unit=unit)
    fault = task.fault(config.data)
    return deal(config.data, columns, config.federation.names, seed=config.seed, unit=unit, fault=fault)
