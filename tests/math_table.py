r"""Answers, keys and whether a person calls them equal, written before the verifier was
changed and not changed since.

The rules of `verify/expression.py` were written later, by someone who knew the rows
that the earlier verifier missed, so its rates here are too good. `python
tests/math_table.py` prints the false rates with Wilson intervals, and each row that the
verifier judges differently. "Equal" follows a grader of a textbook: a unit, a currency
or a percent sign that only one of them has is ignored, the last box is the answer, and
order matters in tuples and intervals but not in sets.
"""

from __future__ import annotations

# (text, key, equal)
TABLE = [
    # numbers, one box
    (r"So the total is \boxed{42}.", "42", True),
    (r"So the total is \boxed{42}.", "24", False),
    (r"Thus \boxed{-17}", "-17", True),
    (r"Thus \boxed{-17}", "17", False),
    (r"Thus $\boxed{2220}$.", "2220", True),
    (r"\boxed{2,220}", "2220", True),
    (r"\boxed{2{,}220}", "2220", True),
    (r"\boxed{2220}", "2,220", True),
    (r"\boxed{12\,345\,678}", "12345678", True),
    (r"\boxed{3.50}", "3.5", True),
    (r"\boxed{3.05}", "3.5", False),
    (r"\boxed{007}", "7", True),
    (r"\boxed{0.125}", r"\frac{1}{8}", True),
    (r"\boxed{0.126}", r"\frac{1}{8}", False),
    (r"\boxed{\dfrac{14}{3}}", r"\frac{14}{3}", True),
    (r"\boxed{\tfrac{14}3}", r"\frac{14}{3}", True),
    (r"\boxed{14/3}", r"\frac{14}{3}", True),
    (r"\boxed{\frac{28}{6}}", r"\frac{14}{3}", True),
    (r"\boxed{\frac{3}{14}}", r"\frac{14}{3}", False),
    (r"\boxed{-\frac{3}{5}}", r"\frac{-3}{5}", True),
    (r"\boxed{\frac{3}{-5}}", r"-\frac{3}{5}", True),
    (r"\boxed{\frac35}", r"-\frac{3}{5}", False),
    (r"\boxed{4\frac{2}{3}}", r"\frac{14}{3}", True),
    (r"\boxed{+9}", "9", True),
    (r"\boxed{1.2\times10^{4}}", "12000", True),
    (r"\boxed{1.2 \cdot 10^5}", "12000", False),
    (r"\boxed{10^{-3}}", "0.001", True),
    (r"\boxed{2^{10}}", "1024", True),
    (r"\boxed{2^{10}}", "1000", False),
    (r"\boxed{6!}", "720", True),
    # units, percent, currency
    (r"\boxed{12.5\%}", "12.5", True),
    (r"\boxed{12.5\%}", r"12.5\%", True),
    (r"\boxed{12.5}", r"12.5\%", True),
    (r"\boxed{12.5%}", "12.5", True),
    (r"\boxed{40\%}", "40", True),
    (r"\boxed{40\%}", "4", False),
    (r"\boxed{33\frac{1}{3}\%}", r"\frac{100}{3}", True),
    (r"\boxed{\$18.90}", "18.90", True),
    (r"\boxed{\$1,000}", "1000", True),
    (r"\boxed{18.90}", r"\$18.90", True),
    (r"\boxed{\$18.09}", r"\$18.90", False),
    (r"\boxed{15\text{ cm}}", "15", True),
    (r"\boxed{15 \text{ cm}^2}", "15", True),
    (r"\boxed{15\,\mathrm{m/s}}", "15", True),
    (r"\boxed{15}", r"15\text{ cm}", True),
    (r"\boxed{15\ \text{inches}}", r"15\text{ inches}", True),
    (r"\boxed{51\text{ cm}}", r"15\text{ cm}", False),
    (r"\boxed{72^\circ}", "72", True),
    (r"\boxed{72}", r"72^\circ", True),
    (r"\boxed{72^{\circ}}", r"27^\circ", False),
    (r"\boxed{\text{15 apples}}", "15", True),
    (r"\boxed{5.4\text{ cents}}", "5.4", True),
    # roots, constants
    (r"\boxed{3\sqrt{13}}", r"3\sqrt{13}", True),
    (r"\boxed{\sqrt{117}}", r"3\sqrt{13}", True),
    (r"\boxed{3\sqrt{31}}", r"3\sqrt{13}", False),
    (r"\boxed{11\sqrt2}", r"11\sqrt{2}", True),
    (r"\boxed{\frac{1}{\sqrt{3}}}", r"\frac{\sqrt{3}}{3}", True),
    (r"\boxed{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", False),
    (r"\boxed{\sqrt[3]{54}}", r"3\sqrt[3]{2}", True),
    (r"\boxed{\sqrt{49}}", "7", True),
    (r"\boxed{2\pi}", r"2\pi", True),
    (r"\boxed{\pi}", r"2\pi", False),
    (r"\boxed{\frac{\pi}{6}}", r"\frac{1}{6}\pi", True),
    (r"\boxed{9\pi - 18}", r"9(\pi-2)", True),
    (r"\boxed{6 - 5i}", "6-5i", True),
    (r"\boxed{6+5i}", "6-5i", False),
    (r"\boxed{1 + \sqrt{19}, 1 - \sqrt{19}}", r"1 \pm \sqrt{19}", True),
    (r"\boxed{\ln 8}", r"3\ln 2", True),
    (r"\boxed{e^{2}}", "e^2", True),
    # algebra
    (r"\boxed{p-q}", "p - q", True),
    (r"\boxed{q-p}", "p - q", False),
    (r"\boxed{x^3 + 3x - 6}", "x^3+3x-6", True),
    (r"\boxed{x^3 - 3x - 6}", "x^3+3x-6", False),
    (r"\boxed{(x+2)(x+3)}", "x^2+5x+6", True),
    (r"\boxed{(x+1)(x+6)}", "x^2+5x+6", False),
    (r"\boxed{2(n+1)}", "2n+2", True),
    (r"\boxed{\frac{x^2-1}{x-1}}", "x+1", True),
    (r"\boxed{x=7}", "7", True),
    (r"\boxed{7}", "x=7", True),
    (r"\boxed{x = 7}", "8", False),
    (r"\boxed{y = 2x + 3}", "y=2x+3", True),
    (r"\boxed{y = 3x + 2}", "y=2x+3", False),
    (r"\boxed{x = 1, x = -4}", "1,-4", True),
    (r"\boxed{a=5}", "5", True),
    # tuples, sets, intervals, matrices
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
    (r"\boxed{\left( \frac{\pi}{2}, 3 \right)}", r"(3,\frac{\pi}{2})", False),
    (r"\boxed{(2,-1)}", "(2, -1)", True),
    (r"\boxed{(-1,2)}", "(2, -1)", False),
    (r"\boxed{1,2,3}", "1, 2, 3", True),
    (r"\boxed{3,1,2}", "1, 2, 3", True),
    (r"\boxed{1,2}", "1, 2, 3", False),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", True),
    (r"\boxed{\{1,4\}}", r"\{2,1\}", False),
    (r"\boxed{2 \text{ and } 5}", "2,5", True),
    (r"\boxed{[2,5)}", "[2,5)", True),
    (r"\boxed{[2,5]}", "[2,5)", False),
    (r"\boxed{(-\infty, 2] \cup [5, \infty)}", r"(-\infty,2]\cup[5,\infty)", True),
    (r"\boxed{(-\infty, 2) \cup (5, \infty)}", r"(-\infty,2]\cup[5,\infty)", False),
    (r"\boxed{x \in [-2,7]}", "[-2,7]", True),
    (r"\boxed{\begin{pmatrix} 1 \\ -2 \end{pmatrix}}", r"\begin{pmatrix}1\\-2\end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\-2\end{pmatrix}", False),
    (r"\boxed{\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix}}", r"\begin{pmatrix}1 & 0\\0 & 1\end{pmatrix}", True),
    # words
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", True),
    (r"\boxed{\text{Carla}}", r"\text{Evelyn}", False),
    (r"\boxed{\text{even}}", "even", True),
    (r"\boxed{\text{odd}}", r"\text{even}", False),
    (r"\boxed{C}", r"\text{(C)}", True),
    (r"\boxed{\text{(B)}}", r"\text{(C)}", False),
    (r"\boxed{\text{No}}", r"\text{Yes}", False),
    # several boxes: the last is the answer
    (r"First I get \boxed{8}. Checking again, the sum is wrong. So \boxed{9}", "9", True),
    (r"First I get \boxed{8}. Checking again, the sum is wrong. So \boxed{9}", "8", False),
    (r"\boxed{11} hmm \boxed{12}", "12", True),
    (r"\boxed{11} hmm \boxed{12}", "11", False),
    (r"Either \boxed{\frac{1}{2}} or, better, \boxed{\frac{1}{3}}.", r"\frac{1}{3}", True),
    (r"Either \boxed{\frac{1}{2}} or, better, \boxed{\frac{1}{3}}.", r"\frac{1}{2}", False),
    (r"Step 1: $\boxed{5}$. Step 2: $\boxed{15}$. Final: $\boxed{25}$.", "25", True),
    (r"Step 1: $\boxed{5}$. Step 2: $\boxed{15}$. Final: $\boxed{25}$.", "15", False),
    (r"\boxed{6}, \boxed{6}", "6", True),
    (r"\[\boxed{x+1}\] then \[\boxed{x+2}\]", "x+2", True),
    (r"\[\boxed{x+1}\] then \[\boxed{x+2}\]", "x+1", False),
    (r"\boxed{70} The answer is $70$ and not $80$.", "70", True),
    (r"The answer is \boxed{31}. I hope this helps with question 4.", "31", True),
    (r"\fbox{19}", "19", True),
    (r"\boxed{\boxed{19}}", "19", True),
    (r"\boxed 7", "7", True),
    (r"The result is \boxed{23} (not \boxed{})", "23", True),
    # other ways to give an answer
    (r"The final answer is $\frac{7}{2}$. I hope it is correct.", "3.5", True),
    (r"The answer is $x^2$.", "x^2", True),
    (r"The answer is 64.", "64", True),
    (r"The answer is 64.", "46", False),
    ("We get 12 + 13 = 25", "25", True),
    (r"\[ x = 16 \]", "16", True),
    (r"Hence \( n = 20 \).", "20", True),
    ("I do not know.", "20", False),
    ("", "20", False),
    (r"\boxed{}", "20", False),
    # ways to write a key
    (r"\boxed{18}", r"$18$", True),
    (r"\boxed{18}", r"$$18$$", True),
    (r"\boxed{18}", r"\(18\)", True),
    (r"\boxed{18}", r"\boxed{18}", True),
    (r"\boxed{18}", "18.", True),
    (r"\boxed{18}", r"\text{18}", True),
    (r"\boxed{18}", r"\mathbf{18}", True),
    (r"\boxed{18}", r"\displaystyle 18", True),
    (r"\boxed{18}", " 18 ", True),
    (r"\boxed{1800}", r"1,\!800", True),
    (r"\boxed{81}", r"\(18\)", False),
    (r"\boxed{81}", r"\boxed{18}", False),
    (r"\boxed{x^2-4}", r"\((x-2)(x+2)\)", True),
    (r"\boxed{x^2-4}", r"$$(x-2)(x+2).$$", True),
    (r"\boxed{\frac{5}{9}}", r"\[\frac59\]", True),
    (r"\boxed{\frac{5}{9}}", r"\boxed{\dfrac{5}{9}}", True),
    (r"\boxed{\frac{9}{5}}", r"\boxed{\dfrac{5}{9}}", False),
    (r"\boxed{(1,2)}", r"\((1,2)\)", True),
    (r"\boxed{[1,2]}", r"[1,2]", True),
    (r"\boxed{50}", r"50\%", True),
    # forms inside a box
    (r"\boxed{18.}", "18", True),
    (r"\boxed{$18$}", "18", True),
    (r"\boxed{\(18\)}", "18", True),
    (r"\boxed{\mathbf{18}}", "18", True),
    (r"\boxed{\text{The answer is } 18}", "18", True),
    (r"\boxed{ 18 }", "18", True),
    (r"\boxed{18 \text{ or } 19}", "18", False),
    (r"\boxed{\approx 18}", "18", True),
    (r"\boxed{18 = 18}", "18", True),
    (r"\boxed{3+15=18}", "18", True),
    (r"\boxed{n=3\cdot 6=18}", "18", True),
    (r"\boxed{-18}", "18", False),
    (r"\boxed{1.8}", "18", False),
    (r"\boxed{18x}", "18", False),
    (r"\boxed{?}", "18", False),
    (r"\boxed{2^{18}}", "18", False),
    (r"\boxed{\frac{18}{1}}", "18", True),
    (r"\boxed{18\%}", "0.18", True),
]  # fmt: skip


def judge() -> tuple[list, list]:
    """Return (false negatives, false positives), rows with their reasons."""
    from jaxreason.types import Task
    from jaxreason.verify import make

    verify = make("math", timeout_s=30.0)
    verdicts = [verify(text, Task("?", key)) for text, key, _ in TABLE]
    judged = [(text, key, v.reason, v.parsed, equal, v.correct) for (text, key, equal), v in zip(TABLE, verdicts, strict=True)]
    return [row[:4] for row in judged if row[4] and not row[5]], [row[:4] for row in judged if row[5] and not row[4]]


def main() -> None:
    from jaxreason.estimators import wilson

    missed, paid = judge()
    equal = sum(row[2] for row in TABLE)
    for name, rows, n in (("false negatives", missed, equal), ("false positives", paid, len(TABLE) - equal)):
        low, high = wilson(len(rows), n)
        print(f"{name}: {len(rows)} of {n} = {len(rows) / n:.3f} ({low:.3f} to {high:.3f})")
        for row in rows:
            print("   ", *map(repr, row))


if __name__ == "__main__":
    main()
