"""The command lines of the two backends, and whether bubblewrap works here.

`bwrap` builds an empty file system and puts into it, read-only, /usr and a Python
without its site-packages. There is no /proc, no /home, no /etc but the loader's cache,
and of /dev four devices; /tmp is a file system in memory with a limit of size.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxreason.sandbox import seccomp

BACKENDS = ("bwrap", "rlimits")
PYTHON = "/python"  # where a Python outside /usr is seen, so that no name of a home folder is
PACKAGES = "/packages"
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # symbolic links into /usr, or folders on older systems
DEVICES = ("null", "zero", "random", "urandom")
FIRST_UID = 1_879_048_192  # from here on systemd leaves numbers of users unused
FULL_MAP = 2**32 - 1  # numbers of users outside any user namespace
FEWEST_USERS = 2**12  # in a container's user namespace; with fewer, root is held as any other user is


def check(backend: str) -> None:
    """Refuse a backend that can't be had here.

    Raises:
      ValueError: an unknown name; or `bwrap` without bubblewrap or user namespaces.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown sandbox {backend!r}; one of: {', '.join(BACKENDS)}")
    if backend == "bwrap" and (why := refusal()):
        raise ValueError(why)


@functools.cache
def refusal() -> str:
    """Say in one line why sandbox 'bwrap' can't be had here; "" if it can."""
    instead = "or sandbox='rlimits', which holds accidents but no attacker"
    if not sys.platform.startswith("linux"):
        return f"sandbox 'bwrap' needs Linux, this is {sys.platform}; use a Linux machine, {instead}"
    if shutil.which("bwrap") is None:
        return f"sandbox 'bwrap' needs bubblewrap, and there is no bwrap in PATH; apt-get install bubblewrap, {instead}"
    try:
        filter_fd = filter_file()
    except ValueError as error:
        return f"sandbox 'bwrap': {error}; {instead}"
    try:
        become = (
            f"import os; os.setgroups([]); os.setresgid(*[{user}] * 3); os.setresuid(*[{user}] * 3)" if (user := uid(0)) else ""
        )
        command = argv(["-I", "-S", "-c", become], filter_fd, files_mb=1)
        done = subprocess.run(
            command, pass_fds=[filter_fd], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"sandbox 'bwrap' does not start here: {error}; {instead}"
    finally:
        os.close(filter_fd)
    if done.returncode == 0:
        return ""
    said = " ".join(done.stderr.decode(errors="replace").split())[-300:] or f"exit status {done.returncode}"
    return f"sandbox 'bwrap' does not start here: {said}; allow user namespaces to this user, {instead}"


def filter_file() -> int:
    """Return a descriptor from which bwrap reads the filter of system calls."""
    fd = os.memfd_create("filter")
    os.write(fd, seccomp.program())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@functools.cache
def new_option(name: str) -> bool:
    """Tell whether the installed bwrap has an option that older ones have not."""
    said = subprocess.run(["bwrap", "--help"], capture_output=True, text=True, check=False)
    return name in said.stdout + said.stderr


def users(uid_map: str, gid_map: str) -> range:
    """Return numbers of users and groups that root may become and that nobody else is
    likely to be, given the maps of its user namespace; none if there are too few.
    """
    largest = []
    for text in (uid_map, gid_map):
        count, start = max((int(count), int(inside)) for inside, _, count in (line.split() for line in text.splitlines()))
        largest.append((start + count // 2, start + count - 2) if count < FULL_MAP else (FIRST_UID, FIRST_UID + 2**30))
    found = range(max(first for first, _ in largest), min(end for _, end in largest))
    return found if len(found) >= FEWEST_USERS else range(0)


@functools.cache
def own_users() -> range:
    """Return the users that this process may become: none unless it is root."""
    maps = (Path(f"/proc/self/{name}_map") for name in ("uid", "gid"))
    return users(*(path.read_text() for path in maps)) if os.geteuid() == 0 else range(0)


def uid(number: int) -> int:
    """Return the user that a sandbox of root becomes, each another, because the limit
    of processes counts those of a user; 0 for "stay who you are".
    """
    found = own_users()
    return found[((os.getpid() % 2**20) * 2**10 + number % 2**10) % len(found)] if found else 0


def variables() -> dict[str, str]:
    """Return the whole environment of a program."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")}  # of numpy; they count as processes
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", **threads}


def argv(
    arguments: Sequence[str],
    filter_fd: int,
    files_mb: int,
    binds: Mapping[str, str] | None = None,  # path here -> path in the sandbox, read-only
    environment: Mapping[str, str] | None = None,
    info_fd: int | None = None,  # where bwrap writes the number of its first process
) -> list[str]:
    """Return the command that runs Python with these arguments in a sandbox.

    Root keeps the right to become another user, which `inside.limit` does at once. Any
    other user, and root where it may become none, is alone in a user namespace that
    allows no further one.
    """
    prefix, executable = Path(sys.base_prefix), Path(os.path.realpath(sys.executable))
    elsewhere = not prefix.is_relative_to("/usr")
    seen = f"{PYTHON}/{executable.relative_to(prefix)}" if elsewhere and executable.is_relative_to(prefix) else str(executable)
    shown = variables() | ({"LD_LIBRARY_PATH": f"{PYTHON}/lib"} if elsewhere else {}) | dict(environment or {})
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--as-pid-1", "--new-session", "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL"]
    if own_users():
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        command += ["--disable-userns"] if new_option("--disable-userns") else []
    for name, value in shown.items():
        command += ["--setenv", name, value]
    for folder in ("/etc", "/dev", PACKAGES):  # made for a bind alone, they would be root's only
        command += ["--perms", "0755", "--dir", folder]
    command += ["--ro-bind", "/usr", "/usr"]
    for name in MERGED:
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    if elsewhere:
        command += ["--ro-bind", str(prefix), PYTHON]
        packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        if (prefix / packages).is_dir():
            command += ["--size", "4096", "--tmpfs", f"{PYTHON}/{packages}", "--remount-ro", f"{PYTHON}/{packages}"]
    for here, there in (binds or {}).items():
        command += ["--ro-bind", here, there]
    for name in DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    command += ["--perms", "1777", "--size", str(files_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    command += ["--info-fd", str(info_fd)] if info_fd is not None else []
    return [*command, "--seccomp", str(filter_fd), "--", seen, *arguments]
