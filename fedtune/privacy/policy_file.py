"""Reading and writing policies as `site.toml` and as JSON."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedtune.codec import decode, read_toml, to_toml
from fedtune.formatting import convert_none_to_infinite
from fedtune.privacy.cohorts import MONTHS
from fedtune.privacy.durable import write_durably
from fedtune.privacy.site_policy import Budget, Policy
from fedtune.spec import name_file_in_errors

OTHER_TABLES = ("machine", "about")
"""Tables of a `site.toml` that are not part of the policy, its digest or the ledger."""


def read_policy(path: Path) -> Policy:
    """Read a policy from a `site.toml`, ignoring the tables in `OTHER_TABLES`.

    Raises:
        ConfigError: the file is not a valid policy; names the file, the key, its value and the accepted values.
    """
    table = read_toml(path, key="policy")
    with name_file_in_errors(path):
        return decode(Policy, table, skipped=OTHER_TABLES)


def decode_policy_json(fields: object) -> Policy:
    """Decode the output of `Policy.to_json`.

    Raises:
        ConfigError: the fields are not a valid policy.
    """
    match fields:
        case {"budget": {"max_epsilon": None, **budget}, **rest}:  # JSON has no infinity
            fields = {**rest, "budget": {**budget, "max_epsilon": math.inf}}
    return decode(Policy, fields)


def iter_permanent_marks(policy: Policy, *, before: Budget | None, time: str) -> Iterator[tuple[str, str]]:
    """Yield the permanent marks that a new policy adds to a ledger.

    Args:
        policy: the new policy.
        before: budget of the previous policy if anything has been charged, else None.
        time: time of the event that records the policy, ISO 8601.
    """
    kinds = {"inexact_gradients": policy.allow.inexact_gradients, "simulated": policy.simulated}
    yield from ((kind, "") for kind, is_so in kinds.items() if is_so)
    if before is not None:
        now = policy.budget
        shorter = MONTHS[now.period] < MONTHS[before.period] and before.max_epsilon_per_period is not None
        of_run = convert_none_to_infinite(now.max_epsilon_per_run) > convert_none_to_infinite(
            before.max_epsilon_per_run
        )
        if (
            shorter
            or of_run
            or convert_none_to_infinite(now.max_epsilon_per_period)
            > convert_none_to_infinite(before.max_epsilon_per_period)
        ):
            yield "limits_loosened", time[:10]


def build_never_accepted_mark(run: str, lead: str) -> tuple[str, str]:
    """Build the mark of a run that its lead ended before this ledger accepted it."""
    return "never", f"{run} of {lead}"


def write_policy(policy: Policy, path: Path, *, others: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write a policy and the tables `others` to a `site.toml`. `read_policy` restores the policy exactly.

    Raises:
        ConfigError: a value of the policy has the wrong type; nothing is written.
    """
    text = to_toml({**dataclasses.asdict(policy), **others})
    decode(Policy, tomllib.loads(text), skipped=OTHER_TABLES)
    write_durably(path, text.encode())
