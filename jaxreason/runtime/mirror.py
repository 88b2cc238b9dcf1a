"""Run folders in a bucket of Google Cloud Storage: `--workdir=gs://BUCKET/RUN`.

An object in a bucket can't be appended to, so a run writes its records (metrics,
rollouts, config and so on) in a local folder, the mirror, and copies changed files to
the bucket: before each checkpoint, at the end, and about once per minute. Orbax writes
the checkpoints straight into the bucket, from all hosts. A checkpoint is only complete
once the records up to its step are in the bucket. A run on a new, empty machine thus
continues from the bucket alone, bit for bit.

The bucket decides: at a start, the mirror becomes a copy of what the bucket has. An
earlier mirror is kept beside it, with the ending `.old`.

Access is through etils' `epath` with gcsfs (extra `gcs`), as in orbax.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax

from jaxreason.options import first_line
from jaxreason.runtime import processes, workdir
from jaxreason.runtime.bucket import SCHEME, check_url, discard, is_url, listed, remote

LEFT_OUT = re.compile(rf"(lock|{re.escape(workdir.POINTER)}|checkpoints|wandb|.*\.part|.*\.tmp)$")  # names that are not copied
COPY_S = 60.0  # interval of copies while a run trains; longer if a copy takes long
READ_BY_ALL = ("config.json", "summary.json")  # records that processes read which don't write them
END_S = 300.0  # time for which the last copy is tried again
RETRY_S = 10.0  # pause before it is
SHARE = 0.05  # share of the time that copies may take


# --- copying ---


def files_in(folder: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of the record files below a local or remote folder, such as
    tensorboard/events.

    Links, pipes and the like are no records. Nor are objects of a name that no file
    has here, such as `a//b` or `../a`, and the empty objects that mark folders.
    """
    for name, is_folder in sorted(entries(folder)):
        if LEFT_OUT.match(name):
            continue
        if is_folder:
            yield from files_in(folder / name, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}"


def entries(folder: Any) -> set[tuple[str, bool]]:
    """Return the names in a folder, and whether each is a folder."""
    if not is_url(folder):
        with os.scandir(folder) as found:
            each = {entry.name: entry for entry in found}
        folders = {name for name, entry in each.items() if entry.is_dir(follow_symlinks=False)}
        files = {name for name, entry in each.items() if entry.is_file(follow_symlinks=False)}
    else:
        folders, files = listed(os.fspath(folder))
    return {(name, True) for name in folders} | {(name, False) for name in files - folders}


def copy(source: Any, target: Any, most: int | None = None) -> None:
    """Copy a file, or its first `most` bytes. If that fails, a target in a bucket
    stays as it was.
    """
    with source.open("rb") as read:
        written = target.open("wb")
        try:
            left = most
            while piece := read.read(1 << 23 if left is None else min(left, 1 << 23)):
                written.write(piece)
                left = None if left is None else left - len(piece)
        except BaseException:
            discard(written)
            raise
        written.close()


def download(url: str, folder: Path, only: Sequence[str] = (), keeps_old: bool = True) -> None:
    """Make `folder` a copy of the records that a bucket has at `url`, or of those
    named.

    An earlier folder of this name gets the ending `.old`, and is then removed unless
    `keeps_old`. Processes of this host wait for each other.
    """
    part, old = (folder.with_name(f"{folder.name}.{ending}") for ending in ("part", "old"))
    make_place(folder.parent)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        there = remote(url)
        for name in files_in(there):
            if only and name not in only:
                continue
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            copy(there / name, part / name)
        (part / workdir.POINTER).write_text(json.dumps({"url": url}))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        if not keeps_old:
            shutil.rmtree(old, ignore_errors=True)


