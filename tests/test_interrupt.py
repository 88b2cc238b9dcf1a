"""Ctrl-C: the first one ends a run after the current step, saved; the second ends it at
once, whatever it is doing. One line, no traceback.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from runs import ROOT

from jaxreason.runtime import preemption

# What `main` does with its signals, around something that never returns.
BUSY = """
import sys, time
from jaxreason.runtime import preemption

def spin():
    while True:
        pass

def in_c():  # as a program that compiles: without the interpreter's lock, and deaf to signals
    import ctypes
    while True:
        ctypes.CDLL(None).sleep(1000)

with preemption.watch(lambda: "interrupted; the same command continues from step 7") as stop:
    if sys.argv[2] == "after a step":
        assert stop() == ""
    print("to be flushed")
    print("busy", file=sys.stderr, flush=True)
    {"spins": spin, "sleeps": lambda: time.sleep(1000), "in C": in_c}[sys.argv[1]]()
"""
LINE = "interrupted; the same command continues from step 7\n"


def begin(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", BUSY, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("busy", ["spins", "sleeps", "in C"])
def test_a_second_ctrl_c_ends_whatever_never_returns(busy):
    process = begin(busy, "after a step")
    assert process.stderr.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first == "got Ctrl-C: saving after this step, then ending; once more ends at once\n"
    assert (out, err) == ("to be flushed\n", LINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_there_is_anything_to_save_the_first_one_ends_the_run(number, code):
    process = begin("spins", "before a step")
    assert process.stderr.readline() == "busy\n"
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("to be flushed\n", LINE)
    assert process.returncode == code


def test_one_ctrl_c_waits_no_longer_than_the_grace():
    body = BUSY.replace("with preemption.watch", "preemption.GRACE_S = 0.1\nwith preemption.watch")
    command = [sys.executable, "-c", body, "spins", "after a step"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines(keepends=True)[1:]) == (130, [LINE])


def test_signals_are_as_they_were_after_the_run():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    with preemption.watch() as stop:
        assert stop() == ""
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(fd) == fd


# `main`, but that the verifier of the first rollout never returns.
HANGS = """
import sys
from absl import app
from jaxreason import main, rollout

def never(*args, **kwargs):
    print("judging", flush=True)
    while True:
        pass

rollout.Collection.hear = never
app.run(main.main, argv=["main", "--config=configs/tiny.py:smoke", *sys.argv[1:]], flags_parser=main.parse_flags)
"""


def test_a_run_whose_verifier_never_returns_ends_at_a_ctrl_c(tmp_path):
    """The first one ends it, because this run has nothing to save yet."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, f"--workdir={tmp_path}"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any(line == "judging\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^interrupted; the same command continues from the start$", err, re.MULTILINE)
    assert "Traceback" not in err
    assert (tmp_path / "lock").read_text() == ""
