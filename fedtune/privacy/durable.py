"""Crash-safe file writes: atomic replacement, fsync and locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune import system
from fedtune.spec import ConfigError


def require_disk_space(folder: Path, num_bytes: int) -> None:
    """Check that the file system of `folder` has room for a file of `num_bytes` plus 1 MiB.

    Raises:
        OSError: the disk is too full (errno ENOSPC).
    """
    if shutil.disk_usage(folder).free < num_bytes + (1 << 20):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def write_durably(path: Path, data: bytes, *, mode: int = 0o666, world_readable: bool = False) -> None:
    """Replace the content of `path` atomically, with fsync.

    After a crash, the file contains either the old or the new bytes.

    An existing file retains its owner, group and mode, as far as the current account may set them. A new file that root
    creates gets the owner of its folder; `mode` is the mode of a new file, before the umask. With
    `world_readable`, the mode is 0o644 whatever the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write one file
    temporary.unlink(missing_ok=True)  # left behind by a killed process with this id
    # O_EXCL and O_NOFOLLOW: never write through a planted link.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.NO_FOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            copy_ownership(descriptor, path)
            if world_readable:
                system.change_mode(descriptor, 0o644)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # free the space on a full disk
        error.filename = str(path)  # missing in errors of write()
        raise
    system.fsync_folder(path.parent)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`; wait while another process holds it.

    Raises:
        ConfigError: the folder, or its file system, does not support locks.
    """
    with contextlib.ExitStack() as held:
        try:
            descriptor = system.open_to_lock(folder)
            held.callback(os.close, descriptor)
            system.lock(descriptor, wait=True)
        except OSError as error:
            raise ConfigError("folder", str(folder), f"cannot be locked: {error.strerror or error}") from None
        yield


def copy_ownership(descriptor: int, path: Path) -> None:
    """Copy the owner, group and mode of `path` to the open file that will replace it."""
    try:
        before = path.lstat()
    except FileNotFoundError:
        before = None
    owner = path.parent.stat() if before is None else before
    with contextlib.suppress(PermissionError):
        if system.effective_user() == 0:
            system.change_owner(descriptor, owner.st_uid, owner.st_gid)
        elif before is not None:
            system.change_owner(descriptor, -1, before.st_gid)
    if before is not None and stat.S_ISREG(before.st_mode):
        system.change_mode(descriptor, before.st_mode & 0o755)


def hash_files(folder: Path, *, besides: Sequence[str] = ()) -> dict[str, str]:
    """Hash every file under `folder`, and return relative path -> SHA-256 in hex.

    Files whose relative path is in `besides` are skipped.

    Raises:
        ConfigError: the folder is or contains a symbolic link, which could point to any secret file and be changed
            later, or contains a pipe, a device, or a name with control characters or bytes that are not UTF-8.
    """
    digests: dict[str, str] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        special = path.exists() and not (path.is_file() or path.is_dir())
        unreadable = path != folder and not path.name.isprintable()
        if path.is_symlink() or special or unreadable:
            kind = "not a printable name" if unreadable else "a pipe or a device" if special else "a symbolic link"
            raise ConfigError("model", str(path), f"is {kind}: a model folder must contain regular files only")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in besides:
            with path.open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
