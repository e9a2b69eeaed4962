"""A site in a separate process: `python site_process.py FOLDER`, with `settings.json` in the folder.

It answers every message with the received arrays and its name, and prints its events as JSON.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
sys.path.insert(0, str(Path(__file__).parent))


def note(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def note_outbound(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        host, port = arguments[1] if event == "socket.connect" else arguments[:2]
        note("outbound", address=[host, port])


sys.addaudithook(note_outbound)

from faults import Faulty  # noqa: E402
from flwr.app import ConfigRecord, Message, RecordDict  # noqa: E402

import fedtune.ops.wire.bounded_http as bounded_http  # noqa: E402
from fedtune.ops.wire.fleet import Fleet, MessageGone, Unauthorized, Unreachable  # noqa: E402
from fedtune.ops.wire.identity import Tls  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Behavior:
    works_s: float = 0.0  # duration of each answer
    replies: int = 1  # number of times that it sends each answer
    # (end of a path, "before" or "after"): each fault breaks one call, and the next fault applies once an answer was
    # sent
    faults: tuple[tuple[str, str], ...] = ()


def answer(message: Message, name: str, number: int) -> Message:
    content = RecordDict({"about": ConfigRecord({"site": name, "number": number})})
    for key, arrays in message.content.array_records.items():
        content[key] = arrays
    return Message(content, reply_to=message)


class Polling:
    """A minimal site: poll, answer, and resend an answer until it is accepted or expires."""

    def __init__(self, fleet: Fleet, behavior: Behavior, name: str) -> None:
        self._fleet, self._behavior, self._name = fleet, behavior, name
        self._active, self._number = False, 0
        self._faulty, self._faults = Faulty(fleet._client), iter(behavior.faults)
        self._take_next_fault()

    def step(self) -> None:
        message = self._tried(self._next)
        if message is None:
            time.sleep(0.25)
            return
        self._number += 1
        note("received", type=message.metadata.message_type, number=self._number)
        time.sleep(self._behavior.works_s)
        reply = answer(message, self._name, self._number)
        for _ in range(self._behavior.replies):
            while not self._tried(lambda: self._sent(reply)):
                time.sleep(0.2)

    def _take_next_fault(self) -> None:
        fault = next(self._faults, None)
        if fault is not None:
            note("fault", fault=list(fault))
            self._faulty.break_at(*fault)

    def _next(self) -> Message | None:
        if not self._active:
            self._fleet.activate()
            self._active = True
            note("activated")
        return self._fleet.receive()

    def _sent(self, reply: Message) -> bool:
        try:
            self._fleet.reply(reply)
            note("replied", number=self._number)
            if not self._faulty.waits:
                self._take_next_fault()
        except MessageGone as error:
            note("dropped", text=str(error))
        return True

    def _tried(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (Unreachable, Unauthorized, MessageGone) as error:
            note("trouble", kind=type(error).__name__, text=str(error))
            self._active = self._active and not isinstance(error, Unauthorized)
            return None


def main() -> None:
    bounded_http._ALERT_S = 0.05  # each connection waits this long for a refusal, which never comes here
    settings = json.loads((FOLDER / "settings.json").read_text())
    fleet = Fleet(settings["server"], Tls(**{key: Path(path) for key, path in settings["tls"].items()}))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    polling = Polling(fleet, Behavior(**settings["behavior"]), settings["site"])
    try:
        while True:
            polling.step()
    finally:
        fleet.close()


main()
