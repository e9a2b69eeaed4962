"""Conversations as one text each: what a chat template writes between contents of turns, found out once for a model.

A template is a program that came with the model.  Most templates are chains: they put the same text between a user's
content and the assistant's whatever the contents are, and wherever in the conversation.  These texts are read off
made-up conversations, and tried on others; a template that is no chain is refused.  A record's contents then go between
them, and the template is rendered over the record once: where it writes anything else, that record is not used.  All
renderings are counted, and each sees one conversation alone, so what becomes of one record is up to no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from fedtune.data.tokenise import MarkedTokenizer, Tokenizer
from fedtune.spec import ConfigError

if TYPE_CHECKING:
    from fedtune.tasks.counted_template import CountedTemplate

Joint: TypeAlias = tuple[str, str]  # both sides of a fixed text: the roles of two turns, or one of the three below
START, END, ANSWER = "start", "end", "answer"
"""A conversation's start and end, and the place behind a user's turn where the model is to write."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_MOST_TEMPLATE = 1 << 16  # characters; the longest of well-known models have about ten thousand
_MOST_TRIED = 1 << 24
"""Steps of all made-up conversations together, as `CountedTemplate` counts them; short templates need 200,000."""


class NoConversation(ValueError):
    """Messages that cannot be learnt or answered."""


class Turn(NamedTuple):
    """One turn of a conversation; `train`: whether it is learnt, where it is the assistant's."""

    role: str
    content: str
    train: bool = True


class Piece(NamedTuple):
    """A part of an example's text."""

    text: str  # in the names of a `MarkedTokenizer`
    said: bool = False  # whether a record says it; otherwise a template does
    learnt: bool = False  # whether its tokens are supervised


@dataclass(frozen=True, slots=True, eq=False)
class ChatFormat:
    """How a conversation becomes one text, which is encoded whole: as the template writes it, so are its tokens."""

    tokenizer: MarkedTokenizer  # encodes that text
    lead: tuple[int, ...]  # the tokens that go before that text
    start: str  # the begin-of-text token's name, where the template itself begins with it
    joints: Mapping[Joint, str]  # the texts between two contents; that behind `start` where it begins with it
    contents: Mapping[str, Callable[[str], str]]  # what is written of a turn's content, by role
    ending: str  # what ends the last answer, always taught
    between: str  # what ends an answer with turns behind it, taught too; blank where the template ends it by no mark
    end: int  # the token that says that an answer has ended
    has_system: bool  # otherwise a system turn is put before the first user's content, with a blank line between them
    # whether the template writes these turns as `joints` and `contents` do
    writes: Callable[[Sequence[Turn]], bool] = lambda turns: True

    def prompt(self, turns: Sequence[Turn], *, answer: str | None = None) -> list[Piece]:
        """The context of an answer to `turns`, from `start` on; the assistant's earlier turns are supervised.

        Where the `answer` is known, the template must write it as it is, too.

        Raises:
            NoConversation: the turns are not a user's and an assistant's in alternation, from a user's to a user's,
                with a system turn before them or none; or the template does not write them one after another.
        """
        placed = self._placed(turns)
        pieces, before, learnt = [Piece(self.start)], START, False
        for turn in (*placed, Turn(ANSWER, "")):
            joint = self.joints.get((before, turn.role))
            if joint is None:
                raise NoConversation("turns in another order")
            if before == ASSISTANT:
                pieces.append(Piece(self.between, learnt=learnt))
            pieces.append(Piece(joint))
            if turn.role != ANSWER:
                pieces.append(self._said(turn))
            before, learnt = turn.role, turn.train
        if not self.writes(placed if answer is None else (*placed, Turn(ASSISTANT, answer))):
            raise NoConversation("turns that the model's own template changes")
        return pieces

    def answer(self, content: str) -> list[Piece]:
        """The learnt part of an assistant's turn: its content, and that it ends."""
        return [self._said(Turn(ASSISTANT, content)), Piece(self.ending, learnt=True)]

    def _said(self, turn: Turn) -> Piece:
        return Piece(self.contents[turn.role](turn.content), said=True, learnt=turn.role == ASSISTANT and turn.train)

    def _placed(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns, a system turn where the format has it; a blank one counts as none."""
        if not turns or turns[0].role != SYSTEM:
            return turns
        system, *others = turns
        if not system.content.strip():
            return others
        if self.has_system or not others or others[0].role != USER:
            return turns
        first = "\n\n".join(text for text in (system.content.strip(), others[0].content) if text.strip())
        return [Turn(USER, first), *others[1:]]


def turns_in(text: str) -> list[Turn]:
    """The turns in a `messages` field, a JSON list of objects with `role` and `content`; else NoConversation."""
    try:
        turns = [Turn(turn["role"], turn["content"], turn.get("train", True)) for turn in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NoConversation("no list of turns") from error
    if not all(isinstance(part, str) for turn in turns for part in turn[:2]):
        raise NoConversation("a turn that is no text")
    return turns


def before_last_answer(turns: Sequence[Turn]) -> tuple[Sequence[Turn], str]:
    """The turns before the assistant's last one that is learnt, and what that says; NoConversation without one."""
    places = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT and turn.train]
    if not places:
        raise NoConversation("no turn of the assistant that is learnt")
    return turns[: places[-1]], turns[places[-1]].content


