"""Conversations as tokens: what a chat template writes between the contents of turns, found out once for a model.

A template is a program that came with the model.  It is rendered over made-up conversations alone, never over a record:
what it does to one text and not to another, and how long it takes for it, then tells nothing about records.  Most
templates are chains: they put the same text between a user's content and the assistant's whatever the contents are, and
wherever in the conversation.  These texts are read off made-up conversations, and tried on others; a template that is
no chain is refused.  A record's contents then go between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from fedtune.data.tokenise import Tokenizer, encode
from fedtune.spec import ConfigError

if TYPE_CHECKING:
    from jinja2 import Template

Joint: TypeAlias = tuple[str, str]
"""What stands on both sides of a fixed text: the roles of two turns, or one of the three below."""
START, END, ANSWER = "start", "end", "answer"
"""A conversation's start and end, and the place behind a user's turn where the model is to write."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_MOST_TEMPLATE = 1 << 16
"""Characters; the longest of well-known models have about ten thousand."""


class NoConversation(ValueError):
    """Messages that cannot be learnt or answered."""


class Turn(NamedTuple):
    """One turn of a conversation; `train`: whether it is learnt, where it is the assistant's."""

    role: str
    content: str
    train: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of an example: a text that is to be encoded, or tokens; `learnt`: whether its tokens are supervised."""

    content: str | tuple[int, ...]
    learnt: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ChatFormat:
    """How a conversation becomes tokens.

    Attributes:
        start: the begin-of-text token, where a conversation begins with one.
        joints: the tokens between two contents; those behind `start` and behind `ending` where they follow.
        contents: what is written of a turn's content, by role.
        ending: the tokens that end an assistant's turn, always taught; the last one says that it has ended.
        has_system: otherwise a system turn is put before the first user's content, with a blank line between them.
    """

    start: tuple[int, ...]
    joints: Mapping[Joint, tuple[int, ...]]
    contents: Mapping[str, Callable[[str], str]]
    ending: tuple[int, ...]
    has_system: bool

    def prompt(self, turns: Sequence[Turn]) -> list[Piece]:
        """What stands before an answer to `turns`, from `start` on; the assistant's earlier turns are supervised.

        Raises:
            NoConversation: the turns are not a user's and an assistant's in alternation, from a user's to a user's,
                with a system turn before them or none.
        """
        pieces, before, learnt = [Piece(self.start)], START, False
        for turn in (*self._placed(turns), Turn(ANSWER, "")):
            if before == ASSISTANT:
                pieces.append(Piece(self.ending, learnt))
            joint = self.joints.get((before, turn.role))
            if joint is None:
                raise NoConversation("turns in another order")
            pieces.append(Piece(joint))
            if turn.role != ANSWER:
                pieces.append(self._said(turn))
            before, learnt = turn.role, turn.train
        return pieces

    def answer(self, content: str) -> list[Piece]:
        """What is learnt of an assistant's turn: its content, and that it ends."""
        return [self._said(Turn(ASSISTANT, content)), Piece(self.ending, learnt=True)]

    def _said(self, turn: Turn) -> Piece:
        return Piece(self.contents[turn.role](turn.content), learnt=turn.role == ASSISTANT and turn.train)

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
    """The turns in a `messages` field, a JSON list of objects with `role` and `content`.

    Raises:
        NoConversation: it is none.
    """
    try:
        turns = [Turn(turn["role"], turn["content"], turn.get("train", True)) for turn in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NoConversation("no list of turns") from error
    if not all(isinstance(part, str) for turn in turns for part in turn[:2]):
        raise NoConversation("a turn that is no text")
    return turns


def before_last_answer(turns: Sequence[Turn]) -> tuple[Sequence[Turn], str]:
    """The turns before the assistant's last one that is learnt, and what that says.

    Raises:
        NoConversation: there is none.
    """
    places = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT and turn.train]
    if not places:
        raise NoConversation("no turn of the assistant that is learnt")
    return turns[: places[-1]], turns[places[-1]].content


