"""Model pinning by a single hash of all files that loading may read; other files in the folder are never read.

The hash of a GGUF file is the output of `sha256sum`.  The hash of a folder with safetensors is the SHA-256 of a text: a
first line that identifies the format, a second line for the kind of image processor if there is one, then the line that
`sha256sum` prints for each file, in the order of the names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedtune.model.unsupported_models import PROCESSOR, VISION, check_content, get_max_file_bytes
from fedtune.spec import ConfigError, RunError

WEIGHTS, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
SETTINGS_FILES = frozenset(
    {
        "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", PROCESSOR,
        "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "byte_maps.json",
        "entity_vocab.json", "tokenizer.model", "tiktoken.model", "spiece.model", "spm.model", "spm_char.model",
        "sentencepiece.model", "sentencepiece.bpe.model",
    }
)  # fmt: skip
"""All files except the weights that AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM and the image processors
of transformers 5.23 may read from a folder.  Excluded on purpose: `adapter_config.json` (it redirects loading),
`tekken.json` (read by a package that is not pinned), `additional_chat_templates/`, `processor_config.json` (for
multimodal processors), `*.py` and pickles."""

_FIRST_LINE = "fedtune model manifest 1\n"  # distinguishes a manifest from other lists of hashes
_PROCESSOR_LINE = "images are processed by transformers' classes for PIL\n"
"""Second line for a model with an image processor, because the torchvision processors compute different pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Names and hashes of the files that a model's hash covers."""

    files: tuple[tuple[str, str], ...]  # name and SHA-256 of each file, in the order of the names

    @property
    def text(self) -> str:
        """Text whose SHA-256 is the model's hash; for a GGUF file, only its own line."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in self.files)
        second = _PROCESSOR_LINE if PROCESSOR in dict(self.files) else ""
        return lines if self._is_gguf else _FIRST_LINE + second + lines

    @property
    def sha256(self) -> str:
        """Model hash in hexadecimal."""
        return self.files[0][1] if self._is_gguf else hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def _is_gguf(self) -> bool:
        return len(self.files) == 1 and self.files[0][0].endswith(".gguf")


@contextmanager
def stage_files(
    folder: Path, *, gguf_file: str | None = None, with_weights: bool = True
) -> Iterator[tuple[Path, Manifest]]:
    """Provide a temporary folder with exactly the files of a model's manifest, copied or linked, and their hashes.

    All files except the weights are read once: the bytes that are checked and hashed are the bytes that are loaded.
    Weights are linked, because copying gigabytes in every run is too slow; at its end the block checks that the linked
    files did not change after they were hashed.  One gap remains: torch may map a file into memory, so a user with
    write access could change the weights later, or reset the clock in between.  Only the site's own account and its
    administrator have such access, and this function does not protect against them.

    Args:
        folder: the model's folder.
        gguf_file: the name of the model's GGUF file in the folder; None selects the safetensors files.
        with_weights: False provides all files except the weights.  The weights are then not linked, and their hash may
            come from an earlier call in this process for a file with the same inode, size and times.

    Raises:
        ConfigError: for `model.path`, if files are missing, link to a target outside the folder, are refused, or change
            during the block.
        RunError: the folder for temporary files is full, or not writable.
    """
    try:
        made = TemporaryDirectory(prefix="fedtune-model-")
    except OSError as error:
        raise RunError(f"no folder for temporary files is writable ({error.strerror}); set TMPDIR") from error
    with made as scratch:
        # For some models transformers selects the tokenizer by the folder's name, so every staged folder has one name.
        place = Path(scratch, "model")
        place.mkdir()
        hashes, weights = {}, {}
        for name in () if gguf_file else _list_settings_files(folder):
            if name == PROCESSOR and json.loads((place / "config.json").read_bytes()).get("model_type") not in VISION:
                continue  # text models do not read it
            content = _read_checked(folder, name)
            try:
                (place / name).write_bytes(content)
            except OSError as error:
                raise RunError(f"{place} cannot be written ({error.strerror})") from error
            hashes[name] = hashlib.sha256(content).hexdigest()
        for name in (gguf_file,) if gguf_file else _list_weights_files(folder, place):
            file = _resolve_inside(folder, name)
            weights[file] = _stat_fingerprint(file)
            if with_weights or (file, weights[file]) not in _hashed:
                try:
                    with file.open("rb") as stream:
                        _hashed[file, weights[file]] = hashlib.file_digest(stream, "sha256").hexdigest()
                except OSError as error:
                    raise ConfigError("model.path", str(file.parent), f"must have a readable {name}") from error
            hashes[name] = _hashed[file, weights[file]]
            if with_weights:
                (place / name).symlink_to(file)
        yield place, Manifest(files=tuple(sorted(hashes.items())))
        for file, before in weights.items():
            if _stat_fingerprint(file) != before:
                raise ConfigError("model.path", str(folder), f"must not change while it is loaded: {file.name} changed")


def build_manifest(folder: Path, *, gguf_file: str | None = None) -> Manifest:
    """Read and check every file of the model in a folder, and return its manifest.

    Raises:
        ConfigError: as in `stage_files`.
    """
    with stage_files(folder, gguf_file=gguf_file) as (_, manifest):
        return manifest


def _list_settings_files(folder: Path) -> list[str]:
    """Check the names of a folder's files, and list the files other than the weights."""
    try:
        listed = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError("model.path", str(folder), "must be a readable folder") from error
    known = SETTINGS_FILES | {WEIGHTS, SHARD_INDEX}
    if "adapter_config.json" in listed:
        bound = "must not contain adapter_config.json, which redirects loading to other weights"
        raise ConfigError("model.path", str(folder), bound, remedy="use a folder with the base model only")
    for name in listed:
        if name not in known and (meant := name.casefold()) in known:
            bound = f"must not contain {name}: its name differs from {meant} only in case, which some systems ignore"
            raise ConfigError("model.path", str(folder), bound)
    names = [name for name in listed if name in SETTINGS_FILES]
    if "config.json" not in names:
        raise ConfigError("model.path", str(folder), "must contain config.json")
    # If a folder has both, the single file is loaded.
    return names if WEIGHTS in listed else [*names, SHARD_INDEX]


