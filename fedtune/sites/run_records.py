"""The records that the person who starts a run may look at, read before there is a model.

They are the lead's, and simulated sites'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.faults import NONE_LEFT_OUT, LeftOut
from fedtune.data.load import Dealt, chosen_rows, deal, lead_records, split_key
from fedtune.data.partition import assign_site
from fedtune.data.records import NO_VALUE, column_values
from fedtune.evaluation.spec import no_test_records
from fedtune.privacy.mechanism import Unit
from fedtune.spec import DataError
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

    @classmethod
    def with_users(cls, config: RunConfig, file: str) -> tuple[LeadRecords, Unit]:
        """The records of a file, with users where the run's unit is the user and the file names them."""
        if config.privacy.unit == "user":
            try:
                return cls.read(file, config, key="--data", unit="user"), "user"
            except DataError as error:
                if error.value != "absent":
                    raise
        return cls.read(file, config, key="--data"), "record"

    @classmethod
    def to_score(cls, config: RunConfig, file: str | None) -> LeadRecords:
        """The records of a file, or those that the run keeps for its test."""
        if file is not None:
            return cls.read(file, config, key="--data")
        if (own := RunRecords(config).test) is None:
            raise no_test_records()
        return own


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


def sites_of(config: RunConfig, records: Sequence[Record]) -> list[str] | None:
    """The simulated site that each test record would be at, dealt out as the training records were.

    None where that says nothing of a record: sites whose records are alike, or have files of their own.

    Raises:
        DataError: the records' file lacks the column that the partition goes by.
    """
    partition, names = config.data.partition, config.federation.names
    match partition.kind:
        case "column":
            values = column_values(records, config.data.columns["site"], key="data.columns.site")
            known = {value: names[site] for value, site in partition.sites.items()}
            return [known.get(value, NO_VALUE) for value in values]
        case "dirichlet":
            labels = column_values(records, config.data.columns["label"], key="data.columns.label")
            key = split_key(config.seed)
            labelled = (
                Record({**record.fields, "label": label}) for record, label in zip(records, labels, strict=True)
            )
            place = partial(assign_site, spec=partition, num_sites=len(names), key=key)
            return [names[place(record)] for record in labelled]
    return None