def chat_format(
    kind: Literal["model", "plain"], tokenizer: Tokenizer, *, start: tuple[int, ...], end: int
) -> ChatFormat:
    """The format that `data.chat_template` names: the tokenizer's own, or the roles in words with blank lines between.

    `start` are the tokens that the tokenizer puts before a text, which a model's own template writes itself; `end` is
    the end-of-text token, which ends an answer that no mark of the template's ends.

    Raises:
        ConfigError: for `data.chat_template`: the model has no template, or none that can be taken.
    """
    if kind == "plain":
        return _plain(tokenizer, start, end)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    try:
        if not isinstance(template, str):
            raise _NoChain("is missing")
        return _own(tokenizer, template, end)
    except _NoChain as error:
        bound = f"the model's own template {error}; use data.chat_template=plain"
        raise ConfigError("data.chat_template", "model", bound) from None


@lru_cache(maxsize=4)
def _plain(tokenizer: Tokenizer, start: tuple[int, ...], end: int) -> ChatFormat:
    """`System: ...`, `User: ...`, `Assistant: ...`; a space leads each content, as words are encoded with it."""
    marked = MarkedTokenizer.of(tokenizer, {end})
    names = {SYSTEM: "System:", USER: "User:", ASSISTANT: "Assistant:", ANSWER: "Assistant:"}
    following = ((SYSTEM, USER), (USER, ASSISTANT), (USER, ANSWER), (ASSISTANT, USER))
    joints = {(START, role): names[role] for role in (SYSTEM, USER)}
    joints |= {(before, role): f"\n\n{names[role]}" for before, role in following}
    contents = dict.fromkeys((SYSTEM, USER, ASSISTANT), lambda content: f" {content.strip()}")
    ending = marked.names[end]
    return ChatFormat(marked, start, "", joints, contents, ending, ending, end, has_system=True)


@lru_cache(maxsize=4)
def _own(tokenizer: Tokenizer, template: str, end: int) -> ChatFormat:
    """Raises _NoChain."""
    special = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    compiled = _compiled(template)
    chain, contents, tried = _derived(compiled, special)
    found = {joint: _marks_in(text, tokenizer) for joint, text in chain.items()}
    marked = MarkedTokenizer.of(tokenizer, {number for marks in found.values() for number, *_ in marks} | {end})
    joints = {joint: _named(text, found[joint], marked) for joint, text in chain.items()}
    # Conversations that are encoded whole have the tokens that transformers gives them.  A content that names a mark is
    # text for us, and a mark for transformers.
    by_name = {text for text in {turn.content for turns in tried for turn in turns} if _marks_in(text, tokenizer)}
    plain = {turns: text for turns, text in tried.items() if by_name.isdisjoint(turn.content for turn in turns)}
    ours = [ids for ids, _ in marked.encode([_written(joints, contents, turns) for turns in plain])]
    if ours != tokenizer([*plain.values()], add_special_tokens=False)["input_ids"]:
        raise _NoChain("marks turns by tokens that the tokenizer finds in some conversations and not in others")

    behind, last = joints.pop((ASSISTANT, END)), next(iter(found[ASSISTANT, END]), None)
    if last is not None:
        end = last[0]
        ending = behind[: behind.index(marked.names[end]) + len(marked.names[end])]
    else:
        ending = marked.names[end]
    between = ending if joints[ASSISTANT, USER].startswith(ending) else ""
    joints[ASSISTANT, USER] = joints[ASSISTANT, USER].removeprefix(between)
    begin = marked.names.get(-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id, "")
    starts = [joint for joint in joints if joint[0] == START]
    if not begin or not all(joints[joint].startswith(begin) for joint in starts):
        begin = ""
    joints |= {joint: joints[joint].removeprefix(begin) for joint in starts}

    def writes(turns: Sequence[Turn]) -> bool:
        try:
            return _rendered(compiled, turns, special) == _written(chain, contents, turns)
        except _NoChain:
            return False

    has_system = (START, SYSTEM) in joints
    return ChatFormat(marked, (), begin, joints, contents, ending, between, end, has_system, writes)


