"""Rendering of conversations as single texts, with fixed separators that are derived once from a model's chat template.

A template is a program that comes with the model.  Most templates write the same text between a user's content and the
assistant's, for all contents and at every position in the conversation.  These separators are derived from synthetic
conversations and tested on others; a template without fixed separators is refused.  A record's contents are then joined
by the separators, and the template is rendered once for the record: if the two texts differ, the record is skipped.
Each rendering has a step limit and receives only one conversation, so that no record affects another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from fedtune.data.tokenization import MarkedTokenizer, Tokenizer
from fedtune.spec import ConfigError

if TYPE_CHECKING:
    from fedtune.tasks.bounded_jinja import StepLimitedTemplate

Boundary: TypeAlias = tuple[str, str]  # roles before and after a separator, or one of the three names below
START, END, ANSWER = "start", "end", "answer"
"""Names of a conversation's start and end, and of the position after a user turn where the model starts to write."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_MAX_TEMPLATE = 1 << 16  # maximum characters; the longest templates of well-known models have about ten thousand
_MAX_TRIED = 1 << 24
"""Limit on the steps of all synthetic conversations together, counted by `StepLimitedTemplate`; short templates need
200,000.
"""


class NoConversation(ValueError):
    """Error for messages without a supervised answer, or without a user turn to answer."""


class Turn(NamedTuple):
    """A turn of a conversation; `train` is whether an assistant turn is supervised."""

    role: str
    content: str
    train: bool = True


class Piece(NamedTuple):
    """A part of an example's text, from the record or from the template."""

    text: str  # with the random names of a `MarkedTokenizer`
    said: bool = False  # whether the text is from the record instead of the template
    learned: bool = False  # whether its tokens are supervised


