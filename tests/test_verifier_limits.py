"""A verifier that misbehaves costs its attempt the reward, is named and counted, and
finally stops the run with one line.
"""

import itertools
import math
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
import tiny_completer as t
from runs import grouped

from jaxreason import environment, rollout, sources, train
from jaxreason.environment import (
    IN_A_ROW,
    Environment,
    Failures,
    Step,
    Threads,
    Turn,
    VerifierFailed,
    count_failures,
    single_turn,
)
from jaxreason.evaluation import Result
from jaxreason.runtime import resume
from jaxreason.runtime.energy import Meter
from jaxreason.runtime.journal import VERIFIER_WARNINGS, Journal
from jaxreason.runtime.resume import Progress
from jaxreason.types import Task, Verdict

TASK = Task("?", "5", id="five")
RIGHT = Verdict(1.0, True, "5", "right")


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raising(error):
    def verify(*_):
        raise error

    return verify


def endless(text, task):
    return endless(text, task)


def step(verify, **more) -> Step:
    made = single_turn(verify, **more)
    return made.step(made.reset(TASK), Turn("5", "eos", True))[1]


MISBEHAVES = {
    "None": (lambda *_: None, "TypeError: returned a NoneType"),
    "True": (lambda *_: True, "TypeError: returned a bool"),
    "a number": (lambda *_: 1.0, "TypeError: returned a float"),
    "a reward that is text": (lambda *_: Verdict("1", True), "TypeError: returned a Verdict whose reward is a str"),
    "a reward that is a bool": (lambda *_: Verdict(True, True), "TypeError: returned a Verdict whose reward is a bool"),
    "correct is a number": (lambda *_: Verdict(1.0, 1), "TypeError: returned a Verdict whose correct is a int"),
    "parsed is a number": (lambda *_: Verdict(1.0, True, 5), "TypeError: returned a Verdict whose parsed is a int"),
    "reason is None": (lambda *_: Verdict(1.0, True, None, None), "TypeError: returned a Verdict whose reason is a NoneType"),
    "nan": (lambda *_: Verdict(math.nan, True), "ValueError: returned a Verdict whose reward is nan"),
    "inf": (lambda *_: Verdict(math.inf, True), "ValueError: returned a Verdict whose reward is inf"),
    "too large for float32": (lambda *_: Verdict(1e300, True), "ValueError: returned a Verdict whose reward is 1e+300"),
    "sys.exit": (lambda *_: sys.exit(3), "SystemExit: 3"),
    "an error": (raising(KeyError("x\ny")), r"KeyError: 'x\ny'"),
    "an error without words": (raising(Speechless()), "Speechless: an error without words"),
    "recursion": (endless, "RecursionError: maximum recursion depth exceeded"),
    "memory": (raising(MemoryError()), "MemoryError"),
}


@pytest.mark.parametrize("name", MISBEHAVES)
def test_misbehaviour_is_an_error_of_the_verifier(name):
    verify, says = MISBEHAVES[name]
    found = step(verify, name="mine:reward")
    assert (found.verdict.reward, found.verdict.correct, found.verdict.parsed) == (0.0, False, None)
    assert found.verdict.reason.startswith(f"verifier error of 'mine:reward': {says}")
    assert "\n" not in found.verdict.reason
    assert found.failure
    assert count_failures([found.verdict, RIGHT]) == {"verifier_errors": 1, "verifier_timeouts": 0, "bad_keys": 0}


def test_a_verdict_of_numpy_values_is_one_of_python():
    found = step(lambda *_: Verdict(np.float32(0.5), np.bool_(True), "5", "half"))
    assert found == Step(verdict=Verdict(0.5, True, "5", "half"))
    assert (type(found.verdict.reward), type(found.verdict.correct)) == (float, bool)
    assert step(lambda *_: Verdict(1, True)).verdict.reward == 1.0


def test_a_keyboard_interrupt_passes():
    with pytest.raises(KeyboardInterrupt):
        step(raising(KeyboardInterrupt()))


def test_every_reason_is_counted():
    reasons = ["right", "timeout", "verifier timeout: x", "crashed", "out of memory", "verifier error: x", "bad key", "wrong", ""]
    counts = count_failures(Verdict(0.0, False, None, reason) for reason in reasons)
    assert counts == {"verifier_errors": 3, "verifier_timeouts": 2, "bad_keys": 1}


