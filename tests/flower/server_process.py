"""A server in a separate process: `python server_process.py FOLDER`, with `settings.json` in the folder.

`roster.json` is reread each time. Every connection that the process opens is recorded in `outbound.log`. Flower waits
three minutes for the rest of a partial answer; here it waits for `upload_s` seconds.
"""

import json
import logging
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(sys.argv[1])


def note_outbound(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with (FOLDER / "outbound.log").open("a") as file:
            file.write(f"{event} {arguments!r}\n")


sys.addaudithook(note_outbound)

import flwr.supercore.corestate.sql_corestate as sql_corestate  # noqa: E402

from fedtune.ops.wire.connections import ConnectionLimits  # noqa: E402
from fedtune.ops.wire.identity import Tls  # noqa: E402
from fedtune.ops.wire.superlink import ServerSettings, serve  # noqa: E402


def read_roster() -> list[Any]:
    members = json.loads((FOLDER / "roster.json").read_text())
    return [SimpleNamespace(**{**member, "node_key": member["node_key"].encode()}) for member in members]


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    given = json.loads((FOLDER / "settings.json").read_text())
    if "files" in given:
        resource.setrlimit(resource.RLIMIT_NOFILE, (given["files"], given["files"]))
    sql_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS = given["upload_s"]
    settings = ServerSettings(
        tls=Tls(**{name: Path(path) for name, path in given["tls"].items()}),
        lead=given["lead"],
        host="127.0.0.1",
        port=given["port"],
        database=FOLDER / "state.db",
        roster=read_roster,
        audit=FOLDER / "audit.jsonl",
        limits=ConnectionLimits(**given.get("limits", {})),
    )

    def note_works(is_ready: bool) -> None:
        (FOLDER / "works").write_text(str(is_ready))

    serve(settings, ready=lambda: print("ready", flush=True), works=note_works)


main()
