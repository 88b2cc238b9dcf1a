"""The split of a text by its content: the same on every machine, whatever its neighbours, and equal texts stay together."""

from __future__ import annotations

from hashlib import blake2b

SPLITS = ("train", "test")


def fraction(text: str) -> float:
    """Hash a text to [0, 1)."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=6).digest()) / 2**48


def split_of(text: str, held_out: float) -> str:
    """Return the split of a text, with a share `held_out` in test."""
    return "test" if fraction(text) < held_out else "train"
