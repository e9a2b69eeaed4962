"""`site.toml` to a `Policy` and back."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from fedtune.codec import decode, read_toml, to_toml
from fedtune.privacy.durable import write_durably
from fedtune.privacy.site_policy import Policy
from fedtune.spec import errors_in


def read_policy(path: Path) -> Policy:
    """The policy in the file `path`.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    table = read_toml(path, key="policy")
    with errors_in(path):
        return decode(Policy, table)


def policy_of(fields: object) -> Policy:
    """The policy that `Policy.to_json` wrote.

    Raises:
        ConfigError: anything else.
    """
    match fields:
        case {"budget": {"max_epsilon": None, **budget}, **rest}:  # JSON has no infinity
            fields = {**rest, "budget": {**budget, "max_epsilon": math.inf}}
    return decode(Policy, fields)


def write_policy(policy: Policy, path: Path) -> None:
    """Write `policy` so that `read_policy` gives it back."""
    write_durably(path, to_toml(dataclasses.asdict(policy)).encode())
