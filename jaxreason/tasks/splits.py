"""The split of a text by its content: the same on every machine, whatever its
neighbours, and equal texts stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

SPLITS = ("train", "test")


def fraction(text: str) -> float:
    """Hash a text to [0, 1)."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=6).digest()) / 2**48


def split_of(text: str, held_out: float) -> str:
    """Return the split of a text, with a share `held_out` in test."""
    return "test" if fraction(text) < held_out else "train"


def normalised(text: str) -> str:
    """Spell a question such that two that differ in case or white space alone are
    equal.
    """
    return " ".join(text.casefold().split())


def splitter(held_out: float) -> Callable[[str], str]:
    """Make a function of the texts of a file, in order, that returns the split of each.

    Texts that differ in case or white space alone are the same question, so they follow
    the first of them; all others are where `split_of` has them.

    Raises:
      ValueError: `held_out` is no fraction.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out got {held_out}; allowed: 0 to 1, the fraction that is test")
    first: dict[float, float] = {}  # hashes, since texts may be large

    def split(text: str) -> str:
        return "test" if first.setdefault(fraction(normalised(text)), fraction(text)) < held_out else "train"

    return split
