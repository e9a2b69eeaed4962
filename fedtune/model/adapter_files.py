"""The files of a saved adapter's folder, and the one digest that identifies all of them.

The module imports no framework, so that commands that only check a digest start quickly.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from fedtune import system
from fedtune.model.spec import LORA_A, LORA_B, NO_ADAPTER
from fedtune.privacy.durable import hash_files
from fedtune.spec import ConfigError, format_value

ADAPTER = "adapter"  # the name of the final adapter's folder in a run folder
CARD, LABEL = "README.md", "label.svg"  # an adapter's model card and its privacy label
SCALE_OF_IA3, SCALE_OF_DORA = PEFT_SCALES = (".ia3_l", ".lora_magnitude_vector")
"""Name suffixes of PEFT's own scales in a saved adapter."""
MATRIX_A, MATRIX_B, OFFSET = f"{LORA_A}weight", f"{LORA_B}weight", ".scales.offset"
TENSOR_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    NO_ADAPTER: {},
    "lora": {"adapter_model": (MATRIX_A, MATRIX_B)},
    "dora": {"adapter_model": (MATRIX_A, MATRIX_B, SCALE_OF_DORA), "offsets": (OFFSET,)},
    "ia3": {"adapter_model": (SCALE_OF_IA3,), "offsets": (OFFSET,)},
}
"""Kind of adapter -> its safetensors files, without their suffix -> the name suffixes of the tensors that each adapted
module has there.  The last suffix belongs to a trained tensor, so that the digest that sites sign covers the names of
the modules.
"""


def hash_adapter_files(folder: Path) -> dict[str, str]:
    """Hash each file of an adapter's folder except card and label, which are generated from the report later.

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


def list_tensor_names(kind: str, found: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """Return the names that the tensors in each file of an adapter must have, given the names that were found there.

    The modules are those that have the last tensor of `TENSOR_FILES`.
    """
    files = TENSOR_FILES[kind]
    last = next(reversed(files), "")
    ending = files[last][-1] if files else ""
    modules = {name.removesuffix(ending) for name in found.get(last, ()) if name.endswith(ending)}
    return {file: {module + ending for module in modules for ending in endings} for file, endings in files.items()}


def copy_adapter_files(folder: Path, into: Path, *, names: Collection[str]) -> None:
    """Copy the files of an adapter's folder, except card and label, into a new folder; each file is read once.

    A check of the copy cannot be deceived by a later change of the folder.

    Raises:
        ConfigError: the folder cannot be read, lacks a file in `names`, or has anything else than these regular files.
    """
    into.mkdir()
    try:
        present = set(os.listdir(folder)) - {CARD, LABEL}
        for name in sorted(present ^ {*names}):
            bound = f"{'lacks' if name in names else 'must not contain'} {format_value(name)}"
            raise ConfigError("adapter", str(folder), f"{bound}: its files are {', '.join(sorted(names))}")
        for name in sorted(names):
            # A pipe is opened without waiting for its writer, and then refused.
            flags = os.O_RDONLY | system.NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(folder / name, flags), "rb") as source, (into / name).open("xb") as target:
                if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                    raise ConfigError("adapter", str(folder), f"has a {name} that is not a regular file")
                shutil.copyfileobj(source, target)
    except OSError as error:
        raise ConfigError("adapter", str(folder), f"cannot be copied ({error.strerror})") from error
