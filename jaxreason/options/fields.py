"""Fields of a config, read from function signatures: types, defaults and one line of
help each.

A section of a config is the keyword arguments of one function, or of several that share
them: a family's `make(name, ...)` and the function that the name selects. The signature
fully defines a field: the annotation is its type, the default its default, and the
comment at the end of its line its help. A field without such a comment takes the
comment of the first function in the same file that has a field of this name.

`Section` lists the functions of a section. `complete`, `check`, `assign` and `describe`
traverse a config with it. This module does not decide which section uses which function
(`build.layout`), and does not check ranges (the functions do).
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import inspect
import io
import shlex
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxreason.options import renamed, unknown_name_message

NEEDED = inspect.Parameter.empty  # stands for a missing default or value
LARGEST = 2**32  # limit of whole numbers in a config, which may be sizes of arrays
LARGEST_FLOAT = 1e38  # limit of floats in a config, close to the largest float32


class Field(NamedTuple):
    """A field of a section."""

    name: str
    type: Any
    default: Any
    help: str


class Section(NamedTuple):
    """The functions that define the fields of a section."""

    functions: tuple[Callable, ...] = ()  # the fields are all their keyword arguments
    given: tuple[str, ...] = ()  # keyword arguments that the caller passes, so they are not fields
    sections: Mapping[str, Callable[[dict], Section]] = {}  # field -> function from its value, or from each item, to its Section
    decided: Mapping[str, str] = {}  # field that other fields decide if it is absent -> how
    each: Callable[[dict], Section] | None = None  # Section of each entry, if the user names the entries
    replaces: tuple[str, ...] = ()  # fields that replace a part of what the section's name selects


# --- fields of a function ---


def fields_of(section: Section) -> dict[str, Field]:
    """Return the fields of a section by name. If two functions have a field of the same
    name, the first one counts.
    """
    found: dict[str, Field] = {}
    for function in section.functions:
        for field in parameters(function):
            if field.name not in section.given:
                found.setdefault(field.name, field)
    return found


@functools.cache
def parameters(function: Callable) -> tuple[Field, ...]:
    """Return the arguments of a function that can be passed by name."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations of a user's function may not evaluate
        hints = {}
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            default = parameter.default
            guess = Any if default in (NEEDED, None) else type(default)
            found.append(Field(name, hints.get(name, guess), default, comment_on(function, name)))
    return tuple(found)


def comment_on(function: Callable, name: str) -> str:
    """Return the comment on an argument's line, else the first comment in the file on
    an argument of the same name.
    """
    module = vars(sys.modules.get(function.__module__, types.ModuleType("")))
    others = [f for f in module.values() if callable(f) and getattr(f, "__module__", None) == function.__module__]
    for other in (function, *others):
        if text := comments(other).get(name):
            return text
    return ""


