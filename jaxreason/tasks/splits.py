"""Train and test splits by a hash of the text: the same on every machine, independent
of the other texts of a file. Equal texts get the same split.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

SPLITS = ("train", "test")


def fraction(text: str) -> float:
    """Hash a text to a number in [0, 1)."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=6).digest()) / 2**48


def split_of(text: str, held_out: float) -> str:
    """Return the split of a text when a fraction `held_out` of texts is test."""
    return "test" if fraction(text) < held_out else "train"


def normalised(text: str) -> str:
    """Fold case and white space, so that texts that differ only in these become
    equal.
    """
    return " ".join(text.casefold().split())


def splitter(held_out: float) -> Callable[[str], str]:
    """Make a function that returns the split of each text of a file. Call it in the
    order of the file.

    Texts that differ only in case or white space are the same question, so they get the
    split of the first of them. Every other text gets the split of `split_of`.

    Raises:
      ValueError: `held_out` is not between 0 and 1.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out got {held_out}; allowed: 0 to 1, the fraction that is test")
    first: dict[float, float] = {}  # hashes, since texts may be large

    def split(text: str) -> str:
        return "test" if first.setdefault(fraction(normalised(text)), fraction(text)) < held_out else "train"

    return split
