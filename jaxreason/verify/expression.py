r"""Verifier of mathematics: math-verify compares the answer with the key by computer
algebra, in killable processes.

It understands LaTeX in `\boxed{}` or dollars, and plain expressions: sets, intervals,
matrices, roots, equations. The last box that is not empty is the answer. Plain numbers
and equal texts are compared in this process.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from jaxreason.types import Task, Verdict
from jaxreason.verify import pool
from jaxreason.verify.exact import BAD_KEY, UNSEEN, verdict


def math(
    timeout_s: float = 5.0,  # CPU time per answer; then its child is killed
    processes: int = 2,  # maximum number of child processes
    memory_mb: int = 2048,  # address space of each child
    max_chars: int = 10_000,  # characters that are read, from the end of the text
) -> Callable[[str, Task], Verdict]:
    r"""Compare the last `max_chars` characters of the text with `task.answer` (or any
    of `task.data["answers"]`), both as mathematics.

    A percent or currency sign that only one of them has is ignored. Boxes joined by a
    comma, "and" or "or" are one answer of several parts, `\boxed{1} and \boxed{2}`, or
    of up to three equal forms; those with only space between them are also tried as
    such.

    At most `processes` children are started, on first use, each with `memory_mb` of
    address space. A child that takes more than `timeout_s` of CPU time is killed, so a
    verdict does not depend on the load of the machine. Reasons: right, wrong, no
    answer, bad key (`task.answer` is empty, or math-verify cannot read it), timeout,
    crashed, out of memory.

    Raises:
      ValueError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier 'math' needs math-verify; pip install 'jaxreason[math]'")
    children = pool.shared("math", processes, timeout_s, memory_mb)

    @functools.lru_cache(maxsize=2048)  # a policy that has learned writes the same text many times
    def ask(answers: tuple[str, ...], keys: tuple[str, ...]) -> tuple[bool, str | None, str]:
        return children.ask(list(answers), list(keys))

    def judge(boxes: list[str], text: str, keys: list[str]) -> Verdict:
        """Compare the boxes, or a text without any, with the keys.

        Raises:
          Failed: a child gave no answer.
        """
        plainly = boxes[0] if boxes else last_line(text)
        quick = compare(plainly, keys) if plainly else None
        if quick or (quick is False and len(boxes) <= 1):
            return verdict(quick, plainly)
        keys = [key for key in keys if _same_bases(boxes, text, bases(key))]
        if not keys:
            return verdict(False, boxes[0] if boxes else None)
        answers = [rf"\boxed{{{box}}}" for box in boxes] or [listed(text)]
        correct, parsed, reason = ask(tuple(both_ways(answers)), tuple(both_ways(keys)))
        return verdict(correct, boxes[0] if boxes and not reason else parsed, reason)

    def verify(text: str, task: Task) -> Verdict:
        keys = [key for answer in (task.answer, *task.data.get("answers", ())) if (key := tidy(str(answer)))]
        if not keys:
            return verdict(False, None, BAD_KEY)
        text = _EMPTY_BOX.sub("", text[-max_chars:].translate(UNSEEN))
        boxes, several = joined_boxes(text)
        if not boxes and not _MAY_ANSWER.search(text):
            return verdict(False, None, "no answer")
        try:
            if not several:
                return judge(as_list(boxes), text, keys)
            found = judge(as_list(boxes)[1:], text, keys)
            if found.correct or len(boxes) > MOST_RESTATED or not all(judge([box], text, keys).correct for box in boxes):
                return found
            return verdict(True, boxes[0])  # one answer in several forms
        except pool.Failed as failure:
            return Verdict(0.0, False, None, str(failure))

    return verify


# --- finding the answer ---

