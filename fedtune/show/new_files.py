"""Atomic creation of commands' output files, with early checks of their paths."""

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
    """Yield a dictionary that the caller fills with a text per path, and write the files on exit without an error."""
    texts = dict[Path, str]()
    with open_new_streams(*places, mode=mode) as streams:
        yield texts
        for (option, path), stream in zip(places, streams, strict=True):
            with translate_os_errors(path, option):
                stream.write(texts[path].encode())


@contextmanager
def open_new_streams(*places: tuple[str, Path], mode: int = 0o666) -> Iterator[list[BufferedWriter]]:
    """Yield writable streams of temporary files, which are moved to their paths, in order, on exit without an error.

    Args:
        *places: pairs of a command-line option and the file's path.
        mode: permissions of the files.

    Raises:
        ConfigError: on entry or exit, a path exists or is not writable, or two paths are the same file.
    """
    token = token_hex(4)
    with ExitStack() as opened:
        files = []
        for option, path in places:
            with translate_os_errors(path, option):
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f"{path.name}.{token}.partial")  # exists if another path is the same file
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
                    _publish_file(beside, path)
                    made.callback(path.unlink)  # remove all files if one cannot be moved
                    fsync_folder(path.parent)
            made.pop_all()


def _publish_file(beside: Path, path: Path) -> None:
    """Move a complete file to its path, or raise FileExistsError if the path exists by now."""
    try:
        os.link(beside, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
        path.touch(exist_ok=False)  # no hard links: a crash before the next line leaves an empty file
        beside.rename(path)


@contextmanager
def translate_os_errors(path: Path, option: str) -> Iterator[None]:
    """Convert operating-system errors, and an existing file at `path`, to a ConfigError about the option."""
    try:
        if os.path.lexists(path):
            raise FileExistsError
        yield
    except FileExistsError:
        raise ConfigError(option, str(path), "already exists: choose a new file") from None
    except OSError as error:
        raise ConfigError(option, str(path), f"cannot be written ({error.strerror})") from None