class Copies:
    """Copies of a mirror's changed files to its bucket. Threads may share it."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.busy = folder, url, threading.Lock()
        self.sent = {name: self.mark(name) for name in files_in(folder)}

    def mark(self, name: str) -> tuple[int, int]:
        found = (self.folder / name).stat()
        return found.st_size, found.st_mtime_ns

    def send(self) -> None:
        """Copy the files that changed since they were last copied.

        A file that grows meanwhile is copied up to the size that it had.

        Raises:
          OSError, or an error of gcsfs: a file could not be copied.
        """
        with self.busy:
            for name in list(files_in(self.folder)):
                try:
                    mark = self.mark(name)
                    if self.sent.get(name) != mark:
                        copy(self.folder / name, remote(f"{self.url}/{name}"), mark[0])
                        self.sent[name] = mark
                except FileNotFoundError:
                    if (self.folder / name).exists():  # then the bucket is gone
                        raise
                    # Replaced or removed meanwhile: the next call finds what is there.


# --- the lock in the bucket ---


def process_space() -> str:
    """Name the machine, since its last start, and the container in which process ids
    count. Several machines or containers may have the same host name.
    """
    try:
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return "unknown"
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:16]


def has_died(holder: str) -> bool:
    """Return whether the holder of a lock is known to have died: a process of this
    machine that there is no more.
    """
    space = process_space()
    found = re.match(rf"host .*?, pid (\d+) of {space},", holder)
    return found is not None and space != "unknown" and not Path("/proc", found[1]).exists()


class Lock:
    """The object `lock` of a run's folder. Its holder rewrites it every few seconds, so
    that other hosts see whether the holder is alive.
    """

    def __init__(self, url: str, say: Callable[[str], None]):
        self.url, self.path = url, remote(f"{url}/lock")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.mine = f"host {socket.gethostname()}, pid {os.getpid()} of {process_space()}, since {since}"
        self.beats = itertools.count()
        holder = self.read()
        if holder and not has_died(holder):
            say(f"{self.path} is of another host; watching for {2.5 * workdir.BEAT_S:.0f} s whether its run is alive ...")
            time.sleep(2.5 * workdir.BEAT_S)
            if self.read() != holder:
                raise ValueError(f"{url} is in use by {holder}; wait for it or stop it, or choose another --workdir")
        if holder:
            say(f"the lock of {url} was left by {holder}, which has died; taking it over")
        self.beat()
        self.check()

    def read(self) -> str:
        try:
            found = self.path.read_bytes()[:300].decode(errors="replace")
            return found.encode("unicode_escape").decode()  # may be any text, so only print it
        except FileNotFoundError:
            return ""

    def beat(self) -> None:
        self.path.write_text(f"{self.mine}, beat {next(self.beats)}")

    def check(self) -> None:
        """Raise Moved if another run has taken the lock over."""
        if not (holder := self.read()).startswith(self.mine):
            raise workdir.Moved(f"{self.url} was taken over by {holder or 'nobody: its lock was removed'}; this run ends")

    def give_back(self) -> None:
        with contextlib.suppress(Exception):  # the next run sees that its holder has ended
            self.check()
            self.path.unlink()


# --- a run's mirror, and a reader's ---


class Refused(OSError):
    """The bucket is gone, or may not be written: trying again is of no use."""


def is_refusal(error: Exception) -> bool:
    """Return whether an error of gcsfs is a refusal, and not a fault of the network."""
    return isinstance(error, FileNotFoundError) or "Forbidden" in str(error) or getattr(error, "code", None) in (401, 403, 404)


def place_of(url: str, use: str) -> Path:
    """Return the local folder for a mirror of `url`. `use` tells mirrors apart."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = quote(url.removeprefix(SCHEME), safe="")
    if len(name) > 200:  # a file system allows 255 bytes
        name = f"{name[-180:]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return Path(cache, "jaxreason", "buckets", name, use)


