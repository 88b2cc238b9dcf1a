r"""The answer is a number, written as people and models write it: `\boxed{1{,}234}`, `#### $1,234.50`, `the answer is -3/4.`

Three steps over the end of the text. *Normalise*: markup, currency and percent signs go,
LaTeX fractions and Unicode forms become plain. *Find the region*: the last box that is not
empty counts; without one the last `####` that has something behind it, then the last
affirmative "answer is", then the last number in the text. *Read one value*: a region that
gives no single number, such as `24 + 18`, `2x` or `5, 6`, is no answer; it is never
guessed at. Numbers are compared exactly, as fractions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from jaxreason.types import Task, Verdict
from jaxreason.verify.exact import verdict

READ = 20_000  # characters from the end of the text
LONGEST = 64  # characters of a number
HIGHEST = 64  # the largest power that is worked out


def number(
    strict: bool = False,  # accept a box or a #### only
    fractions: bool = True,  # 3/4 is one number, not two
) -> Callable[[str, Task], Verdict]:
    """Compare the number that the text gives as its answer with that of `task.answer`.

    `strict` accepts a box or a `####` only. With `fractions=False`, `3/4` is two numbers.
    Currency, percent signs and units are ignored: "50%" is 50. Reasons: right, wrong, no
    answer, bad key (`task.answer` is not one number).
    """

    def verify(text: str, task: Task) -> Verdict:
        key = only_value(normalise(task.answer), fractions)
        if key is None:
            return verdict(False, None, "bad key")
        value = read_number(text, strict, fractions)
        if value is None:
            return verdict(False, None, "no answer")
        return verdict(value == key, str(value))

    return verify


def read_number(text: str, strict: bool = False, fractions: bool = True) -> Fraction | None:
    """Find the number that a text gives as its answer; None where there is none, or no single one."""
    text = normalise(text[-READ:])
    box = last_box(text)
    if box is not None:
        return only_value(box, fractions)
    marked = last_marked(text)
    if marked is not None:
        return value_of_lines(marked, fractions)
    if strict:
        return None
    said = last_said(text)
    if said is not None:
        return value_of_lines(said, fractions)
    denied = list(_DENIES.finditer(text))
    return last_value(text[denied[-1].end() :] if denied else text, fractions)


# --- normalise ---

_MINUS = re.compile("[−–—‒﹣－]")
_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|[\u00a0\u2009\u202f'’])(?=[0-9]{3}(?![0-9]))")
_SUPERSCRIPT = str.maketrans({c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_VULGAR = str.maketrans({c: f" {unicodedata.normalize('NFKC', c).replace('⁄', '/')} " for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"})
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s?\{([^{}]*)\}")
_DROPPED = re.compile(
    r"\\?[$€£¥%]|°|\^\{\\circ\}|\^?\\circ|\\(?:degree|left|right|displaystyle)(?![A-Za-z])|\*\*|__|`|\\!|</?[|]?\w+[|]?>"
)
_SPACES = re.compile(r"\\[,;: ()\[\]]|\\q?quad(?![A-Za-z])|~|\\\\|[\u00a0\u2009\u202f]|(?<![<>=!])&")
_CROSS = re.compile(r"(?<=[0-9])\s?x\s?(?=[0-9])")
_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·]")
_EQUALS = re.compile(r"\\(?:approx|equiv)(?![A-Za-z])|[≈≡]")
_COMPARES = re.compile(r"\\(?:leq?|geq?|neq?|lt|gt)(?![A-Za-z])|<=|>=|!=|[≤≥≠]")
_PART = r"\s?(?:\{\s?(-?[0-9][0-9,.]{0,31})\s?\}|([0-9]))"
_FRAC = re.compile(rf"(-?)\\[dtc]?frac{_PART}{_PART}")
_BRACED = re.compile(r"(?<!boxed)(?<!boxed )\{\s?(-?[0-9.,]+)\s?\}")
_NEGATED = re.compile(r"-\s?\(\s?(-?)\s?([0-9][^()]{0,63})\)")
_NEGATIVE = re.compile(r"(?:\bnegative|(?<=\bis )minus)[\s{}]+(?=[0-9.(])", re.IGNORECASE)
_SUBTRACTS = re.compile(r"\bminus[\s{}]+(?=[0-9.(])", re.IGNORECASE)
_OVER = re.compile(r"\\div(?![A-Za-z])|÷")
_BLANKS = re.compile(r"[ \t]+")


def normalise(text: str) -> str:
    """Rewrite LaTeX, Markdown and Unicode forms of one thing as one plain form."""
    text = _MINUS.sub("-", text.translate(_SUPERSCRIPT).translate(_VULGAR))
    text = _GROUP_SPACE.sub(",", text)
    text = _CROSS.sub("*", text)
    text = _TEXT.sub(r"\1", re.sub(r"(?<=[0-9])\*\*(?=[0-9])", "^", text))
    text = _SPACES.sub(" ", _DROPPED.sub("", text))
    text = _COMPARES.sub(" < ", _EQUALS.sub("=", _OVER.sub("/", _TIMES.sub("*", text)))).replace("{-}", "-")
    text = _BRACED.sub(r"\1", _FRAC.sub(_plain_fraction, text))
    text = _SUBTRACTS.sub("- ", _NEGATIVE.sub("-", _BLANKS.sub(" ", text)))
    return _NEGATED.sub(lambda match: match[2] if match[1] else f"-{match[2]}", text)


def _plain_fraction(match: re.Match) -> str:
    """Write `-\\frac{1}{-2}` as ` 1/2 `, with one sign in front or none."""
    parts = match[1], match[2] or match[3], match[4] or match[5]
    negative = sum(part.startswith("-") for part in parts) % 2
    return f" {'-' * negative}{parts[1].lstrip('-')}/{parts[2].lstrip('-')} "


# --- find the region ---

_SAYS = re.compile(r"answer\s?(?:is\b|was\b|:|=)|(?:^|[.!?] )\W{0,4}(?:final )?answer *$", re.IGNORECASE | re.MULTILINE)
# With the number that it denies.
_DENIES = re.compile(r"answer\s?(?:(?:is|was)\s+(?:not|never)|(?:is|was)n['’]t)\b[^0-9\n]{0,40}[0-9.,]*[0-9]?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_MARK = re.compile("#{4,}")
_DIGIT = re.compile("[0-9]")


def last_box(text: str) -> str | None:
    """Return what the last closed `\\boxed{...}` that is not empty holds, braces balanced."""
    stop = len(text)
    while (start := text.rfind("\\boxed", 0, stop)) >= 0:
        opened = start + 6 + (text[start + 6 : start + 7] == " ")
        depth = 0
        for i in range(opened, stop if text[opened : opened + 1] == "{" else opened):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                if any(c.isalnum() for c in text[opened:i]):
                    return text[opened + 1 : i]
                break
        stop = start  # each character is looked at once
    return None


def last_marked(text: str) -> str | None:
    """Return what is behind the last `####` that something is behind; None without one."""
    parts = _MARK.split(text)
    return next((part for part in reversed(parts[1:]) if _DIGIT.search(part) or any(c.isalnum() for c in part)), None)


def last_said(text: str) -> str | None:
    """Return the rest of the sentence behind the last "answer is" that has a digit in it; None if a later one denies."""
    for match in reversed(list(_SAYS.finditer(text))[-20:]):
        if _DENIES.match(text, match.start()):
            return None
        lines = text[match.end() :].lstrip(" :*")
        line = lines.lstrip().partition("\n")[0]
        end = _SENTENCE_END.search(line)
        sentence = line[: end.start()] if end else line
        if _DIGIT.search(sentence) and not (end and end[0].startswith("?")):
            return sentence
    return None


# --- read one value ---

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3}){1,20}|[0-9]{1,2}(?:,[0-9]{2}){1,20},[0-9]{3}"
_BELOW = r"(?P<below>[0-9][0-9.]{0,31})(?![0-9/]|,[0-9])"
_MIXED = r"[ ](?P<over>[0-9]{1,32})/(?P<part>[0-9]{1,32})(?![0-9/]|[.,][0-9])"


def _token_pattern(whole: str, comma: str, joins: str) -> re.Pattern:
    """The pattern of a token: more ways to write `whole` digits, a decimal `comma`, and what `joins` digits to no number."""
    return re.compile(
        rf"(?P<sign>(?<![\w)\]}}])-[ ]?)?"
        rf"(?P<digits>(?:{_GROUPED}{whole}|[0-9]+)(?![0-9])(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+{comma})(?![0-9]|[{joins}][0-9])"
        r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?!\.?[0-9]))?"
        rf"(?:{_MIXED}|[ ]?/[ ]?{_BELOW})?"
        r"(?P<power>\^\{?(?P<to>-?[0-9]{1,3})\}?)?"
        r"(?:[ ]?[*x][ ]?10\^\{?(?P<ten>-?[0-9]{1,3})\}?)?"
        r"(?:[ ]?(?P<scale>thousand|million|billion|trillion)\b)?"
        r"|(?P<unread>[0-9](?:[0-9,.:']*[0-9])?)"
        r"|(?P<equals>=)|(?P<compare>[<>])|(?P<macro>\\[A-Za-z]+|[√±∞πθ∑∫|])"
        r"|(?P<word>[^\W\d_]+(?:[-'][^\W\d_]+)*(?:\^\{?-?[0-9]+\}?)?)"
        r"|(?P<operator>[-+*/^!])|(?P<open>[(\[])|(?P<close>[)\]])|(?P<stop>[,;.:?\n]+)"
    )


# Spaces between thousands and a decimal comma are read where an answer is, not in running text.
_ANSWER = _token_pattern(r"|[0-9]{1,3}(?: [0-9]{3})+", "|[0-9]+,[0-9]{1,2}(?![0-9,])", ",.:'")
_RUNNING = _token_pattern("|[0-9]{1,3}(?: [0-9]{3}){2,}", "", ".:")
_SCALES = {None: 0, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNITS = frozenset("mghslLNJWVAKCF")  # of one letter, that may follow a number without a space: 5m, but not 2x
_UNKNOWNS = frozenset("abcdeijknpqrtuvwxyzXYZ")


class Token(NamedTuple):
    """A piece of a region. A `number` has a value, or None where it can't be worked out."""

    kind: str
    value: Fraction | None
    text: str
    attached: bool  # to the token before it, without a space


