"""Reading, partitioning, tokenising and collating text, each record by itself.

Nothing here lets one record change another's place: whether a record is used, held out or given to
a site, and what its tokens are, is a function of that record, or of its user, alone (and of public settings).
"""

from fedtune.data.batching import Batch, collate
from fedtune.data.partition import users_of
from fedtune.data.records import Record
from fedtune.data.shapes import Part, Shapes
from fedtune.data.tokenise import TextDataset

__all__ = ["Batch", "Part", "Record", "Shapes", "TextDataset", "collate", "users_of"]
