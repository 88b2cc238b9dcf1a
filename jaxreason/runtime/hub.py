"""Files of repositories on the Hugging Face hub, read from its client's cache or else
downloaded, checked and cached.

`fetch` returns a folder with the files that the caller needs, at one commit. Cached
files cost no request. A download prints one line with its size and, on a terminal, a
live bar; each file is then checked against the hash from the hub. The branch name is
written to the cache last, so an interrupted download is never taken for a complete one,
and the next attempt fetches only the missing files. Every error is one line that says
what to do. `noting` records the commits that were read, and makes a resumed run use the
commits that it began with.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

COMMIT = re.compile(r"[0-9a-f]{40}")
ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)")
WAITS_S = (1, 2, 4, 8)  # between attempts when the hub is down or asks to wait
LONGEST_WAIT_S = 300
TIMEOUT_S = 10

Choose = Callable[[Sequence[str]], Sequence[str]]


class Reading(NamedTuple):
    """State of a `noting` block."""

    pinned: Mapping[str, str]
    noted: dict[str, str]
    say: Callable[[str], None]


_READING: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextlib.contextmanager
def noting(pinned: Mapping[str, str] | None = None, say: Callable[[str], None] = print) -> Iterator[dict[str, str]]:
    """Record the commit of each repository read in this block, as `{"owner/name":
    commit}`. Names of data sets begin with `datasets/`.

    A repository in `pinned` is read at the commit given there, unless the caller asks
    for another. `say` prints progress of downloads, each line once.
    """
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    token = _READING.set(Reading(pinned or {}, {}, once))
    try:
        yield _READING.get().noted
    finally:
        _READING.reset(token)


def reading() -> Reading:
    """Return the state of the innermost `noting` block."""
    return _READING.get() or Reading({}, {}, lambda line: print(line, flush=True))


def _known(name: str) -> str | None:
    """Return the commit of a repository that is pinned, or from which files were
    already read.
    """
    pinned, noted, _ = reading()
    return pinned.get(name) or noted.get(name)


def name_of(id: str, kind: str) -> str:
    """Name a repository as on its page: `owner/name` or `datasets/owner/name`."""
    return id if kind == "model" else f"{kind}s/{id}"


def fetch(id: str, choose: Choose, *, kind: str = "model", revision: str | None = None) -> Path:
    """Return the folder of a repository's files at one commit. The folder's name is the
    commit.

    Args:
      id: `owner/name`.
      choose: takes the names of all files and returns the needed ones, in download
        order. Raises ValueError if the repository lacks a needed file.
      kind: "model" or "dataset".
      revision: a commit, branch or tag. None means the commit that a resumed run
        began with, else `main`.

    Raises:
      FileNotFoundError: a file is neither cached nor available; says why and what to
        do.
      ValueError: from `choose`, or a file's hash differs from the hub's (the file is
        removed).
      KeyboardInterrupt: with a line that says which files are kept.
    """
    if (folder := cached(id, choose, kind=kind, revision=revision)) is not None:
        return folder
    try:
        folder = _download(id, choose, kind, revision or _known(name_of(id, kind)))
    except FileNotFoundError as error:
        if revision is None and (pinned := reading().pinned.get(name_of(id, kind))):
            advice = "--accept_config_change takes what main is now"
            raise FileNotFoundError(f"{error}; this run was begun with commit {pinned}: {advice}") from None
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while downloading {id}; whole files are kept, and the same command gets the rest") from None
    reading().noted[name_of(id, kind)] = folder.name
    return folder


def cached(id: str, choose: Choose, *, kind: str = "model", revision: str | None = None) -> Path | None:
    """Return the folder that `fetch` would, without a request, if the cache has all
    needed files; else None.
    """
    name, cache = name_of(id, kind), _cache(id, kind)
    revision = revision or _known(name) or "main"
    branch = cache / "refs" / revision
    commit = revision if COMMIT.fullmatch(revision) else branch.read_text(errors="replace").strip() if branch.is_file() else ""
    if commit and not COMMIT.fullmatch(commit):
        reading().say(f"{branch} is damaged: got {commit[:40]!r}; allowed: a commit of 40 hex digits; asking the hub for it")
        return None
    folder = cache / "snapshots" / commit
    if not commit or not folder.is_dir():
        return None
    listing = _listing(cache, commit)
    if listing.is_file():
        try:
            names = _checked(json.loads(listing.read_text(encoding="utf-8")), listing)
        except (ValueError, RecursionError):  # `_download` rewrites it
            reading().say(f"{listing} is damaged: it holds no list of file names; asking the hub for them")
            return None
    else:  # another program filled the cache
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        needed = choose(names)
    except ValueError:
        return None
    if not all((folder / file).is_file() for file in [*needed, *_all_shards(needed)]):
        return None
    reading().noted[name] = commit
    return folder


def _checked(names: Any, where: Any) -> list[str]:
    """Check that each name is a path inside a repository.

    Raises:
      ValueError: a name could refer to a file elsewhere.
    """
    if not isinstance(names, list):
        raise ValueError(f"{where} holds a {type(names).__name__}; allowed: a list of file names")
    for name in names:
        parts = name.split("/") if isinstance(name, str) else [""]
        if not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or not name.isprintable():
            raise ValueError(f"{where} lists a file {name!r:.80}; allowed: paths below its folder; do not use it")
    return names


def _all_shards(names: Iterable[str]) -> list[str]:
    """List all shards of each sharded file that has a shard among `names`."""
    found = [match for match in map(SHARD.fullmatch, names) if match]
    first = 0 if any(int(match[2]) == 0 for match in found) else 1  # data sets count from 0, weights from 1
    return [f"{m[1]}-{first + i:05d}-of-{m[3]}{m[4]}" for m in found for i in range(int(m[3]))]


def _cache(id: str, kind: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(os.path.expanduser(constants.HF_HUB_CACHE)) / repo_folder_name(repo_id=id, repo_type=kind)


def _listing(cache: Path, commit: str) -> Path:
    """Return the path of the stored list of a commit's files. Offline, the cached files
    alone can't tell which ones are missing.
    """
    return cache / "jaxreason" / f"{commit}.json"


# --- downloading ---


def _download(id: str, choose: Choose, kind: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    say, cache = reading().say, _cache(id, kind)
    with _waits_told(id, say):
        ask = functools.partial(HfApi().repo_info, id, repo_type=kind, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        with _explained(id, kind):
            info = _patiently(ask, id, say)
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise ValueError(f"the hub names the commit {info.sha!r:.80} for {id}; allowed: 40 hex digits; check HF_ENDPOINT")
        files = {file.rfilename: file for file in info.siblings or ()}
        _checked(list(files), id)
        needed, folder = choose(list(files)), cache / "snapshots" / info.sha
        listing = _listing(cache, info.sha)
        listing.parent.mkdir(parents=True, exist_ok=True)
        _write(listing, json.dumps(sorted(files)))
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            size = sum(files[name].size or 0 for name in missing)
            say(f"downloading {name_of(id, kind)}@{info.sha}: {_count(missing)}, {_megabytes(size)}, to {cache.parent}")
        for name in missing:
            with _explained(id, kind):
                path = hf_hub_download(id, name, repo_type=kind, revision=info.sha, etag_timeout=TIMEOUT_S)
            _check(Path(path), files[name], id)
    if not COMMIT.fullmatch(revision or ""):
        branch = cache / "refs" / (revision or "main")
        branch.parent.mkdir(parents=True, exist_ok=True)
        _write(branch, info.sha)
    return folder


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} file{'s' if len(names) > 1 else ''}"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _write(path: Path, text: str) -> None:
    """Write a small file atomically, so that no reader finds half of it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _check(path: Path, promised: Any, id: str) -> None:
    """Check a new file against the hub's hash, and remove it if they differ. The hub's
    client compares only sizes.
    """
    size, lfs = path.stat().st_size, promised.lfs
    with path.open("rb") as file:
        if lfs is not None:
            got, wanted = hashlib.file_digest(file, "sha256").hexdigest(), lfs.sha256
        else:  # git's hash of a file
            mark = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            for part in iter(lambda: file.read(1 << 20), b""):
                mark.update(part)
            got, wanted = mark.hexdigest(), promised.blob_id
    if wanted is not None and got != wanted:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} of {id} came with hash {got[:12]} in the place of {wanted[:12]} and was removed; give the same command "
            "again, and if that does not help, look at what is between here and the hub (a proxy, a mirror in HF_ENDPOINT)"
        )