@functools.cache
def comments(function: Callable) -> dict[str, str]:
    """Return the comment at the end of each argument's line, or of each field's line in
    a class.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
        (node,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    if isinstance(node, ast.ClassDef):
        lines = {n.end_lineno: n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    elif isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = collections.Counter(a.end_lineno for a in arguments)
        lines = {a.end_lineno: a.arg for a in arguments if count[a.end_lineno] == 1 and a.end_lineno > node.lineno}
    else:
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {lines[t.start[0]]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and t.start[0] in lines}
    return found


# --- types ---


def members(type_: Any) -> tuple:
    """Return the types in a union, or the type alone."""
    return typing.get_args(type_) if typing.get_origin(type_) in (typing.Union, types.UnionType) else (type_,)


def items(type_: Any, count: int) -> tuple | None:
    """Return the types of the `count` items of a sequence; None if the type is not a
    sequence or has another length.
    """
    inside = typing.get_args(type_)
    if typing.get_origin(type_) is tuple and inside and inside[-1] is not Ellipsis:
        return inside if len(inside) == count else None
    if is_sequence(type_):
        return (inside[0] if inside else Any,) * count
    return None


def is_sequence(type_: Any) -> bool:
    return (typing.get_origin(type_) or type_) in (tuple, list, collections.abc.Sequence)


def is_section(type_: Any) -> bool:
    return (typing.get_origin(type_) or type_) in (dict, collections.abc.Mapping) or dataclasses.is_dataclass(type_)


def fits(value: Any, type_: Any) -> bool:
    """Return whether a value has a type. An int counts as a float and a list as a
    tuple, but a bool does not count as an int.
    """
    for one in members(type_):
        if (
            one is Any
            or (one is type(None) and value is None)
            or (one is float and isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value))
            or (one is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST)
            or (one in (bool, str) and isinstance(value, one))
            or (is_section(one) and isinstance(value, Mapping) and names_are_text(value))
        ):
            return True
        if is_sequence(one) and isinstance(value, tuple | list):
            inside = items(one, len(value))
            if inside is not None and all(map(fits, value, inside)):
                return True
    return False


def names_are_text(section: Mapping) -> bool:
    """Return whether all names in a section and its subsections are strings, as JSON
    and `--config.` require.
    """
    return all(isinstance(k, str) and (not isinstance(v, Mapping) or names_are_text(v)) for k, v in section.items())


def is_finite(value: float) -> bool:
    return abs(value) < LARGEST_FLOAT  # False for nan


def shown(type_: Any) -> str:
    """Describe a type in words, such as `int or None`."""
    words = []
    for one in members(type_):
        inside = typing.get_args(one)
        if typing.get_origin(one) is tuple and inside and inside[-1] is not Ellipsis:
            words.append(f"({', '.join(map(shown, inside))})")
        elif is_sequence(one):
            words.append(f"a tuple of {shown(inside[0])}" if inside else "a tuple")
        elif is_section(one):
            words.append("a section")
        else:
            words.append("any" if one is Any else "None" if one is type(None) else getattr(one, "__name__", str(one)))
    return " or ".join(words)


def wrong_type(where: str, value: Any, type_: Any) -> str:
    """Say that a value has the wrong type for the field `where`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    limit = ""
    if number and float in members(type_):
        limit = ", finite and below 1e38"
    elif number and int in members(type_) and not isinstance(value, float):
        limit = ", below 2**32"
    if isinstance(value, Mapping) and any(map(is_section, members(type_))):
        limit = ", with strings as names"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{where} got {text} ({type(value).__name__}); allowed: {shown(type_)}{limit}"


def read(text: str, type_: Any, where: str) -> Any:
    """Parse a command-line value of a given type.

    Raises:
      ValueError: the value does not have that type.
    """
    kinds = members(type_)
    if type(None) in kinds and text == "None":
        return None
    literal = literal_of(text)
    for kind in sorted(kinds, key=lambda kind: kind is str):  # str comes last, since it accepts any text
        if kind is not str and str in kinds and not isinstance(literal, tuple | list):
            continue
        value = read_one(text, literal, kind)
        if value is not NEEDED:
            return value
    names = ", with strings as names" if isinstance(literal, Mapping) and any(map(is_section, kinds)) else ""
    raise ValueError(f"{where} got {text!r}; allowed: {shown(type_)}{names}")


def literal_of(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return NEEDED


def read_one(text: str, literal: Any, kind: Any) -> Any:
    """Parse a value of one type; NEEDED if the text is not of this type."""
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.strip().lower(), NEEDED)
    if kind is str:
        return text
    if kind is Any:
        return {"true": True, "false": False}.get(text.strip().lower(), text if literal is NEEDED else literal)
    if is_sequence(kind):
        if not isinstance(literal, tuple | list):
            literal = tuple(map(bare, text.split(","))) if text.strip() else ()
        inside = items(kind, len(literal)) or ()
        literal = tuple(float(x) if t is float and fits(x, float) else x for t, x in zip(inside, literal)) if inside else literal
        return tuple(literal) if fits(literal, kind) else NEEDED
    if kind is float:
        try:
            literal = float(text)
        except ValueError:
            return NEEDED
    return literal if literal is not NEEDED and fits(literal, kind) else NEEDED


def bare(text: str) -> Any:
    """Parse an item of a list written without brackets or quotes: `q,v` or `1,2`."""
    value = literal_of(text)
    return text.strip() if value is NEEDED else value


# --- a config ---


def sections_of(section: Section, tree: dict, where: str = "config") -> Iterator[tuple[str, Section, dict]]:
    """Yield every section of a config, parents first: its name, its Section, and its
    values. The sections of a tuple are named by their positions: `verifier.of.0`.
    """
    yield where, section, tree
    for name, value in tree.items():
        below = section.each or section.sections.get(name)
        if below is not None and isinstance(value, Mapping):
            yield from sections_of(below(value), value, f"{where}.{name}")
        for i, item in enumerate(value) if below is not None and isinstance(value, tuple | list) else ():
            if isinstance(item, Mapping):
                yield from sections_of(below(item), item, f"{where}.{name}.{i}")