def test_ten_failures_in_a_row_stop_the_run():
    failures = Failures("mine:reward")
    for i in range(IN_A_ROW - 1):
        failures.hear(step(raising(KeyError(i))))
    failures.hear(step(lambda *_: RIGHT))
    for i in range(100, 100 + IN_A_ROW - 1):
        failures.hear(step(raising(KeyError(i))))
    with pytest.raises(VerifierFailed, match="verifier 'mine:reward' failed 10 times in a row") as error:
        failures.hear(step(raising(KeyError("last"))))
    assert "KeyError: 100" in error.value.traceback  # of the first in the row
    assert "in verify" in error.value.traceback


@pytest.fixture(scope="module")
def made():
    model, params = t.make_model()
    return t.make_completer(model), t.biased(params, _=0.8)


def test_a_broken_verifier_stops_the_collection(made):
    with pytest.raises(VerifierFailed, match="10 times in a row"):
        t.roll(*made, t.make_requests(9, 3), single_turn(lambda *_: None))


def test_timeouts_of_the_verifiers_children_never_stop_the_run(made):
    """A child that crashes or times out is no sign of a broken verifier."""
    rollouts = t.roll(*made, t.make_requests(9, 3), single_turn(lambda *_: Verdict(0.0, False, None, "timeout")))
    assert sources.measure(grouped(rollouts, 3))["rollout/verifier_timeouts"] == (27.0, 27.0)


