"""Packages of extras: whether they are there, and the command that adds an extra to this installation of fedtune."""

from __future__ import annotations

import shlex
from importlib import metadata
from importlib.util import find_spec

from fedtune.spec import ConfigError


def is_installed(module: str) -> bool:
    """Whether a module can be imported; imports nothing."""
    return find_spec(module) is not None


def require_extra(key: str, value: object, extra: str, *modules: str, or_else: str = "") -> None:
    """Require modules of an extra, before any work that needs them.

    Args:
        key: the setting or option that needs them.
        value: its value.
        extra: the name of the extra in pyproject.toml.
        modules: names of the modules; none: the extra is called as its module.
        or_else: what to do instead of installing them, as the end of a sentence.

    Raises:
        ConfigError: a module is missing; the message has the command that installs it.
    """
    for module in modules or (extra,):
        if not is_installed(module):
            package = "Pillow" if module == "PIL" else module.replace("_", "-")
            raise ConfigError(key, value, f"needs {package}", remedy=f"{install_command(extra)}{or_else}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra's packages.

    It names the packages themselves, as this installation's metadata has them: that works wherever fedtune came from,
    a checkout, a wheel, a repository or an image, of which no index need know.
    """
    needed = (line.partition(";") for line in metadata.requires("fedtune") or ())
    packages = [package.strip() for package, _, when in needed if f"extra == '{extra}'" in when.replace('"', "'")]
    return shlex.join(["pip", "install", *(packages or [f"fedtune[{extra}]"])])
