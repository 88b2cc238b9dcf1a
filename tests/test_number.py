"""Which number of a text is its answer: forms that models write, and what is no single number."""

from fractions import Fraction

import pytest

from jaxreason.types import Task
from jaxreason.verify import make, number

NEGATIVE = [
    "\\boxed{- 3}", "#### - 3", "#### –3", "#### －3", "\\boxed{−3}", "\\boxed{-\\left(3\\right)}", "#### -(3)",
    "x = - 3 is in \\boxed{x = - 3}", "\\boxed{\\text{negative }3}", "the answer is negative 3",
    "The answer is: -3.",
    "\\boxed{minus 3}", "\\boxed{\\text{minus }3}", "#### minus 3", "The answer: minus 3", "\\boxed{{-}3}",
    "The answer is minus 3.",
]  # fmt: skip
NO_ANSWER = [
    "\\boxed{\\sqrt{16}}", "\\boxed{2\\pi}", "\\boxed{5!}", "\\boxed{2x}", "\\boxed{2n}", "\\boxed{>5}",
    "\\boxed{x \\leq 5}", "\\boxed{3\\sqrt{2}}", "\\boxed{(2)(3)}", "\\boxed{(3,4)}", "\\boxed{3 + 4}",
    "\\boxed{3:00}", "\\boxed{1.2.3}", "#### 24 + 18", "#### 24 - 18", "#### 24 -18", "#### 10-12", "#### 12, 13",
    "#### 12 or 13", "#### 12 and 13", "#### 2x", "#### 3:00", "#### 2^999", "#### 1e999999", "#### > 5",
]  # fmt: skip


@pytest.mark.parametrize("text", NEGATIVE)
def test_minus_three(text):
    assert number.read_number(text) == -3


@pytest.mark.parametrize("text", NO_ANSWER)
def test_what_is_no_single_number_is_no_answer(text):
    assert number.read_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # mixed numbers, fractions, powers
        ("#### 1 1/2", "3/2"),
        ("\\boxed{1\\frac{1}{2}}", "3/2"),
        ("#### ½", "1/2"),
        ("#### 1½", "3/2"),
        ("\\boxed{\\frac{1}{-2}}", "-1/2"),
        ("\\boxed{\\frac3{4}}", "3/4"),
        ("\\boxed{-\\frac{-1}{2}}", "1/2"),
        ("\\boxed{10^3}", "1000"),
        ("#### 2^3", "8"),
        ("#### 2**3", "8"),
        ("#### 2^{10}", "1024"),
        ("#### 2 \\times 10^3", "2000"),
        ("#### 2 × 10³", "2000"),
        ("#### 7x8=56", "56"),
        ("\\boxed{-(-5)}", "5"),
        ("#### 8 ÷ 2 = 4", "4"),
        ("#### 8 \\div 2 = 4", "4"),
        ("#### 5 minus 3 = 2", "2"),
        ("#### 5 apples minus 3 apples = 2 apples", "2"),
        ("\\boxed{Rs.500}", "500"),
        ("\\boxed{(5,700)}", None),
        ("\\boxed{[1,234]}", None),
        ("\\boxed{(5700)}", "5700"),
        # thousands, decimal commas, scales
        ("#### 10 000", "10000"),
        ("#### 10\u2009000", "10000"),
        ("#### 10\u00a0000", "10000"),
        ("\\boxed{10\\ 000}", "10000"),
        ("\\boxed{10\\,000}", "10000"),
        ("#### 1'000", "1000"),
        ("#### 12,34,567", "1234567"),
        ("#### 0,5", "1/2"),
        ("#### $1.5 million", "1500000"),
        ("#### 3 thousand", "3000"),
        # where the answer is
        ("#### 12 ####", "12"),
        ("#### 12\n####", "12"),
        ("#### Final Answer\n12", "12"),
        ("#### Final Answer\nThere are 3 of 12", None),
        ("#### 12\nI was asked to write \\boxed{}", "12"),
        ("The answer is 12 because 3 + 4 = 7", "12"),
        ("**Answer**: 12 apples for 3 kids", "12"),
        ("The answer is not 12. It is 14.", "14"),
        ("The answer isn't 12, it is 14", "14"),
        ("The answer is not 12.", None),
        ("The answer is 12. No, the answer is not 12.", None),
        ("The answer is 12? No.\nIt makes 14.", "14"),
        ("**Answer**\n\n21 kg, of 30", "21"),
        ("That makes 2x.", None),
        ("That makes 8.9e3.", "8900"),
        ("\\boxed{x = 3, y = 4}", None),
        ("\\boxed{12^\\circ} is it, not 5", "12"),
        ("The answer is:\n\n**12**", "12"),
        ("The final answer is \\(12\\).", "12"),
        ("The answer is $12$.", "12"),
        ("#### 6 <= 7", "6"),
        ("#### 3 apples + 4 apples = 7 apples", "7"),
        ("#### 12 - that is all", "12"),
        ("#### Answer - 12", "12"),
        ("- 3 apples\n- 4 pears", "4"),
        ("It is at 3:00. He had 5.", "5"),
        # units
        ("\\boxed{5\\text{ cm}^2}", "5"),
        ("The area is 5 m^2.", "5"),
        ("The area is 5 m².", "5"),
        ("#### 5cm", "5"),
        ("#### 5 m", "5"),
        ("#### $5/hour", "5"),
        ("\\boxed{12^\\circ}", "12"),
        ("\\boxed{35.0\\%}", "35"),
        ("The answer is 5!", "5"),
    ],
)
def test_number_reads(text, value):
    assert number.read_number(text) == (None if value is None else Fraction(value))


def test_a_decimal_comma_is_read_in_answers_only():
    assert number.read_number("#### 3,5") == Fraction("3.5")
    assert number.read_number("among 3,5") == 5


@pytest.mark.parametrize(("key", "reason"), [("3:00", "bad key"), ("five", "bad key"), ("", "bad key"), ("1 1/2", "right")])
def test_keys(key, reason):
    assert make("number")("#### 1.5", Task("", key)).reason == reason
