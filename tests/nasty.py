"""Texts that a model may write and that parsers must survive: long, deep, odd or cut
off.
"""

NASTY = [
    "", " ", "\0", "\ud800", "\udfff#### \ud800", "nan", "inf", "-inf", "1e999", "1e99999999", "1/0", "0/0", "10**10**10",
    "9" * 5000, "9" * 1_000_000, "(" * 1_000_000, "1," * 500_000, "1," * 9 + "1", "1/" * 500_000, "-" * 1_000_000,
    "$" * 1_000_000, "." * 1_000_000, "0." + "0" * 1_000_000, "\\boxed{" * 100_000, "\\boxed{" + "{" * 100_000,
    "}" * 100_000, "#### " * 200_000, "answer is " * 100_000, "\\frac{" * 100_000, "\\frac{1}{0}", "=" * 500_000, "٣٤",
    "１２", "²", "½", "Ⅷ", "1\u00a0000", "\u202e12", "\x1b[31m5", "1_000", "0x10", "1e", "1e+", ".", "-.", "$-", "%", "A",
    "AA", "A\ud800", "A" * 1_000_000, "A" + "(" * 5000 + "1", "A" + "1" * 5000, "A1/(1-1)", "A" + "9*" * 100 + "9", "A²",
    "A" + "999999999*" * 90_000 + "9",
    "A٣", "A1 if 1 else 2", "A3+", "A3*(", "<think>" * 100_000, "</think>" * 100_000, ("9" * 30 + "/") * 600,
    "1/" + "9" * 19_000 + ".5", ",234" * 5000, "1" + ",234" * 5000 + "5", "\\boxed{\\boxed{" * 9, "#" * 99_999,
]  # fmt: skip


def adversarial() -> list[tuple[str, str]]:
    """Return texts that try to crash, to stall or to deceive a verifier whose key is 5,
    each with its kind.
    """
    towers = [
        "9^9^9",
        "10^{10^{10}}",
        "2^{2^{2^{2^{2^2}}}}",
        "9**9**9",
        "(10^{100})!",
        "100!!!",
        "e^{e^{e^{10}}}",
        "2^{999999999}",
    ]
    wraps = [r"\boxed{%s}", "$%s$", "the answer is %s", "#### %s", "A%s", "<answer>%s</answer>"]
    found = [("power tower", wrap % tower) for tower in towers for wrap in wraps]
    deep = [r"\frac{1}{", r"\sqrt{", "{", r"\left(", "[", "((", r"\text{", r"\boxed{", r"\begin{matrix}", "^{", "_{", r"\over"]
    found += [("nested LaTeX", opening * n + "5" + "}" * n) for opening in deep for n in (3, 50, 3000)]
    megabyte = [
        "5",
        " ",
        "\n",
        "5 ",
        "\\",
        "{",
        "$",
        "a",
        "é",
        "\u200b",
        "#",
        "?",
        "5 or ",
        "x = 5, ",
        r"\boxed{5} or ",
        "answer is 5. ",
    ]
    found += [("1 MB", piece * (1_000_000 // len(piece))) for piece in megabyte]
    unseen = [
        "\u200b",
        "\u200c",
        "\u200d",
        "\u2060",
        "\ufeff",
        "\u00ad",
        "\u202e",
        "\u2066",
        "\u180e",
        "\u3164",
        "\u034f",
        "\ue000",
    ]
    found += [("zero-width", text) for c in unseen for text in (c, f"{c}6", f"6{c}", rf"\boxed{{{c}6}}", f"answer{c} is 6")]
    alike = ["Ƽ", "ƽ", "𝟞", "６", "⑤", "⁵", "₅", "٥", "५", "Ⅴ", "五", "Б", "S", "б", "⒌", "🄆", "㊄", "𐄋"]
    found += [("look-alike", wrap % f"{c}.1") for c in alike for wrap in (r"\boxed{%s}", "%s", "A%s")]
    odd = [
        "nan",
        "NaN",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "-1e999",
        "1/0",
        "0/0",
        "∞",
        r"\infty",
        "float('nan')",
        "None",
        "True",
    ]
    found += [("no number", wrap % value) for value in odd for wrap in (r"\boxed{%s}", "%s", "A%s", "<answer>%s</answer>")]
    found += [("NUL", text) for text in ("\0", "\0" * 1000, "6\0", "\x005\x006", "\\boxed{\x006}", "A\x006", "\x00" * 9 + "6")]
    found += [("lone surrogate", text) for text in ("\ud800", "\udfff6", "\\boxed{\ud83d}", "A\ud800", "\ude00\ud83d", "6\udc80")]
    partly = [
        r"\boxed{",
        r"\boxed{5",
        r"\boxed{\frac{5}{",
        "####",
        "the answer is",
        "A",
        "<answer>",
        "<answer>5",
        "answer: -",
        r"$\frac",
    ]
    found += [("partial", text) for text in partly]
    lists = [
        "1, 2, 3, 4, 5",
        "4 or 5",
        "5 or 6",
        "1 2 3 4 5 6 7 8 9",
        "A, B, C, D or E",
        "{1,2,3,4,5}",
        "5, 6",
        "x = 5, y = 6",
        "3-7",
        "5 ± 1",
    ]
    found += [("enumerated", wrap % text) for text in lists for wrap in (r"\boxed{%s}", "the answer is %s", "#### %s", "A%s")]
    return found + [("nasty", text) for text in NASTY]