def tokens(text: str, fractions: bool, pattern: re.Pattern = _ANSWER) -> Iterator[Token]:
    """Cut a text into numbers, words and signs. What is none of these is left out."""
    end, before, numbers, named = -1, None, 0, False
    for match in pattern.finditer(text):
        attached, end = match.start() == end, match.end()
        kind = "number" if match["digits"] or match["unread"] else match.lastgroup
        if kind != "number" or match["unread"]:
            yield Token(kind, None, match[0], attached)
        elif match["below"] and not fractions:
            yield Token("number", _plain(match["digits"]), match["digits"], attached)
            yield Token("number", _plain(match["below"]), match["below"], False)
        else:
            sign, value = match["sign"] or "", _value(match)
            minus = before in ("number", "close") or (before == "word" and numbers and sign == "- ")
            if sign and minus:
                yield Token("operator", None, "-", attached)
            dash = sign == "- " and (pattern is _RUNNING or (before == "word" and named))
            negative = sign and not minus and not dash and value is not None
            yield Token("number", -value if negative else value, match[0], attached)
        before, numbers, named = kind, numbers + (kind == "number"), match[0].lower() in ("answer", "result", "total")


def _plain(digits: str) -> Fraction | None:
    """The value of digits with thousands separators, or with a comma before their last one or two."""
    if len(digits) > LONGEST or digits.count(".") > 1:
        return None
    if re.fullmatch(r"[0-9]+,[0-9]{1,2}", digits):
        return Fraction(digits.replace(",", "."))
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip("."))


