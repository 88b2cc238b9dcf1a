"""A small writer of YAML: mappings, lists, texts, whole numbers and booleans, with
comments before keys. Every text is read back as the same text by YAML 1.1 and 1.2,
also one that looks like something else (`no`, `1e3`, `a: b`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = re.compile(r"(?!\.\d)[A-Za-z./~][A-Za-z0-9_./-]*")  # no colon, no space, no sign that begins another kind
WORDS = re.compile(r"~|null|true|false|yes|no|on|off|y|n|\.+|\.(inf|nan)", re.IGNORECASE)  # not texts if written plainly
# Characters that a text in double quotes must escape; JSON's own escapes are the rest.
HIDDEN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def write(values: Mapping[str, Any], comments: Mapping[str, str] = {}, indent: int = 0) -> str:
    """Write a mapping as YAML. `comments` are texts of some lines, for keys of the
    outermost mapping.

    Raises:
      ValueError: a text with bytes that are no UTF-8, or a value of another kind.
    """
    lines, space = [], " " * indent
    for key, value in values.items():
        lines += [f"{space}# {line}" for line in comments.get(key, "").splitlines()]
        lines.append(f"{space}{text(key)}:{_value(value, indent)}")
    return "\n".join(lines) + "\n"


def _value(value: Any, indent: int) -> str:
    """Return a value with what parts it from its key."""
    if isinstance(value, Mapping):
        return f"\n{write(value, indent=indent + 2)}".rstrip("\n") if value else " {}"
    if isinstance(value, str):
        return f" {block(value, indent + 2) or text(value)}"
    if isinstance(value, Sequence):
        return f" [{', '.join(_scalar(one) for one in value)}]"
    return f" {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise ValueError(f"YAML got {value!r}; allowed: a text, a whole number, true or false")


def text(value: str) -> str:
    """Write a text in one line: plainly if it can't be read as anything else, otherwise
    in double quotes.
    """
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{value!r} has bytes that are no UTF-8; allowed: text")
    if PLAIN.fullmatch(value) and not WORDS.fullmatch(value):
        return value
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def block(value: str, indent: int) -> str:
    """Write a text of several lines as it is, below a `|`; "" if it can't be.

    It must end with one line break, begin with no space, and have visible characters
    alone.
    """
    lines = value.split("\n")
    if len(lines) < 3 or lines[-1] or not lines[-2].strip() or not lines[0] or lines[0][0] in " \t":
        return ""
    if not all(character.isprintable() for line in lines for character in line):
        return ""
    return "|\n" + "\n".join(" " * indent + line if line else "" for line in lines[:-1])
