"""Build the simulated accelerator once per machine, and run Python with it."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ..forked import run_forked

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
_ENTRY_POINT = "[torch.backends]\nsim = torch_sim:load\n"
_BEGIN = "import sys, torch; sys.path.insert(0, {folder!r}); import torch_sim; torch_sim.load()\n"


@cache
def build_folder() -> Path:
    """Return the folder for PYTHONPATH that provides the device; skip the test without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("no C++ compiler to build the simulated accelerator")
    sources = [HERE / "sim.cpp", HERE / "torch_sim.py"]
    version = hashlib.sha256(b"".join([torch.__version__.encode(), *(path.read_bytes() for path in sources)]))
    cached = Path(tempfile.gettempdir()) / f"fedtune-tests-{os.getuid()}"
    cached.mkdir(mode=0o700, exist_ok=True)
    assert cached.stat().st_uid == os.getuid(), f"{cached} belongs to another user"
    made = cached / version.hexdigest()[:16]
    with (cached / "lock").open("w") as lock:  # several processes of pytest may build it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _build(compiler, made)
    return made


def _build(compiler: str, into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into.parent) as name:
        new = Path(name) / "new"
        about = new / "torch_sim-1.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-sim\nVersion: 1\n")
        (about / "entry_points.txt").write_text(_ENTRY_POINT)
        shutil.copy(HERE / "torch_sim.py", new)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [word for path in cpp_extension.library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
        words = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *includes, str(HERE / "sim.cpp")]
        words += ["-o", str(new / "sim.so"), *libraries, "-lc10", "-ltorch", "-ltorch_cpu"]
        subprocess.run(words, check=True, timeout=600)
        new.rename(into)


def run_on_it(code: str, *, timeout_s: float = 300, **settings: object) -> str:
    """Run `code` in a process with the device and these SIM_... settings; return its output."""
    here = str(build_folder())
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment |= {"PYTHONPATH": os.pathsep.join([here, str(REPOSITORY)]), "OMP_NUM_THREADS": "1"}
    done = run_forked(
        [sys.executable, "-c", _BEGIN.format(folder=here) + code], timeout_s=timeout_s, env=environment, cwd=REPOSITORY
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
