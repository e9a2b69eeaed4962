"""Rendering of chat templates with a deterministic step limit.

A template is a program that comes with a model.  A nested loop, or a text that doubles forty times, would hang a site
or exhaust its memory.  Here each operation costs the number of characters and items that it reads and writes, counted
before its result is built; a template that exceeds the limit is refused.  The limit does not depend on time, so a slow
machine refuses the same templates as a fast machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from threading import Lock
from typing import Any

from jinja2 import Environment, TemplateError, Undefined, nodes
from jinja2.ext import Extension
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

_A_TURN, _A_CHARACTER = 1 << 17, 1 << 6
"""Step limit of a rendering, per turn and per character of the conversation.  Known templates need about 2,000 steps
per turn.
"""
_MAX_MADE = 1 << 25
"""Maximum size of a call's result if the sizes of its arguments multiply, as in 'a' * 5 or str.replace."""
_MAX_NUMBER = 1 << 10
"""Maximum number in a filter's arguments, such as an indentation or a number of parts.  Known templates use single
digits.
"""
_COUNTED = "counted work"  # fedtune's own filter, with a name that no template can contain
_WITHHELD = ("format", "random", "sum", "striptags", "urlize", "wordwrap")
"""Excluded filters: format can produce a text of any length, random is not deterministic, sum copies a list for each
item, and the others may take time quadratic in a text's length.
"""
_PLAIN = (
    *(str, bytes, int, float, type(None), list, tuple, dict, KeysView, ValuesView, ItemsView, range),
    *(Undefined, Namespace, LoopContext, Macro),
)
"""Types whose text follows from their content. A method's or an iterator's text contains a memory address, and a set's
order depends on the process: with them a record's tokens could depend on other records.
"""
_OF_JINJA = (Context, nodes.EvalContext, Environment)  # passed to filters and tests by Jinja itself


class TooMuchWork(TemplateError):
    """Error for a template that exceeded its step limit."""

    def __init__(self, most: int) -> None:
        super().__init__(f"takes more than {most} steps for a short conversation")


class StepLimitedTemplate:
    """A compiled chat template with the functions and filters of transformers, and with a step limit.

    Attributes:
        texts: the template's string constants, for which it may search the contents.
        work: the number of steps of the last rendering.

    Raises:
        TemplateError: the template cannot be parsed.
    """

    def __init__(self, source: str) -> None:
        self._environment = _StepLimitedEnvironment(_compile_jinja_template("").environment)
        self._template = self._environment.from_string(source)
        constants = self._environment.parse(source).find_all(nodes.Const)
        self.texts = {constant.value for constant in constants if isinstance(constant.value, str)}
        self.work = 0
        self._one_at_a_time = Lock()

    def render(self, given: Mapping[str, Any]) -> str:
        """Render the template for `messages` with text contents.

        Exceptions from the template are passed on unchanged.
        """
        messages = given["messages"]
        with self._one_at_a_time:
            self._environment.work = 0
            self._environment.most = _A_TURN * (1 + len(messages))
            self._environment.most += _A_CHARACTER * sum(len(message["content"]) for message in messages)
            text = self._template.render(given)
            self.work = self._environment.work
        return text


