"""The lists of tasks and of inputs; `fedtune/tasks/base.py` and `inputs.py` explain how to add one.

The import is fast: models are built in other modules, because importing torch and its dependencies takes seconds.
"""

from __future__ import annotations

from fedtune.spec import ConfigError, check_one_of
from fedtune.tasks.base import Task
from fedtune.tasks.causal_lm import CausalLM
from fedtune.tasks.classification import Classification
from fedtune.tasks.embedding import Embedding
from fedtune.tasks.image_input import Image
from fedtune.tasks.inputs import INPUTS
from fedtune.tasks.multi_label import MultiLabel
from fedtune.tasks.ordinal import Ordinal
from fedtune.tasks.preference import Preference
from fedtune.tasks.regression import Regression
from fedtune.tasks.survival import Survival
from fedtune.tasks.token_classification import TokenClassification
from fedtune.tasks.votes import Votes

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Classification(), MultiLabel(), Ordinal(), Regression(), Survival(), TokenClassification()),
        *(CausalLM(), Preference(), Embedding(), Votes()),
    )
}
INPUTS["image"] = Image()


def get_task(name: str, given: object = None) -> Task:
    """The task that settings call `name`, with these settings of its own; None: their defaults.

    Raises:
        ConfigError: for `task`, where there is none, or for one of `task_settings`.
    """
    if name == "cox":
        bound = "couples records: each partial likelihood depends on all records still at risk, so clipping "
        raise ConfigError("task", name, f"{bound}would not bound one record's influence; use task=survival")
    check_one_of("task", name, TASKS)
    return TASKS[name] if given is None else TASKS[name].with_settings(given)
