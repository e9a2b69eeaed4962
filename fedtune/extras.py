"""Packages of extras: whether they are there, and the command that adds an extra to this installation of fedtune."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fedtune.spec import ConfigError

_CHECKOUT = Path(__file__).parents[1]


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
            raise ConfigError(key, value, f"needs {package}: {install_command(extra)}{or_else}")


def install_command(extra: str) -> str:
    """Return the command that installs an extra from where this fedtune came from."""
    if (_CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{_CHECKOUT}[{extra}]')}"
    # PEP 610: pip writes direct_url.json for what it installs from a file or an address, and not from an index.
    found = next(iter(metadata.distributions(name="fedtune")), None)
    match json.loads((found and found.read_text("direct_url.json")) or "{}"):
        case {"url": url, "vcs_info": {"vcs": kind, "commit_id": commit}}:
            packages = [f"fedtune[{extra}] @ {kind}+{url}@{commit}"]
        case {"url": url} if urlsplit(url).scheme != "file" or Path(url2pathname(urlsplit(url).path)).exists():
            packages = [f"fedtune[{extra}] @ {url}"]
        case {"url": _}:  # the file is gone, as in an image: the extra's packages by themselves
            needed = [line.partition(";") for line in metadata.requires("fedtune") or ()]
            packages = [package for package, _, when in needed if f"extra == '{extra}'" in when.replace('"', "'")]
        case _:
            packages = [f"fedtune[{extra}]"]
    return shlex.join(["pip", "install", *packages])