def make_place(folder: Path) -> None:
    """Make the folder of a mirror.

    Raises:
      ValueError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")  # on a full disk an empty file can still be created
            file.flush()
    except OSError as error:
        raise ValueError(
            f"can't write to {folder}: {error.strerror}; a run in a bucket keeps its records there too: make room, or set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from None


class Mirror:
    """The mirror of a run that writes to a bucket, in the process that writes."""

    def __init__(self, url: str, folder: Path, say: Callable[[str], None]):
        self.url, self.folder, self.say = url, folder, say
        self.lock = Lock(url, say)
        self.copies: Copies | None = None  # once the records are here
        self.lost: Exception | None = None  # raised by `check` once another run has the lock
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.keep_lock, self.keep_copied)]

    def begin(self) -> None:
        download(self.url, self.folder)
        self.copies = Copies(self.folder, self.url)
        for thread in self.threads:
            thread.start()

    def keep_lock(self) -> None:
        while not self.ended.wait(workdir.BEAT_S):
            try:
                self.lock.check()
                self.lock.beat()
            except workdir.Moved as moved:
                self.lost = moved
                return
            except Exception:  # no network for a while; `keep_copied` says so
                continue

    def keep_copied(self) -> None:
        pause_s, failed = COPY_S, False
        while not self.ended.wait(pause_s):
            began_s = time.monotonic()
            try:
                self.send()
                failed = False
            except workdir.Moved:
                return
            except OSError as error:
                if not failed:
                    self.say(f"warning: {error}; trying again while the run goes on")
                failed = True
            pause_s = max(COPY_S, (time.monotonic() - began_s) / SHARE)

    def send(self) -> None:
        """Copy changed records; called before each checkpoint is written.

        Raises:
          OSError: a file could not be copied; one line.
          Moved: another run writes to the folder.
        """
        self.check()
        try:
            self.lock.check()  # the thread may not have noticed yet
            self.copies.send()
        except workdir.Moved as moved:
            self.lost = moved  # a failed save is no end of the run; the next `check` is
            raise
        except Exception as error:  # each library between here and the bucket has its own types
            kind = Refused if is_refusal(error) else OSError
            raise kind(f"can't copy to {self.url}: {first_line(error)}") from None

    def check(self) -> None:
        """Raise Moved once another run writes to the folder."""
        if self.lost is not None:
            raise self.lost

    def end(self) -> None:
        """Copy what is left, and give the lock back."""
        try:
            if self.copies is not None:
                self.send_last()
        except (OSError, workdir.Moved) as error:
            self.say(f"warning: {error}; the records of this run are in {self.folder}")
        self.ended.set()
        if self.threads[0].is_alive():
            self.threads[0].join(END_S)  # it could write the lock after it was removed
        self.lock.give_back()

    def send_last(self) -> None:
        """Copy what is left; try again for a while if the bucket can't be reached."""
        until_s, said = time.monotonic() + END_S, False
        while True:
            try:
                self.send()
                return
            except OSError as error:
                if isinstance(error, Refused) or time.monotonic() >= until_s:
                    raise
                if not said:
                    self.say(f"warning: {error}; trying again for {END_S:.0f} s")
                said = True
                time.sleep(min(RETRY_S, END_S))


@contextlib.contextmanager
def mirrored(url: str, say: Callable[[str], None]) -> Iterator[tuple[Path, Mirror | None]]:
    """Lock a folder in a bucket, copy its records here, and keep them copied there
    until the end of the block. All processes of a run call it.

    It yields the mirror's folder and, on the process that writes, the mirror.

    Raises:
      ValueError: the URL is wrong, the folder can't be written, or is in use.
    """
    url = processes.on_all_processes(check_url, url)
    folder = place_of(url, "run" if processes.writes() else f"process{jax.process_index()}")
    with contextlib.ExitStack() as opened:

        def lock() -> Mirror | None:
            if not processes.writes():
                return None
            make_place(folder.parent)
            opened.callback(workdir.lock(folder.parent, say, name=url))
            with reaching(url):
                made = Mirror(url, folder, say)
            opened.callback(made.end)
            return made

        def read() -> None:
            with reaching(url):
                download(url, folder, READ_BY_ALL) if mirror is None else mirror.begin()

        mirror = processes.on_all_processes(lock)
        processes.on_all_processes(read)  # after the lock is taken, so that all processes read the same records
        with named(folder, url):
            yield folder, mirror


@contextlib.contextmanager
def named(folder: Path, url: str) -> Iterator[None]:
    """Name the bucket in the place of its mirror in errors."""
    try:
        yield
    except (ValueError, workdir.Moved) as error:
        if type(error) not in (ValueError, workdir.Moved):
            raise
        raise type(error)(str(error).replace(str(folder), url)) from None


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Raise ValueError with one line in the place of any error of the bucket."""
    try:
        yield
    except (ValueError, workdir.Moved) as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"can't use {url}: {what}; the bucket must exist and be yours to write (gcloud storage ls {SCHEME}BUCKET, "
            "gcloud auth application-default login)"
        ) from None


def local(path: str | os.PathLike) -> Path:
    """Return a local folder to read a run in: the path itself or, for a URL, a new copy
    of its records, whose checkpoints stay in the bucket.

    RUN/checkpoints/STEP is allowed as well.

    Raises:
      ValueError: the URL is wrong, or can't be read.
    """
    if not is_url(path):
        return Path(os.path.expanduser(path))
    url, step = re.fullmatch(r"(.*?)(/checkpoints/\d+)?/*", os.fspath(path)).groups()
    url = check_url(url, "the folder of a run")
    folder = place_of(url, "read")
    with reaching(url):
        there = any(listed(url))
    if not there:
        raise FileNotFoundError(f"no folder {url}")
    with reaching(url):
        download(url, folder, keeps_old=False)
    return folder / step[1:] if step else folder
