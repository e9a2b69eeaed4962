"""Where a base model's files lie, and the hash that pins their weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from fedtune.model.quiet import first_line
from fedtune.model.spec import PACKAGE, ModelSpec
from fedtune.spec import ConfigError

_WEIGHTS, _SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_HUB_TIMEOUT_S = 5.0


def model_folder(spec: ModelSpec) -> Path:
    """The local folder with the model's files; fetches them from the hub when they are not cached.

    Raises:
        ConfigError: for `model.path` or `model.gguf_file` when there is no such model or no safetensors
            weights in it.  Pickled weights are never read, for reading them runs code.
    """
    local = Path(spec.path).expanduser()
    if spec.path.startswith(PACKAGE):
        folder = _package_folder(spec.path)
    elif local.is_dir():
        folder = local
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec.path):
        folder = _hub_folder(spec)
    else:
        raise ConfigError("model.path", spec.path, "is neither a folder on this machine nor a model hub's id")
    if not _has_weights(folder, spec):
        missing = spec.gguf_file or f"{_WEIGHTS} or {_SHARD_INDEX}"
        raise ConfigError("model.path", spec.path, f"must be a folder that holds {missing}")
    return folder


def weights_files(spec: ModelSpec) -> tuple[Path, ...]:
    """The files that hold the weights, in the order of their names.

    Raises:
        ConfigError: as `model_folder`; or the folder's index is damaged, names anything but safetensors files beside
            it, or names one that is missing.
    """
    folder = model_folder(spec)
    if spec.gguf_file:
        return (folder / spec.gguf_file,)
    if (folder / _WEIGHTS).is_file():
        return (folder / _WEIGHTS,)
    try:
        index = json.loads((folder / _SHARD_INDEX).read_text(encoding="utf-8"))
        names = sorted({str(name) for name in index["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError("model.path", str(folder), f"must hold a readable {_SHARD_INDEX}") from error
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII) for name in names):
        bound = f"must hold a {_SHARD_INDEX} that names safetensors files beside it"
        raise ConfigError("model.path", str(folder), bound)
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError("model.path", str(folder), f"must hold {name}, which its index names")
    return tuple(folder / name for name in names)


def files_sha256(files: tuple[Path, ...]) -> str:
    """A single file's SHA-256; for several, the SHA-256 of `sha256sum`'s lines for them ("<hash>  <name>")."""
    hashes = []
    for path in files:
        with path.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(hashes, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def cache_folder(spec: ModelSpec) -> Path:
    """Where fedtune keeps what it derives from downloads."""
    return Path(spec.cache_dir or os.environ.get("FEDTUNE_CACHE") or "~/.cache/fedtune").expanduser()


def _has_weights(folder: Path, spec: ModelSpec) -> bool:
    names = (spec.gguf_file,) if spec.gguf_file else (_WEIGHTS, _SHARD_INDEX)
    return any((folder / name).is_file() for name in names)


def _package_folder(path: str) -> Path:
    module, _, inside = path.removeprefix(PACKAGE).partition("/")
    # Looked up, not imported: the packages that carry weights want others that we don't need.
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ConfigError("model.path", path, f"needs the Python package {module}, which is not installed")
    return Path(found.origin).parent / inside


def _hub_folder(spec: ModelSpec) -> Path:
    """Look in the cache first, so that a cached model works without network and without telling the hub."""
    problem: Exception | None = None
    for fetch in (False, True):
        try:
            if fetch:
                # Asked first because it keeps to its time limit; a download waits minutes for a hub that hangs.
                HfApi().model_info(spec.path, revision=spec.revision, timeout=_HUB_TIMEOUT_S)
            folder = Path(_snapshot(spec, cached_only=not fetch))
        # The hub's client raises errors of several libraries; all of them mean that the model cannot be had.
        except Exception as error:
            problem = error
            continue
        if _has_weights(folder, spec):
            return folder
    why = f" ({type(problem).__name__}: {first_line(problem)})" if problem else ""
    bound = f"is no folder on this machine, and its safetensors weights could not be had from the model hub{why}"
    raise ConfigError("model.path", spec.path, bound) from problem


def _snapshot(spec: ModelSpec, *, cached_only: bool) -> str:
    return snapshot_download(
        spec.path,
        revision=spec.revision,
        cache_dir=spec.cache_dir,
        allow_patterns=[spec.gguf_file] if spec.gguf_file else _HUB_FILES,
        ignore_patterns=["*/*"],
        local_files_only=cached_only,
    )
