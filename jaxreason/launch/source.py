"""This checkout as one archive: the files of the commit, with the changes to them and
the new files that git does not ignore, and the files of its submodules.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """An archive of the checkout."""

    archive: bytes  # .tar.gz, the same bytes for the same files
    digest: str  # of the archive
    commit: str
    changed: tuple[str, ...]  # files that differ from the commit


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, errors="surrogateescape", check=False)
    if done.returncode:
        raise ValueError(f"{root}: git {' '.join(words)} failed: {done.stderr.strip()[-200:]}")
    return done.stdout


def ls_files(root: Path, *options: str) -> list[str]:
    return [name for name in git(root, "ls-files", "-z", "--cached", *options).split("\0") if name]


def pack(root: Path) -> Source:
    """Make the archive of a checkout.

    Raises:
      ValueError: not a git checkout, or a submodule with changes or of another
        commit.
    """
    commit = git(root, "rev-parse", "HEAD").strip()
    listed = ls_files(root, "--others", "--exclude-standard")
    for line in git(root, "submodule", "status", "--recursive").splitlines():
        path = re.sub(r" \([^()]*\)$", "", line[1:].partition(" ")[2])
        if line[:1] in "+-U":
            raise ValueError(f"submodule {path} is not at the commit that is recorded; commit it, or git submodule update --init")
        if git(root / path, "status", "--porcelain"):
            raise ValueError(f"submodule {path} has changes; commit them, or git -C {path} stash")
        listed += [f"{path}/{name}" for name in ls_files(root / path)]
    files = sorted({name for name in listed if (root / name).is_file()})
    changed = tuple(sorted({line[3:] for line in git(root, "status", "--porcelain", "-z", "--no-renames").split("\0") if line}))
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=6) as tar:
        for name in files:
            content = (root / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755 if (root / name).stat().st_mode & 0o100 else 0o644
            tar.addfile(info, io.BytesIO(content))
    data = raw.getvalue()
    data = data[:4] + bytes(4) + data[8:]  # gzip notes the time at which it was made
    return Source(data, hashlib.sha256(data).hexdigest()[:16], commit, changed)