def chat_format(
    kind: Literal["model", "plain"], tokenizer: Tokenizer, *, start: tuple[int, ...], end: int
) -> ChatFormat:
    """The format that `data.chat_template` names.

    Args:
        kind: "model", the template of the tokenizer's own; "plain", the roles in words with blank lines between turns.
        tokenizer: the base's.
        start: the tokens that it puts before a text.  A model's own template writes them itself.
        end: the end-of-text token, which ends an answer that no mark of the template's ends.

    Raises:
        ConfigError: for `data.chat_template`: the model has no template, or none that can be taken.
    """
    if kind == "plain":
        return _plain(tokenizer, start, end)
    try:
        chain = _chain_of(_template_of(tokenizer), tuple(_special_texts(tokenizer).items()))
        joints = {joint: _ids(text, tokenizer) for joint, text in chain.joints.items()}
        _check_marks({number for ids in joints.values() for number in ids}, tokenizer)
    except _NoChain as error:
        bound = f"the model's own template {error}; use data.chat_template=plain"
        raise ConfigError("data.chat_template", "model", bound) from None
    behind = joints.pop((ASSISTANT, END))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    place = next((place for place, number in enumerate(behind) if number in special), None)
    ending = (end,) if place is None else behind[: place + 1]
    between = joints[ASSISTANT, USER]
    if between[: len(ending)] == ending:
        joints[ASSISTANT, USER] = between[len(ending) :]
    starts = {joint: ids for joint, ids in joints.items() if joint[0] == START}
    begin = joints[START, USER][:1]
    if begin != (tokenizer.bos_token_id,) or any(ids[:1] != begin for ids in starts.values()):
        begin = ()
    joints |= {joint: ids[len(begin) :] for joint, ids in starts.items()}
    return ChatFormat(begin, joints, chain.contents(), ending, has_system=(START, SYSTEM) in joints)


def _plain(tokenizer: Tokenizer, start: tuple[int, ...], end: int) -> ChatFormat:
    """`System: ...`, `User: ...`, `Assistant: ...`; a space leads each content, as words are encoded with it."""
    names = {SYSTEM: "System:", USER: "User:", ASSISTANT: "Assistant:", ANSWER: "Assistant:"}
    first = {(START, role): _ids(names[role], tokenizer) for role in (SYSTEM, USER)}
    following = ((SYSTEM, USER), (USER, ASSISTANT), (USER, ANSWER), (ASSISTANT, USER))
    joints = first | {(before, role): _ids(f"\n\n{names[role]}", tokenizer) for before, role in following}
    contents = dict.fromkeys((SYSTEM, USER, ASSISTANT), lambda content: f" {content.strip()}")
    return ChatFormat(start, joints, contents, (end,), has_system=True)


# What a model's own template writes, as texts.

