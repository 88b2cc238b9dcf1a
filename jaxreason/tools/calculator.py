"""Calculator with a parser of its own: exact, bounded, without `eval`.

Numbers (with decimals and commas between thousands), + - * / % ^ ** and parentheses.
Values are fractions, so that 0.1+0.2 is 0.3. No input makes it recurse, and no number
grows beyond `LARGEST_BITS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from jaxreason.tools.interface import Tool, ToolError, stateless

LONGEST = 1000  # characters of an expression
LARGEST_BITS = 2048  # of a numerator or denominator, about 600 digits
DIGITS = 12  # significant digits of a value that has no finite decimal form of that many
_TOKENS = re.compile(r"(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)|(\*\*|[-+*/%^()])|\s+", re.ASCII)
_REPLACED = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "$": "", "=": " "})
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "%": 2, "minus": 3, "^": 4}


class TooLarge(ToolError):
    """A value has too many digits."""


def calculator(
    as_name: str = "calculator",  # as the model calls it
) -> Tool:
    """Compute an expression of + - * / % ^ and parentheses exactly."""

    def call(expression: str) -> str:
        return written(evaluate(expression))

    parameters = {"expression": "for example 3*(2+4)/5"}
    return Tool(as_name, "Compute an arithmetic expression.", stateless(call), parameters, keeps_time=True)


def evaluate(expression: str) -> Fraction:
    """Return the exact value of an expression.

    Raises:
      ToolError: it is none, is too long, divides by zero, or its value is too large.
    """
    if len(expression) > LONGEST:
        raise ToolError(f"expression of {len(expression)} characters; at most {LONGEST}")
    values: list[Fraction] = []
    pending: list[str] = []

    def apply_down_to(binding: int) -> None:
        while pending and pending[-1] != "(" and _BINDS[pending[-1]] >= binding:
            operator, right = pending.pop(), values.pop()
            values.append(bounded(-right if operator == "minus" else OPERATORS[operator](values.pop(), right)))

    wants_value = True
    for number, symbol in tokens(expression):
        if number:
            if not wants_value:
                raise ToolError("not an expression: an operator is missing")
            values.append(bounded(Fraction(number.replace(",", ""))))
            wants_value = False
        elif symbol == "(" and wants_value:
            pending.append(symbol)
        elif symbol == ")" and not wants_value:
            apply_down_to(0)
            if not pending:
                raise ToolError("not an expression: ) without (")
            pending.pop()
        elif wants_value and symbol in "+-":
            pending.extend(["minus"] * (symbol == "-"))
        elif wants_value or symbol == "(":
            raise ToolError(f"not an expression: unexpected {symbol}")
        else:
            operator = "^" if symbol == "**" else symbol
            apply_down_to(_BINDS[operator] + (operator == "^"))  # a power binds from the right
            pending.append(operator)
            wants_value = True
    if wants_value:
        raise ToolError("not an expression: a number is missing")
    apply_down_to(0)
    if pending:
        raise ToolError("not an expression: ( without )")
    return values[0]


def tokens(expression: str) -> list[tuple[str, str]]:
    """Split an expression into (number, "") and ("", symbol)."""
    expression, at, found = expression.translate(_REPLACED), 0, []
    while at < len(expression):
        match = _TOKENS.match(expression, at)
        if match is None:
            raise ToolError(f"not an expression: {expression[at]!r}")
        if match[1] or match[2]:
            found.append((match[1] or "", match[2] or ""))
        at = match.end()
    return found


def divided(left: Fraction, right: Fraction) -> Fraction:
    if not right:
        raise ToolError("division by zero")
    return left / right


def remainder(left: Fraction, right: Fraction) -> Fraction:
    if not right:
        raise ToolError("division by zero")
    return left % right


def power(left: Fraction, right: Fraction) -> Fraction:
    if right.denominator != 1:
        raise ToolError("only whole powers")
    if not left and right < 0:
        raise ToolError("division by zero")
    if not left:
        return Fraction(not right)
    size = max(abs(left.numerator).bit_length(), left.denominator.bit_length())
    if size > 1 and abs(right) * (size - 1) > LARGEST_BITS:  # before it is computed
        raise TooLarge("the value is too large")
    return left ** (int(right) if size > 1 else int(right) % 2)  # 1 or -1: its power may be huge


OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": divided,
    "%": remainder,
    "^": power,
}


def bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator).bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise TooLarge("the value is too large")
    return value


def written(value: Fraction) -> str:
    """Write a value as a whole number, or as a decimal rounded to `DIGITS` significant
    digits.
    """
    if value.denominator == 1:
        return str(value.numerator)
    whole = abs(value.numerator) // value.denominator
    places = max(0, DIGITS - len(str(whole))) if whole else DIGITS + leading_zeros(value)
    scaled = round(abs(value) * 10**places)
    digits = str(scaled).rjust(places + 1, "0")
    text = f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}".rstrip("0").rstrip(".") if places else digits
    return f"-{text}" if value < 0 and text.strip("0.") else text


def leading_zeros(value: Fraction) -> int:
    """Count the zeros behind the point of a value between -1 and 1."""
    zeros, scaled = 0, abs(value) * 10
    while scaled < 1:
        zeros, scaled = zeros + 1, scaled * 10
    return zeros
