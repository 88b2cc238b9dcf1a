"""Search over a folder of text files by BM25 (Robertson and Zaragoza 2009), with the
source of each passage in the result.

It uses `bm25s`, which needs NumPy alone. The index is made once, when the tool is made.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import NamedTuple

from jaxreason.options import read_text
from jaxreason.tools.interface import Tool, ToolError, stateless

ENDINGS = (".txt", ".md", ".rst")
MOST_WORDS = 64  # of a query; further ones are left out


class Passage(NamedTuple):
    """A part of a file."""

    source: str  # the file, relative to the folder, and its line
    text: str


def search(
    folder: str,  # text files to search: .txt, .md and .rst, also in folders within
    results: int = 3,  # passages per result
    words: int = 80,  # words per passage, about
    as_name: str = "search",  # as the model calls it
) -> Tool:
    """Search a folder of text files by BM25; a result names the file of each passage.

    Raises:
      ValueError: no such folder, no text in it, or a number below 1; bm25s is not
        installed.
    """
    try:
        import bm25s
    except ImportError:
        raise ValueError("tool 'search' needs bm25s; pip install 'jaxreason[search]'") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # else a line per index
    if results < 1 or words < 1:
        raise ValueError(f"tool 'search' got results={results}, words={words}; allowed: 1 or more")
    passages = read_folder(Path(os.path.expanduser(folder)), words)
    index, tokenized = bm25s.BM25(), bm25s.tokenize([passage.text for passage in passages], show_progress=False)
    if not any(tokenized.ids):
        raise ValueError(f"tool 'search': the text in {folder} has no word to search for; allowed: more than short common words")
    index.index(tokenized, show_progress=False)
    lock = threading.Lock()  # the library does not promise that threads may share an index

    def call(query: str) -> str:
        asked = " ".join(query.split()[:MOST_WORDS])
        with lock:
            tokens = bm25s.tokenize([asked], show_progress=False, return_ids=False)
            scores = index.get_scores(tokens[0]) if tokens[0] else None
        if scores is None or not scores.max() > 0:
            raise ToolError("nothing found")
        best = sorted(range(len(passages)), key=lambda i: (-scores[i], i))[:results]
        return "\n".join(f"[{passages[i].source}] {passages[i].text}" for i in best if scores[i] > 0)

    return Tool(as_name, "Search the notes; the result names its sources.", stateless(call), {"query": "words to look for"})


def read_folder(folder: Path, words: int) -> list[Passage]:
    """Read the passages of all text files of a folder, in the order of their names.

    A passage is one paragraph, or several short ones; a long one is split.

    Raises:
      ValueError: there is no text.
    """
    if not folder.is_dir():
        raise ValueError(f"tool 'search': no folder {folder}; allowed: a folder of {', '.join(ENDINGS)} files")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    found = [passage for path in files for passage in split(str(path.relative_to(folder)), read_text(path), words)]
    if not found:
        raise ValueError(f"tool 'search': no text in {folder}; allowed: a folder of {', '.join(ENDINGS)} files with text")
    return found


def split(source: str, text: str, words: int) -> list[Passage]:
    """Split a file into passages of about `words` words, at the ends of paragraphs
    where possible.
    """
    found: list[Passage] = []
    pending: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if not pending:
            start = number
        pending += line.split()
        while len(pending) >= 2 * words or (len(pending) >= words and not line.strip()):
            found.append(Passage(f"{source}:{start}", " ".join(pending[: 2 * words])))
            pending, start = pending[2 * words :], number
    if pending:
        found.append(Passage(f"{source}:{start}", " ".join(pending)))
    return found
