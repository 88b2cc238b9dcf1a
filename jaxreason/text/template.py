"""Chat templates: read from a checkpoint, and rendered in a sandbox with the names that
transformers gives them.

Templates are programs from the internet. The sandbox hides Python's private attributes,
and limits steps and characters, which stops templates that loop, recurse or grow
without end. The same conversation always renders to the same text: the caller gives the
date (`clock`), and random functions are removed.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from jaxreason.options import read_object, read_text, unknown_name_message
from jaxreason.types import Message

MAX_STEPS = 100_000  # calls and loop iterations per rendering
MAX_SIZE = 4_000_000  # characters of a text, elements of a list and bits of a number
GIVEN = ("messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token")  # set here, so not by a config
FORMAT = jinja2.filters.FILTERS["format"]
FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError, SyntaxError, NotImplementedError),
)


def load_template(folder: str | Path) -> str:
    """Read the chat template of a checkpoint: chat_template.jinja, or the entry of
    tokenizer_config.json.

    Raises:
      FileNotFoundError: there is none, as in a base model.
      ValueError: it is not a text.
    """
    path = template_path(folder)
    if path is not None and path.suffix == ".jinja":
        return read_text(path)
    template = read_object(path).get("chat_template") if path is not None else None
    if isinstance(template, list):  # named templates; those beside "default" are for tools and retrieval
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", "" if named else 0)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template got {template!r:.60}; allowed: a text, or a list of named ones")
    if not template:
        raise FileNotFoundError(f"{folder} has no chat template; use the plain format, or write one to chat_template.jinja")
    return template


def template_path(folder: str | Path) -> Path | None:
    """Return the file that `load_template` reads; None if there is none."""
    paths = [Path(folder) / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return next((path for path in paths if path.is_file()), None)


def check_arguments(template: str, arguments: Mapping[str, Any]) -> None:
    """Check that a template reads the arguments that a config passes to it.

    Raises:
      ValueError: names the first argument that the template does not read, or that a
        config may not set.
    """
    read = variables_of(template) - {*GIVEN, *_environment().globals}
    for name in arguments:
        if name not in read:
            raise ValueError(unknown_name_message("argument of the chat template", name, read))


def variables_of(template: str) -> set[str]:
    """Return the names of the variables that a template reads."""
    with _failures():
        return jinja2.meta.find_undeclared_variables(_environment().parse(template))


def reads(template: str, name: str) -> bool:
    """Tell whether a template reads a variable."""
    return name in variables_of(template)


def render(
    template: str,
    messages: Sequence[Message | Mapping[str, Any]],
    add_generation_prompt: bool,
    **arguments,
) -> str:
    """Render a conversation to text; `add_generation_prompt` ends it where the
    assistant starts to write.

    Args:
      template: Jinja source.
      messages: the conversation.
      add_generation_prompt: whether to open the assistant's turn.
      **arguments: further variables of the template; `strftime_now` defaults to the
        current time.

    Raises:
      ValueError: the template is not valid, refuses these messages, or does not end.
    """
    _budget.left = MAX_STEPS
    variables = {"tools": None, "documents": None} | arguments
    plain = [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages]
    pieces, size = [], 0
    with _failures():
        for piece in _compiled(template).generate(messages=plain, add_generation_prompt=add_generation_prompt, **variables):
            size += len(piece)
            if size > MAX_SIZE:
                raise jinja2.TemplateError(f"it writes more than {MAX_SIZE:,} characters")
            pieces.append(piece)
    return "".join(pieces)


@contextlib.contextmanager
def _failures():
    """Turn any error of a template into a ValueError of one line."""
    try:
        yield
    except FAILURES as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the chat template failed{line}: {said}; does it belong to this model and these roles?") from None


def clock(date: datetime.date) -> Callable[[str], str]:
    """Make the `strftime_now` function of a day, at midnight."""
    return datetime.datetime.combine(date, datetime.time()).strftime


# --- the sandbox ---

_budget = threading.local()  # steps left to the current rendering of a thread


def _spend(steps: int) -> None:
    _budget.left -= steps
    if _budget.left < 0:
        raise jinja2.TemplateError(f"it takes more than {MAX_STEPS:,} steps")


def _bounded(value, size: int | None = None):
    """Return a value, unless it has grown too large. Each thousand characters cost one
    step.
    """
    if size is None:
        size = value.bit_length() if isinstance(value, int) else len(value) if isinstance(value, str | list | tuple) else 0
    if size > MAX_SIZE:
        raise jinja2.TemplateError(f"it makes a {type(value).__name__} of more than {MAX_SIZE:,} elements")
    _spend(size // 1000)
    return value


def _range(*numbers):
    found = jinja2.sandbox.safe_range(*numbers)
    _spend(len(found))
    return found


def _counted(items):
    """Return the items of a loop; each item costs one step."""
    if hasattr(items, "__len__"):
        _spend(len(items))
        return items
    return (_spend(1) or item for item in items)


class _Budgeted(jinja2.visitor.NodeTransformer):
    """Rewriter of templates that puts `_counted` around the iterable of a loop, and
    `_bounded` around assigned or joined values.
    """

    def visit_For(self, node):
        node = self.generic_visit(node)
        node.iter = self.filtered(node.iter, "counted")
        return node

    def visit_Assign(self, node):
        node = self.generic_visit(node)
        node.node = self.filtered(node.node, "bounded")
        return node

    def visit_Concat(self, node):
        return self.filtered(self.generic_visit(node), "bounded")

    def filtered(self, node, name):
        return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The Jinja environment that templates expect (settings and names of transformers),
    with a budget.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _generate(self, source, *args, **kwargs):
        return super()._generate(_Budgeted().visit(source), *args, **kwargs)

    def wrap_str_format(self, value):
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def call(self, context, function, *args, **kwargs):
        _spend(1 + sum(len(one) for one in args if isinstance(one, list | tuple | range)))  # `loop(range(10))`
        _check_widths(getattr(function, "__self__", None), *args, *kwargs.values())
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        for one, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int):
                _bounded(one, one.bit_length() + times.bit_length() if isinstance(one, int) else _length(one) * times)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bounded(left, left.bit_length() * right)
        if operator == "%":
            _check_widths(left)
        return _bounded(super().call_binop(context, operator, left, right))


def _length(value) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _check_widths(text, *numbers) -> None:
    """Raise for arguments that would pad a text without end: `"%99999999d" % 1`,
    `"x".ljust(10**9)`.
    """
    if isinstance(text, str) and (re.search(r"\d{6}", text) or any(isinstance(n, int) and n > MAX_SIZE for n in numbers)):
        raise jinja2.TemplateError("it pads a text to too many characters")


def _filter(function: Callable) -> Callable:
    """Wrap one of Jinja's filters so that it cannot pad a text without end."""

    @functools.wraps(function)  # also copies the attribute that asks for the context
    def limited(*args, **kwargs):
        value, *more = args[1:] if hasattr(function, "jinja_pass_arg") else args
        _check_widths(value if function is FORMAT else "", *more, *kwargs.values())
        return _bounded(function(*args, **kwargs))

    return limited


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's text. `encode_chat` finds
    that text without it, so the tag only renders its content.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    environment.filters = {name: _filter(function) for name, function in environment.filters.items()}
    environment.filters |= {"tojson": tojson, "counted": _counted, "bounded": _bounded}  # Jinja's own tojson escapes HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "range": _range}
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)
