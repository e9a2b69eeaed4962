"""Reading, partitioning, tokenizing and batching of records, each record independently of the others.

Whether a record is used, held out or assigned to a site, and how it is tokenized, depends only on that record (or its
user) and on public settings, so no record can change the treatment of another.
"""

from fedtune.data.batching import Batch, collate
from fedtune.data.partition import group_by_user
from fedtune.data.records import Record
from fedtune.data.shapes import MicroBatch, Shapes
from fedtune.data.tokenization import TextDataset

__all__ = ["Batch", "MicroBatch", "Record", "Shapes", "TextDataset", "collate", "group_by_user"]
