"""The model store of a site: `models/<sha256>/` in the kit's folder, filled only from local files."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from fedtune.model.manifest import Manifest, build_manifest
from fedtune.model.source import find_model_folder, find_single_gguf
from fedtune.model.spec import PACKAGE, RANDOM_MODELS, ModelSpec
from fedtune.ops.kits.kit_file import Kit, KitModel, find_model_store_path
from fedtune.privacy.durable import lock_folder
from fedtune.spec import ConfigError, RunError
from fedtune.system import fsync_folder

_OPTION = "--import-model"
_KEPT_FREE_BYTES = 200 * 2**20
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_PAPER = re.compile(r"(LICEN[SC]E|NOTICE)([-_][\w-]*)?(\.(txt|md))?", re.IGNORECASE | re.ASCII)
_MAX_PAPER_BYTES = 1 << 20


def find_installed_model(kit_folder: Path, sha256: str) -> Path:
    """Return the folder of an installed model.

    The hash is not verified here, but when the model is loaded (`fedtune.model.base_model`).

    Raises:
        ConfigError: the model is not installed.
    """
    folder = find_model_store_path(kit_folder, sha256)
    if not folder.is_dir():
        remedy = "run `fedtune site doctor --import-model PATH` with the model's folder or file"
        raise ConfigError("base model", sha256, "is not installed here", remedy=remedy)
    return folder


def verify_model(kit_folder: Path, sha256: str) -> None:
    """Verify the files of an installed model against its hash, which is the name of its folder.

    Raises:
        ConfigError: the model is not installed, or its files were changed or are incomplete.
    """
    folder = find_installed_model(kit_folder, sha256)
    manifest = _build_model_manifest(folder, key="base model")
    if manifest.sha256 != sha256:
        raise ConfigError("base model", sha256, f"does not match the installed files: SHA-256 {manifest.sha256}")


def is_built_in_model(sha256: str) -> bool:
    """Return True if `sha256` is the hash of a built-in random model for tests, which needs no installation."""
    from fedtune.model.base_model import hash_model  # transformers takes seconds to import

    return any(hash_model(ModelSpec(path=path)) == sha256 for path in RANDOM_MODELS)


def list_license_files(kit_folder: Path, sha256: str) -> list[str]:
    """List the names of the license files of an installed model."""
    names = (path.name for path in find_installed_model(kit_folder, sha256).iterdir())
    return sorted(name for name in names if name.upper().startswith("LICEN"))


def install_model(path: Path, kit: Kit) -> tuple[KitModel, bool]:
    """Atomically copy a model that the kit lists into the model store.

    Only the hashed files and the license and notice files are copied.

    Args:
        path: a folder with safetensors (one file, or shards with their index) or with exactly one GGUF file; a GGUF
            file; or "package:<module>/<folder or GGUF file>" inside an installed Python package.
        kit: the site's kit.

    Returns:
        The model, and whether this call installed it (False if an intact copy existed already).

    Raises:
        ConfigError: the model does not exist, the kit does not list it, or its folder contains pickles or links to
            files outside.
        RunError: the disk is full, or the store cannot be written.
    """
    place = _find_in_package(str(path)) if str(path).startswith(PACKAGE) else path.expanduser()
    folder, gguf_file = (place, None) if place.is_dir() else (place.parent, place.name)
    if gguf_file is None:
        _check_folder(folder)
    elif place.suffix != ".gguf" or not place.is_file():
        bound = "must be a folder with safetensors or with one GGUF file, or a .gguf file"
        raise ConfigError(_OPTION, str(path), bound)
    papers = _find_license_files(folder)
    manifest = _build_model_manifest(folder, gguf_file=gguf_file, key=_OPTION)
    model = next((model for model in kit.model if model.sha256 == manifest.sha256), None)
    if model is None:
        allowed = ", ".join(f"{model.sha256} ({model.name})" for model in kit.model) or "no model"
        raise ConfigError(_OPTION, str(path), f"has SHA-256 {manifest.sha256}, but kit.toml names {allowed}")
    target = find_model_store_path(kit.folder, manifest.sha256)
    try:
        target.parent.mkdir(exist_ok=True)
        with lock_folder(target.parent):
            with suppress(ConfigError, OSError):  # there is no installed model, or its files were changed
                verify_model(kit.folder, manifest.sha256)
                return model, False
            _copy_into_store((*(folder / name for name, _ in manifest.files), *papers), target)
    except OSError as error:
        raise RunError(f"{target.parent} cannot be written ({error.strerror}); nothing was installed") from error
    return model, True


def _find_in_package(path: str) -> Path:
    """Locate a model folder or GGUF file inside an installed Python package, without importing the package."""
    folder, _, name = path.rpartition("/")
    is_file = name.endswith(".gguf")
    try:
        spec = ModelSpec(path=folder, gguf_file=name) if is_file else ModelSpec(path=path)
        location = find_model_folder(spec)
    except ConfigError as error:
        raise ConfigError(_OPTION, path, error.bound, remedy=error.remedy) from error
    return location / name if is_file else location


def _check_folder(folder: Path) -> None:
    """Check that a folder contains no pickle files, which can run code, and no links to files outside of it."""
    inside = folder.resolve()
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _PICKLES:
            remedy = "reading such a file can run code; use a folder without it"
            raise ConfigError(_OPTION, str(folder), f"must not contain {file.name}", remedy=remedy)
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            bound = f"must not contain {file.name}, a link to a file outside the folder"
            raise ConfigError(_OPTION, str(folder), bound, remedy="copy the folder with its link targets (cp -rL)")


def _build_model_manifest(folder: Path, *, key: str, gguf_file: str | None = None) -> Manifest:
    """Build the manifest of the model in a folder, from its safetensors files or, without these, its GGUF file."""
    try:
        name = gguf_file or find_single_gguf(folder)
        if name is not None and not re.fullmatch(r"[\w.-]+\.gguf", name):
            bound = "must have a name of letters, digits, '-', '_' and '.', because runs refer to the name"
            raise ConfigError(key, str(folder / name), bound)
        return build_manifest(folder, gguf_file=name)
    except ConfigError as error:
        raise ConfigError(key, error.value, error.bound, remedy=error.remedy) from error


def _find_license_files(folder: Path) -> tuple[Path, ...]:
    """List the license and notice files up to a size limit; no model loader reads these files."""
    papers = (file for file in sorted(folder.iterdir()) if _PAPER.fullmatch(file.name) and file.is_file())
    return tuple(file for file in papers if file.stat().st_size <= _MAX_PAPER_BYTES)


def _copy_into_store(files: tuple[Path, ...], target: Path) -> None:
    """Copy `files` to a temporary folder next to `target`, verify their hash, and rename the folder to `target`."""
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(target.parent).free
    if free < needed + _KEPT_FREE_BYTES:
        raise RunError(
            f"{target.parent} has {free / 2**30:.1f} GiB free, but the model needs {needed / 2**30:.1f} GiB and a "
            "reserve; nothing was installed"
        )
    draft, damaged = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.damaged")
    for leftover in (draft, damaged):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        for file in files:
            with file.open("rb") as source, (draft / file.name).open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        fsync_folder(draft)
        if _build_model_manifest(draft, key=_OPTION).sha256 != target.name:
            raise ConfigError(_OPTION, str(files[0].parent), "changed during the copy; nothing was installed")
        if target.exists():
            os.rename(target, damaged)
        os.rename(draft, target)
        fsync_folder(target.parent)
    finally:
        for leftover in (draft, damaged):
            shutil.rmtree(leftover, ignore_errors=True)
