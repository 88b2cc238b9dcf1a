r"""Verifier of numbers as people and models write them: `\boxed{1{,}234}`, `####
$1,234.50`, `the answer is -3/4.`

It takes three steps over the end of the text. *Normalise*: remove markup, currency and
percent signs; rewrite LaTeX fractions and Unicode forms plainly. *Find the region*: the
last box that is not empty; without one the text after the last `####` that is followed
by something, then the last affirmative "answer is", then the last number in the text.
If the text after a closed `</think>` has any of these regions, it alone counts. *Read
one value*: a region without a single number, such as `24 + 18`, `2x`, `5, 6` or `5 feet
6 inches`, is no answer; the verifier never guesses. Numbers are compared exactly, as
fractions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import prod
from typing import NamedTuple

from jaxreason.types import Task, Verdict
from jaxreason.verify.exact import UNSEEN, verdict

READ = 20_000  # characters from the end of the text
LONGEST = 64  # characters of a number
HIGHEST = 64  # largest exponent that is computed


def number(
    strict: bool = False,  # accept only a box or a ####
    fractions: bool = True,  # 3/4 is one number, not two
) -> Callable[[str, Task], Verdict]:
    """Compare the number that the text gives as its answer with the one of
    `task.answer`.

    `strict` accepts only a box or a `####`. With `fractions=False`, `3/4` is two
    numbers. Currency, percent signs and units are ignored: "50%" is 50. Reasons: right,
    wrong, no answer, bad key (`task.answer` is not one number).
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
    """Find the number that a text gives as its answer; None if there is none, or more
    than one.
    """
    text = text[-READ:]
    behind = normalise(_THOUGHT.split(text)[-1])
    if holds_answer(behind, strict):
        return read_normal(behind, strict, fractions)
    return read_normal(normalise(text), strict, fractions)


def holds_answer(text: str, strict: bool) -> bool:
    """Tell whether a text has a region from which an answer can be read."""
    return last_box(text) is not None or last_marked(text) is not None or (not strict and _DIGIT.search(text) is not None)


def read_normal(text: str, strict: bool, fractions: bool) -> Fraction | None:
    """Find the answer in a text that is already normalised."""
    if last_box(text) is not None:
        return only_box(text, fractions)
    marked = last_marked(text)
    if marked is not None:
        return value_of_lines(marked, fractions)
    if strict:
        return None
    said = last_said(text)
    if said is not None:
        return value_of_lines(said, fractions)
    denied = list(_DENIES.finditer(text))
    running = _HALF_BOX.sub("", without_questions(text[denied[-1].end() :] if denied else text))
    return last_value(running, fractions)


# --- normalise ---