def _value(match: re.Match) -> Fraction | None:
    """The value of a matched number without its sign; None if it is too long, over zero, or a power too high."""
    value = _plain(match["digits"])
    powers = [int(match[name] or 0) for name in ("exponent", "to", "ten")]
    below = _plain(match["below"] or match["part"] or "1")
    if value is None or not below or len(match[0]) > LONGEST + 20 or any(abs(p) > 999 for p in powers):
        return None
    exponent, to, ten = powers
    if match["part"]:
        if value.denominator != 1 or int(match["over"]) >= below:
            return None
        value += int(match["over"]) / below
    elif match["below"]:
        value /= below
    if match["power"]:
        if abs(to) > HIGHEST or (not value and to < 0):
            return None
        value = value**to
    value *= Fraction(10) ** (exponent + ten + _SCALES[match["scale"]])
    return value


# May be two numbers, or one with a separator.
_PAIR = re.compile(r"[(\[]\s?-?[0-9]+(?:,[0-9]+)+\s?[)\]]")


def only_value(text: str, fractions: bool) -> Fraction | None:
    """Read the one number of a text that holds nothing else but words and units, or says that it equals it."""
    found = list(tokens(text, fractions))
    equal = [i for i, token in enumerate(found) if token.kind == "equals"]
    if equal and any(token.text in (",", ";") for token in found[: equal[-1]]):
        return None  # several unknowns
    if equal and any(token.kind == "number" for token in found[equal[-1] :]):
        found = found[equal[-1] + 1 :]
    at = [i for i, token in enumerate(found) if token.kind == "number"]
    if len(at) != 1 or any(token.kind in ("compare", "macro") for token in found):
        return None
    if _PAIR.search(text):
        return None
    return found[at[0]].value if is_complete(found, at[0], factorial=True) else None


