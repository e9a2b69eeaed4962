"""kit.toml, strictly: what every kit says of its federation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, TypeVar

from fedtune.deploy.address import Address
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.policy_file import from_table, read_toml
from fedtune.spec import ConfigError, check_name, check_one_of, spec

T = TypeVar("T")
VERSION = 1
"""Of kit.toml, roster.json and join requests."""


def read_spec(cls: type[T], path: Path) -> T:
    """An instance of the spec `cls` from a TOML file, strictly.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    table = read_toml(path, key="file")
    try:
        return from_table(cls, table)
    except ConfigError as error:
        raise error.in_file(path) from None


@spec
class KitModel:
    """A base model that runs may name; a site installs it by its hash.

    Attributes:
        sha256: of the model's weights, 64 hex digits.
        licence: its licence, for people.
    """

    name: str
    sha256: str
    licence: str

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError("sha256", self.sha256, "must be 64 lower-case hex digits")
        if not (self.licence.strip() and self.licence.isprintable()):
            raise ConfigError("licence", self.licence, "must name the model's licence on one line")


def check_models(models: tuple[KitModel, ...]) -> None:
    """Require names that do not repeat."""
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigError("model", names, "must not repeat a name")


@spec
class KitFile:
    """What kit.toml says; `Kit` adds the folder."""

    version: int
    kind: Literal["server", "lead", "site"]
    federation: str
    server: str
    lead: str
    site: str | None = None
    model: tuple[KitModel, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("version", self.version, (VERSION,))
        check_name("federation", self.federation)
        Address.of(self.server)
        check_public_key("lead", self.lead)
        check_models(self.model)
        if self.kind == "site":
            if self.site is None:
                raise ConfigError("site", None, "is required in a site's kit")
            check_name("site", self.site)
        elif self.site is not None:
            raise ConfigError("site", self.site, "has no place in a kit that is not a site's")

    def to_toml(self) -> str:
        """The text of the file."""
        values = {name: getattr(self, name) for name in ("version", "kind", "federation", "server", "lead", "site")}
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
        for model in self.model:
            lines += ["", "[[model]]"]
            # Text that is printable is spelt the same in TOML and in JSON.
            lines += [f"{name} = {_text(getattr(model, name))}" for name in ("name", "sha256", "licence")]
        return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
