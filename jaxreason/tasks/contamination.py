"""Questions of a suite that share a passage with training data.

A passage is n consecutive words, as in the contamination study of GPT-3 (Brown et al.,
2020, arXiv 2005.14165, appendix C). Like that study, this finds candidates, not proof:
a shared passage may be a common way to put a question. `tasks.overlap` counts equal
questions; this module finds edited ones.

Words say nothing about problems made by rule (`7+5*3-2:`), where any two share most of
their symbols. They are not compared here: see `compares`, `passages` and `template`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxreason.tasks.procedural import Drawn
from jaxreason.types import Task

LONGEST, SHORTEST = 13, 8  # words in a passage
AT_ONCE = 2**20  # characters of training data that are hashed at once, which bounds the memory
OVERLAP = 400  # characters that pieces of a long text have in common; more than a passage has
MOST_READ = 2**28  # characters of training data that are read, about a minute
SHOWN = 80  # characters of the example
WARN_ABOVE = 0.01  # fraction of questions that share a passage
_WORD = re.compile(r"[^\W_]+")


class Shared(NamedTuple):
    """Questions that share at least one passage with training data."""

    count: int
    compared: int  # questions with at least one passage
    questions: int  # all of the suite
    words: int  # in a passage
    example: str = ""  # a shared passage
    question: int = -1  # index of the question that has it
    read: int = 0  # training items read
    items: int = 0  # training items

    @property
    def fraction(self) -> float:
        return self.count / max(1, self.questions)


def words_of(text: str) -> list[str]:
    """Split a text into words: runs of letters and digits, in folded case."""
    return _WORD.findall(text.casefold())


def compares(trained: Sequence, held_out: Sequence) -> bool:
    """Tell whether words can be compared: the held-out items are tasks, and neither
    side is made by rule.
    """
    made = isinstance(trained, Drawn) or isinstance(held_out, Drawn)
    return not made and len(trained) > 0 and len(held_out) > 0 and isinstance(held_out[0], Task)


def shared(trained: Sequence, held_out: Sequence[Task]) -> Shared:
    """Find the held-out questions that share a passage with a training text, or with
    the question or the solution of a training task.

    The number of words in a passage is the fifth percentile of the questions' lengths,
    within 8 to 13, as in GPT-3. At least half of its words must have a letter and be
    outside the suite's template, so lists of numbers and common instructions don't
    count. A question without such a passage, most often a short one, is not compared.

    Passages are compared by 64-bit hashes. Memory is linear in the suite and does not
    depend on the training data, of which at most `MOST_READ` characters are read.
    """
    asked = [words_of(task.question) for task in held_out]
    n = int(np.clip(np.quantile([len(words) for words in asked], 0.05), SHORTEST, LONGEST))
    ids = {word: i for i, word in enumerate(dict.fromkeys(word for words in asked for word in words), 1)}
    has_letter = np.array([False, *(any(map(str.isalpha, word)) for word in ids)])
    id_W, question_W = flat([[ids[word] for word in words] for words in asked])
    hash_H, start_H = passages(id_W, question_W, n)
    telling_W = has_letter[id_W] & ~template(hash_H, start_H, question_W, n, len(held_out))
    telling_H = np.concatenate([[0], np.cumsum(telling_W)])
    kept_H = 2 * (telling_H[start_H + n] - telling_H[start_H]) >= n
    hash_H, start_H = hash_H[kept_H], start_H[kept_H]
    known, items_read, found = np.unique(hash_H), 0, [np.zeros(0, np.uint64)]
    for items, texts in pieces(trained):
        batch = flat([[ids.get(word, 0) for word in words_of(text)] for text in texts])
        found.append(np.intersect1d(known, passages(*batch, n)[0]))
        items_read = items
    start_S = start_H[np.isin(hash_H, np.concatenate(found))]
    count, compared = (len(np.unique(question_W[starts])) for starts in (start_S, start_H))
    result = Shared(count, compared, len(held_out), n, read=items_read, items=len(trained))
    if not count:
        return result
    question = int(question_W[start_S[0]])
    start = int(start_S[0] - np.argmax(question_W == question))
    return result._replace(example=" ".join(asked[question][start : start + n]), question=question)


def pieces(trained: Sequence) -> Iterator[tuple[int, list[str]]]:
    """Yield the texts of training items in batches of about `AT_ONCE` characters, each
    with the number of items read, until `MOST_READ` characters have been read.

    A longer text is cut into pieces that overlap.
    """
    batch, size, read, i = [], 0, 0, -1
    for i in range(len(trained)):
        item = trained[i]
        for text in (item,) if isinstance(item, str) else (item.question, item.solution):
            for start in range(0, max(1, len(text)), AT_ONCE):
                batch.append(text[start : start + AT_ONCE + OVERLAP])
                size += len(batch[-1])
                if size >= AT_ONCE:
                    yield i + 1, batch
                    batch, size, read = [], 0, read + size
        if read > MOST_READ:
            break
    yield i + 1, batch


def flat(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Join texts, which are lists of word ids; also return the index of each word's
    text.
    """
    lengths = [len(text) for text in texts]
    return np.fromiter((i for text in texts for i in text), np.int64, sum(lengths)), np.repeat(np.arange(len(texts)), lengths)


def passages(id_W: np.ndarray, text_W: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash and the start of each passage of n words.

    A passage is within one text. One with a word that the suite does not have, of id 0,
    can't be shared and is left out, which saves time.
    """
    windows = len(id_W) - n + 1
    if windows < 1:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    mixed_W, hash_P, known_P = mix(id_W.astype(np.uint64)), np.zeros(windows, np.uint64), np.ones(windows, bool)
    for k in range(n):
        hash_P = mix(hash_P + mixed_W[k : k + windows])
        known_P &= id_W[k : k + windows] > 0
    start_P = np.flatnonzero(known_P & (text_W[:windows] == text_W[n - 1 :]))
    return hash_P[start_P], start_P


def mix(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers one to one (the finalizer of splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def template(hash_H: np.ndarray, start_H: np.ndarray, question_W: np.ndarray, n: int, questions: int) -> np.ndarray:
    """Tell which words of a suite are in a passage that more than two questions and
    more than 5 % of them have: instructions, not a problem.
    """
    order = np.lexsort((question_W[start_H], hash_H))
    hash_S, question_S = hash_H[order], question_W[start_H][order]
    first_S = np.ones(len(order), bool)  # of a passage in a question, which may have it twice
    first_S[1:] = (hash_S[1:] != hash_S[:-1]) | (question_S[1:] != question_S[:-1])
    values, counts = np.unique(hash_S[first_S], return_counts=True)
    common_H = np.isin(hash_H, values[counts > max(2, questions / 20)])
    change_W = np.zeros(len(question_W) + 1, np.int64)
    np.add.at(change_W, start_H[common_H], 1)
    np.add.at(change_W, start_H[common_H] + n, -1)
    return np.cumsum(change_W)[:-1] > 0


def told(found: Shared, what: str, source: str) -> str:
    """Describe the result in one line, as a warning above `WARN_ABOVE`."""
    of = f"{found.count:,} of its {found.questions:,} questions"
    compared = "" if found.compared == found.questions else f" ({found.compared:,} could be compared)"
    read = "" if found.read == found.items else f", of which {found.read:,} of {found.items:,} items were read"
    line = f"{what}: {of}{compared} share {found.words} words in a row with {source}{read}"
    if not found.count:
        return line
    line += f" ({found.fraction:.1%}), for example {found.example[:SHOWN]!r} (question {found.question})"
    return f"warning: {line}" if found.fraction > WARN_ABOVE else line
