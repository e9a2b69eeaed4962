"""Write docs/configuration.md from the settings classes and their docstrings.

python tools/write_configuration.py            writes the page
python tools/write_configuration.py --check    exit code 1 if the page is out of date
"""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap
from pathlib import Path

from fedtune import config
from fedtune.api.compose import compose_run
from fedtune.api.config_groups import list_config_groups, list_options
from fedtune.data.features import FeatureSpec
from fedtune.data.spec import PartitionSpec
from fedtune.tasks.registry import TASKS
from fedtune.training.algorithms.algorithm_registry import ALGORITHMS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
GROUPS = (
    "model",
    "data",
    "lora",
    "head",
    "privacy",
    "training",
    "federation",
    "evaluation",
    "runtime",
    "tracking",
    "report",
    "cost",
    "public",
)

HEAD = """\
# Configuration

<!-- Written by tools/write_configuration.py from the settings classes; `make test` checks that it is up to date. -->

[Hydra](hydra.md) composes the settings of `fedtune simulate` from `conf/`: choose an option of a group with
`group=option` (`privacy=none`, `experiment=debug`), change one value with `key=value` (`privacy.epsilon=3`), sweep with
`-m key=1,2,3`. The defaults below are those of the experiment `banks_intents`. If a value breaks a bound, the command
ends with exit code 2 and a message that names key, value and bound.

**Simulations only**: `data.partition`, `federation.num_sites`, `federation.site_names` and
`federation.participants`. `fedtune run` takes `sites=[north,south]` in their place, and what the roster says of these
sites; it refuses the last three, as it does `runtime`.
"""


def page() -> str:
    """The whole page."""
    default = compose_run(["name=example"])
    parts = [HEAD, "## Groups\n", _options(), "## The run\n", _table("", config.RunConfig, default, skip=GROUPS)]
    parts += ["## task_settings\n", "A task has the settings of its table here, and the others have none.\n"]
    for task in (task for task in TASKS.values() if task.settings):
        parts += [f"`task={task.name}`: {_summary(task.settings)}", _table("task_settings.", task.settings, task.own)]
    for group in GROUPS:
        spec = type(getattr(default, group))
        parts += [f"## {group}\n", _summary(spec), _table(f"{group}.", spec, getattr(default, group))]
        if group == "data":
            parts += [_table("data.partition.", PartitionSpec, default.data.partition)]
            example = FeatureSpec(columns=("NAME",), range=(0.0, 1.0))
            parts += [_summary(FeatureSpec), _table("data.features[].", FeatureSpec, example)]
        if group == "federation":
            parts += ["An algorithm has the settings of its table here, and the others have none.\n"]
            for one in (algorithm for algorithm in ALGORITHMS.values() if algorithm.settings):
                named = f"`federation.algorithm={one.name}`: {_summary(one.settings)}"
                parts += [named, _table("federation.algorithm_settings.", one.settings, one.own)]
        if group == "report":
            parts += [_summary(config.AboutSpec), _table("report.about.", config.AboutSpec, default.report.about)]
    return "\n".join(parts)


def _options() -> str:
    rows = ["| group | options |", "| --- | --- |"]
    for group in list_config_groups():
        rows.append(f"| `{group}` | {', '.join(f'`{option}`' for option in list_options(group))} |")
    return "\n".join(rows) + "\n"


def _summary(spec: type) -> str:
    return re.sub(r"\s+", " ", (spec.__doc__ or "").split("Attributes:")[0]).strip() + "\n"


def _table(prefix: str, spec: type, values: object, *, skip: tuple[str, ...] = ()) -> str:
    meanings = _attributes(spec)
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(spec):
        if field.name in skip or field.name in ("partition", "about"):
            continue
        meaning = meanings.get(field.name, "").replace("|", "\\|")
        rows.append(f"| `{prefix}{field.name}` | {_shown(getattr(values, field.name))} | {meaning} |")
    return "\n".join(rows) + "\n"


def _attributes(spec: type) -> dict[str, str]:
    """Attribute name to its meaning, out of a Google-style docstring."""
    found = {}
    for cls in reversed(spec.__mro__):  # what a class inherits is said where it is declared
        _, _, block = (cls.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(block)):
            name, colon, meaning = entry.partition(":")
            if colon and name.isidentifier():
                found[name] = re.sub(r"\s+", " ", meaning).strip()
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 4:
        return f"({len(value)} values)"
    text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
    return f"`{text.lower() if isinstance(value, bool) else text}`" if text else ""


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} is out of date: run {sys.argv[0]}")
    PAGE.write_text(page())
