"""The newest receipt of each site, kept by the lead over all its runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtune.federation.lead import newest_of
from fedtune.privacy.durable import write_durably
from fedtune.privacy.release import Receipt, receipt_from_json
from fedtune.spec import RunError


@dataclass(frozen=True)
class ReceiptBook:
    """A JSON file.  Sent back with the next request, a receipt shows a site that its ledger was lost or put back."""

    path: Path

    def read(self) -> dict[str, Receipt]:
        """Site -> its newest receipt.

        Raises:
            RunError: the file is damaged.
        """
        if not self.path.exists():
            return {}
        try:
            return {site: receipt_from_json(fields) for site, fields in json.loads(self.path.read_bytes()).items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RunError(f"{self.path} is damaged; the sites' last receipts are not known") from error

    def keep(self, receipts: Mapping[str, Receipt]) -> None:
        """Remember those that are newer than what is there."""
        newest = {site: dataclasses.asdict(receipt) for site, receipt in newest_of(self.read(), receipts).items()}
        write_durably(self.path, json.dumps(newest, indent=1).encode() + b"\n")