def complete(section: Section, tree: dict) -> dict:
    """Add the absent fields of a config with their defaults, except fields that other
    fields decide.
    """
    found = fields_of(section)
    absent = [f for f in found.values() if f.name not in tree and f.default is not NEEDED and f.name not in section.decided]
    tree = tree | {field.name: field.default for field in absent}
    for name, value in tree.items():
        below = section.each or section.sections.get(name)
        if below is not None and isinstance(value, Mapping):
            tree[name] = complete(below(value), dict(value))
        elif below is not None and isinstance(value, tuple | list):
            tree[name] = type(value)(complete(below(v), dict(v)) if isinstance(v, Mapping) else v for v in value)
    return tree


def check(section: Section, tree: dict, name: str = "config") -> None:
    """Check the types of all fields of a config, or of the section named `name`.

    Raises:
      ValueError: a value does not have the type of its field.
    """
    for where, here, values in sections_of(section, tree, name):
        for name, field in fields_of(here).items():
            if name in values and not fits(values[name], field.type):
                raise ValueError(wrong_type(f"{where}.{name}", values[name], field.type))
        for name, value in values.items() if here.each else ():
            if not isinstance(value, Mapping):
                raise ValueError(wrong_type(f"{where}.{name}", value, dict))


def unknown_fields(section: Section, tree: dict) -> list[tuple[str, str]]:
    """List the fields of a config that no function has, each with its error message."""
    found = []
    for where, here, values in sections_of(section, tree):
        known = fields_of(here)
        if here.functions:
            found += [(f"{where}.{n}", no_field(where, n, known)) for n in values if n not in known and n not in here.sections]
    return found


def no_field(where: str, name: str, known) -> str:
    """Say that a section has no such field, or that it was renamed."""
    return renamed(where, name) or unknown_name_message(f"field of {where}", name, known)