def is_complete(found: list[Token], at: int, factorial: bool = False) -> bool:
    """Whether a number is not a part of a term: of 2x, 5!, f(3), 3 + a."""
    before, after = found[at - 1] if at else None, found[at + 1] if at + 1 < len(found) else None
    if is_factor(found, at):
        return False
    if after is not None and after.kind == "operator" and ((after.text in "^!" and factorial) or operates(found, at + 1)):
        return False
    if after is not None and after.kind in ("macro", "open") and after.attached:
        return False
    if at > 1 and before.kind == "open" and before.attached and found[at - 2].kind == "word":
        return False
    return not (before is not None and (before.kind == "macro" or (before.kind == "operator" and operates(found, at - 1))))


def is_factor(found: list[Token], at: int) -> bool:
    """Whether an unknown of one letter follows a number, and not a unit: 2x, 2 n, but not 2m."""
    after = found[at + 1] if at + 1 < len(found) else None
    if after is None or after.kind != "word" or len(after.text.partition("^")[0]) != 1:
        return False
    return after.text[0] in _UNKNOWNS or (after.attached and after.text[0] not in _UNITS)


def operates(found: list[Token], at: int) -> bool:
    """Whether a sign stands between two operands, and is not a dash, a bullet or a slash between words."""
    if at == 0 or at + 1 >= len(found) or found[at].text == "!":
        return False
    after = found[at + 1]
    return after.kind in ("number", "open", "macro") or (
        after.kind == "word" and after.text[0] in _UNKNOWNS and len(after.text) == 1
    )


def value_of_lines(text: str, fractions: bool) -> Fraction | None:
    """Read the answer on the first line; where that has no digit, on the next, if that is a number alone."""
    lines = [line for line in text.splitlines() if any(c.isalnum() for c in line)][:2]
    if lines and not _DIGIT.search(lines[0]):
        return only_value(lines[1], fractions) if len(lines) > 1 else None
    return first_value(lines[0], fractions) if lines else None


def first_value(line: str, fractions: bool) -> Fraction | None:
    """Read the first number of a line, or what the calculation that it begins comes to: `3 + 4 = 7 apples` is 7."""
    found = list(tokens(line, fractions))
    at = next((i for i, token in enumerate(found) if token.kind == "number"), None)
    if at is None or any(token.kind in ("compare", "macro") for token in found[max(0, at - 1) : at]):
        return None
    value, calculates = None, False
    while True:
        side = None if calculates or not is_complete(found, at) else found[at].value
        after = at + 1
        while after < min(len(found), at + 5) and found[after].kind in ("word", "close"):
            after += 1
        then = found[after] if after < len(found) else None
        if then is not None and then.kind == "equals":
            value, calculates = value if side is None else side, False
            at = next((i for i in range(after + 1, len(found)) if found[i].kind == "number"), None)
            if at is None:
                return value
        elif then is not None and then.kind == "operator" and operates(found, after) and _next_number(found, after) is not None:
            at, calculates = _next_number(found, after), True
        else:
            break
    hedges = then is not None and then.kind == "number" and found[after - 1].text.lower() in ("or", "and")
    listed = then is not None and then.text == "," and after + 1 < len(found) and found[after + 1].kind == "number"
    return None if hedges or listed else value if side is None else side


def _next_number(found: list[Token], at: int) -> int | None:
    return next((i for i in range(at + 1, min(at + 3, len(found))) if found[i].kind == "number"), None)


def last_value(text: str, fractions: bool) -> Fraction | None:
    """Read the last number of a text, unless it can't be read or is a factor, as in 2x."""
    found = list(tokens(text, fractions, _RUNNING))
    at = [i for i, token in enumerate(found) if token.kind == "number" and not (token.value is None and ":" in token.text)]
    if not at or is_factor(found, at[-1]):
        return None
    return found[at[-1]].value