def _marks_in(text: str, tokenizer: Tokenizer) -> list[tuple[int, int, int]]:
    """Find the added tokens that a text names: (id, first character, end) of each, without those of spaces alone."""
    added, found = tokenizer.added_tokens_decoder, []
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    for number, (first, end) in zip(encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True):
        name = added[number].content if number in added else ""
        # Some take the spaces beside them along; the one for unknown letters stands for what it is not called.
        if name.strip() and name in text[first:end]:
            place = text.index(name, first)
            found.append((number, place, place + len(name)))
    return found


def _named(text: str, marks: Sequence[tuple[int, int, int]], marked: MarkedTokenizer) -> str:
    for number, first, end in reversed(marks):
        text = text[:first] + marked.names[number] + text[end:]
    return text


# What a model's own template writes, as texts.

_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
"""Changes that templates make to a content: none, or they take spaces off its ends."""
_Conversation: TypeAlias = tuple[Turn, ...]
_Contents: TypeAlias = Mapping[str, Callable[[str], str]]


def _written(joints: Mapping[Joint, str], contents: _Contents, turns: Sequence[Turn]) -> str:
    """Write a conversation as a `ChatFormat` with these texts does; an answer may be yet to come."""
    roles = (START, *(turn.role for turn in turns), END if turns[-1].role == ASSISTANT else ANSWER)
    said = (*(contents[turn.role](turn.content) for turn in turns), "")
    return "".join(joints[joint] + text for joint, text in zip(pairwise(roles), said, strict=True))


class _NoChain(Exception):
    """Why a template is refused, as the end of a sentence about it."""


def _derived(
    template: CountedTemplate, special: Mapping[str, str]
) -> tuple[Mapping[Joint, str], _Contents, Mapping[_Conversation, str]]:
    """Find out the `joints` and `contents` of a template's format.

    Also returns what the template writes of the conversations that it was tried on.
    """
    spent = 0

    def rendered(turns: _Conversation) -> str:
        nonlocal spent
        text = _rendered(template, turns, special)
        spent += template.work
        if spent > _MOST_TRIED:
            raise _NoChain(f"takes more than {_MOST_TRIED} steps for all the conversations that it is tried on")
        return text

    one, more = (USER, ASSISTANT), (USER, ASSISTANT, USER)
    joints = _read_off(rendered, one) | _read_off(rendered, more)
    # Some templates know no system turn: they say so, or leave it out.
    try:
        joints |= _read_off(rendered, (SYSTEM, *one))
    except _NoChain:  # some write it before the last user's content alone
        turns, keeps = (Turn(SYSTEM, "qzxw"), Turn(USER, "a"), Turn(ASSISTANT, "b")), False
        with suppress(_NoChain):
            keeps = any("qzxw" in rendered(turns[:count]) for count in (2, 3))
        if keeps:
            raise
    prompt, written = joints[USER, ANSWER], joints[USER, ASSISTANT]
    lead = written.removeprefix(prompt)
    if not written.startswith(prompt) or lead.strip():
        raise _NoChain("writes other words before an answer than those that ask for one")
    joints[USER, ASSISTANT] = prompt
    roles = [role for role in (SYSTEM, USER, ASSISTANT) if role != SYSTEM or (START, SYSTEM) in joints]
    # Spaces before an assistant's content, but not before an answer yet to be written, are the model's to write.
    contents: dict[str, Callable[[str], str]] = dict.fromkeys(roles, str) | {ASSISTANT: lambda content: lead + content}
    for role in roles:
        contents[role] = _trimmed(rendered, joints, contents, role)
    tried = {
        turns: rendered(turns) for turns in _tried((*template.texts, *special.values()), has_system=SYSTEM in roles)
    }
    if any(text != _written(joints, contents, turns) for turns, text in tried.items()):
        raise _NoChain("does not write turns one after another: what it writes of one goes by its place or content")
    return joints, contents, tried