@pytest.fixture
def hung(monkeypatch):
    """Make a verifier that hangs at problem 3, while a simulated clock advances for it
    alone.
    """
    released, others = threading.Event(), itertools.count()
    waits = 24  # verdicts of other problems

    def verify(text, task):
        if task.id == "3":
            released.wait(120)
        else:
            next(others)
        return t.verify(text, task)

    passed = itertools.count()

    def clock():
        return float(next(passed)) if int(repr(others)[6:-1]) >= waits else 0.0

    monkeypatch.setattr(rollout, "time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(rollout, "TICK_S", 0.01)  # of real waiting, and of the time that counts
    yield verify
    released.set()


def test_the_time_of_each_verdict_is_measured(made):
    """A step that observes is none."""

    def step(state, turn):
        return state + 1, Step(verdict=RIGHT) if state or turn.final else Step(observation="a")

    _, spent = rollout.collect(
        made[0],
        made[0].sampler.prepare(made[1]),
        t.make_requests(3, 2),
        Environment(lambda task: 0, step),
        key=jax.random.key(0),
        temperature=1.0,
    )
    assert len(spent.verdict_s) == 6
    assert min(spent.verdict_s) >= 0
    assert sources.latency([0.001] * 99 + [1.0]) == {"time/verify_p50_ms": 1.0, "time/verify_p99_ms": pytest.approx(10.99)}
    assert sources.latency([]) == {}


def test_a_verifier_that_hangs_is_given_up_and_the_run_goes_on(made, hung):
    requests = t.make_requests(9, 3)
    rollouts = t.roll(*made, requests, single_turn(hung, deadline_s=0.05, name="mine:reward"))
    for r in rollouts:
        if r.problem == 3:
            late = Verdict(0.0, False, None, "verifier timeout of 'mine:reward': no verdict in 0.05 s")
            assert r.verdict == late
        else:
            assert r.verdict == t.verify(r.text, r.task)
    assert sources.measure(grouped(rollouts, 3))["rollout/verifier_timeouts"] == (3.0, 27.0)


def test_more_hang_than_there_are_threads(made, monkeypatch):
    """Each abandoned thread is replaced; otherwise the ninth verdict would wait
    forever.
    """
    monkeypatch.setattr(rollout, "TICK_S", 0.01)
    monkeypatch.setattr(environment.interface, "IN_A_ROW", 100)
    monkeypatch.setattr(environment.interface, "STUCK", 20)
    released = threading.Event()
    judge = single_turn(lambda text, task: released.wait(120) and RIGHT, deadline_s=0.02)
    try:
        with pytest.raises(VerifierFailed, match="20 calls of the verifier run without end") as error:
            t.roll(*made, t.make_requests(9, 3), judge)
    finally:
        released.set()
    assert "released.wait" in error.value.traceback  # where it hangs


def test_an_environment_of_several_turns_has_a_deadline_too(made, monkeypatch):
    monkeypatch.setattr(rollout, "TICK_S", 0.01)
    released = threading.Event()

    def hang(state, turn):
        released.wait(120)
        return state, Step(verdict=RIGHT)

    try:
        (r,) = t.roll(*made, t.make_requests(1, 1), Environment(lambda task: task, hang, deadline_s=0.02))
    finally:
        released.set()
    assert r.verdict.reason == "verifier timeout: no verdict in 0.02 s"


def test_threads_replace_what_is_given_up_and_take_its_late_answer_for_nothing():
    threads, released = Threads(1), threading.Event()
    stuck = threads.submit(released.wait, 120)
    while not stuck.running():
        pass
    thread = threads.give_up(stuck)
    assert threads.submit(lambda: 7).result(60) == 7
    released.set()
    thread.join(60)
    assert not thread.is_alive()
    assert not stuck.done()
    done = threads.submit(lambda: 8)
    assert done.result(60) == 8
    assert threads.give_up(done) is None
    threads.close()


def test_closed_threads_begin_no_call_that_waits():
    threads, released, called = Threads(1), threading.Event(), []
    running = threads.submit(released.wait, 120)
    while not running.running():
        pass
    (thread,) = threads.workers.values()
    threads.submit(called.append, 1)
    threads.close()
    released.set()
    thread.join(60)
    assert not thread.is_alive()
    assert called == []


def test_the_program_ends_while_a_verifier_hangs():
    code = """
import threading
from jaxreason.environment import Threads
stuck = Threads(1).submit(threading.Event().wait)
while not stuck.running():
    pass
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_deadline_must_be_above_zero():
    for deadline_s in (0, -1, math.nan):
        with pytest.raises(ValueError, match=r"verifier.deadline_s got .*; allowed: seconds above 0"):
            single_turn(lambda *_: RIGHT, deadline_s=deadline_s)


# --- runs ---


def attempts(*reasons):
    task = Task("?", "5", id="five")
    verdicts = [Verdict(0.0, False, None, reason) for reason in reasons]
    return [types.SimpleNamespace(task=task, verdict=verdict) for verdict in verdicts]


def test_an_evaluation_says_and_counts_what_failed(tmp_path):
    said, written = [], []
    log = types.SimpleNamespace(
        say=said.append,
        doing=lambda what: None,
        write=lambda step, phase, values: written.append(values),
        write_more=lambda step, **_: None,
    )
    drawn = attempts("wrong", "verifier error of 'mine': KeyError: 'x'", "verifier timeout: no verdict in 60 s", "bad key")
    result = Result([], drawn, {}, {"tokens": 0.0, "flops": 0.0})
    run = types.SimpleNamespace(
        evaluate=lambda *_, **__: result, sample_devices=1, watts=None, description={}, decoding=None, profile_steps=None
    )

    def new_journal():
        checkpoints = types.SimpleNamespace(latest=lambda: None)
        return Journal(run, tmp_path, checkpoints, log, Progress(), lambda: None, Meter(None))

    written_down = new_journal()
    written_down.evaluate_at(None, "rl", 7, final=False)
    assert said == [
        "warning: evaluation at step 7: 2 of 4 attempts earn 0 because their verifier failed; the first at task 'five': "
        "verifier error of 'mine': KeyError: 'x'"
    ]
    for name in ("verifier_errors", "verifier_timeouts", "bad_keys"):
        assert written[0][f"eval/{name}"] == 0.25
    for _ in range(9):
        written_down.warn_of_verifier(drawn, "step 8")
    new_journal().warn_of_verifier(attempts("wrong", "bad key"), "step 8")
    assert len(said) == VERIFIER_WARNINGS
    assert said[-1].endswith("; from now on such failures are only counted")


def test_a_run_with_a_broken_verifier_ends_in_one_line_and_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        resume, "find_newest", raising(VerifierFailed("verifier 'mine' failed 10 times in a row", "the first: \ud800"))
    )
    checkpoints = types.SimpleNamespace(wait=lambda: None, latest=lambda: 20, steps=list)
    with pytest.raises(VerifierFailed) as error:
        train.train(types.SimpleNamespace(phases=()), tmp_path, checkpoints)
    file = tmp_path / "verifier_error.txt"
    assert str(error.value) == (
        f"verifier 'mine' failed 10 times in a row; the traceback of the first failure is in {file}; "
        "the same command continues from step 20"
    )
    assert file.read_text() == "the first: \\ud800"
