"""Which number of a text is its answer: forms that models write, and regions without a
single number.

`KINDS` holds the errors of the grammar of 2026-11-27. Of 141 hostile endings labelled
by hand before they were read, that grammar wrongly rewarded 45 (31.9 % [24.8, 40.0])
and missed 7 of 60 (11.7 % [5.8, 22.2]); the next grammar, at its first reading, 27
(19.1 % [13.5, 26.4]) and 5 (8.3 % [3.6, 18.1]). The clear kinds of error were mended
since.
"""

import time
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


# Every kind with controls that must still be read.
KINDS = [
    # reported as a mistake
    ("The answer is 15. A common mistake is to say the answer is 12.", "15"),
    ("The answer is 15. One might be tempted to conclude that the final answer is 12, which ignores the tax.", "15"),
    ("The answer is 15. A careless reader would say that the answer is 12.", "15"),
    ("You might think the answer is 12. The answer is 15.", "15"),
    ("The answer is 12. I made a mistake, the answer is 15.", "15"),
    ("The answer is 12. Correcting the error, the answer is 15.", "15"),
    ("The answer is 12. I made an error. I would say the answer is 15.", "15"),
    # a minus with a space, in running text
    ("so x = - 3/4", "-3/4"),
    ("Total = - 5", "-5"),
    ("Total: - 5", "-5"),
    ("The change is - 5", "-5"),
    ("that is (- 5)", "-5"),
    ("7 - 5", "5"),
    ("we have:\n- 5", "5"),
    # the right side of the last "=" where the left is a computation
    ("#### 1/4 of 12 = 3", "3"),
    ("The answer is 20% of 50 = 10.", "10"),
    ("The answer: 5 times 3 = 15.", "15"),
    ("#### 5 plus 3 = 8", "8"),
    ("#### 12 divided by 4 equals 3", "3"),
    ("#### half of 24 is 12", "12"),
    ("#### 5 times 3", None),
    ("#### 1/4 of 12", None),
    ("#### half of 24", None),
    ("#### 7 of 12", "7"),
    ("#### 2x = 6", None),
    ("\\boxed{2x = 6}", None),
    ("\\boxed{x + 3 = 10}", None),
    ("\\boxed{f(3) = 7}", "7"),
    ("\\boxed{x_1 = 7}", "7"),
    ("#### 7 more than 5", None),
    # denied
    ("The answer is no longer 12 but 14.", "14"),
    ("The answer is no longer 12.", None),
    ("The answer can't be 12.", None),
    ("The answer is neither 12 nor 14.", None),
    ("#### not 12 but 14", "14"),
    ("\\boxed{\\text{not } 5}", None),
    ("The answer is 12, not 14.", "12"),
    # words that multiply
    ("#### 2 hundred", "200"),
    ("#### 2 hundred thousand", "200000"),
    ("#### 3 dozen", None),
    ("She needs 3 dozen eggs.", None),
    ("#### 762 M&M's", "762"),
    ("#### 5 mm", "5"),
    ("#### 12 eggs, for a dozen", "12"),
    ("#### 3 Million", "3000000"),
    ("#### 5K", None),
    ("#### $5k", None),
    ("#### 5 grand", None),
    ("#### $5M", None),
    ("He has 5K", None),
    ("#### 5 kids", "5"),
    ("#### 5 kg", "5"),
    ("#### 5 km", "5"),
    ("#### 300 K", "300"),
    ("#### 5 and a half", "11/2"),
    ("\\boxed{5 and a half}", "11/2"),
    ("#### 5 hours and a half", None),
    ("He needs 5 and a half", "11/2"),
    ("\\boxed{3 and 1/2}", "7/2"),
    ("\\boxed{3 and 5/2}", None),
    # several numbers
    ("#### 5 hours 30 minutes", None),
    ("\\boxed{5 hours 30 minutes}", None),
    ("The answer is 5 hours 30 minutes.", None),
    ("#### 5 hours and 30 minutes", None),
    ("#### 5h30m", None),
    ("#### 5 feet 6 inches", None),
    ("#### 5 to 7", None),
    ("The answer is 5 to 7.", None),
    ("#### from 5 to 7", None),
    ("#### 5; 6", None),
    ("#### 5 6", None),
    ("The answer is 5 6.", None),
    ("#### x=3, y=4", None),
    ("The answer is x = 3, y = 4.", None),
    ("#### x = 3 and y = 4", None),
    ("\\boxed{x = 3 \\quad y = 4}", None),
    ("#### 3 : 4", None),
    ("#### 3 \\le x \\le 5", None),
    ("#### 3 ≤ x ≤ 5", None),
    ("#### x = 2 or x = 3", None),
    ("\\boxed{x = 2 \\text{ or } x = 3}", None),
    ("The answer is x = 2 or x = 3.", None),
    ("#### 5 \\pm 1", None),
    ("#### 1_000", None),
    ("it has 1_000", None),
    ("#### CO2", None),
    ("#### 12 kg of CO2", "12"),
    ("It emits 12 kg of CO2.", "12"),
    ("#### 5 km2", "5"),
    ("#### USD500", "500"),
    ("\\boxed{x_2}", None),
    ("\\boxed{\\{1,234\\}}", None),
    ("#### (5,700)", None),
    ("#### 12 apples, and he ate 3", "12"),
    ("#### 12 (or 13)", None),
    ("#### 12 or 12 dollars", "12"),
    ("#### 12 and 12", None),
    ("#### 3.14 to 2 decimal places", "3.14"),
    ("#### 12 rounded to 2 digits", "12"),
    # other ways to write one number
    ("\\boxed{(-2)^2}", "4"),
    ("\\boxed{-(-2)^2}", "-4"),
    ("\\boxed{3(-2)^2}", None),
    ("\\boxed{|-5|}", "5"),
    ("\\boxed{\\left|-5\\right|}", "5"),
    ("\\boxed{3|-5|}", None),
    ("\\boxed{\\textcolor{red}{5}}", "5"),
    ("\\boxed{\\color{red} 5}", "5"),
    ("\\boxed{\\underline{5}}", "5"),
    ("\\boxed{\\underline{\\textbf{5}}}", "5"),
    ("\\boxed{18 \\text{ (or 18 dollars)}}", "18"),
    ("\\boxed{18 \\text{ (or 19 dollars)}}", None),
    ("\\boxed{\\frac12 \\text{ or } 0.5}", "1/2"),
    ("\\boxed{5, 5}", None),
    ("#### <<3*4=12>>12", "12"),
    ("#### １２", "12"),
    ("\\boxed{１２}", "12"),
    ("#### ５，６", None),
    ("#### 7 p.m.", "7"),
    # of a second list of endings
    ("Answer:\n- 12", "-12"),
    ("Answer: - 12", "-12"),
    ("Answer:\n- 12\n- 15", None),
    ("\\boxed{\\bf{12}}", "12"),
    ("\\boxed{\\Large 12}", "12"),
    ("#### Alice: 5, Bob: 7", None),
    ("#### 5...7", None),
    ("#### 5 and/or 7", None),
    ("#### 0.333...", None),
    ("it is 0.333...", None),
    ("It is 12...", "12"),
    ("#### 0.(3)", None),
    ("#### sqrt 16", None),
    ("#### the square root of 16", None),
    ("#### the square root of 16 is 4", "4"),
    ("#### 5 factorial", None),
    ("#### 2 to the power of 5", None),
    ("x is 2 squared", None),
    ("#### 5 meters squared", "5"),
    ("#### 8 doubled", None),
    ("#### 7 fifths", None),
    ("#### three-fourths of 12", None),
    ("#### a total of 12", "12"),
    ("#### at most five of 12", None),
    ("#### 5 or more", None),
    ("#### 5+", None),
    ("#### over 5", None),
    ("#### up to 5", None),
    ("#### left over: 5", "5"),
    ("#### 12, but it could be 13", None),
    ("#### 12, but not 13", "12"),
    ("The answer is 12 for Tom and 15 for Ann.", None),
    ("The answer is 12 for 3 kids and 4 dogs.", "12"),
    ("The answer is option (2).", None),
    ("The answer is option B: 7", "7"),
    # behind a closed block of thoughts
    ("<think>\\boxed{9}</think>The answer is 7.", "7"),
    ("<think>#### 9</think>So it is 7.", "7"),
    ("<think>#### 9</think>\\boxed{7}", "7"),
    ("\\boxed{9}</think>\nThe answer is 7 or 8.", None),
    ("<think>\\boxed{9}</think>\n\\boxed{\\text{none}}", None),
    ("<think>\\boxed{9}</think>", "9"),
    ("<think>\\boxed{9}</think>That is all.", "9"),
    ("<think>\\boxed{9}", "9"),
]


