"""The version, build digest and data folders of the package. This module imports no other module of fedtune."""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.2.0"
_PACKAGE = Path(__file__).parent


@cache
def build() -> str:
    """Return the version with a digest of the package's source files, which identifies modified copies."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def find_shipped_folders() -> tuple[Path, ...]:
    """Return the parent folders of `conf/` and `simulations/`, in a wheel or in a checkout."""
    return tuple(folder for folder in (_PACKAGE / "share", _PACKAGE.parent) if folder.is_dir())


def find_config_folder() -> Path:
    """Return the folder `conf/`, in a checkout or in the installed package."""
    return next(folder / "conf" for folder in find_shipped_folders() if (folder / "conf" / "config.yaml").is_file())