def _patiently(request: Callable[[], Any], id: str, say: Callable[[str], None]) -> Any:
    """Repeat a request while the hub is down or asks to wait. The client itself repeats
    only requests for files.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return request()
        except Exception as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if wait_s is None or not (status == 429 or (status or 0) >= 500):
                raise
            asked = response.headers.get("Retry-After", "")
            wait_s = int(asked) if asked.isdecimal() else wait_s
            if wait_s > LONGEST_WAIT_S:
                raise
            say(f"{id}: the hub answered {status}; trying again in {wait_s} s")
            time.sleep(wait_s)


@contextlib.contextmanager
def _waits_told(id: str, say: Callable[[str], None]) -> Iterator[None]:
    """Report when the client waits, and silence its own warnings."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines = record.getMessage().splitlines()
            if lines[-1].startswith(("Retrying", "Rate limited", "Trying to resume")):
                say(f"{id}: {' '.join(lines)}")

    logger = logging.getLogger("huggingface_hub")
    before, logger.handlers = logger.handlers, [Told()]
    try:
        yield
    finally:
        logger.handlers = before


# --- errors ---


@contextlib.contextmanager
def _explained(id: str, kind: str) -> Iterator[None]:
    """Turn any error of the client into one line. The client has dozens of error types,
    some from its HTTP library.
    """
    try:
        yield
    except Exception as error:
        raise FileNotFoundError(f"cannot get {id!r} from the hub: {explain(error, id, kind)}") from None


