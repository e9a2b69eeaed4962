"""A site in a process of its own: `python site_process.py FOLDER`, where `settings.json` lies.

It answers every message with the arrays that came, and says who it is.  What happens to it is noted in `log.jsonl`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(sys.argv[1])


def note(event: str, **fields: object) -> None:
    with (FOLDER / "log.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, **fields}) + "\n")


def note_outbound(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[1:] if event == "socket.connect" else arguments[:2]
        note("outbound", address=repr(address))


sys.addaudithook(note_outbound)

from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.flower.fleet import Dropped, Fleet, Unauthorised, Unreachable
from fedtune.flower.tls import Tls


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the site does.

    Attributes:
        works_s: how long it takes to answer.
        dies_on: number of the message on which it dies before it answers; 0: none.
        replies: how often it sends each answer.
    """

    works_s: float = 0.0
    dies_on: int = 0
    replies: int = 1


def answer(message: Message, name: str, number: int) -> Message:
    content = RecordDict({"about": ConfigRecord({"site": name, "number": number})})
    for key, arrays in message.content.array_records.items():
        content[key] = arrays
    return Message(content, reply_to=message)


def main() -> None:
    given = json.loads((FOLDER / "settings.json").read_text())
    behaviour, name = Behaviour(**given["behaviour"]), given["site"]
    fleet = Fleet(given["server"], Tls(**{key: Path(path) for key, path in given["tls"].items()}))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    active, number = False, 0
    try:
        while True:
            try:
                if not active:
                    fleet.activate()
                    active = True
                    note("activated")
                message = fleet.receive()
                if message is None:
                    time.sleep(0.1)
                    continue
                number += 1
                note("received", type=message.metadata.message_type, number=number)
                if number == behaviour.dies_on:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(behaviour.works_s)
                reply = answer(message, name, number)
                for _ in range(behaviour.replies):
                    fleet.reply(reply)
                    note("replied", number=number)
            except (Unreachable, Unauthorised, Dropped) as error:
                note("trouble", kind=type(error).__name__, text=str(error))
                active = active and not isinstance(error, Unauthorised)
                time.sleep(0.2)
    finally:
        fleet.close()


main()