_MINUS = re.compile("[−–—‒﹣－]")
_WIDE = str.maketrans("０１２３４５６７８９．／：；＝＋（）", "0123456789./:;=+()", "") | str.maketrans(
    {"，": ", ", "、": ", ", "％": "%"}
)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # calculator call of GSM8K: <<3*4=12>>
_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|[\u00a0\u2009\u202f'’])(?=[0-9]{3}(?![0-9]))")
_SUPERSCRIPT = str.maketrans({c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_VULGAR = str.maketrans({c: f" {unicodedata.normalize('NFKC', c).replace('⁄', '/')} " for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"})
# The bold and other styled digits of mathematics, and the fraction slash.
_STYLED = {0x1D7CE + i: str(i % 10) for i in range(50)} | {0x2044: "/"}
_CHARACTERS = _SUPERSCRIPT | _VULGAR | _WIDE | _STYLED | UNSEEN
_SCRIPTS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces around numbers
_UNSPACED = re.compile(f"(?<=[{_SCRIPTS}])(?=[-0-9])|(?<=[0-9])(?=[{_SCRIPTS}])")
# 1.234,50 as in German; in English this is nothing.
_CONTINENTAL = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:\.[0-9]{3}){1,6}),([0-9]{1,2})(?![0-9]|[.,][0-9])")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname|underline|emph)\s?\{([^{}]*)\}(?=([0-9])?)"
)
_COLOR = re.compile(r"\\(?:textcolor|color(?:box)?)\s?\{[A-Za-z]{1,20}\}")
_DROPPED = re.compile(
    r"\\?[$€£¥%]|°|\^\{\\circ\}|\^?\\circ|\\(?:degree|left|right|displaystyle|textstyle|bf|boldsymbol|bm|[Ll]arge|LARGE|[Hh]uge)(?![A-Za-z])|\*\*|__|`|\\!|</?[|]?\w+[|]?>"
)
_SPACES = re.compile(r"\\[,;: ()\[\]]|\\q?quad(?![A-Za-z])|~|\\\\|[\u00a0\u2009\u202f]|(?<![<>=!A-Za-z])&")
_CROSS = re.compile(r"(?<=[0-9])\s?x\s?(?=[0-9])")
_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·]")
_EQUALS = re.compile(r"\\(?:approx|equiv)(?![A-Za-z])|[≈≡]")
_COMPARES = re.compile(r"\\(?:leq?|geq?|neq?|lt|gt)(?![A-Za-z])|<=|>=|!=|[≤≥≠]")
_PART = r"\s?(?:\{\s?(-?[0-9][0-9,.]{0,31})\s?\}|([0-9]))"
_FRAC = re.compile(rf"(-?)\\[dtc]?frac{_PART}{_PART}")
_OVER_BAR = re.compile(r"\{\s?(-?[0-9][0-9,.]{0,31})\s?\\over\s{0,3}(-?[0-9][0-9,.]{0,31})\s?\}")
_BRACED = re.compile(r"(?<!boxed)(?<!boxed )\{\s?(-?[0-9.,]+)\s?\}")
_HALF = re.compile(r"(?<=[0-9]) and (?:(a|one) (half|third|quarter)|(?:three[ -])(quarters))\b", re.IGNORECASE)
_PARTS = {"half": "1/2", "third": "1/3", "quarter": "1/4", "quarters": "3/4"}
_POWER = re.compile(
    r"\(\s?(-?[0-9]{1,9}(?:\.[0-9]{1,9}|/[1-9][0-9]{0,8})?)\s?\)\^(?:\{\s?([0-9]{1,2})\s?\}|([0-9]{1,2})(?![0-9]))"
)
_ABSOLUTE = re.compile(r"(?:\||\\[lr]?vert )\s?-\s?([0-9][0-9.,/]{0,31})\s?(?:\||\\[lr]?vert(?![a-z]))")
_OPERATES = re.compile(r"(?<=[0-9]) (?:(times|multiplied by)|(plus)|(divided by)) (?=[0-9.(])", re.IGNORECASE)
_EQUAL = re.compile(r"\b(?:equals|equal to)\b", re.IGNORECASE)
_AND_OR = re.compile(r"\band/or\b", re.IGNORECASE)
_CURRENCY = re.compile(r"\b(?:[A-Z]{1,2}(?=\\?\$\s?[0-9])|(?:USD|EUR|GBP|INR|CAD|AUD|Rs)(?=[0-9]))")
_CENTS = re.compile(r"(?<=[0-9]) dollars? and ([0-9]{1,2}) cents?\b", re.IGNORECASE)
_CLOCK = re.compile(r"(?<=[0-9]) ?([ap])\.\s?m\b\.?", re.IGNORECASE)
_NEGATED = re.compile(r"-\s?\(\s?(-?)\s?([0-9][^()]{0,63})\)")
_NEGATIVE = re.compile(r"(?:\bnegative|(?<=\bis )minus)[\s{}]+(?=[0-9.(])", re.IGNORECASE)
_SUBTRACTS = re.compile(r"\bminus[\s{}]+(?=[0-9.(])", re.IGNORECASE)
_OVER = re.compile(r"\\div(?![A-Za-z])|÷")
_BLANKS = re.compile(r"[ \t]+")


def normalise(text: str) -> str:
    """Rewrite the LaTeX, Markdown and Unicode forms of a thing in one plain form."""
    text = _UNSPACED.sub(" ", _MINUS.sub("-", text.translate(_CHARACTERS)))
    text = _CONTINENTAL.sub(lambda match: f"{match[1].replace('.', '')}.{match[2]}", text)
    if "<<" in text:
        text = _CALCULATOR.sub("", text)
    text = _CROSS.sub("*", _GROUP_SPACE.sub(",", _CURRENCY.sub("", text)))
    text = re.sub(r"(?<=[0-9])\*\*(?=[0-9])", "^", text)
    if "\\" in text:
        text = _TEXT.sub(_plain_text, _TEXT.sub(_plain_text, _COLOR.sub("", text)))
    text = _SPACES.sub(" ", _DROPPED.sub("", text))
    text = _COMPARES.sub(" < ", _EQUALS.sub("=", _OVER.sub("/", _TIMES.sub("*", text)))).replace("{-}", "-")
    text = _OVER_BAR.sub(r" \1/\2 ", text) if "\\over" in text else text
    text = _BRACED.sub(r"\1", _FRAC.sub(_plain_fraction, text))
    text = _BLANKS.sub(" ", text)
    text = _plain_words(text)
    if ")^" in text:
        text = _POWER.sub(lambda match: f"({Fraction(match[1]) ** int(match[2] or match[3])})", text)
    if "|" in text or "vert" in text:
        text = _ABSOLUTE.sub(r"(\1)", text)
    return _NEGATED.sub(lambda match: match[2] if match[1] else f"-{match[2]}", text)


def _plain_words(text: str) -> str:
    """Write words between numbers as signs: 5 times 3 equals 15, 5 and a half."""
    text = _SUBTRACTS.sub("- ", _NEGATIVE.sub("-", _CENTS.sub(lambda match: f".{int(match[1]):02} dollars", text)))
    text = _EQUAL.sub("=", _AND_OR.sub("or", text))
    text = _OPERATES.sub(lambda match: " * " if match[1] else " + " if match[2] else " / ", text)
    return _HALF.sub(lambda match: " " + _PARTS[(match[2] or match[3]).lower()], _CLOCK.sub(r" \1m", text))


def _plain_text(match: re.Match) -> str:
    """Return the content of a text macro; content with letters is separated by spaces
    from digits around it.
    """
    if not any(c.isalpha() for c in match[1]):
        return match[1]
    return f" {match[1]} " if match[2] else f" {match[1]}"


def _plain_fraction(match: re.Match) -> str:
    """Write `-\\frac{1}{-2}` as ` 1/2 `, with at most one sign, in front."""
    parts = match[1], match[2] or match[3], match[4] or match[5]
    negative = sum(part.startswith("-") for part in parts) % 2
    return f" {'-' * negative}{parts[1].lstrip('-')}/{parts[2].lstrip('-')} "


# --- find the region ---

_SAYS = re.compile(r"answer\s?(?:is\b|was\b|:|=)|(?:^|[.!?] )\W{0,4}(?:final )?answer *$", re.IGNORECASE | re.MULTILINE)
# Includes the denied number.
_DENIES = re.compile(
    r"answer\s?(?:(?:is|was)\s+(?:not|never|no longer|neither)"
    r"|(?:(?:can|could|would|should|must)\s?not|\w{2,6}n['’]t|can['’]t)(?:\s+be)?)\b"
    r"[^0-9\n]{0,40}[0-9.,]*[0-9]?(?:[\W_]{0,3}n?or[\W_]{1,3}[0-9.,]*[0-9])*",
    re.IGNORECASE,
)
# Matches the words before an "answer is" that is reported as somebody's mistake.
_MISTAKEN = re.compile(
    r"\b(?:mistake|error|misconception|trap|tempt(?:ed|ing)|wrong(?:ly)?|incorrect(?:ly)?|mistakenly"
    r"|(?<!\bI )(?<!\bwe )(?:might|may|could|would))\b"
    r"[^.!?,;:\n]{0,40}\b(?:think|say|guess|assume|conclude|believe|claim|answer)(?:ing)?(?: that)?(?: the)?(?: \w+)? $",
    re.IGNORECASE,
)
# A said answer that is taken back.
_RETRACTS = re.compile(
    r"^\s?\W{0,4}(?:(?:hmm|oh|oops|wait)\W{1,3}){0,2}(?:no|correction|scratch that)[,:;.!-]\s?(?=.{0,40}[0-9])", re.IGNORECASE
)
_BETWEEN_BOXES = re.compile(r"[\s.]{0,4}(?:[,;]|,?\s?(?:and|or)\b)[\s,]{0,4}(?:[A-Za-z]\s?=\s?)?", re.IGNORECASE)
_HALF_BOX = re.compile(r"\\boxed ?\{\s?-?[0-9][0-9.,]*$")  # a text that is cut off within its answer
_THOUGHT = re.compile(r"</(?:think|thinking|thought|thoughts|reasoning|scratchpad)>")
_SENTENCES = re.compile(r"(?<=[.!?])\s+")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_BULLETS = re.compile(r"\n\s{0,9}- .*\n\s{0,9}- ")  # a single one may be a negative number
_MARK = re.compile("#{4,}")
_DIGIT = re.compile("[0-9]")


def boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the closed `\\boxed{...}` that are not empty, the last first: start, end
    and content, with balanced braces.
    """
    stop = len(text)
    while (start := text.rfind("\\boxed", 0, stop)) >= 0:
        opened = start + 6 + (text[start + 6 : start + 7] == " ")
        depth = 0
        for i in range(opened, stop if text[opened : opened + 1] == "{" else opened):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                if any(c.isalnum() for c in text[opened:i]):
                    yield start, i + 1, text[opened + 1 : i]
                break
        stop = start  # each character is read once


def last_box(text: str) -> str | None:
    """Return the content of the last box; None without one."""
    return next((content for _, _, content in boxes(text)), None)


def only_box(text: str, fractions: bool) -> Fraction | None:
    """Read the last box; None if it has no single number, or if boxes joined to it by a
    comma, "and" or "or" have another one.
    """
    value = follows = None
    for start, end, content in boxes(text):
        if follows is not None and not _BETWEEN_BOXES.fullmatch(text, end, min(follows, end + 40)):
            break
        found = only_value(content, fractions)
        if found is None or (follows is not None and found != value):
            return None
        value, follows = found, start
    return value


def last_marked(text: str) -> str | None:
    """Return the text after the last `####` that is followed by something; None without
    one.
    """
    parts = _MARK.split(text)
    return next((part for part in reversed(parts[1:]) if _DIGIT.search(part) or any(c.isalnum() for c in part)), None)


def last_said(text: str) -> str | None:
    """Return the rest of the sentence after the last "answer is" that is followed by a
    digit; None without one, or if a later one denies. Answers reported as somebody's
    mistake do not count.
    """
    for match in reversed(list(_SAYS.finditer(text))[-20:]):
        if _DENIES.match(text, match.start()):
            return None
        if _MISTAKEN.search(text, max(0, match.start() - 120), match.start()):
            continue
        lines = text[match.end() :].lstrip(" :*")
        line = lines.lstrip().partition("\n")[0]
        if _BULLETS.match(lines):
            return ""
        end = _SENTENCE_END.search(line)
        sentence = line[: end.start()] if end else line
        if _DIGIT.search(sentence) and not (end and end[0].startswith("?")):
            rest = line[end.end() :] if end else lines.lstrip()[len(line) :].lstrip()
            taken_back = _RETRACTS.match(rest)
            return rest[taken_back.end() :] if taken_back else sentence
    return None


def without_questions(text: str) -> str:
    """Remove the sentences that end with a question mark: a number in them is asked
    about, not given.
    """
    if "?" not in text:
        return text
    lines = (_SENTENCES.split(line) for line in text.split("\n"))
    return "\n".join(" ".join(s for s in line if not s.rstrip("\"'”’)* ").endswith("?")) for line in lines)


# --- read one value ---

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3}){1,20}|[0-9]{1,2}(?:,[0-9]{2}){1,20},[0-9]{3}"
_BELOW = r"(?P<below>[0-9][0-9.]{0,31})(?![0-9/]|,[0-9])"
_MIXED = r"[ ](?:and[ ])?(?P<over>[0-9]{1,32})/(?P<part>[0-9]{1,32})(?![0-9/]|[.,][0-9])"


_SCALES = {
    "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_SCALE = re.compile("|".join(_SCALES), re.IGNORECASE)


def _token_pattern(whole: str, comma: str, joins: str, first: str = "") -> re.Pattern:
    """Build the pattern of a token: `whole` and `comma` add alternatives for whole and
    decimal digits, `first` some that are tried before all others, `joins` lists signs
    that make digits unreadable when more digits follow.
    """
    return re.compile(
        rf"(?P<sign>(?<![\w)\]}}])-[ ]?)?"
        rf"(?P<digits>{first}(?:{_GROUPED}{whole}|[0-9]+)(?![0-9])(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+{comma})(?![0-9]|[{joins}][0-9]|\.\([0-9])"
        r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?!\.?[0-9]))?"
        rf"(?:{_MIXED}|[ ]?/[ ]?{_BELOW})?"
        r"(?P<power>\^\{?(?P<to>-?[0-9]{1,3})\}?)?"
        r"(?:[ ]?[*x][ ]?10\^\{?(?P<ten>-?[0-9]{1,3})\}?)?"
        rf"(?P<scale>(?:[ -]?(?i:{'|'.join(_SCALES)})s?\b){{1,2}})?"
        r"|(?P<unread>[0-9](?:[0-9,.:'_]*[0-9])?)"
        r"|(?P<equals>=)|(?P<compare>[<>])|(?P<macro>\\[A-Za-z]+|[√±∞πθ∑∫|])"
        r"|(?P<word>[^\W\d_]+(?:[-'&][^\W\d_]+)*(?:[0-9]+[^\W_]*|_\{?[0-9A-Za-z]+\}?)?(?:\^\{?-?[0-9]+\}?)?)"
        r"|(?P<operator>[-+*/^!])|(?P<open>[(\[])|(?P<close>[)\]])|(?P<stop>[,;.:?…\n]+)"
    )


# A space between thousands and a decimal comma are accepted in an answer's region, not
# in running text.
_ANSWER = _token_pattern(
    "|[0-9]{1,3}(?: [0-9]{3})+", "|[0-9]+,[0-9]{1,2}(?![0-9,])", ",.:'_", "[0-9]{1,3}(?: [0-9]{3})+,[0-9]{1,2}(?![0-9,])|"
)
_RUNNING = _token_pattern("|[0-9]{1,3}(?: [0-9]{3}){2,}", "", ".:_")
_UNITS = frozenset("mghslLNJWVACF")  # units of one letter that may follow a number without a space: 5m, but not 2x
_UNKNOWNS = frozenset("abcdeijknpqrtuvwxyzXYZ")


class Token(NamedTuple):
    """A piece of a region. A `number` has a value, or None if the value can't be worked
    out.
    """

    kind: str
    value: Fraction | None
    text: str
    attached: bool  # no space before it


def tokens(text: str, fractions: bool, pattern: re.Pattern = _ANSWER) -> Iterator[Token]:
    """Cut a text into numbers, words and signs; skip everything else."""
    end, before, numbers, named, last = -1, None, 0, False, ""
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
            dash = sign == "- " and (before == "word" and named if pattern is _ANSWER else not _expects(before, last))
            negative = sign and not minus and not dash and value is not None
            yield Token("number", -value if negative else value, match[0], attached)
        before, numbers, last = kind, numbers + (kind == "number"), match[0].lower()
        named = last in ("answer", "result", "total")


def _expects(kind: str | None, text: str) -> bool:
    """Tell whether this token announces a value in running text, so that in `- 5` after
    it the sign is a minus, not a dash or a bullet.
    """
    return kind in ("equals", "open") or text == ":" or text in ("is", "was", "be", "gives", "get")


def _plain(digits: str) -> Fraction | None:
    """Read digits with thousands separators, or with a decimal comma before the last
    one or two; None if they are too long.
    """
    if len(digits) > LONGEST or digits.count(".") > 1:
        return None
    if re.fullmatch(r"[0-9 ]+,[0-9]{1,2}", digits):
        return Fraction(digits.replace(" ", "").replace(",", "."))
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip("."))


def _value(match: re.Match) -> Fraction | None:
    """Compute the value of a matched number without its sign; None if it is too long,
    divides by zero, or has too high a power.
    """
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
    value *= Fraction(10) ** (exponent + ten)
    return value * prod(_SCALES[name.lower()] for name in _SCALE.findall(match["scale"] or ""))


# Either two numbers, or one with a thousands separator.
_PAIR = re.compile(r"(?:[(\[]|\\\{)\s?-?[0-9]+(?:,[0-9]+)+\s?(?:[)\]]|\\\})")
_JOINS = frozenset(("and", "or", "to", "plus", "nor", "versus", "vs", "through", "then"))
# Words that begin a clause about other numbers: 12 apples for 3 kids.
_CLAUSE = frozenset(
    """
    accurate after all although as assuming at because before but by correct during each every for from given has
    have he hence i if in instead into is it leaving left not of on out rather rounded she since so that therefore
    they though until using was we were when where which while who with within you
    """.split()  # noqa: SIM905
)
# Ambiguous: "5 dozen" is 60, or 5 if the question asks for dozens, as in ten solutions
# of GSM8K.
_MULTIPLIERS = frozenset(
    """
    dozen dozens half-dozen half-million grand bn mn mil tn M B factorial squared cubed doubled tripled halved raised fifths
    sixths eighths tenths
    """.split()  # noqa: SIM905
)
_TAKEN = frozenset("sqrt root log ln sin cos tan square cube half twice double triple thrice third quarter".split())  # noqa: SIM905
_COUNTS = re.compile("one|two|three|four|five|six|seven|eight|nine|ten|.*(?:halves|thirds|fourths|quarters|fifths|half)")
_BOUNDS = frozenset(("than", "over", "under", "above", "below"))
_LABELS = frozenset(("option", "choice", "step", "part", "question", "problem", "case", "exercise", "figure"))
_MORE = frozenset(("more", "less", "fewer", "greater"))
_MAYBE = frozenset(("could", "might", "may", "maybe", "perhaps", "possibly"))
_FRACTION_WORDS = frozenset(("half", "third", "quarter", "thirds", "quarters", "halves"))
_HARMLESS = frozenset(
    ("\\checkmark", "\\square", "\\blacksquare", "\\qed", "\\hfill", "\\because", "\\therefore", "\\tag", "\\end", "\\boxed")
)
_AREA = re.compile(r"(?:[kcdm]?m|ft|in|yd)[23]")


def only_value(text: str, fractions: bool) -> Fraction | None:
    """Read the only number of a text of words and units, or the only one after its last
    `=`; None if there is none, or another one differs.
    """
    found = list(tokens(text, fractions))
    equal = [i for i, token in enumerate(found) if token.kind == "equals"]
    if equal and (states_several(found[: equal[-1]]) or is_equation(found[: equal[0]])):
        return None
    if equal and any(token.kind == "number" for token in found[equal[-1] :]):
        found = found[equal[-1] + 1 :]
    at = [i for i, token in enumerate(found) if token.kind == "number"]
    if not at or any(token.kind in ("compare", "macro") for token in found) or _PAIR.search(text):
        return None
    if not all(is_complete(found, i, factorial=True) for i in at) or denies(found[: at[0]]):
        return None
    value = found[at[0]].value
    return value if all(found[i].value == value and restates(found, i) for i in at[1:]) else None


def denies(words: list[Token]) -> bool:
    """Tell whether the words before a number deny it, bound it or make it a label: not
    5, more than 5, option (5).
    """
    words = words[:-1] if words and words[-1].kind == "open" else words
    names = [token.text.lower() for token in words if token.kind == "word"]
    if any(name in ("not", "never") or name.endswith("n't") for name in names) or names[-2:] == ["no", "longer"]:
        return True
    if not words or words[-1].kind != "word":
        return False
    return names[-1] in _BOUNDS | _LABELS or names[-2:] == ["up", "to"]


def restates(found: list[Token], at: int) -> bool:
    """Tell whether a number restates the one before it in another form: 18 (or 18
    dollars), 1/2 or 0.5.
    """
    before = found[at - 1]
    return before.text.lower() == "or" or before.kind == "open" or (before.kind == "equals" and found[at - 2].kind == "open")


def states_several(found: list[Token]) -> bool:
    """Tell whether the text before the last `=` gives values to several unknowns: x =
    3, y.
    """
    if any(token.text in (",", ";") for token in found):
        return True
    first = next((i for i, token in enumerate(found) if token.kind == "equals"), len(found))
    rest = found[first:]
    if any(token.text.lower() in ("or", "and") for token in rest):
        return True
    return len(rest) > 2 and is_unknown(rest[-1]) and rest[-2].kind in ("number", "word", "close")


def is_unknown(token: Token) -> bool:
    return token.kind == "word" and token.text[0] in _UNKNOWNS and len(_name(token)) == 1


def _name(token: Token) -> str:
    """Return a word without its power and its subscript."""
    return token.text.partition("^")[0].partition("_")[0]


def is_equation(left: list[Token]) -> bool:
    """Tell whether the left side of a `=` is a term of an unknown and numbers: 2x, x +
    3.
    """
    at = [i for i, token in enumerate(left) if token.kind == "number"]
    if any(is_factor(left, i) and left[i + 1].text[0] in _UNKNOWNS for i in at):
        return True
    return bool(at) and any(map(is_unknown, left)) and any(token.kind == "operator" for token in left)


def is_complete(found: list[Token], at: int, factorial: bool = False) -> bool:
    """Tell whether a number stands alone, not as part of a term such as 2x, 5!, f(3), 3
    + a, half of 3, 3 grand.
    """
    before, after = found[at - 1] if at else None, found[at + 1] if at + 1 < len(found) else None
    if is_factor(found, at) or is_multiplied(found, at) or is_taken_of(found, at):
        return False
    if after is not None and after.kind == "operator" and ((after.text in "^!" and factorial) or operates(found, at + 1)):
        return False
    if after is not None and after.attached and (after.kind in ("macro", "open") or after.text == "+"):
        return False
    if at > 1 and before.kind == "open" and before.attached and found[at - 2].kind in ("word", "number"):
        return False
    return not (before is not None and (before.kind == "macro" or (before.kind == "operator" and operates(found, at - 1))))


def is_factor(found: list[Token], at: int) -> bool:
    """Tell whether an unknown of one letter, and not a unit, follows a number: 2x, 2 n,
    but not 2m; or letters with digits, as in 5h30.
    """
    after = found[at + 1] if at + 1 < len(found) else None
    if after is None or after.kind != "word":
        return False
    if after.attached and _DIGIT.search(after.text.partition("^")[0]):
        return not _AREA.fullmatch(after.text)
    if len(_name(after)) != 1:
        return False
    return after.text[0] in _UNKNOWNS or (after.attached and after.text[0] not in _UNITS)


def is_multiplied(found: list[Token], at: int) -> bool:
    """Tell whether words after a number change its value: 5 grand, 5 B, 5 hours and a
    half.
    """
    names = [token.text.lower() for token in found[at + 1 : at + 6] if token.kind == "word"]
    after = found[at + 1] if at + 1 < len(found) else None
    if after is None or after.text in _MULTIPLIERS:
        return after is not None
    if after.attached and after.text[:2] in ("..", "…") and "." in found[at].text:
        return True  # 0.333...
    if names[:3] == ["to", "the", "power"] or (names[:1] == ["or"] and not _MORE.isdisjoint(names[1:2])):
        return True
    return any(
        names[i] == "and" and names[i + 1] in ("a", "one", "two", "three", "half") and _FRACTION_WORDS & set(names[i + 1 : i + 3])
        for i in range(len(names) - 1)
    )


def is_taken_of(found: list[Token], at: int) -> bool:
    """Tell whether words before a number change its value: half of 24, twice 6."""
    names = [token.text.lower() for token in found[max(0, at - 3) : at] if token.kind == "word"]
    if not names or found[at - 1].kind != "word":
        return False
    part = names[-1] == "of"
    while names and names[-1] in ("of", "the", "a"):
        names.pop()
    return bool(names) and (names[-1] in _TAKEN or (part and _COUNTS.fullmatch(names[-1]) is not None))


def operates(found: list[Token], at: int) -> bool:
    """Tell whether a sign is an operator between two operands, not a dash, a bullet or
    a slash between words.
    """
    if at == 0 or at + 1 >= len(found) or found[at].text == "!":
        return False
    after = found[at + 1]
    return after.kind in ("number", "open", "macro") or (
        after.kind == "word" and after.text[0] in _UNKNOWNS and len(after.text) == 1
    )


def value_of_lines(text: str, fractions: bool) -> Fraction | None:
    """Read the answer on the first line; if that has no digit, on the second, which
    must then hold a number alone.
    """
    lines = [line for line in text.splitlines() if any(c.isalnum() for c in line)][:2]
    if lines and not _DIGIT.search(lines[0]):
        return only_value(lines[1], fractions) if len(lines) > 1 else None
    return first_value(lines[0], fractions) if lines else None


def first_value(line: str, fractions: bool) -> Fraction | None:
    """Read the first number of a line, or the result of the calculation that it begins:
    `3 + 4 = 7 apples` is 7.

    There is no answer if the line has another number that no clause separates: 5 hours
    30 minutes.
    """
    found = list(tokens(line, fractions))
    at = next((i for i, token in enumerate(found) if token.kind == "number"), None)
    if at is not None and denies(found[:at]):
        but = next((i for i, token in enumerate(found) if token.text.lower() == "but"), len(found))
        found = found[but + 1 :]
        at = next((i for i, token in enumerate(found) if token.kind == "number"), None)
    if at is None or any(token.kind in ("compare", "macro") for token in found[max(0, at - 1) : at]) or in_pair(line, found, at):
        return None
    value, calculates, begin = None, is_taken_of(found, at), 0
    while True:
        side = None if calculates or not is_complete(found, at) else found[at].value
        after = at + 1
        while after < min(len(found), at + 5) and found[after].kind in ("word", "close"):
            after += 1
        then = found[after] if after < len(found) else None
        between = {token.text.lower() for token in found[at + 1 : after]}
        if then is not None and then.kind == "equals" and not between & _JOINS:
            if is_equation(found[begin:after]):
                return None
            begin = after + 1
            value, calculates = value if side is None else side, False
            at = next((i for i in range(after + 1, len(found)) if found[i].kind == "number"), None)
            if at is None:
                return value
        elif then is not None and then.kind == "operator" and operates(found, after) and _next_number(found, after) is not None:
            at, calculates = _next_number(found, after), True
        elif (
            then is not None and then.kind == "number" and found[after - 1].text.lower() == "of" and is_whole(found, after, side)
        ):
            at, calculates = after, True
        elif then is not None and then.kind == "number" and calculates and between & {"is", "makes", "gives", "leaves"}:
            at, calculates = after, False
        else:
            break
    value = value if side is None else side
    return None if value is None or has_rival(found, at, value) else value


def in_pair(line: str, found: list[Token], at: int) -> bool:
    """Tell whether a number is in brackets that may hold two: (5,700)."""
    return at > 0 and found[at - 1].kind == "open" and _PAIR.search(line) is not None


def is_whole(found: list[Token], at: int, part: Fraction | None) -> bool:
    """Tell whether a part is taken of the number at `at`: 1/4 of 12, 20% of 50 = 10,
    but not 7 of 12.
    """
    if part is not None and part.denominator != 1:
        return True
    after = at + 1
    while after < min(len(found), at + 5) and found[after].kind in ("word", "close"):
        after += 1
    return after < len(found) and found[after].kind == "equals"


def has_rival(found: list[Token], at: int, value: Fraction) -> bool:
    """Tell whether another number could equally be the answer: 5 to 7, 5 feet 6 inches,
    x = 3, y = 4.
    """
    after = at + 1
    while after < len(found) and found[after].kind in ("word", "close"):
        if found[after].text.lower() in _CLAUSE:
            return is_second(found, after)
        after += 1
    then = found[after] if after < len(found) else Token("end", None, "", False)
    if then.kind == "number":
        return (then.value != value or found[after - 1].text.lower() != "or") and not is_places(found, after)
    if then.kind == "compare":
        return is_chain(found, after)
    if then.kind == "macro":
        return then.text not in _HARMLESS
    if then.kind == "open":
        return is_rival_remark(found, after, value)
    if then.kind == "stop" and then.text[:2] in (",", ";", ":", ".."):
        return is_second(found, after + 1) or is_listed(found, after + 1, value)
    return then.kind == "equals"  # 5 or x = 3


def is_listed(found: list[Token], at: int, value: Fraction) -> bool:
    """Tell whether a list continues at `at` with another number, or another name and
    its value: 5, and 6; x = 3, y = 4; A: 3, B: 4.
    """
    joined = False
    while at < len(found) and found[at].text.lower() in _JOINS:
        at, joined = at + 1, True
    if at + 1 < len(found) and found[at].kind == "word" and found[at + 1].text in ("=", ":"):
        at += 2
    return at < len(found) and found[at].kind == "number" and (found[at].value != value or not joined)


def is_second(found: list[Token], at: int) -> bool:
    """Tell whether the words from `at` lead to a second answer: 12 for Tom and 15, 12,
    but it may be 15.
    """
    words = []
    while at < len(found) and found[at].kind == "word":
        words.append(found[at].text.lower())
        at += 1
    if not words or at == len(found) or found[at].kind != "number":
        return False
    return words[-1] in ("and", "or") or not _MAYBE.isdisjoint(words)


def is_places(found: list[Token], at: int) -> bool:
    """Tell whether a number counts digits: to 2 decimal places."""
    return at + 1 < len(found) and found[at + 1].text.lower() in ("decimal", "decimals", "significant", "digits", "places")


def is_chain(found: list[Token], at: int) -> bool:
    """Tell whether a comparison bounds an unknown, or is one of several: 3 < x, 3 < 4 <
    5.
    """
    rest = found[at + 1 :]
    return bool(rest) and (rest[0].kind == "word" or any(token.kind == "compare" for token in rest))


def is_rival_remark(found: list[Token], at: int, value: Fraction) -> bool:
    """Tell whether brackets that open at `at` give another value: 12 (or 13), 12 (13),
    but not 12 (3 * 4).
    """
    inside = found[at + 1 : at + 4]
    if not inside:
        return False
    if inside[0].kind == "number" and len(inside) > 1 and inside[1].kind == "close":
        return inside[0].value != value
    return inside[0].text.lower() in ("or", "and") and len(inside) > 1 and inside[1].kind == "number" and inside[1].value != value


def _next_number(found: list[Token], at: int) -> int | None:
    return next((i for i in range(at + 1, min(at + 3, len(found))) if found[i].kind == "number"), None)


def last_value(text: str, fractions: bool) -> Fraction | None:
    """Read the last number of a running text; None if it can't be read, is a factor
    (2x), is multiplied (5 grand), or one of several (5 or 6; 4, 5, 6; x = 6, y = 8).

    Numbers of decimal places don't count. A denied number (22, not 20) stands for the
    one before it in its sentence.
    """
    found = list(tokens(text, fractions, _RUNNING))
    at = [i for i, token in enumerate(found) if token.kind == "number" and not (token.value is None and ":" in token.text)]
    while at and is_places(found, at[-1]):
        at.pop()
    if at and is_denied(found, at[-1]):
        denied = at.pop()
        if not at or any(token.kind == "stop" and not set(token.text) <= {",", ";", ":"} for token in found[at[-1] : denied]):
            return None
    if not at or is_factor(found, at[-1]) or is_multiplied(found, at[-1]) or is_bound(found, at[-1]) or is_one_of(found, at):
        return None
    return found[at[-1]].value


def is_denied(found: list[Token], at: int) -> bool:
    """Tell whether the words before a number deny it, or leave it open: not 5, rather
    than 5, whether it is 5.
    """
    names = [token.text.lower() for token in found[max(0, at - 3) : at] if token.kind == "word"]
    last = names[-1] if names and found[at - 1].kind == "word" else ""
    if last and names[-2:] in (["rather", "than"], ["instead", "of"]):
        return True
    return last in ("not", "never") or last.endswith(("n't", "n’t")) or "whether" in names


def is_bound(found: list[Token], at: int) -> bool:
    """Tell whether a number is only a bound: more than 7, but not "no more than 7"."""
    names = [token.text.lower() for token in found[max(0, at - 3) : at] if token.kind == "word"]
    return names[-1:] == ["than"] and names[-2:-1] and names[-2] in _MORE and names[-3:-2] not in (["no"], ["not"])


def is_one_of(found: list[Token], at: list[int]) -> bool:
    """Tell whether the last number ends an enumeration of others: 5 or 6; 1, 2, 3;
    x = 6, y = 8.
    """
    if len(at) < 2:
        return False
    value, other = found[at[-1]].value, found[at[-2]].value
    between = [token.text.lower() for token in found[at[-2] + 1 : at[-1]]]
    if between == ["or"] and value != other and value is not None and other is not None:
        return value != 100 * other  # 0.5 or 50%
    if between[-1:] == ["="] and between[:-2] in ([","], [";"], ["and"], [",", "and"]) and at[-2] > 1:
        here, there = found[at[-1] - 2], found[at[-2] - 2]
        return found[at[-2] - 1].kind == "equals" and is_unknown(here) and is_unknown(there) and here.text != there.text
    listed = 1
    while listed < len(at) and {token.text.lower() for token in found[at[-listed - 1] + 1 : at[-listed]]} <= _LISTS:
        listed += 1
    return listed > 2 and len({found[i].value for i in at[-listed:]}) > 2


_LISTS = frozenset((",", ";", "and", "or"))
