"""Python processes with the large libraries already loaded: `Forked` replaces `subprocess.Popen`.

Importing torch, transformers, peft and Flower takes longer than most of the work that tests give a process. A server
(this file as a program) imports them once and forks. A forked process behaves like any other: it has its own pid
and exit code, handles signals, exits as Python does, and is a child of the process that requested it.
FEDTUNE_TEST_FORK=no starts each process the ordinary way.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_IN_NETWORK = ("ip", "netns", "exec")
_SUBREAPER, _NEW_NETWORK = 36, 0x40000000  # PR_SET_CHILD_SUBREAPER, CLONE_NEWNET
_MAX_BYTES = 1 << 20
_STREAMS = ("stdin", "stdout", "stderr")
_IMPORTED = (
    *(
        "fedtune.cli.real_run",
        "fedtune.cli.server",
        "fedtune.cli.interruptible_run",
        "fedtune.ops.services.lead_and_server",
    ),
    *("fedtune.ops.services.site_service", "fedtune.ops.deployment", "fedtune.ops.wire.superlink"),
    *("fedtune.sites.real_site", "opacus", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert"),
)
_FORKING = threading.Lock()
_SHIM = """\
#!{python} -IS
import array, json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
    channel.connect({address!r})
    request = {{"words": [*{before!r}, *sys.argv[1:]], "cwd": os.getcwd(), "environment": dict(os.environ)}}
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    channel.sendmsg([json.dumps(request).encode()], streams)
    pid = int(channel.recv(20))
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, frame: os.kill(pid, number))
    code = int(channel.recv(20))
sys.exit(code if code >= 0 else 128 - code)
"""
_SET_BY_IMPORTS: dict[str, str] = {}
"""Environment variables that the imports set if they were unset."""


class Forked(subprocess.Popen[Any]):
    """`subprocess.Popen` for `[sys.executable, ...]`, also within `ip netns exec NAME`; other commands run as usual.

    The process handles Ctrl-C even if the shell that started pytest in the background ignores it for its children.
    """

    def _execute_child(self, *args: Any) -> None:  # the only hook that leaves the rest of Popen unchanged
        named = inspect.signature(super()._execute_child).bind(*args).arguments  # type: ignore[misc]
        request = None if os.environ.get("FEDTUNE_TEST_FORK") == "no" else _request(named)
        if request is None:
            super()._execute_child(*args)  # type: ignore[misc]
            return
        pipes = [(named["p2cread"], 0), (named["c2pwrite"], 1), (named["errwrite"], 2)]
        with _FORKING:
            self.pid = _ask_for_fork(request, [own_end if end < 0 else end for end, own_end in pipes])
        self._child_created = True
        pipe_names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(named[end] for end in pipe_names))  # type: ignore[attr-defined]


def run_forked(words: Sequence[str], *, timeout_s: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with `Forked`: captures the output as text, and kills the process at the timeout."""
    with Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@contextlib.contextmanager
def write_forked_commands(folder: Path) -> Iterator[Path]:
    """Write `fedtune` and `python` commands that use `Forked` into a folder, which a shell can put first in its PATH.

    Commands that still run at the end are killed.
    """
    commands, address = folder / "commands", str(folder / "commands.socket")
    commands.mkdir()
    for name, before in (("fedtune", ["-m", "fedtune"]), ("python", [])):
        (commands / name).write_text(_SHIM.format(python=sys.executable, address=address, before=before))
        (commands / name).chmod(0o755)
    started: list[Forked] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(address)
        door.listen()
        threading.Thread(target=_accept_connections, args=(door, started), daemon=True).start()
        try:
            yield commands
        finally:
            door.shutdown(socket.SHUT_RDWR)
            for process in started:
                process.kill()


def _accept_connections(door: socket.socket, started: list[Forked]) -> None:
    """Fork for each command that a shell starts, until the socket is closed."""
    with contextlib.suppress(OSError):
        while True:
            channel, _ = door.accept()
            threading.Thread(target=_impersonate_account, args=(channel, started), daemon=True).start()


def _impersonate_account(channel: socket.socket, begun: list[Forked]) -> None:
    """Start the process of one command, and send it the pid and then the exit code."""
    with channel:
        message, streams, _, _ = socket.recv_fds(channel, _MAX_BYTES, 3)
        asked = json.loads(message)
        words = [sys.executable, *asked["words"]]
        process = Forked(words, cwd=asked["cwd"], env=asked["environment"], **dict(zip(_STREAMS, streams, strict=True)))
        begun.append(process)
        for stream in streams:
            os.close(stream)
        channel.send(str(process.pid).encode())
        with contextlib.suppress(OSError):  # the shell, and so the command, was killed
            channel.send(str(process.wait()).encode())