def _read_off(rendered: Callable[[_Conversation], str], roles: Sequence[str]) -> dict[Joint, str]:
    """The texts between contents that nothing else can be taken for."""
    turns = tuple(Turn(role, f"qz{place}xw") for place, role in enumerate(roles))
    texts, rest = [], rendered(turns)
    for turn in turns:
        if rest.count(turn.content) != 1:
            raise _NoChain(f"does not write what the {turn.role} says once, where it stands")
        before, _, rest = rest.partition(turn.content)
        texts.append(before)
    ends = END if roles[-1] == ASSISTANT else ANSWER
    return dict(zip(pairwise((START, *roles, ends)), (*texts, rest), strict=True))


def _trimmed(
    rendered: Callable[[_Conversation], str], joints: Mapping[Joint, str], contents: _Contents, role: str
) -> Callable[[str], str]:
    """Find out what the template writes of one role's contents, off which it may take spaces."""
    roles = (SYSTEM, USER, ASSISTANT) if role == SYSTEM else (USER, ASSISTANT)
    turns = tuple(Turn(one, " \n\ta word\n \n" if one == role else "word") for one in roles)
    text, whole = rendered(turns), contents[role]
    for trim in _TRIMS:

        def trimmed(content: str, trim: Callable[[str], str] = trim) -> str:
            return whole(trim(content))

        if _written(joints, {**contents, role: trimmed}, turns) == text:
            return trimmed
    raise _NoChain(f"changes what the {role} says")


def _tried(own_texts: Sequence[str], *, has_system: bool) -> Iterator[_Conversation]:
    """Made-up conversations of several lengths, with contents that a template might treat in a way of their own.

    Such as one that holds all of its own texts: what it cuts off there, such as a thought, it has to look for.
    """
    odd = ('\n\nLines\n\nof "text", <b> & {{ x }}\n', "Ünï: 文字 [INST] #1", " two words\n", "word")
    unsaid = ("", "  ", *odd)  # of a user, who may say nothing
    for shift in range(len(unsaid)):
        turns: _Conversation = ()
        for place in range(3):
            user, assistant = unsaid[(shift + place) % len(unsaid)], odd[(shift + place) % len(odd)]
            turns = (*turns, Turn(USER, user), Turn(ASSISTANT, assistant))
        for first in ((), (Turn(SYSTEM, odd[shift % len(odd)]),)) if has_system else ((),):
            yield from ((*first, *turns[:count]) for count in ((5, 6) if shift else range(1, 7)))
    roles = (*((SYSTEM,) if has_system else ()), USER, ASSISTANT, USER, ASSISTANT)
    for content in (" and ".join(("said", *sorted(set(own_texts)), "</think>", "more")), "long " * 1000):
        yield tuple(Turn(role, content) for role in roles)


_WITHHELD = ("strftime_now", "lipsum")
"""Calls of transformers' templates on which no record may depend: a clock, chance.  Where it asks whether they
are there, it hears no."""


def _compiled(template: str) -> CountedTemplate:
    """The template with what transformers' own sandbox has, under counts."""
    from fedtune.model.quiet import first_line
    from fedtune.tasks.counted_template import CountedTemplate

    if len(template) > _MOST_TEMPLATE:
        raise _NoChain(f"has {len(template)} characters, more than {_MOST_TEMPLATE}")
    try:
        return CountedTemplate(template)
    except Exception as error:  # whatever its own words make of Jinja and of Python's compiler
        raise _NoChain(f"cannot be read ({first_line(error)})") from None


def _rendered(template: CountedTemplate, turns: Sequence[Turn], special: Mapping[str, str]) -> str:
    """Raises _NoChain, whose words are about a made-up conversation: of a record they are not shown."""
    from jinja2 import Undefined

    from fedtune.model.quiet import first_line
    from fedtune.tasks.counted_template import TooMuchWork

    given: dict[str, object] = (
        {name: Undefined(name=name) for name in _WITHHELD} | dict.fromkeys(("tools", "documents")) | dict(special)
    )
    given["messages"] = [{"role": turn.role, "content": turn.content} for turn in turns]
    given["add_generation_prompt"] = turns[-1].role != ASSISTANT
    try:
        return template.render(given)
    except TooMuchWork as error:
        raise _NoChain(str(error)) from None
    except Exception as error:  # whatever the template raises
        roles = ", ".join(turn.role for turn in turns)
        raise _NoChain(f"refuses turns of {roles} ({first_line(error)})") from None
