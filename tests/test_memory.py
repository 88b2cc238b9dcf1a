"""Freed memory goes back to the system."""

import subprocess
import sys
import threading
import time

import pytest

from jaxreason.runtime import memory

# All blocks but the last are freed, so that glibc can't lower the end of its heap.
PROGRAM = """
import ctypes, os, time
import jax
from jaxreason.runtime import memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
mib = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def leave_free(size, blocks):
    made = [libc.malloc(size) for _ in range(blocks)]
    for block in made:
        ctypes.memset(block, 1, size)
    for block in made[:-1]:
        libc.free(block)

memory.give_back()
jax.jit(lambda x: x + 1)(1)
start = mib()
leave_free(40 * 2**20, 2)
leave_free(34 * 2**20, 6)
before = mib()
leave_free(60_000, 2_000)
small = mib()
jax.monitoring.record_event_duration_secs(memory.COMPILED, 0.1)
short = mib()
jax.monitoring.record_event_duration_secs(memory.COMPILED, 2.0)
long = mib()
memory.trim_soon(0.5)
leave_free(60_000, 2_000)
late = mib()
waits = time.monotonic() + 60
while mib() - before > 20 and time.monotonic() < waits:
    time.sleep(0.1)
print(round(before - start), *(round(x - before) for x in (small, short, long, late, mib())))
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_of_compilers_and_large_arrays_is_given_back():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    large, small, short, long, late, soon = map(int, done.stdout.split())
    assert large < 40 + 34 + 34  # the last block of each is not freed, the other five of 34 MiB are
    assert small > 100  # kept by glibc: else this test tests nothing
    assert short > 100  # a short compilation leaves little, and trimming takes time
    assert long < 20
    assert late > 100  # freed after the call
    assert soon < 20  # and returned by it


def wait_until(condition):
    waits = time.monotonic() + 60
    while not condition() and time.monotonic() < waits:
        time.sleep(0.01)
    assert condition()


@pytest.fixture
def trims(monkeypatch):
    """Let trims wait for the event `may`, and count them."""
    done, may = [], threading.Event()
    monkeypatch.setattr(memory, "SOON", memory.Soon())
    monkeypatch.setattr(memory, "trim", lambda: done.append(may.wait(60)))
    yield done, may
    may.set()


@pytest.mark.skipif(not hasattr(memory.LIBC, "malloc_trim"), reason="glibc")
def test_trims_of_many_short_steps_share_a_thread(trims):
    done, may = trims
    before = threading.active_count()
    for _ in range(50):
        memory.trim_soon(0.0)
    assert threading.active_count() <= before + 1
    may.set()
    wait_until(lambda: not memory.SOON.working)
    assert 1 <= len(done) <= 2


@pytest.mark.skipif(not hasattr(memory.LIBC, "malloc_trim"), reason="glibc")
def test_a_release_during_a_trim_is_followed_by_another(trims, monkeypatch):
    done, may = trims
    begun = threading.Event()
    monkeypatch.setattr(memory, "trim", lambda: (begun.set(), done.append(may.wait(60))))
    memory.trim_soon(0.0)
    assert begun.wait(60)
    memory.trim_soon(0.0)
    may.set()
    wait_until(lambda: not memory.SOON.working)
    assert len(done) == 2
    memory.trim_soon(0.0)  # a new thread, as the other has ended
    wait_until(lambda: not memory.SOON.working)
    assert len(done) == 3


def test_without_glibc_no_thread_is_started(trims, monkeypatch):
    monkeypatch.setattr(memory, "LIBC", object())
    before = threading.active_count()
    memory.trim_soon(60.0)
    assert threading.active_count() == before
