"""A site's store of base models: `models/<sha256>/` in the kit's folder, filled from files and never from a network."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.folders import locked
from fedtune.deploy.kit_file import KitModel
from fedtune.deploy.kits import Kit
from fedtune.model.source import files_sha256, model_folder, weights_files
from fedtune.model.spec import PACKAGE, RANDOM_MODELS, ModelSpec
from fedtune.privacy.durable import fsync_folder
from fedtune.spec import ConfigError, RunError

_OPTION = "--import-model"
_KEPT_FREE_BYTES = 200 * 2**20
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_DATA = frozenset({".json", ".txt", ".model", ".jinja"})
_CODE = frozenset({".py", ".pyc", ".so", ".sh"})
_PAPERS = ("LICENSE", "LICENCE", "NOTICE", "README")


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """A model in the store.

    Attributes:
        new: False where it had been there before, whole.
    """

    model: KitModel
    folder: Path
    new: bool


def model_place(kit_folder: Path, sha256: str) -> Path:
    """Where a model lies, or would."""
    return kit_folder / "models" / sha256


def installed_model(kit_folder: Path, sha256: str) -> Path:
    """The folder of an installed model; its file names are those it came with.

    The hash is not computed here: whoever loads the weights checks it (`fedtune.model.base.check_sha256`).

    Raises:
        ConfigError: it is not installed.
    """
    folder = model_place(kit_folder, sha256)
    if not folder.is_dir():
        bound = "is not installed here: run `fedtune site doctor --import-model PATH` with the model's folder or file"
        raise ConfigError("base model", sha256, bound)
    return folder


def verify_model(kit_folder: Path, sha256: str) -> None:
    """Read an installed model's weights, and require them to have the hash that names their folder.

    Raises:
        ConfigError: it is not installed, or its files were changed or are incomplete.
    """
    found = files_sha256(installed_weights(kit_folder, sha256))
    if found != sha256:
        raise ConfigError("base model", sha256, f"is not what lies in its folder, whose weights have SHA-256 {found}")


def installed_weights(kit_folder: Path, sha256: str) -> tuple[Path, ...]:
    """The files with an installed model's weights.

    Raises:
        ConfigError: it is not installed, or incomplete.
    """
    return _weights(installed_model(kit_folder, sha256), key="base model")


def is_made_here(sha256: str) -> bool:
    """Whether it is a tiny untrained model that fedtune makes itself, for tests: there is nothing to install."""
    from fedtune.model.base import weights_sha256  # transformers takes seconds to import

    return any(weights_sha256(ModelSpec(path=path)) == sha256 for path in RANDOM_MODELS)


def licence_files(kit_folder: Path, sha256: str) -> list[str]:
    """Names of the licence files that an installed model came with."""
    names = (path.name for path in installed_model(kit_folder, sha256).iterdir())
    return sorted(name for name in names if name.upper().startswith(_PAPERS[:2]))


def install_model(path: Path, kit: Kit) -> Installed:
    """Copy a model of the kit's manifest into the store; a crash leaves the whole model or none.

    Only weights that the hash covers are copied, and beside them settings, tokenizer, licence and notes: no code.

    Args:
        path: a folder with safetensors (one file, or shards with their index) or with exactly one GGUF file; a GGUF
            file; or "package:<module>/<folder or GGUF file>" inside an installed Python package.
        kit: of the site.

    Raises:
        ConfigError: there is no such model, the kit does not name it, or its folder holds what may run code when it
            is read.
        RunError: the disk is too full, or cannot be written.
    """
    weights, beside = _source(path)
    found = files_sha256(weights)
    model = next((model for model in kit.models if model.sha256 == found), None)
    if model is None:
        allowed = ", ".join(f"{model.sha256} ({model.name})" for model in kit.models) or "no model at all"
        raise ConfigError(_OPTION, str(path), f"has weights with SHA-256 {found}, and kit.toml names {allowed}")
    target = model_place(kit.folder, found)
    try:
        target.parent.mkdir(exist_ok=True)
        with locked(target.parent):
            if _is_whole(kit.folder, found):
                return Installed(model=model, folder=target, new=False)
            _copy((*weights, *beside), target)
    except OSError as error:
        raise RunError(f"{target.parent} cannot be written ({error.strerror}); nothing was installed") from error
    return Installed(model=model, folder=target, new=True)


def _source(path: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files with the weights, and those to copy beside them."""
    place = _packaged(str(path)) if str(path).startswith(PACKAGE) else path.expanduser()
    if place.is_dir():
        _check_folder(place)
        weights = _weights(place, key=_OPTION)
        return weights, tuple(file for file in sorted(place.iterdir()) if file.is_file() and _is_wanted(file.name))
    if place.suffix == ".gguf" and place.is_file():
        # Beside a single file may lie anything, a folder of downloads for instance: only papers come along.
        papers = (file for file in sorted(place.parent.iterdir()) if file.is_file() and _is_paper(file.name))
        return (_named_for_runs(place),), tuple(papers)
    raise ConfigError(_OPTION, str(path), "must be a folder with safetensors or with one GGUF file, or a .gguf file")


def _packaged(path: str) -> Path:
    """A folder or a GGUF file inside an installed Python package, which is looked up and not imported."""
    folder, _, name = path.rpartition("/")
    is_file = name.endswith(".gguf")
    try:
        spec = ModelSpec(path=folder, gguf_file=name) if is_file else ModelSpec(path=path)
        found = model_folder(spec)
    except ConfigError as error:
        raise ConfigError(_OPTION, path, error.bound) from error
    return found / name if is_file else found


def _check_folder(folder: Path) -> None:
    """Refuse what runs code when it is read, and what lies elsewhere."""
    inside = folder.resolve()
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _PICKLES:
            bound = f"must not hold {file.name}: reading such a file can run code; give a folder without it"
            raise ConfigError(_OPTION, str(folder), bound)
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            bound = f"must not hold {file.name}, a link out of it: give a real copy of the folder (cp -rL)"
            raise ConfigError(_OPTION, str(folder), bound)


def _weights(folder: Path, *, key: str) -> tuple[Path, ...]:
    """The files that hold a folder's weights: safetensors, or else its one GGUF file."""
    safetensors = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    gguf = sorted(folder.glob("*.gguf"))
    if not any(file.is_file() for file in safetensors):
        if len(gguf) != 1:
            bound = f"must hold safetensors weights, or exactly one GGUF file; it holds {len(gguf)}"
            raise ConfigError(key, str(folder), bound)
        return (_named_for_runs(gguf[0]),)
    try:
        return weights_files(ModelSpec(path=str(folder)))
    except ConfigError as error:
        raise ConfigError(key, str(folder), error.bound) from error


def _named_for_runs(file: Path) -> Path:
    if not re.fullmatch(r"[\w.-]+\.gguf", file.name):
        raise ConfigError(_OPTION, str(file), "must be named in letters, digits, '-', '_' and '.': runs name the file")
    return file


def _is_wanted(name: str) -> bool:
    """Whether a file is one of the known good ones; weights are chosen by the hash and not here."""
    return Path(name).suffix.lower() in _DATA or _is_paper(name)


def _is_paper(name: str) -> bool:
    return name.upper().startswith(_PAPERS) and Path(name).suffix.lower() not in _CODE | _PICKLES


def _is_whole(kit_folder: Path, sha256: str) -> bool:
    try:
        verify_model(kit_folder, sha256)
    except (ConfigError, OSError):
        return False
    return True


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
        found = files_sha256(_weights(draft, key=_OPTION))
        if found != target.name:
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