def explain(error: BaseException, id: str, kind: str) -> str:
    """Say why a repository is not available, and what to do."""
    from huggingface_hub import constants, errors, get_token

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the cause has the hub's answer
    page, log_in = f"{constants.ENDPOINT}/{name_of(id, kind)}", "log in (`hf auth login`, or set HF_TOKEN)"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        then = "with the account of the token that is in use here" if get_token() else f"then {log_in}"
        return f"it is gated: ask for access at {page}, {then}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision; the branches and commits that it has are at {page}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404 or (status == 401 and not get_token()):
        return f"there is no {page}, or it is private; correct the name, or {log_in} with an account that may read it"
    if status in (401, 403):
        new = f"make one that may read {page} at {constants.ENDPOINT}/settings/tokens"
        return f"it refused the token in use here ({status}); {new}, and {log_in}"
    if status == 429:
        return f"it asks for fewer requests (429); {log_in}, which allows more, or give the same command again in some minutes"
    if status is not None:
        return f"it answered {status}; give the same command again later, or {elsewhere(id, kind)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
        where = error.filename or constants.HF_HUB_CACHE
        return f"can't write to {where}: {error.strerror}; make room, or set HF_HOME to another folder"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and the cache does not have it; unset it, or {elsewhere(id, kind)}"
    if "Consistency check failed" in str(error):
        return "the connection broke off before a file was whole; give the same command again"
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return f"{reason} ({constants.ENDPOINT}); {elsewhere(id, kind)}"


def elsewhere(id: str, kind: str) -> str:
    """Say how to get the files without a connection here."""
    download = f"hf download {id}" + ("" if kind == "model" else f" --repo-type {kind}")
    folder = "pass a folder that holds it; or " if kind == "model" else ""
    return f"{folder}run `{download}` once where there is network; or set HF_HOME to a cache that has it"