def _list_weights_files(folder: Path, place: Path) -> tuple[str, ...]:
    """Return the names of the weights files, from the staged index if there is one."""
    index = place / SHARD_INDEX
    if not index.exists():
        return (WEIGHTS,)
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = tuple(sorted({str(name) for name in named}))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError("model.path", str(folder), f"must contain a readable {SHARD_INDEX}") from error
    if not names or not all(re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII) for name in names):
        bound = f"must contain a {SHARD_INDEX} that names safetensors files next to it"
        raise ConfigError("model.path", str(folder), bound)
    return names


def _read_checked(folder: Path, name: str) -> bytes:
    try:
        with _resolve_inside(folder, name).open("rb") as stream:
            content = stream.read(get_max_file_bytes(name) + 1)
    except OSError as error:
        raise ConfigError("model.path", str(folder), f"must have a readable {name}") from error
    check_content(name, content, folder=str(folder))
    return content


def _resolve_inside(folder: Path, name: str) -> Path:
    """Resolve a file's path, and require that it is in the folder, or in the hub's cache if the folder is a hub
    snapshot.
    """
    inside = folder.resolve()
    if inside.parent.name == "snapshots" and (inside.parent.parent / "blobs").is_dir():
        inside = inside.parent.parent
    try:
        file = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError("model.path", str(folder), f"must have a readable {name}") from error
    if not file.is_relative_to(inside):
        bound = f"must not contain {name}, a link to a file outside the folder"
        raise ConfigError("model.path", str(folder), bound, remedy="use a copy of the folder without links (cp -rL)")
    if not file.is_file():
        raise ConfigError("model.path", str(folder), f"must have {name} as a regular file")
    return file


_hashed: dict[tuple[Path, tuple[int, ...]], str] = {}  # hashes of weights, by path and `_stat_fingerprint`


def _stat_fingerprint(file: Path) -> tuple[int, ...]:
    """Return a file's device, inode, size, and modification and change times; empty if it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
