"""`fedtune chat`: a conversation with a finished run's model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING

from fedtune.cli import finished_run as runs
from fedtune.cli.finished_run import Adapters, Device, MaxNewTokens, Run, Seed, Temperature, TopP
from fedtune.config import RunConfig
from fedtune.data.lists import as_json
from fedtune.evaluation.spec import WritingSpec
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import task_named
from fedtune.words import counted

if TYPE_CHECKING:  # it imports torch, which takes seconds
    import numpy as np
    import numpy.typing as npt

    from fedtune.runs.saved_model import SavedModel

_HELP = """\
/reset          forget the conversation
/adapter NAME   go on with another adapter (without NAME: which there are)
/help           these lines
/quit           end; Ctrl-D does the same, and Ctrl-C ends an answer"""


def chat(
    run: Run,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    adapter: Adapters = (),
    device: Device = "auto",
) -> None:
    """Talk with a finished run's model: each line is a message, and each answer is shown as it is written.

      fedtune chat runs/chats
      fedtune chat runs/chats --temperature 0.7 --adapter other=runs/other

    /help lists what else can be typed. Nothing is saved.
    """
    spec = WritingSpec(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config, own = runs.finished_run(run, device=device)
    if not task_named(config.task).predicts_tokens:
        raise ConfigError("task", config.task, f'writes no text; try: fedtune generate {run} --prompt "..."')
    folders = runs.by_name(run, own, adapter)
    from fedtune.runs.saved_model import SavedModel

    conversation = _Conversation(config, SavedModel(config, folders), spec, adapter=next(iter(folders)))
    for message in _typed_lines():
        if message in ("/quit", "/exit"):
            break
        if message.startswith("/"):
            conversation.command(message)
        else:
            conversation.answer(message)


class _Conversation:
    """The turns so far, and the adapter that answers."""

    def __init__(self, config: RunConfig, saved: SavedModel, spec: WritingSpec, *, adapter: str) -> None:
        self._saved, self._spec, self._adapter = saved, spec, adapter
        self._turns: Sequence[tuple[str, str]] = ()
        self._keeps_turns = "messages" in task_named(config.task).asked_by(config.data)
        _say(f"{self._adapter} answers; /help lists the commands.")
        if not self._keeps_turns:
            _say("The run was tuned on single texts, not on conversations: each message is a new prompt.")
        runs.warn_of_fixed_prompt(config)

    def command(self, words: str) -> None:
        match words.split():
            case ["/reset"]:
                self._turns = ()
                _say("The conversation begins anew.")
            case ["/adapter", name] if name in self._saved.names:
                self._adapter = name
                _say(f"{name} answers.")
            case ["/adapter", *_]:
                _say(f"{self._adapter} answers. There are: {', '.join(self._saved.names)}.")
            case _:
                _say(_HELP)

    def answer(self, message: str) -> None:
        """Answer a message; one that cannot be answered is no part of the conversation."""
        turns: Sequence[tuple[str, str]] = [*self._turns, ("user", message)]
        try:
            if self._keeps_turns:
                turns, ids = self._fitting(turns)
            else:
                ids = self._saved.prompt_ids(self._saved.fields_of(message, at="message"), at="message")
        except ConfigError as error:
            _say(str(error))
            return
        self._saved.use(self._adapter)
        text, _ = runs.print_streamed(self._saved.written(ids, self._spec))
        self._turns = [*turns, ("assistant", text)]

    def _fitting(self, turns: Sequence[tuple[str, str]]) -> tuple[Sequence[tuple[str, str]], npt.NDArray[np.int32]]:
        """As many of the last turns as leave the model room for an answer, with their tokens."""
        positions = self._saved.positions
        room = 1 if positions is None else min(self._spec.max_new_tokens, positions // 2)
        for first in range(0, len(turns), 2):
            kept, is_last = turns[first:], first == len(turns) - 1
            try:
                messages = as_json([{"role": role, "content": content} for role, content in kept])
                ids = self._saved.prompt_ids({"messages": messages}, at="message", room=1 if is_last else room)
            except DataError:
                if is_last:
                    raise
                continue
            if first:
                _say(f"The model's {positions} positions are full: the oldest {counted(first, 'turn')} are left out.")
            return kept, ids
        raise AssertionError("a message is a turn")


def _typed_lines() -> Iterator[str]:
    """Lines from the keyboard or a pipe; blank lines are passed over."""
    with suppress(ImportError):
        import readline  # noqa: F401  (`input` then edits lines)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                sys.stdout.write("\n")
            return
        if line:
            yield line


def _say(text: str) -> None:
    """A line to the person, apart from what the model writes."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
