"""The process of a run: `python -m jaxreason.sweep.child PARENT CORES WORDS...`.

It keeps to some cores, ends when the sweep does, and becomes `python WORDS...`. This is
not done between fork and exec, because the sweep's process has threads of JAX, and
Python code in a forked process could deadlock on their locks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies; it survives an exec


def main(parent: int, cores: set[int], words: list[str]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # is for the job that the run is in, and would end it; an exec keeps this
    if os.getppid() != parent:  # it died before that
        sys.exit("the sweep has ended")
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), {int(core) for core in sys.argv[2].split(",")}, sys.argv[3:])