_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{\s{0,9}\}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{")
_BETWEEN = re.compile(
    r"[\s$,;\\()\[\]]*(?:\\text\{\s*)?(?:and|or)?(?:\s*\})?[\s$,;\\()\[\]]*(?:[A-Za-z](?:_\w|_\{\w\})?\s*=\s*)?"
)
_SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b")
_LONGEST_BETWEEN = 40  # characters
MOST_RESTATED = 3  # boxes that may be one answer in several forms
_MAY_ANSWER = re.compile(r"[\d$\\\[]")  # whatever math-verify finds in a text begins with one of these


def last_boxes(text: str) -> list[str]:
    r"""Return the content of the last closed `\boxed{...}`, tidied; and second, if
    other boxes belong to it, all their contents as one list.
    """
    return as_list(joined_boxes(text)[0])


def as_list(boxes: list[str]) -> list[str]:
    return [*boxes[:1], ", ".join(reversed(boxes))][: len(boxes)]


def joined_boxes(text: str) -> tuple[list[str], bool]:
    r"""Return the contents of the last closed `\boxed{...}` and of those that belong to
    it, tidied, the last one first; and whether a comma, "and" or "or" says that they
    are several answers.
    """
    several = False
    found: list[str] = []
    stop = follows = len(text)
    for match in reversed(list(_BOX.finditer(text))):
        close = _closing(text, match.end(), stop)
        stop = match.start()  # skip a box that is not closed before the next: each character is read once
        if close is None:
            continue
        between = text[close + 1 : follows]
        if found and (len(between) > _LONGEST_BETWEEN or not _BETWEEN.fullmatch(between)):
            break
        if box := tidy(text[match.end() : close]):
            several |= bool(found and box not in found and _SEVERAL.search(between))
            follows = match.start()
            found += [box] if box not in found else []
    return found, several


_ELSEWHERE = re.compile(r"[$\\]|answer|\b(?:is|are)\b", re.IGNORECASE)  # a text with one of these may answer before its last line


def last_line(text: str) -> str | None:
    """Return the last line of a text without a box if it is one plain number that can
    only be the answer; else None.

    math-verify would read `2` and `-5` on two lines as 2-5.
    """
    line = text.strip().rpartition("\n")[2].strip()
    return None if plain(line) is None or _ELSEWHERE.search(text) else line


_NUMBER = r"-?(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30}|/[0-9]{1,30})?(?![0-9])"
_JOIN = r"(?:[,;]\s{1,3}|,?\s{1,3}(?:or|and)\s{1,3}|\s{0,3}(?:±|\\pm)\s{0,3})"  # a comma without a space is in a number
_LISTED = re.compile(rf"(?<![0-9.,/]){_NUMBER}(?:{_JOIN}{_NUMBER}){{1,99}}(?=[\s.$*)]*$)")


def listed(text: str) -> str:
    r"""Return the numbers that the last line of a text without a box lists at its end,
    as one boxed answer; else the text. math-verify would take one of them: 5 of `5 or
    6`.
    """
    line = text.rstrip().rpartition("\n")[2][-200:]
    found = _LISTED.search(line)
    return rf"\boxed{{{_OR.sub(', ', found[0])}}}" if found else text


_OR = re.compile(r",?\s{0,3}\b(?:or|and)\b\s{0,3}|;\s{0,3}")


def _closing(text: str, start: int, stop: int) -> int | None:
    """Return the position of the brace that closes the one opened before `start`; None
    if it is not before `stop`.
    """
    depth = 1
    for i in range(start, stop):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None


# --- tidying ---

_MATH = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
_WRAP = re.compile(r"\\(boxed|fbox|text|textbf|textrm|mbox|mathrm|mathbf)\s{0,9}\{")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_AMOUNT = re.compile(r"([-+]?[$€£¥]?[0-9][0-9.,/]*)\s+([A-Za-z][A-Za-z ]*)")
_ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_COUNTS = re.compile(rf"(?<=[0-9])\s{{0,3}}(?:\\text\{{\s{{0,3}}({'|'.join(_ZEROS)})s?\s{{0,3}}\}}|({'|'.join(_ZEROS)})s?\b)")
_FRACTIONS = {c: unicodedata.normalize("NFKC", c).split("\u2044") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
_PLAINLY = str.maketrans({c: f"\\frac{{{above}}}{{{below}}}" for c, (above, below) in _FRACTIONS.items()} | {"−": "-"})
_CURRENCY = "€£¥₹"


def tidy(expression: str) -> str:
    r"""Strip an expression of its wrapping: `\[18\]`, `$18$.`, `\boxed{18}`, `\text{18
    apples}`, `18\,000`.
    """
    for _ in range(9):  # deeper wrapping is not an answer
        before, expression = expression, _unwrap(expression.strip())
        if expression == before:
            break
    expression = _NAMED_BASE.sub(lambda m: f"_{{{_BASE_NAMES[m[1]]}}}", expression)
    expression = _THOUSANDS.sub("", expression.translate(_PLAINLY)).strip(_CURRENCY)
    return _COUNTS.sub(lambda m: rf" \cdot 10^{{{_ZEROS[m[1] or m[2]]}}} ", expression).strip()


def _unwrap(expression: str) -> str:
    """Remove one layer of wrapping, if there is one."""
    for open, close in _MATH:
        inside = expression[len(open) : -len(close)]
        if expression == open + inside + close and close not in inside and not inside.endswith("\\"):
            return inside
    match = _WRAP.match(expression)
    if match and _closing(expression, match.end(), len(expression)) == len(expression) - 1:
        inside = expression[match.end() : -1]
        if match[1] in ("boxed", "fbox"):
            return inside
        if any(map(str.isdecimal, inside)):
            amount = _AMOUNT.fullmatch(inside.strip(" ."))
            return rf"{amount[1]}\text{{ {amount[2]}}}" if amount and amount[2].split()[0] not in _ZEROS else inside
    if expression.endswith(".") and not expression.endswith(".."):
        return expression[:-1]
    return expression


_PERCENT = re.compile(r"(?<=[\d}])(?:\\?%|\\?\s?\\text\{\s?(?:%|\\%|percent)\s?\}|\s?percent\b)|(?<=[\d}]) \\?%")


def both_ways(expressions: list[str]) -> list[str]:
    """Return the expressions, then those with a percent sign once more without it:
    35.0% is 0.35, and as an answer also 35.
    """
    return list(dict.fromkeys([*expressions, *(_PERCENT.sub("", e) for e in expressions)]))


# --- bases ---

_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASE_NAMES = {name: base for base, name in enumerate(_NAMES, 2)}
_BASED = re.compile(
    r"(?<![\w}])(?:\\text\{|\\mathrm\{|\()?\s{0,3}([0-9][0-9A-F]{0,99})\s{0,3}[)}]?\s{0,3}_\s{0,3}"
    rf"(?:\{{\s{{0,3}}(?:\\text\{{)?(?:([0-9]{{1,2}})|({'|'.join(_NAMES)}))(?:\s{{0,3}}\}}){{1,2}}|([0-9]))"
)
_NAMED_BASE = re.compile(rf"(?<=[0-9A-F)])_\{{\\text\{{({'|'.join(_NAMES)})\}}\}}")


def bases(expression: str) -> tuple[int, ...]:
    r"""Return the bases that the numbers of an expression name, in order: 2 and 16 of
    `101_2, 1F_{16}`.

    math-verify ignores a subscript of digits, so 101_2 and 101_3 are the same to it.
    """
    return tuple(_BASE_NAMES[name] if name else int(braced or bare) for _, braced, name, bare in _BASED.findall(expression))


def _same_bases(boxes: list[str], text: str, wanted: tuple[int, ...]) -> bool:
    """Tell whether an answer's bases allow it to equal a key with bases `wanted`: they
    are the same, or the answer names none.
    """
    found = list(map(bases, boxes)) if boxes else [bases(text)[-len(wanted) :]]
    return not wanted or any(there in ((), wanted) for there in found)


# --- comparison without math-verify ---

_WHOLE = r"(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2}|[1-9][0-9]{0,8})"
_PLAIN = re.compile(
    rf"(?P<sign>-?)(?:\\?\$)?(?P<whole>{_WHOLE})(?P<decimals>\.[0-9]{{1,4}})?"
    r"|(?P<minus>-?)(?:\\[dt]?frac\{(?P<above>[1-9][0-9]{0,5})\}\{(?P<below>[1-9][0-9]{0,5})\}|"
    r"(?P<over>[1-9][0-9]{0,5})/(?P<under>[1-9][0-9]{0,5}))"
)
_CLOSE = Fraction(2, 10**6)  # math-verify rounds decimals to six places


def compare(answer: str, keys: list[str]) -> bool | None:
    """Tell whether plain numbers or texts are equal, with the same result as
    math-verify; None if only math-verify can tell.
    """
    if answer in keys:
        return True
    value, (values, rounds) = plain(answer), ([plain(key) for key in keys], "." in answer)
    if value is not None and value in values:
        return True
    if value is None or None in values:
        return None
    near = any((rounds or "." in key) and abs(value - other) <= _CLOSE for key, other in zip(keys, values, strict=True))
    return None if near else False


def plain(text: str) -> Fraction | None:
    """Read a plainly written number that is short enough for math-verify to read it
    exactly; None for any other text.
    """
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    if match["whole"]:
        value = Fraction(match["whole"].replace(",", "") + (match["decimals"] or ""))
        return -value if match["sign"] else value
    value = Fraction(int(match["above"] or match["over"]), int(match["below"] or match["under"]))
    return -value if match["minus"] else value
