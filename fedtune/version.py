"""The version and the build, in a file that imports nothing of fedtune: every layer may read it."""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.2.0"


@cache
def build() -> str:
    """The version with a digest of the package's files: builds of one version, and changed ones, are told apart."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
