"""Reading, partitioning, tokenising and collating text, each record by itself.

Nothing here lets one record change another's place: whether a record is used, held out or given to
a site, and what its tokens are, is a function of that record, or of its user, alone (and of public settings).
"""

from fedtune.data.batching import Batch, collate, micro_batches
from fedtune.data.partition import (
    PartitionSpec,
    assign_site,
    is_heldout,
    is_selected,
    partition_records,
    split_heldout,
    unit_hash,
    users_of,
)
from fedtune.data.records import Record, iter_records, record_key, resolve_file
from fedtune.data.shapes import Part, Shapes
from fedtune.data.spec import DataSpec
from fedtune.data.tokenise import UNSUPERVISED, TextDataset

__all__ = [
    "UNSUPERVISED",
    "Batch",
    "DataSpec",
    "Part",
    "PartitionSpec",
    "Record",
    "Shapes",
    "TextDataset",
    "assign_site",
    "collate",
    "is_heldout",
    "is_selected",
    "iter_records",
    "micro_batches",
    "partition_records",
    "record_key",
    "resolve_file",
    "split_heldout",
    "unit_hash",
    "users_of",
]
