"""A site's store of base models: `models/<sha256>/` in the kit's folder, filled from files and never from a network."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from fedtune.federation.run_folder import locked
from fedtune.model.manifest import Manifest, manifest_of
from fedtune.model.source import model_folder, only_gguf
from fedtune.model.spec import PACKAGE, RANDOM_MODELS, ModelSpec
from fedtune.ops.kits.kit_file import Kit, KitModel, model_place
from fedtune.spec import ConfigError, RunError
from fedtune.system import fsync_folder

_OPTION = "--import-model"
_KEPT_FREE_BYTES = 200 * 2**20
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_PAPER = re.compile(r"(LICEN[SC]E|NOTICE)([-_][\w-]*)?(\.(txt|md))?", re.IGNORECASE | re.ASCII)
_MOST_PAPER_BYTES = 1 << 20


def installed_model(kit_folder: Path, sha256: str) -> Path:
    """The folder of an installed model; its file names are those it came with.

    The hash is not computed here: loading the model checks it (`fedtune.model.base_model`).

    Raises:
        ConfigError: it is not installed.
    """
    folder = model_place(kit_folder, sha256)
    if not folder.is_dir():
        remedy = "run `fedtune site doctor --import-model PATH` with the model's folder or file"
        raise ConfigError("base model", sha256, "is not installed here", remedy=remedy)
    return folder


def verify_model(kit_folder: Path, sha256: str) -> None:
    """Read an installed model's files, and require them to have the hash that names their folder.

    Raises:
        ConfigError: it is not installed, or its files were changed or are incomplete.
    """
    folder = installed_model(kit_folder, sha256)
    manifest = _manifest(folder, key="base model")
    if manifest.sha256 != sha256:
        raise ConfigError("base model", sha256, f"is not what lies in its folder, which has SHA-256 {manifest.sha256}")


def is_made_here(sha256: str) -> bool:
    """The base is a tiny untrained model that fedtune makes itself, for tests: there is nothing to install."""
    from fedtune.model.base_model import model_sha256  # transformers takes seconds to import

    return any(model_sha256(ModelSpec(path=path)) == sha256 for path in RANDOM_MODELS)


def licence_files(kit_folder: Path, sha256: str) -> list[str]:
    """Names of the licence files that an installed model came with."""
    names = (path.name for path in installed_model(kit_folder, sha256).iterdir())
    return sorted(name for name in names if name.upper().startswith("LICEN"))


def install_model(path: Path, kit: Kit) -> tuple[KitModel, bool]:
    """Copy a model of the kit's manifest into the store; a crash leaves the whole model or none.

    Exactly the files that the hash covers are copied, and beside them papers: licence and notice.

    Args:
        path: a folder with safetensors (one file, or shards with their index) or with exactly one GGUF file; a GGUF
            file; or "package:<module>/<folder or GGUF file>" inside an installed Python package.
        kit: of the site.

    Returns:
        The model, and whether it is new: False where it was there before, whole.

    Raises:
        ConfigError: there is no such model, the kit does not name it, or its folder holds what may run code when it
            is read, or what redirects the loader.
        RunError: the disk is too full, or cannot be written.
    """
    place = _packaged(str(path)) if str(path).startswith(PACKAGE) else path.expanduser()
    folder, gguf_file = (place, None) if place.is_dir() else (place.parent, place.name)
    if gguf_file is None:
        _check_folder(folder)
    elif place.suffix != ".gguf" or not place.is_file():
        bound = "must be a folder with safetensors or with one GGUF file, or a .gguf file"
        raise ConfigError(_OPTION, str(path), bound)
    papers = _papers(folder)
    manifest = _manifest(folder, gguf_file=gguf_file, key=_OPTION)
    model = next((model for model in kit.model if model.sha256 == manifest.sha256), None)
    if model is None:
        allowed = ", ".join(f"{model.sha256} ({model.name})" for model in kit.model) or "no model at all"
        raise ConfigError(_OPTION, str(path), f"has SHA-256 {manifest.sha256}, and kit.toml names {allowed}")
    target = model_place(kit.folder, manifest.sha256)
    try:
        target.parent.mkdir(exist_ok=True)
        with locked(target.parent):
            with suppress(ConfigError, OSError):  # of one that is not there, or was changed
                verify_model(kit.folder, manifest.sha256)
                return model, False
            _copy((*(folder / name for name, _ in manifest.files), *papers), target)
    except OSError as error:
        raise RunError(f"{target.parent} cannot be written ({error.strerror}); nothing was installed") from error
    return model, True


def _packaged(path: str) -> Path:
    """A folder or a GGUF file inside an installed Python package, which is looked up and not imported."""
    folder, _, name = path.rpartition("/")
    is_file = name.endswith(".gguf")
    try:
        spec = ModelSpec(path=folder, gguf_file=name) if is_file else ModelSpec(path=path)
        found = model_folder(spec)
    except ConfigError as error:
        raise ConfigError(_OPTION, path, error.bound, remedy=error.remedy) from error
    return found / name if is_file else found


def _check_folder(folder: Path) -> None:
    """Refuse what runs code when it is read, and what lies elsewhere."""
    inside = folder.resolve()
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _PICKLES:
            remedy = "reading such a file can run code; give a folder without it"
            raise ConfigError(_OPTION, str(folder), f"must not hold {file.name}", remedy=remedy)
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            bound = f"must not hold {file.name}, a link out of it"
            raise ConfigError(_OPTION, str(folder), bound, remedy="give a real copy of the folder (cp -rL)")


def _manifest(folder: Path, *, key: str, gguf_file: str | None = None) -> Manifest:
    """The manifest of a folder's model: its safetensors, or else its one GGUF file."""
    try:
        name = gguf_file or only_gguf(folder)
        if name is not None and not re.fullmatch(r"[\w.-]+\.gguf", name):
            bound = "must be named in letters, digits, '-', '_' and '.': runs name the file"
            raise ConfigError(key, str(folder / name), bound)
        return manifest_of(folder, gguf_file=name)
    except ConfigError as error:
        raise ConfigError(key, error.value, error.bound, remedy=error.remedy) from error


def _papers(folder: Path) -> tuple[Path, ...]:
    """Licence and notice, as text: nothing that a loader could take for weights or settings."""
    papers = (file for file in sorted(folder.iterdir()) if _PAPER.fullmatch(file.name) and file.is_file())
    return tuple(file for file in papers if file.stat().st_size <= _MOST_PAPER_BYTES)


def _copy(files: tuple[Path, ...], target: Path) -> None:
    """Copy `files` into a folder beside `target`, check them there, and put it in `target`'s place."""
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(target.parent).free
    if free < needed + _KEPT_FREE_BYTES:
        raise RunError(
            f"{target.parent} has {free / 2**30:.1f} GiB free, and the model needs {needed / 2**30:.1f} GiB and some "
            "to spare; nothing was installed"
        )
    draft, damaged = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.damaged")
    for leftover in (draft, damaged):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        for file in files:
            _copy_durably(file, draft / file.name)
        fsync_folder(draft)
        if _manifest(draft, key=_OPTION).sha256 != target.name:
            raise ConfigError(_OPTION, str(files[0].parent), "changed while it was copied; nothing was installed")
        if target.exists():
            os.rename(target, damaged)
        os.rename(draft, target)
        fsync_folder(target.parent)
    finally:
        for leftover in (draft, damaged):
            shutil.rmtree(leftover, ignore_errors=True)


def _copy_durably(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())
