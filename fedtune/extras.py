"""Optional dependencies: whether an extra's packages are installed, and the command that installs them."""

from __future__ import annotations

import shlex
from importlib import metadata
from importlib.util import find_spec

from fedtune.spec import ConfigError


def is_installed(module: str) -> bool:
    """Whether a module can be imported; does not import it."""
    return find_spec(module) is not None


def require_extra(key: str, value: object, extra: str, *modules: str, or_else: str = "") -> None:
    """Require modules of an extra before any work that needs them starts.

    Args:
        key: the setting or option that needs the modules.
        value: its value.
        extra: the name of the extra in pyproject.toml.
        modules: names of the modules; by default one module with the name of the extra.
        or_else: an alternative to installing them, as the end of a sentence.

    Raises:
        ConfigError: a module is missing; the message contains the command that installs it.
    """
    for module in modules or (extra,):
        if not is_installed(module):
            package = "Pillow" if module == "PIL" else module.replace("_", "-")
            raise ConfigError(key, value, f"needs {package}", remedy=f"{install_command(extra)}{or_else}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra's packages.

    The command names the packages themselves, from the metadata of this installation, so that it works for a checkout,
    a wheel, a repository or an image that no package index knows.
    """
    needed = (line.partition(";") for line in metadata.requires("fedtune") or ())
    packages = [package.strip() for package, _, when in needed if f"extra == '{extra}'" in when.replace('"', "'")]
    return shlex.join(["pip", "install", *(packages or [f"fedtune[{extra}]"])])