_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
"""What templates do to a content: nothing, or they take spaces off its ends."""
_Conversation: TypeAlias = tuple[Turn, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """The fixed texts of a template.

    Attributes:
        joints: between two contents; of an assistant's turn the one that a model is to answer behind.
        trims: what is taken off a content, by role.
        lead: spaces that the template writes before an assistant's content and not before an answer that is yet to be
            written: the model writes them itself.
    """

    joints: Mapping[Joint, str]
    trims: Mapping[str, Callable[[str], str]]
    lead: str

    def contents(self) -> dict[str, Callable[[str], str]]:
        said = dict(self.trims)
        said[ASSISTANT] = lambda content: self.lead + self.trims[ASSISTANT](content)
        return said

    def text(self, turns: _Conversation) -> str:
        """What the template has to write of a conversation, where an answer may be yet to come."""
        contents, ends = self.contents(), (END if turns[-1].role == ASSISTANT else ANSWER)
        roles = (START, *(turn.role for turn in turns), ends)
        said = (*(contents[turn.role](turn.content) for turn in turns), "")
        return "".join(self.joints[joint] + text for joint, text in zip(pairwise(roles), said, strict=True))


class _NoChain(Exception):
    """Why a template is refused, as the end of a sentence about it."""


@lru_cache(maxsize=8)
def _chain_of(template: str, special: tuple[tuple[str, str], ...]) -> _Chain:
    return _derived(_compiled(template), dict(special))


def _derived(template: Template, special: Mapping[str, str]) -> _Chain:
    def rendered(turns: _Conversation) -> str:
        return _rendered(template, turns, special)

    one, more = (USER, ASSISTANT), (USER, ASSISTANT, USER)
    joints = _read_off(rendered, one) | _read_off(rendered, more)
    # Some templates know no system turn: they say so, or leave it out.
    try:
        joints |= _read_off(rendered, (SYSTEM, *one))
    except _NoChain:
        if _keeps_system(rendered):
            raise
    prompt, written = joints[USER, ANSWER], joints[USER, ASSISTANT]
    lead = written.removeprefix(prompt)
    if not written.startswith(prompt) or lead.strip():
        raise _NoChain("writes other words before an answer than those that ask for one")
    joints[USER, ASSISTANT] = prompt
    roles = [role for role in (SYSTEM, USER, ASSISTANT) if role != SYSTEM or (START, SYSTEM) in joints]
    chain = _Chain(joints, dict.fromkeys(roles, str), lead)
    for role in roles:
        chain = _trimmed(rendered, chain, role)
    for turns in _tried(has_system=SYSTEM in roles):
        if rendered(turns) != chain.text(turns):
            raise _NoChain("does not write turns one after another: what it writes of one goes by its place or content")
    return chain


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


def _keeps_system(rendered: Callable[[_Conversation], str]) -> bool:
    """Whether a system turn is written anywhere; some write it before the last user's content alone."""
    turns = (Turn(SYSTEM, "qzxw"), Turn(USER, "a"), Turn(ASSISTANT, "b"))
    try:
        return any("qzxw" in rendered(turns[:count]) for count in (2, 3))
    except _NoChain:
        return False


def _trimmed(rendered: Callable[[_Conversation], str], chain: _Chain, role: str) -> _Chain:
    """The chain with what the template takes off the contents of one role."""
    roles = (SYSTEM, USER, ASSISTANT) if role == SYSTEM else (USER, ASSISTANT)
    turns = tuple(Turn(one, " \n\ta word\n \n" if one == role else "word") for one in roles)
    text = rendered(turns)
    for trim in _TRIMS:
        found = _Chain(chain.joints, {**chain.trims, role: trim}, chain.lead)
        if found.text(turns) == text:
            return found
    raise _NoChain(f"changes what the {role} says")


def _tried(*, has_system: bool) -> Iterator[_Conversation]:
    """Made-up conversations of several lengths, with contents that a template might treat in a way of their own."""
    odd = ('\n\nLines\n\nof "text", <b> & {{ x }}\n', "Ünï: 文字 [INST] #1", " two words\n", "word")
    unsaid = ("", "  ", *odd)  # of a user, who may say nothing
    for shift in range(len(unsaid)):
        turns: _Conversation = ()
        for place in range(3):
            user, assistant = unsaid[(shift + place) % len(unsaid)], odd[(shift + place) % len(odd)]
            turns = (*turns, Turn(USER, user), Turn(ASSISTANT, assistant))
        for first in ((), (Turn(SYSTEM, odd[shift % len(odd)]),)) if has_system else ((),):
            yield from ((*first, *turns[:count]) for count in range(1, len(turns) + 1))


_WITHHELD = ("strftime_now", "range", "lipsum")
"""What a template of transformers may call and none of a record's may depend on: a clock, long loops, chance.  Where
it asks whether they are there, it hears no."""


def _compiled(template: str) -> Template:
    """The template in transformers' own sandbox."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from fedtune.model.quiet import first_line

    if len(template) > _MOST_TEMPLATE:
        raise _NoChain(f"has {len(template)} characters, more than {_MOST_TEMPLATE}")
    try:
        compiled: Template = _compile_jinja_template(template)
    except (TemplateError, RecursionError) as error:
        raise _NoChain(f"cannot be read ({first_line(error)})") from None
    return compiled


def _rendered(template: Template, turns: _Conversation, special: Mapping[str, str]) -> str:
    from jinja2 import Undefined

    from fedtune.model.quiet import first_line

    given = {name: Undefined(name=name) for name in _WITHHELD} | dict.fromkeys(("tools", "documents")) | dict(special)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return template.render(given, messages=messages, add_generation_prompt=turns[-1].role != ASSISTANT)
    except Exception as error:  # of a made-up conversation, whatever the template raises
        roles = ", ".join(turn.role for turn in turns)
        raise _NoChain(f"refuses turns of {roles} ({first_line(error)})") from None


def _template_of(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise _NoChain("is missing")
    return template


def _special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by the names that a template knows, such as `bos_token`."""
    return {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}


def _check_marks(ids: Collection[int], tokenizer: Tokenizer) -> None:
    """Refuse marks of turns that the text of a record would give as well."""
    for number, token in tokenizer.added_tokens_decoder.items():
        if number in ids and token.content.strip() and number in _ids(token.content, tokenizer, literal=True):
            raise _NoChain(f"marks turns by {token.content!r}, which is no special token: a record could hold it, too")


def _ids(text: str, tokenizer: Tokenizer, *, literal: bool = False) -> tuple[int, ...]:
    (ids,) = encode([text], tokenizer, special_tokens=False, literal=literal)
    return tuple(ids)
