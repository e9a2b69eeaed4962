"""Tasks, one module each, with their registry and the public names for custom tasks.

A custom task is a subclass of `Task`, or of `PooledTask` for a head on one embedding per record.  It needs only the
names below; docs/own_task.md has an example.  Importing them does not import torch.
"""

from fedtune.data.batching import Batch
from fedtune.data.records import Record
from fedtune.data.spec import DataSpec
from fedtune.data.tokenization import UNSUPERVISED, Targets, TextDataset, Tokenizer, compute_max_characters, encode
from fedtune.model.spec import TaskModelSpec
from fedtune.spec import ConfigError, DataError, check_at_least, check_fraction, check_positive, spec
from fedtune.tasks.base import Draws, FirstTarget, Ids, Model, Task, read_target_number, require_target_range
from fedtune.tasks.inputs import mean_pool
from fedtune.tasks.measures import Floats
from fedtune.tasks.pooled import PooledTask, TargetOf
from fedtune.tasks.registry import register

__all__ = ["UNSUPERVISED", "Batch", "ConfigError", "DataError", "DataSpec", "Draws", "FirstTarget", "Floats", "Ids"]
__all__ += ["Model", "PooledTask", "Record", "TargetOf", "Targets", "Task", "TaskModelSpec", "TextDataset", "Tokenizer"]
__all__ += ["check_at_least", "check_fraction", "check_positive", "compute_max_characters", "encode", "mean_pool"]
__all__ += ["read_target_number", "register", "require_target_range", "spec"]
