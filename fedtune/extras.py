"""Optional packages: checks, install commands, and entry points of other packages."""

from __future__ import annotations

import hashlib
import inspect
import shlex
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from fedtune.spec import ConfigError


def is_installed(module: str) -> bool:
    """Return True if a module is installed, without importing it."""
    return find_spec(module) is not None


def require_extra(key: str, value: object, extra: str, *modules: str, or_else: str = "") -> None:
    """Check that the modules of an extra are installed, before any work that needs them.

    Args:
        key: setting or option that needs the modules.
        value: value of that setting.
        extra: name of the extra in pyproject.toml.
        modules: names of the modules; by default one module with the name of the extra.
        or_else: an alternative to the installation, as the end of a sentence.

    Raises:
        ConfigError: a module is missing. The message contains the command that installs it.
    """
    for module in modules or (extra,):
        if not is_installed(module):
            package = "Pillow" if module == "PIL" else module.replace("_", "-")
            raise ConfigError(key, value, f"requires {package}", remedy=f"{build_install_command(extra)}{or_else}")


def build_install_command(extra: str) -> str:
    """Return the pip command that installs the packages of an extra.

    The command lists the packages in this installation's metadata, so that it works for checkouts, wheels, repositories
    and images outside any package index.
    """
    needed = (line.partition(";") for line in metadata.requires("fedtune") or ())
    packages = [package.strip() for package, _, when in needed if f"extra == '{extra}'" in when.replace('"', "'")]
    return shlex.join(["pip", "install", *(packages or [f"fedtune[{extra}]"])])


def load_entry_point(group: str, name: str, *, key: str) -> object | None:
    """Load an entry point by group and name, or return None if no package declares it.

    Args:
        group: group of entry points.
        name: name within the group.
        key: setting that names the entry point, for error messages.

    Raises:
        ConfigError: several packages declare the name, or the import fails.
    """
    entry_points = [*metadata.entry_points(group=group, name=name)]
    if len(entry_points) > 1:
        packages = ", ".join(sorted(entry.dist.name for entry in entry_points if entry.dist))
        raise ConfigError(key, name, f"is declared by several installed packages: keep one of {packages}")
    try:
        return entry_points[0].load() if entry_points else None
    except Exception as error:  # the package's code may raise anything
        bound = f"cannot be imported from {entry_points[0].value}: {type(error).__name__}: {error}"
        raise ConfigError(key, name, bound) from error


def describe_code(defined: type) -> str:
    """Describe the source of a class: its file with the SHA-256, and its installed package with the version."""
    top = defined.__module__.partition(".")[0]
    packages = [f"{name} {metadata.version(name)}" for name in metadata.packages_distributions().get(top, ())]
    try:
        file = Path(inspect.getfile(defined))
        source = f"{file.name} SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    except (OSError, TypeError):  # defined in a notebook or console
        source = "without a file"
    return ", ".join([*sorted({*packages}), source])
