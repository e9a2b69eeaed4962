"""Atomic file operations for kits and federation folders, and helpers for accounts, permissions and signals."""

from __future__ import annotations

import getpass
import io
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtune.privacy.durable import require_disk_space
from fedtune.spec import ConfigError
from fedtune.system import effective_user, fsync_folder, pwd

_PAGE_BYTES = 4096


@contextmanager
def create_folder(target: Path, *, key: str) -> Iterator[Path]:
    """Create a folder that only its owner can read.

    The folder has a temporary name during the block, and is renamed to `target` if the block succeeds.

    Args:
        target: the final path of the folder.
        key: the setting or option that an error names.

    Raises:
        ConfigError: `target` exists, or cannot be written.
    """
    if os.path.lexists(target):
        raise ConfigError(key, str(target), "already exists: move it away, or name another folder")
    with translate_write_errors(target, key=key):
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield building
            building.rename(target)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def translate_write_errors(target: Path, *, key: str) -> Iterator[None]:
    """Convert an OSError in the block to a ConfigError with `key` and `target`."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(target), target) else f" ({error.filename})"
        raise ConfigError(key, str(target), f"cannot be written: {error.strerror or error}{where}") from None


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def find_write_problem(*files: Path) -> str:
    """Return an error text if a ledger or its anchor cannot be written; empty if all `files` can be written.

    The check writes and syncs a page next to each file, because a full, read-only or over-quota disk reports an error
    only on a write.
    """
    for file in files:
        try:
            require_disk_space(file.parent, _PAGE_BYTES)
            with tempfile.TemporaryFile(dir=file.parent) as page:
                page.write(bytes(_PAGE_BYTES))
                page.flush()
                os.fsync(page.fileno())
        except OSError as error:
            disk = next(folder for folder in file.resolve().parents if os.path.ismount(folder))
            return f"{file} cannot be written ({error.strerror}, disk {disk}): no round can be charged"
    return ""


def make_zip(files: Mapping[str, bytes], *, moment: datetime) -> bytes:
    """Build a reproducible zip archive of `files`; every entry is world-readable and has the timestamp `moment`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, moment.timetuple()[:6])
            entry.create_system = 3  # Unix: only then are the mode bits read
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return buffer.getvalue()


def act_as_owner(*places: Path) -> None:
    """Drop root privileges: switch permanently to the owner of the first existing path, unless the owner is root.

    Raises:
        ConfigError: root may not switch users here, as in some containers, or the owner's account cannot read this
            Python installation.
    """
    place = next((place for place in places if os.path.lexists(place)), None)
    if place is None or effective_user() != 0:
        return
    owner = place.lstat()  # does not follow a link
    if owner.st_uid == 0:
        return
    known = _get_account_entry(owner.st_uid)
    group = known.pw_gid if known else owner.st_gid
    groups = os.getgrouplist(known.pw_name, group) if known else [group]
    name = get_account_name(owner.st_uid)
    try:
        os.setgroups(groups)
        os.setregid(group, group)
        os.setreuid(owner.st_uid, owner.st_uid)
    except OSError as error:
        bound = f"belongs to account {name}, but root cannot switch to it ({error.strerror}): run this as {name}"
        raise ConfigError("account", str(place), bound) from None
    if not _is_python_readable():
        bound = f"cannot be read by account {name}, to which {place} belongs: install fedtune in /opt, for example"
        raise ConfigError("Python", sys.prefix, bound)
    os.environ["HOME"] = known.pw_dir if known else "/"
    sys.stderr.write(f"fedtune: acting as account {name}, to which {place} belongs\n")


def get_account_name(uid: int) -> str:
    """Return the name of the account with this user id, or the id as text if it has no name."""
    known = _get_account_entry(uid)
    return known.pw_name if known else str(uid)


@contextmanager
def handle_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Install `handler` for SIGTERM and SIGINT during the block, and restore the previous handlers afterwards."""
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, known in before.items():
            signal.signal(signum, known)


def get_current_account() -> str:
    """Return the name of the account that runs this command; under sudo, that of the calling account."""
    return os.environ.get("SUDO_USER") or (get_account_name(os.getuid()) if pwd else getpass.getuser())


def get_primary_group(uid: int) -> int | None:
    """Return the primary group id of an account; None for a user id without an entry."""
    known = _get_account_entry(uid)
    return known.pw_gid if known else None


def _is_python_readable() -> bool:
    return os.access(os.__file__, os.R_OK) and os.access(__file__, os.R_OK)


def _get_account_entry(uid: int) -> Any:
    try:
        return pwd and pwd.getpwuid(uid)
    except KeyError:
        return None