@pytest.mark.parametrize(("text", "value"), KINDS)
def test_kinds(text, value):
    assert number.read_number(text) == (None if value is None else Fraction(value))


def test_strict_looks_behind_thoughts_for_a_box_only():
    assert number.read_number("<think>\\boxed{9}</think>#### 7", strict=True) == 7
    assert number.read_number("<think>\\boxed{9}</think>It is 7.", strict=True) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["5 ", "1,", "x = ", "- ", "5 and ", "<<", "|-", "(-2", "((", "\\boxed{", "{", "#### ", "answer is ", "5 or ", "</think>",
     "answer is not ", "a1_", "5 (", "\\text{", "dozen ", "\\color{", "5 x = ", "5 = ", "5 apples ", "5 times ",
     "answer is neither 1 nor 2 "],
)  # fmt: skip
@pytest.mark.parametrize(
    ("start", "end"),
    [("#### ", ""), pytest.param("", "", marks=pytest.mark.slow), pytest.param("\\boxed{", "}", marks=pytest.mark.slow)],
)
def test_time_grows_no_faster_than_the_text(piece, start, end, monkeypatch):
    monkeypatch.setattr(number, "READ", 10**6)

    def seconds(length, times):
        text, spent = start + piece * (length // len(piece)) + end, []
        for _ in range(times):
            start_s = time.process_time()  # whatever else the machine does
            number.read_number(text)
            spent.append(time.process_time() - start_s)
        return min(spent)

    assert seconds(100_000, 2) < 50 * seconds(10_000, 3) + 0.1  # quadratic: 100 times


@pytest.mark.parametrize("text", NEGATIVE)
def test_minus_three(text):
    assert number.read_number(text) == -3


@pytest.mark.parametrize("text", NO_ANSWER)
def test_a_region_without_a_single_number_is_no_answer(text):
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
