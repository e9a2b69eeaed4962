"""Output files of commands: paths are checked before the work, and complete files appear at its end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedWriter
from pathlib import Path
from secrets import token_hex

from fedtune.privacy.durable import copy_ownership
from fedtune.spec import ConfigError
from fedtune.system import fsync_folder


@contextmanager
def write_new_files(*places: tuple[str, Path], mode: int = 0o666) -> Iterator[dict[Path, str]]:
    """Yield a dict from path to text for the block to fill; the texts become files as in `open_new_streams`."""
    texts = dict[Path, str]()
    with open_new_streams(*places, mode=mode) as streams:
        yield texts
        for (option, path), stream in zip(places, streams, strict=True):
            with translate_os_errors(path, option):
                stream.write(texts[path].encode())


@contextmanager
def open_new_streams(*places: tuple[str, Path], mode: int = 0o666) -> Iterator[list[BufferedWriter]]:
    """Yield open streams for the block to write; if it ends without an error, they become files, in this order.

    Args:
        *places: pairs of the option that names a file and the file's path.
        mode: the permissions of the files.

    Raises:
        ConfigError: before or after the block, a path exists, two paths name the same file, or one is not writable.
    """
    token = token_hex(4)
    with ExitStack() as opened:
        files = []
        for option, path in places:
            with translate_os_errors(path, option):
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f"{path.name}.{token}.partial")  # is there for another spelling of one path
                file = os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")
                opened.callback(beside.unlink, missing_ok=True)
                files.append((option, path, beside, opened.enter_context(file)))
                copy_ownership(file.fileno(), path)
        yield [file for *_, file in files]
        for option, path, _, file in files:
            with translate_os_errors(path, option):
                file.flush()
                os.fsync(file.fileno())
        with ExitStack() as made:
            for option, path, beside, _ in files:
                with translate_os_errors(path, option):
                    _publish(beside, path)
                    made.callback(path.unlink)  # one that cannot appear takes the others along
                    fsync_folder(path.parent)
            made.pop_all()


def _publish(beside: Path, path: Path) -> None:
    """Move a finished file to its name, unless that name has been taken meanwhile."""
    try:
        os.link(beside, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
        path.touch(exist_ok=False)  # the disk has no links: a kill between these two lines leaves an empty file
        beside.rename(path)


@contextmanager
def translate_os_errors(path: Path, option: str) -> Iterator[None]:
    """Turn operating system errors, and an existing file at `path`, into a ConfigError that names the option."""
    try:
        if os.path.lexists(path):
            raise FileExistsError
        yield
    except FileExistsError:
        raise ConfigError(option, str(path), "already exists; choose a new file") from None
    except OSError as error:
        raise ConfigError(option, str(path), f"cannot be written ({error.strerror})") from None