@dataclass(frozen=True, slots=True, eq=False)
class ChatFormat:
    """Format that renders a conversation as one text, which is encoded as a whole with the template's own special
    tokens.
    """

    tokenizer: MarkedTokenizer  # encodes the text
    lead: tuple[int, ...]  # tokens before the text
    start: str  # the name of the begin-of-text token, if the template starts with it
    separators: Mapping[Boundary, str]  # separators between two contents, without `start`
    contents: Mapping[str, Callable[[str], str]]  # conversion of a turn's content to the rendered content, by role
    ending: str  # supervised text that ends the last answer
    between: str  # supervised text that ends earlier answers; empty if the template has no end mark there
    end: int  # the token that ends an answer
    has_system: bool  # False: the system text is prepended to the first user content, separated by a blank line
    # whether the template renders these turns exactly as `separators` and `contents` do
    renders_unchanged: Callable[[Sequence[Turn]], bool] = lambda turns: True

    def build_prompt(self, turns: Sequence[Turn], *, answer: str | None = None) -> list[Piece]:
        """Build the context of an answer to `turns`, starting with `start`; earlier assistant turns are supervised.

        If `answer` is given, the template must also render the answer unchanged.

        Raises:
            NoConversation: user and assistant turns do not alternate from a first to a last user turn, after at most
                one system turn; or the template does not render the turns one after another.
        """
        placed = self._merge_system_turn(turns)
        pieces, before, learned = [Piece(self.start)], START, False
        for turn in (*placed, Turn(ANSWER, "")):
            joint = self.separators.get((before, turn.role))
            if joint is None:
                raise NoConversation("turns in a different order")
            if before == ASSISTANT:
                pieces.append(Piece(self.between, learned=learned))
            pieces.append(Piece(joint))
            if turn.role != ANSWER:
                pieces.append(self._make_content_piece(turn))
            before, learned = turn.role, turn.train
        if not self.renders_unchanged(placed if answer is None else (*placed, Turn(ASSISTANT, answer))):
            raise NoConversation("turns that the model's own template changes")
        return pieces

    def build_answer(self, content: str) -> list[Piece]:
        """Build the supervised part of an assistant turn: its content and its end token."""
        return [self._make_content_piece(Turn(ASSISTANT, content)), Piece(self.ending, learned=True)]

    def _make_content_piece(self, turn: Turn) -> Piece:
        return Piece(self.contents[turn.role](turn.content), said=True, learned=turn.role == ASSISTANT and turn.train)

    def _merge_system_turn(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Prepend the system text to the first user turn if the format has no system turn; drop a blank system turn."""
        if not turns or turns[0].role != SYSTEM:
            return turns
        system, *others = turns
        if not system.content.strip():
            return others
        if self.has_system or not others or others[0].role != USER:
            return turns
        first = "\n\n".join(text for text in (system.content.strip(), others[0].content) if text.strip())
        return [Turn(USER, first), *others[1:]]


def parse_turns(text: str) -> list[Turn]:
    """Parse the turns in a `messages` field, a JSON list of objects with `role` and `content`.

    Raises:
        NoConversation: the field has another form.
    """
    try:
        turns = [Turn(turn["role"], turn["content"], turn.get("train", True)) for turn in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NoConversation("not a list of turns") from error
    if not all(isinstance(part, str) for turn in turns for part in turn[:2]):
        raise NoConversation("a turn without text")
    return turns


def split_last_answer(turns: Sequence[Turn]) -> tuple[Sequence[Turn], str]:
    """Split a conversation into the turns before the last supervised assistant turn, and the content of that turn.

    Raises:
        NoConversation: no assistant turn is supervised.
    """
    places = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT and turn.train]
    if not places:
        raise NoConversation("no assistant turn to learn from")
    return turns[: places[-1]], turns[places[-1]].content


def build_chat_format(
    kind: Literal["model", "plain"], tokenizer: Tokenizer, *, start: tuple[int, ...], end: int
) -> ChatFormat:
    """Return the format that `data.chat_template` selects: the tokenizer's own, or plain role names and blank lines.

    Args:
        kind: "model" or "plain".
        tokenizer: the base's tokenizer.
        start: the tokens that the tokenizer adds before a text; a model's own template writes them itself.
        end: the end-of-text token, which ends an answer if the template has no end mark.

    Raises:
        ConfigError: for `data.chat_template`, if the model's template is missing or not supported.
    """
    if kind == "plain":
        return _build_plain_format(tokenizer, start, end)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    try:
        if not isinstance(template, str):
            raise _UnsupportedTemplate("is missing")
        return _build_template_format(tokenizer, template, end)
    except _UnsupportedTemplate as error:
        bound = f"the model's own template {error}; use data.chat_template=plain"
        raise ConfigError("data.chat_template", "model", bound) from None


@lru_cache(maxsize=4)
def _build_plain_format(tokenizer: Tokenizer, start: tuple[int, ...], end: int) -> ChatFormat:
    """Build the format `System: ...`, `User: ...`, `Assistant: ...`.

    The space before a content is part of the content, so that its first word is tokenized as in running text.
    """
    marked = MarkedTokenizer.from_tokenizer(tokenizer, {end})
    names = {SYSTEM: "System:", USER: "User:", ASSISTANT: "Assistant:", ANSWER: "Assistant:"}
    following = ((SYSTEM, USER), (USER, ASSISTANT), (USER, ANSWER), (ASSISTANT, USER))
    separators = {(START, role): names[role] for role in (SYSTEM, USER)}
    separators |= {(before, role): f"\n\n{names[role]}" for before, role in following}
    contents = dict.fromkeys((SYSTEM, USER, ASSISTANT), lambda content: f" {content.strip()}")
    ending = marked.names[end]
    return ChatFormat(marked, start, "", separators, contents, ending, ending, end, has_system=True)


@lru_cache(maxsize=4)
def _build_template_format(tokenizer: Tokenizer, template: str, end: int) -> ChatFormat:
    """Build the format of a model's own chat template.

    Raises:
        _UnsupportedTemplate: the template is not supported.
    """
    special = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    compiled = _compile_template(template)
    chain, contents, tried = _derive_format(compiled, special)
    tokens = {joint: _find_special_tokens(text, tokenizer) for joint, text in chain.items()}
    marked = MarkedTokenizer.from_tokenizer(
        tokenizer, {number for marks in tokens.values() for number, *_ in marks} | {end}
    )
    separators = {joint: _rename_marks(text, tokens[joint], marked) for joint, text in chain.items()}
    # Conversations that are encoded as a whole must have the same tokens as in transformers.  Contents with the name
    # of a special token are excluded: they are text here, and a special token in transformers.
    by_name = {
        text for text in {turn.content for turns in tried for turn in turns} if _find_special_tokens(text, tokenizer)
    }
    plain = {turns: text for turns, text in tried.items() if by_name.isdisjoint(turn.content for turn in turns)}
    ours = [ids for ids, _ in marked.encode([_join_turns(separators, contents, turns) for turns in plain])]
    if ours != tokenizer([*plain.values()], add_special_tokens=False)["input_ids"]:
        raise _UnsupportedTemplate("marks turns with tokens that the tokenizer finds in only some conversations")

    suffix, last = separators.pop((ASSISTANT, END)), next(iter(tokens[ASSISTANT, END]), None)
    if last is not None:
        end = last[0]
        ending = suffix[: suffix.index(marked.names[end]) + len(marked.names[end])]
    else:
        ending = marked.names[end]
    between = ending if separators[ASSISTANT, USER].startswith(ending) else ""
    separators[ASSISTANT, USER] = separators[ASSISTANT, USER].removeprefix(between)
    begin = marked.names.get(-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id, "")
    starts = [joint for joint in separators if joint[0] == START]
    if not begin or not all(separators[joint].startswith(begin) for joint in starts):
        begin = ""
    separators |= {joint: separators[joint].removeprefix(begin) for joint in starts}

    def renders_unchanged(turns: Sequence[Turn]) -> bool:
        try:
            return _render_turns(compiled, turns, special) == _join_turns(chain, contents, turns)
        except _UnsupportedTemplate:
            return False

    has_system = (START, SYSTEM) in separators
    return ChatFormat(marked, (), begin, separators, contents, ending, between, end, has_system, renders_unchanged)


def _find_special_tokens(text: str, tokenizer: Tokenizer) -> list[tuple[int, int, int]]:
    """Find the added tokens whose names occur in a text, as (id, start, end); whitespace tokens are ignored."""
    added, tokens = tokenizer.added_tokens_decoder, []
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    for number, (first, end) in zip(encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True):
        name = added[number].content if number in added else ""
        # Some tokens include adjacent spaces; the unknown token replaces text without its name.
        if name.strip() and name in text[first:end]:
            place = text.index(name, first)
            tokens.append((number, place, place + len(name)))
    return tokens


def _rename_marks(text: str, marks: Sequence[tuple[int, int, int]], marked: MarkedTokenizer) -> str:
    for number, first, end in reversed(marks):
        text = text[:first] + marked.names[number] + text[end:]
    return text


# Analysis of a model's own template.

_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
"""Trimming of contents by templates: none, or removal of surrounding whitespace."""
_Conversation: TypeAlias = tuple[Turn, ...]
_Contents: TypeAlias = Mapping[str, Callable[[str], str]]


def _join_turns(separators: Mapping[Boundary, str], contents: _Contents, turns: Sequence[Turn]) -> str:
    """Render a conversation with these separators and contents, as a `ChatFormat` does, with or without an answer."""
    roles = (START, *(turn.role for turn in turns), END if turns[-1].role == ASSISTANT else ANSWER)
    texts = (*(contents[turn.role](turn.content) for turn in turns), "")
    return "".join(separators[joint] + text for joint, text in zip(pairwise(roles), texts, strict=True))


class _UnsupportedTemplate(Exception):
    """Reason for refusing a chat template, as the end of a sentence whose subject is the template."""


def _derive_format(
    template: StepLimitedTemplate, special: Mapping[str, str]
) -> tuple[Mapping[Boundary, str], _Contents, Mapping[_Conversation, str]]:
    """Derive the separators between turns, and the trimming of their contents, from a chat template.

    Returns:
        The separators, the trimming by role, and the template's renderings of the test conversations.
    """
    spent = 0

    def render_counted(turns: _Conversation) -> str:
        nonlocal spent
        text = _render_turns(template, turns, special)
        spent += template.work
        if spent > _MAX_TRIED:
            raise _UnsupportedTemplate(f"takes more than {_MAX_TRIED} steps for all trial conversations")
        return text

    exchange, longer = (USER, ASSISTANT), (USER, ASSISTANT, USER)
    separators = _derive_separators(render_counted, exchange) | _derive_separators(render_counted, longer)
    # Some templates have no system turn: they raise an error, or omit it.
    try:
        separators |= _derive_separators(render_counted, (SYSTEM, *exchange))
    except _UnsupportedTemplate:  # some templates write it only before the last user content
        turns, keeps = (Turn(SYSTEM, "qzxw"), Turn(USER, "a"), Turn(ASSISTANT, "b")), False
        with suppress(_UnsupportedTemplate):
            keeps = any("qzxw" in render_counted(turns[:count]) for count in (2, 3))
        if keeps:
            raise
    prompt, written = separators[USER, ANSWER], separators[USER, ASSISTANT]
    lead = written.removeprefix(prompt)
    if not written.startswith(prompt) or lead.strip():
        raise _UnsupportedTemplate("writes different text before an answer than in the generation prompt")
    separators[USER, ASSISTANT] = prompt
    roles = [role for role in (SYSTEM, USER, ASSISTANT) if role != SYSTEM or (START, SYSTEM) in separators]
    # The model must generate spaces that precede an assistant's content but not the generation position.
    contents: dict[str, Callable[[str], str]] = dict.fromkeys(roles, str) | {ASSISTANT: lambda content: lead + content}
    for role in roles:
        contents[role] = _detect_trimming(render_counted, separators, contents, role)
    tried = {
        turns: render_counted(turns)
        for turns in _iter_test_conversations((*template.texts, *special.values()), has_system=SYSTEM in roles)
    }
    if any(text != _join_turns(separators, contents, turns) for turns, text in tried.items()):
        raise _UnsupportedTemplate("does not render turns independently: a turn depends on its position or content")
    return separators, contents, tried


def _derive_separators(rendered: Callable[[_Conversation], str], roles: Sequence[str]) -> dict[Boundary, str]:
    """Derive the separators from one rendering of turns with unique contents."""
    turns = tuple(Turn(role, f"qz{place}xw") for place, role in enumerate(roles))
    texts, rest = [], rendered(turns)
    for turn in turns:
        if rest.count(turn.content) != 1:
            raise _UnsupportedTemplate(f"does not write the {turn.role}'s text exactly once, in place")
        before, _, rest = rest.partition(turn.content)
        texts.append(before)
    ends = END if roles[-1] == ASSISTANT else ANSWER
    return dict(zip(pairwise((START, *roles, ends)), (*texts, rest), strict=True))


def _detect_trimming(
    rendered: Callable[[_Conversation], str], separators: Mapping[Boundary, str], contents: _Contents, role: str
) -> Callable[[str], str]:
    """Determine how the template trims the contents of one role."""
    roles = (SYSTEM, USER, ASSISTANT) if role == SYSTEM else (USER, ASSISTANT)
    turns = tuple(Turn(turn_role, " \n\ta word\n \n" if turn_role == role else "word") for turn_role in roles)
    text, whole = rendered(turns), contents[role]
    for trim in _TRIMS:

        def render_trimmed(content: str, trim: Callable[[str], str] = trim) -> str:
            return whole(trim(content))

        if _join_turns(separators, {**contents, role: render_trimmed}, turns) == text:
            return render_trimmed
    raise _UnsupportedTemplate(f"changes the {role}'s text")


def _iter_test_conversations(own_texts: Sequence[str], *, has_system: bool) -> Iterator[_Conversation]:
    """Yield synthetic conversations of several lengths, with contents that a template might treat specially.

    One content consists of all string constants of the template, because a template that removes a part of a content,
    such as a thought, must search for one of them.
    """
    odd = ('\n\nLines\n\nof "text", <b> & {{ x }}\n', "Ünï: 文字 [INST] #1", " two words\n", "word")
    unsaid = ("", "  ", *odd)  # user contents may be blank
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
"""Functions that transformers offers to templates, and that would make a rendering depend on the clock or on
randomness.  Templates see these functions as undefined.
"""


def _compile_template(template: str) -> StepLimitedTemplate:
    """Compile a template in transformers' sandbox, with a step limit."""
    from fedtune.model.hf_logging import get_first_line
    from fedtune.tasks.bounded_jinja import StepLimitedTemplate

    if len(template) > _MAX_TEMPLATE:
        raise _UnsupportedTemplate(f"has {len(template)} characters, more than {_MAX_TEMPLATE}")
    try:
        return StepLimitedTemplate(template)
    except Exception as error:  # any error of Jinja or of Python's compiler
        raise _UnsupportedTemplate(f"cannot be read ({get_first_line(error)})") from None


def _render_turns(template: StepLimitedTemplate, turns: Sequence[Turn], special: Mapping[str, str]) -> str:
    """Render turns with a template.

    Raises:
        _UnsupportedTemplate: rendering failed.  Its message is shown only for synthetic conversations, never for a
            record.
    """
    from jinja2 import Undefined

    from fedtune.model.hf_logging import get_first_line
    from fedtune.tasks.bounded_jinja import TooMuchWork

    variables: dict[str, object] = (
        {name: Undefined(name=name) for name in _WITHHELD} | dict.fromkeys(("tools", "documents")) | dict(special)
    )
    variables["messages"] = [{"role": turn.role, "content": turn.content} for turn in turns]
    variables["add_generation_prompt"] = turns[-1].role != ASSISTANT
    try:
        return template.render(variables)
    except TooMuchWork as error:
        raise _UnsupportedTemplate(str(error)) from None
    except Exception as error:  # any error of the template
        roles = ", ".join(turn.role for turn in turns)
        raise _UnsupportedTemplate(f"refuses turns of {roles} ({get_first_line(error)})") from None