class _StepLimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja sandbox with the extensions, filters and functions of another environment, and with a step counter.

    Attributes:
        work: the work since the counter was last reset to 0.
        most: the work limit.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, like: Any) -> None:
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=list(map(type, like.extensions.values())),
            optimized=False,  # otherwise filters of constants run uncounted at compile time
        )
        self.work = self.most = 0
        self.globals.update(like.globals)
        allowed = {name: func for name, func in like.filters.items() if name not in _WITHHELD}
        self.filters = {name: self._wrap_counted(func, self._check_filter_call) for name, func in allowed.items()}
        self.tests = {name: self._wrap_counted(func, self.spend) for name, func in like.tests.items()}
        self.filters[_COUNTED] = self._count_value
        self.finalize = self._charge_output

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _CountingTransformer().visit(super()._parse(source, name, filename))
        template.set_environment(self)
        return template

    def spend(self, value: object = None, steps: int = 1) -> int:
        """Add `steps` and the size of a value to the counter, and return the added amount.

        Raises:
            TooMuchWork: the limit is exceeded.
            TemplateError: the value is no plain data.
        """
        waiting, before = [value], self.work
        while True:
            self.work += steps
            if self.work > self.most:
                raise TooMuchWork(self.most)
            if not waiting:
                return self.work - before
            if not isinstance(held := waiting.pop(), _PLAIN):
                raise TemplateError(f"it handles a {type(held).__name__}, whose text may differ between two renderings")
            steps = 1 + _measure_size(held)
            if isinstance(held, Namespace):
                held = held._Namespace__attrs
            if isinstance(held, dict):
                waiting += [*held, *held.values()]
            elif isinstance(held, list | tuple):
                waiting += held

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            raise TemplateError("string formatting has no limit on its output")
        owner = getattr(__obj, "__self__", None)
        arguments = (owner, *args, *(value for name, value in kwargs.items() if name[:1] != "_"))
        __self._check_call(arguments[isinstance(owner, Extension) :])
        return __self._charge_result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise TemplateError("string formatting has no limit on its output")
        if operator == "**" or (operator == "*" and not (_is_number(left) and _is_number(right))):
            self._check_call((left, right))
        return self._charge_result(super().call_binop(context, operator, left, right))

    def _check_call(self, arguments: tuple[Any, ...]) -> None:
        """Count the arguments of a call, and refuse a call whose result could be very large.

        Raises:
            TooMuchWork: the limit is exceeded, or could be exceeded by the result.
        """
        sizes = [self.spend(value) for value in arguments]
        factors = (abs(value) if _is_number(value) else size for value, size in zip(arguments, sizes, strict=True))
        if math.prod(1 + factor for factor in factors) > _MAX_MADE:
            raise TooMuchWork(self.most)

    def _check_filter_call(self, arguments: tuple[Any, ...]) -> None:
        if any(_is_number(value) and abs(value) > _MAX_NUMBER for value in arguments[1:]):
            raise TooMuchWork(self.most)
        self._check_call(arguments)

    def _charge_result(self, made: Any) -> Any:
        if isinstance(made, Iterator):  # as from map, select and reverse: lazy items would not be counted
            made = list(made)
        self.spend(made)
        return made

    def _wrap_counted(
        self, function: Callable[..., Any], before: Callable[[tuple[Any, ...]], object]
    ) -> Callable[..., Any]:
        @wraps(function)
        def call_counted(*args: Any, **kwargs: Any) -> Any:
            before(tuple(value for value in (*args, *kwargs.values()) if not isinstance(value, _OF_JINJA)))
            return self._charge_result(function(*args, **kwargs))

        return call_counted

    def _charge_output(self, value: Any) -> Any:
        """Count the size of a value that the template outputs, and refuse lists, dictionaries and namespaces."""
        if isinstance(value, list | tuple | dict | Namespace):
            raise TemplateError(f"it outputs a {type(value).__name__} without formatting it as text")
        return self._count_value(value)

    def _count_value(self, value: Any, steps: int = 1) -> Any:
        self.spend(value, steps)
        return value


class _CountingTransformer(NodeTransformer):
    """Node transformer that adds counting where the sandbox has no hooks: loops, macros, concatenation and list
    literals.
    """

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For(body=body) | nodes.Macro(body=body) | nodes.CallBlock(body=body) | nodes.Block(body=body):
                steps = sum(1 + len(getattr(child, "data", "")) for part in body for child in part.find_all(nodes.Node))
                body.insert(0, nodes.Output([_wrap_in_counter(nodes.Const(""), 1 + steps)]))
                if isinstance(node, nodes.For) and node.test is not None:
                    node.test = _wrap_in_counter(node.test)
            case nodes.Concat():
                return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)
            case nodes.Compare():
                node.expr = _wrap_in_counter(node.expr)
                for operand in node.ops:
                    operand.expr = _wrap_in_counter(operand.expr)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _wrap_in_counter(node)
        return node


def _wrap_in_counter(node: nodes.Node, steps: int = 1) -> nodes.Filter:
    return nodes.Filter(node, _COUNTED, [nodes.Const(steps)], [], None, None, lineno=node.lineno or 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _measure_size(value: object) -> int:
    """Return the length of a string or container, or the cost of squaring an int."""
    if isinstance(value, str | bytes | list | tuple | Mapping | range):
        return len(value)
    return value.bit_length() ** 2 // 4096 if isinstance(value, int) else 0
