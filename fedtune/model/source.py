"""Location of a base model's files: a local folder, an installed package, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from fedtune.model.manifest import SETTINGS_FILES, SHARD_INDEX, WEIGHTS
from fedtune.model.spec import NO_BASE, PACKAGE, RANDOM, ModelSpec
from fedtune.spec import ConfigError, expand_home

_HUB_FILES = ["*.safetensors", SHARD_INDEX, *sorted(SETTINGS_FILES)]
_HUB_TIMEOUT_S = 5.0


def find_model_folder(spec: ModelSpec) -> Path:
    """Return the local folder with the model's files, downloaded from the hub if they are not cached.

    Pickled weights are never read, because reading them executes code.

    Raises:
        ConfigError: for `model.path` or `model.gguf_file`, if the model does not exist or has no safetensors weights.
    """
    local = Path(expand_home(spec.path, key="model.path"))
    if spec.path.startswith(PACKAGE):
        folder = _find_package_folder(spec.path)
    elif local.is_dir():
        folder = local
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec.path):
        folder = _find_hub_folder(spec)
    else:
        raise ConfigError("model.path", spec.path, "must be an existing local folder or a hub id")
    if not _has_weights(folder, spec):
        missing = spec.gguf_file or f"{WEIGHTS} or {SHARD_INDEX}"
        raise ConfigError("model.path", spec.path, f"must be a folder that contains {missing}")
    return folder


def find_public_location(spec: ModelSpec) -> str:
    """Return the id or path with which plain transformers loads the base: its public id, path, or package folder."""
    inside = spec.public_id is None and spec.path.startswith(PACKAGE)
    return str(find_model_folder(spec)) if inside else spec.public_id or spec.path


def is_public_location(spec: ModelSpec, place: object) -> bool:
    """Whether `find_public_location` returns `place`, here or, for a package, on another machine."""
    if spec.public_id is None and spec.path.startswith(PACKAGE):
        inside = Path(spec.path.removeprefix(PACKAGE))
        return isinstance(place, str) and Path(place).is_absolute() and Path(place).match(str(inside))
    return place == (spec.public_id or spec.path)


def resolve_model(path: str) -> ModelSpec:
    """Build the model settings for a user's path: a model folder, a GGUF file or its folder, or any `model.path`.

    Raises:
        ConfigError: for `model.path` or `model.gguf_file`, if the model does not exist.
    """
    if path == NO_BASE or path.startswith(RANDOM):
        return ModelSpec(path=path)
    place = Path(expand_home(path, key="model.path"))
    if path.endswith(".gguf") and (path.startswith(PACKAGE) or place.is_file()):
        folder, _, name = path.rpartition("/")
        return ModelSpec(path=folder or ".", gguf_file=name)
    location = _find_package_folder(path) if path.startswith(PACKAGE) else place
    return ModelSpec(path=path, gguf_file=find_single_gguf(location) if location.is_dir() else None)


def find_single_gguf(folder: Path) -> str | None:
    """Return the name of a folder's only GGUF file, or None for a folder with safetensors weights, which take
    precedence.

    Raises:
        ConfigError: for `model.path`, if the folder has neither safetensors weights nor exactly one GGUF file.
    """
    if any((folder / name).is_file() for name in (WEIGHTS, SHARD_INDEX)):
        return None
    names = sorted(file.name for file in folder.glob("*.gguf"))
    if len(names) != 1:
        bound = f"must contain safetensors weights, or exactly one GGUF file, not {len(names)}"
        raise ConfigError("model.path", str(folder), bound)
    return names[0]


def find_cache_folder(spec: ModelSpec) -> Path:
    """Return the folder in which fedtune caches files that it derives from downloads."""
    return Path(expand_home(spec.cache_dir or os.getenv("FEDTUNE_CACHE") or "~/.cache/fedtune", key="model.cache_dir"))


def _has_weights(folder: Path, spec: ModelSpec) -> bool:
    names = (spec.gguf_file,) if spec.gguf_file else (WEIGHTS, SHARD_INDEX)
    return any((folder / name).is_file() for name in names)


def _find_package_folder(path: str) -> Path:
    module, _, inside = path.removeprefix(PACKAGE).partition("/")
    # Located without an import, because packages with weights import other packages that are not needed here.
    package = find_spec(module)
    if package is None or package.origin is None:
        raise ConfigError("model.path", path, f"requires the Python package {module}, which is not installed")
    return Path(package.origin).parent / inside


def _find_hub_folder(spec: ModelSpec) -> Path:
    """Return the model's folder in the hub's cache, and download it if needed.

    The cache is searched first, so that a cached model works offline and without contacting the hub.
    """
    problem: Exception | None = None
    for fetch in (False, True):
        try:
            if fetch:
                # This request has a working timeout; a download waits minutes for a hub that hangs.
                HfApi().model_info(spec.path, revision=spec.revision, timeout=_HUB_TIMEOUT_S)
            patterns = [spec.gguf_file] if spec.gguf_file else _HUB_FILES
            about: Any = {"revision": spec.revision, "cache_dir": spec.cache_dir, "local_files_only": not fetch}
            folder = Path(snapshot_download(spec.path, allow_patterns=patterns, ignore_patterns=["*/*"], **about))
        # The hub's client raises errors of several libraries, all of which mean that the model is not available.
        except Exception as error:
            problem = error
            continue
        if _has_weights(folder, spec):
            return folder
    from fedtune.model.hf_logging import get_first_line  # imported late: transformers takes seconds

    why = f" ({type(problem).__name__}: {get_first_line(problem)})" if problem else ""
    bound = f"is not a local folder, and its safetensors weights could not be downloaded from the hub{why}"
    raise ConfigError("model.path", spec.path, bound) from problem
