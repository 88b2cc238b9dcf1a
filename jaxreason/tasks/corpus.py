"""Plain text for pretraining: files cut into documents."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxreason.options import unknown_name_message
from jaxreason.tasks import splits


def corpus(
    path: str | Sequence[str],  # a file, a glob such as books/*.txt, or several of either
    split: str | None = None,  # train or test, by the document's hash; None: all
    by: str = "paragraph",  # unit of a document: paragraph (cut at blank lines) or file
    held_out: float = 0.1,  # fraction of the documents that are test
) -> Sequence[str]:
    """Load the documents of a text file, of a glob such as `books/*.txt`, or of several
    of either. They are texts, not tasks.

    `by="paragraph"` cuts at blank lines; `by="file"` takes each file whole. A hash of
    the document decides its split, and documents that differ only in case or white
    space get the same split. A fraction `held_out` of the distinct documents is test.
    `split=None` takes all of them.

    Raises:
      FileNotFoundError: nothing matches.
      ValueError: an unknown split or `by`, a file that is not UTF-8, or no document in
        the split.
    """
    if split not in (None, *splits.SPLITS):
        raise ValueError(unknown_name_message("split of task 'corpus'", split, splits.SPLITS))
    if by not in ("paragraph", "file"):
        raise ValueError(unknown_name_message("by of task 'corpus'", by, ("paragraph", "file")))
    texts = [_read(file) for file in find_files([path] if isinstance(path, str) else path)]
    documents = texts if by == "file" else [piece for text in texts for piece in paragraphs(text)]
    documents, split_of = [document.strip() for document in documents], splits.splitter(held_out)
    kept = [document for document in documents if document and (split is None or split_of(document) == split)]
    if not kept:
        raise ValueError(f"{path}: no document in split {split!r} ({len(documents)} in all, held_out={held_out}, by={by!r})")
    return kept


def paragraphs(text: str) -> list[str]:
    """Cut a text at its blank lines."""
    return re.split(r"\n[^\S\n]*\n", text)


def find_files(paths: Sequence[str]) -> list[Path]:
    """Find the files that paths and globs name, each once, sorted by name.

    A file that several names lead to (`./a.txt`, a symbolic link) is listed once.

    Raises:
      FileNotFoundError: one of them matches nothing.
    """
    files: dict[str, str] = {}  # real path -> path as found
    for pattern in map(str, paths):
        name = os.path.expanduser(pattern)
        found = [name] if Path(name).is_file() else [hit for hit in glob.glob(name, recursive=True) if Path(hit).is_file()]
        if not found:
            raise FileNotFoundError(f"no file matches {pattern!r}; give a file, or a glob such as books/*.txt")
        files |= {os.path.realpath(hit): hit for hit in found if os.path.realpath(hit) not in files}
    return [Path(name) for name in sorted(files.values())]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None