class Dropped(NamedTuple):
    """Fields of a config file that belong to a name which the command replaced."""

    where: str
    old: str
    name: str
    fields: dict
    known: Mapping[str, Field]  # fields of the new name

    def message(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        words = [f"--{self.where}.{name}={value}" for name, value in self.fields.items() if name in self.known]
        kept = f"has its own default; to keep the file's value, add {shlex.join(words)}" if words else "has no such field"
        return f"{self.where}.name={self.name}: dropped {told}, given by the config file for {self.old!r}; {self.name!r} {kept}"


def assign(
    layout: Callable[[dict], Section], tree: dict, changes: Mapping[str, str], say: Callable[[str], None] | None = None
) -> dict:
    """Set fields of a config from the command line: `{"rl.optimizer.lr": "1e-3"}`.

    A `name` is set before the other fields of its section, since it decides which
    fields exist. Setting the first field of a section that is None creates the section.
    A new name drops the file's fields that belong to the old name (see
    `belongs_to_name`). `say` gets one line for dropped fields that the command does not
    set itself.

    Raises:
      ValueError: a field is unknown, or a value does not have its type.
    """
    paths = sorted((path.split(".") for path in changes), key=lambda path: (len(path), path[-1] != "name"))
    dropped: list[Dropped] = []
    for path in paths:
        tree = assigned(layout(tree), tree, path, changes[".".join(path)], "config", dropped)
    for one in dropped:
        left = {name: value for name, value in one.fields.items() if f"{one.where}.{name}".removeprefix("config.") not in changes}
        if left and say:
            say(one._replace(fields=left).message())
    return tree


def belongs_to_name(field: str, old: Section, new: Section) -> bool:
    """Return whether a field belongs to the old name of a section: the new name lacks
    the field, has another default for it, or selects the part that the field replaces.
    """
    before, after = fields_of(old), fields_of(new)
    if field not in after:
        return True
    return field in new.replaces or (field in before and before[field].default != after[field].default)


def with_new_name(old: Section, new: Section, before: dict, after: dict, where: str, dropped: list[Dropped]) -> dict:
    """Return the section `after` its name was set, without the fields that belong to
    its previous name.
    """
    unknown = len(new.functions) < len(old.functions)  # the name selects no function; it is refused later
    if before.get("name") in (None, after["name"]) or unknown:
        return after
    gone = {name: value for name, value in after.items() if name != "name" and belongs_to_name(name, old, new)}
    dropped.append(Dropped(where, before["name"], after["name"], gone, fields_of(new)))
    return {name: value for name, value in after.items() if name not in gone}


def assigned(section: Section, tree: dict, path: list[str], text: str, where: str, dropped: list[Dropped]) -> dict:
    """Return the section with one field set."""
    name, *rest = path
    known = fields_of(section)
    below = section.each or section.sections.get(name)
    begins_with_name = section.each and "name" in fields_of(section.each({}))
    if begins_with_name and name not in tree and rest not in ([], ["name"]):
        raise ValueError(
            unknown_name_message(f"entry of {where}", name, tree) + f"; a new one begins with --{where}.{name}.name=..."
        )
    if name not in known and below is None and section.functions:
        raise ValueError(no_field(where, name, {*known, *section.sections}))
    type_ = known[name].type if name in known else dict
    where = f"{where}.{name}"
    if not rest:
        if text == "None" and name in section.decided and type(None) not in members(type_):
            return {key: value for key, value in tree.items() if key != name}
        value = read(text, type_ if section.functions else Any, where)
        return tree | {name: value}
    if below is None and not (any(map(is_section, members(type_))) or not section.functions):
        raise ValueError(f"{where} got the field {'.'.join(rest)!r}; it has none: it is {shown(type_)}")
    inside = tree.get(name)
    if below and isinstance(inside, tuple | list):
        return tree | {name: assigned_item(below, inside, rest, text, where, dropped)}
    return tree | {name: assigned_below(below, inside, rest, text, where, dropped)}


def assigned_item(below, items: tuple | list, path: list[str], text: str, where: str, dropped: list[Dropped]) -> tuple | list:
    """Return a tuple of sections with one field of one of them set: `of.0.strict`."""
    at, *rest = path
    if not at.isdecimal() or int(at) >= len(items):
        raise ValueError(unknown_name_message(f"item of {where}", at, map(str, range(len(items)))))
    if not rest:
        raise ValueError(f"{where}.{at} is a section; set a field of it, such as --{where}.{at}.name=..., or all of {where}")
    i = int(at)
    changed = assigned_below(below, items[i], rest, text, f"{where}.{at}", dropped)
    return type(items)(changed if j == i else item for j, item in enumerate(items))


def assigned_below(below, inside: Any, path: list[str], text: str, where: str, dropped: list[Dropped]) -> dict:
    """Return a section inside another one, or a new one, with one field set."""
    inside = dict(inside) if isinstance(inside, Mapping) else {}
    changed = assigned(below(inside) if below else Section(), inside, path, text, where, dropped)
    if below and path == ["name"]:
        changed = with_new_name(below(inside), below(changed), inside, changed, where, dropped)
    return changed


# --- describe ---


def describe(section: Section, tree: dict, path: str = "") -> list[str]:
    """Return the lines that describe a section and its subsections, one field, or the
    whole config if `path` is empty.

    Raises:
      ValueError: there is no such section or field.
    """
    wanted = f"config.{path.removeprefix('config.')}".rstrip(".") if path not in ("", "config") else "config"
    found = list(sections_of(section, tree))
    lines = [line for where, here, values in found if f"{where}.".startswith(f"{wanted}.") for line in table(where, here, values)]
    if lines:
        return lines[1:]
    parent, _, name = wanted.rpartition(".")
    for where, here, values in found:
        if where == parent and name in fields_of(here):
            return table(where, here, values, only=name)[1:]
    allowed = [where.removeprefix("config.") for where, *_ in found if where != "config"]
    near = next((fields_of(here) for where, here, _ in found if where == parent and where != "config"), None)
    raise ValueError(
        unknown_name_message("section of the config", path, allowed) if near is None else no_field(parent, name, near)
    )


def table(where: str, section: Section, values: dict, only: str | None = None) -> list[str]:
    """List a section's fields, one line each: name, value, default, type and help."""
    rows = []
    for name, field in fields_of(section).items():
        if only not in (None, name):
            continue
        if name in section.decided and name not in values:
            value, default = "-", section.decided[name]
        else:
            value = "..." if isinstance(values.get(name), Mapping) and name in section.sections else repr(values.get(name, "-"))
            default = section.decided.get(name) or ("needed" if field.default is NEEDED else repr(field.default))
        rows.append((name, value, f"default {default}" if default != "needed" else default, shown(field.type), field.help))
    if not rows:
        return []
    widths = [min(32, max(len(row[i]) for row in rows)) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0))).rstrip() for row in rows]
    return ["", where, *(f"  {line}" for line in lines)]