def _request(named: dict[str, Any]) -> dict[str, Any] | None:
    """Build the request for the fork server; None for a command other than Python."""
    words, network = [os.fspath(word) for word in named["args"]], None
    if tuple(words[:3]) == _IN_NETWORK:
        network, words = words[3], words[4:]
    if sys.platform != "linux" or words[0] != sys.executable:
        return None
    assert named["preexec_fn"] is None
    assert not named["pass_fds"]
    return {
        "words": words[1:],
        "network": network,
        "cwd": os.fspath(named["cwd"] or os.getcwd()),
        "environment": dict(os.environ if named["env"] is None else named["env"]),
        "own_session": named["start_new_session"],
    }


@cache
def _open_server_channel() -> socket.socket:
    """Return this process's channel to a fork server, which exits when the channel closes."""
    own_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, __file__, str(server_end.fileno())]
    with server_end:
        process = subprocess.Popen(words, pass_fds=[server_end.fileno()], env=environment, stdin=subprocess.DEVNULL)
    atexit.register(lambda: (own_end.close(), process.wait(timeout=30)))
    return own_end


def _ask_for_fork(request: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Ask the server to fork, and return the pid of the new process, which is a child of this one."""
    server, ancillary = _open_server_channel(), array.array("i", descriptors).tobytes()
    control = ctypes.CDLL(None, use_errno=True).prctl
    assert control(_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    try:  # meanwhile, orphaned descendants also become children of this process
        server.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ancillary)])
        answer = server.recv(_MAX_BYTES)
    finally:
        control(_SUBREAPER, 0, 0, 0, 0)
    assert answer, "the fork server ended"
    return int(answer)


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in each new process, and None in the server at the end."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _MAX_BYTES, 3)
        if not message:
            return None
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            child = os.fork()
            if child == 0:
                while os.getppid() == parent:
                    time.sleep(0.001)
                for own in (channel.fileno(), read, write):
                    os.close(own)
                channel.detach()
                return {**json.loads(message), "descriptors": descriptors}
            os.write(write, str(child).encode())
            os._exit(0)  # the requesting process becomes the parent of the child
        os.waitpid(between, 0)
        channel.send(os.read(read, 20))
        for descriptor in (read, write, *descriptors):
            os.close(descriptor)


def _apply_process_state(request: dict[str, Any]) -> None:
    """Apply the state of a new process: session, network, folder, environment, streams, arguments, randomness."""
    if request["own_session"]:
        os.setsid()
    if request["network"]:
        with open(f"/run/netns/{request['network']}") as network:
            result = ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK)
        assert result == 0, os.strerror(ctypes.get_errno())
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(_SET_BY_IMPORTS | request["environment"])
    for target, source in enumerate(request["descriptors"]):
        os.dup2(source, target)
        os.close(source)
    # The server's stream objects remember whether its own files were seekable.
    sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - they live as long as the process
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["numpy"].random.seed()
    kind, *rest = request["words"]
    if kind in ("-m", "-c"):
        sys.path[0], sys.argv = request["cwd"], ["-c" if kind == "-c" else rest[0], *rest[1:]]
    else:
        sys.path[0], sys.argv = str(Path(kind).resolve().parent), [kind, *rest]


def _run(kind: str, *rest: str) -> None:
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind in ("-", "-c"):
        code = compile(sys.stdin.read() if kind == "-" else rest[0], "<string>", "exec")
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def _end(code: int) -> None:
    """Exit as Python does, but without freeing objects, which would touch and so copy memory shared with the server."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def _run_server() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and then this server
    before = set(os.environ)
    for name in _IMPORTED:
        importlib.import_module(name)
    logging.root.handlers.clear()  # a library adds a handler, which would keep a process from adding its own
    _SET_BY_IMPORTS.update((name, value) for name, value in os.environ.items() if name not in before)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with several threads cannot fork safely"
    gc.collect()
    gc.freeze()  # so that garbage collection in a child does not touch, and so copy, shared memory
    request = _serve(channel)
    if request is not None:
        _apply_process_state(request)
        code: object = None
        try:
            _run(*request["words"])
        except SystemExit as exit_request:
            code = exit_request.code
        if code is None or isinstance(code, int):
            _end(code or 0)
        sys.exit(code)  # Python prints a string


if __name__ == "__main__":
    _run_server()
