"""Other installed packages: whether an extra's packages are there, the command that installs them, and the classes that
a package declares for fedtune.
"""

from __future__ import annotations

import hashlib
import inspect
import shlex
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

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


def load_entry_point(group: str, name: str, *, key: str) -> object | None:
    """Import what an installed package declares under this name in a group of entry points; None: no package does.

    Raises:
        ConfigError: for `key`: several packages declare the name, or the import fails.
    """
    found = [*metadata.entry_points(group=group, name=name)]
    if len(found) > 1:
        packages = ", ".join(sorted(entry.dist.name for entry in found if entry.dist))
        raise ConfigError(key, name, f"is declared by several installed packages: keep one of {packages}")
    try:
        return found[0].load() if found else None
    except Exception as error:  # whatever the package's own code raises
        bound = f"cannot be imported from {found[0].value}: {type(error).__name__}: {error}"
        raise ConfigError(key, name, bound) from error


def describe_code(defined: type) -> str:
    """Describe which code defines a class: its file with the SHA-256, and the installed package with its version."""
    top = defined.__module__.partition(".")[0]
    packages = [f"{name} {metadata.version(name)}" for name in metadata.packages_distributions().get(top, ())]
    try:
        file = Path(inspect.getfile(defined))
        source = f"{file.name} SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    except (OSError, TypeError):  # typed in a notebook or a console
        source = "without a file"
    return ", ".join([*sorted({*packages}), source])
