"""The files of a saved adapter's folder, and the one digest that identifies all of them.

The module imports no framework, so that commands that only check a digest start quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fedtune.privacy.durable import hash_files

ADAPTER = "adapter"  # the name of the final adapter's folder in a run folder
CARD, LABEL = "README.md", "label.svg"  # an adapter's model card and its privacy label


def hash_adapter_files(folder: Path) -> dict[str, str]:
    """Hash each file of an adapter's folder except card and label, which are drawn from the report later.

    Returns:
        `adapter/` and the path of the file in the folder, whatever the folder's name -> SHA-256, in hex.

    Raises:
        ConfigError: the folder contains a symbolic link, a pipe or a device.
    """
    return {f"{ADAPTER}/{name}": sha256 for name, sha256 in hash_files(folder, besides=(CARD, LABEL)).items()}


def combine_hashes(files: Mapping[str, str]) -> str:
    """Return the digest of an adapter: the SHA-256, in hex, of one line per file, sorted by name.

    Each line is the name of the file as in `hash_adapter_files`, a NUL, the SHA-256 of the file in hex, and a newline.
    The digest covers everything that decides the model's answers: trained and frozen tensors, the head, and all
    settings with their labels. Nobody can change, add, remove or rename a file and keep the digest.
    """
    lines = (f"{name}\0{sha256}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def compute_adapter_digest(folder: Path) -> str:
    """Return the digest of the adapter in `folder`, as in the `run.json` of its run; see `combine_hashes`.

    Raises:
        ConfigError: the folder contains a symbolic link, a pipe or a device.
    """
    return combine_hashes(hash_adapter_files(folder))
