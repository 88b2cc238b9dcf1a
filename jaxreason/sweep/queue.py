"""Workers that execute the runs of a sweep, each run a process with a log of its own,
and the state of every run in a file.

A worker is a part of this machine: some of its cores, or accelerators that its
processes alone see. Each takes the first run that is waiting and whose shared phases
are trained. A run that fails is recorded with the last lines of its log, and the others
continue. Runs are stopped by a signal and save themselves; the same command continues
all of them.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.runtime.files import replacing
from jaxreason.runtime.workdir import json_object
from jaxreason.sweep.runs import SweepRun, begin_with_shared

POLL_S = 0.5
PATIENCE_S = 120.0  # that a run has to save itself when the sweep is stopped
IN_USE = "is in use by"  # says a run whose folder is locked: by one that a sweep before has left behind, and that is saving
LOCKED_RETRIES = 20
LAST_LINES = 5  # of a log, kept with a failure


class Worker(NamedTuple):
    """A part of the machine."""

    name: str
    cores: frozenset[int]
    environment: Mapping[str, str]


def make_workers(count: int | None, per_run: int = 1) -> list[Worker]:
    """Divide this machine's accelerators, or its cores where it has none, among
    workers; None makes as many as there are parts of `per_run` devices.

    Nothing here starts JAX, which would take the accelerators for itself.

    Raises:
      ValueError: more workers than there are parts.
    """
    kind, devices = find_devices()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    most = len(devices) // per_run
    count = max(1, most) if count is None else count
    if not 1 <= count <= most:
        raise ValueError(
            f"--workers={count} with {per_run} per run; allowed: 1 to {most}, since this machine has {len(devices)} {kind}s"
        )
    made = []
    for i in range(count):
        part = devices[i * len(devices) // count :][:per_run]
        if kind == "core":
            each = len(devices) // count  # equal: the last digits of XLA's sums depend on the number of cores
            part = devices[i * each : (i + 1) * each]
            made.append(Worker(f"cores {_span(part)}", frozenset(part), {"JAX_PLATFORMS": "cpu"}))
        else:
            own = cores[i * len(cores) // count : (i + 1) * len(cores) // count] or cores
            made.append(Worker(f"{kind} {','.join(map(str, part))}", frozenset(own), _visible(kind, part)))
    return made


def find_devices() -> tuple[str, list]:
    """The kind and the names of the devices that runs may use: gpu, tpu or core."""
    platforms = {name.strip() for name in os.environ.get("JAX_PLATFORMS", "").split(",")} - {""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(len(_nvidia()))] if visible is None else _named(visible)
    tpus = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if gpus and (not platforms or platforms & {"cuda", "gpu"}):
        return "gpu", gpus
    if tpus and (not platforms or "tpu" in platforms):
        return "tpu", list(range(len(tpus)))
    return "core", sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _nvidia() -> list[str]:
    return glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*")  # a container may lack the first


def _named(visible: str) -> list[str]:
    """The devices of CUDA_VISIBLE_DEVICES: numbers, or names that begin with GPU- or
    MIG-. As CUDA does, stop at the first word that is neither.
    """
    words = [word.strip() for word in visible.split(",")]
    return list(dict.fromkeys(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, words)))


def _visible(kind: str, part: Sequence) -> dict[str, str]:
    """The environment of a process that sees these accelerators alone."""
    numbers = ",".join(map(str, part))
    if kind == "gpu":
        return {"CUDA_VISIBLE_DEVICES": numbers}
    return {
        "TPU_VISIBLE_CHIPS": numbers,
        "TPU_CHIPS_PER_PROCESS_BOUNDS": f"1,{len(part)},1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


# --- the state of runs ---


class State:
    """The state of each run, in `state.json`: its status (waiting, running, done,
    failed, stopped), attempts, times, exit code and the last lines of a failure.
    """

    def __init__(self, path: Path):
        self.path = path
        self.runs = read_states(path)

    def of(self, run: SweepRun) -> dict:
        return self.runs.setdefault(run.name, {"status": "waiting", "attempts": 0})

    def set(self, run: SweepRun, **fields) -> None:
        self.of(run).update(fields)
        try:
            with replacing(self.path) as file:
                file.write(json.dumps({"runs": self.runs}, indent=2, sort_keys=True))
        except OSError as error:  # of a full disk it has no file's name
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def read_states(path: Path) -> dict[str, dict]:
    """Read the state of each run: run -> state. A file or a state that is damaged
    counts as absent, since the folders of the runs say what is done.
    """
    runs = (json_object(path) or {}).get("runs")
    if not isinstance(runs, dict):
        return {}
    kinds = {"status": str, "attempts": int}
    return {
        name: state
        for name, state in runs.items()
        if isinstance(state, dict)
        and all(isinstance(state.get(field), kind) for field, kind in kinds.items())
        and not isinstance(state["attempts"], bool)
        and 0 <= state["attempts"] < 2**31
    }


class Running(NamedTuple):
    run: SweepRun
    worker: Worker
    process: Any  # a subprocess.Popen, or what has its methods
    log: Path
    begin: int  # bytes of the log before this process
    begun_s: float  # monotonic time


def execute(
    runs: Sequence[SweepRun],
    workers: Sequence[Worker],
    state: State,
    folder: Path,
    *,
    retries: int = 0,
    provenance: Callable[[], Mapping[str, str]] = dict,
    show: Callable[[Sequence[Running]], None] = lambda running: None,
    say: Callable[[str], None] = print,
    stopped: Callable[[], bool] = lambda: False,
    prune: Callable[[SweepRun], str] = lambda run: "",
    more: Callable[[], Sequence[SweepRun]] = tuple,
    finished: Callable[[SweepRun, str], None] = lambda run, status: None,
    launch: Callable[[SweepRun, Worker, Path], Any] | None = None,
) -> None:
    """Execute all runs that are not done. `stopped` is called all the time; when it
    returns true, the runs that are under way are saved and stopped.

    `provenance` is asked for the version of the code whenever a run starts: a process
    reads the sources as they are by then, and they may be edited while a sweep runs.
    `prune(run)` may return a reason to stop a run for good. A worker without work asks
    `more` for further runs; `finished` gets each run that ended, and its status. Runs
    that failed in an earlier call are tried again.
    """
    waiting = add_runs(runs, state, finished)
    running: list[Running] = []
    try:
        while not stopped():
            for worker in workers:
                if any(other.worker is worker for other in running):
                    continue
                while not waiting and (found := more()):  # runs that are done already lead to others
                    waiting += add_runs(found, state, finished)
                if run := next_ready(waiting, running):
                    waiting.remove(run)
                    running += start(run, worker, state, folder, provenance, launch or start_process, say)
            if not running and not waiting:
                break
            show(running)
            time.sleep(POLL_S)
            for one in list(running):
                if (reason := prune(one.run)) and state.of(one.run)["status"] == "running":
                    state.set(one.run, status="pruned", reason=reason)
                    one.process.send_signal(signal.SIGTERM)
                if one.process.poll() is not None:
                    running.remove(one)
                    if (status := ended(one, state, retries, say)) == "waiting":
                        waiting.insert(0, one.run)
                    else:
                        finished(one.run, status)
    finally:
        stop(running, state, say)


def add_runs(runs: Sequence[SweepRun], state: State, finished: Callable[[SweepRun, str], None]) -> list[SweepRun]:
    """Record the status of runs; return those that are to be executed."""
    waiting = []
    for run in runs:
        if run.is_done():
            state.set(run, status="done")
        elif state.of(run)["status"] != "pruned":
            state.set(run, status="waiting", attempts=0)
            waiting.append(run)
        if run not in waiting:
            finished(run, state.of(run)["status"])
    return waiting


def next_ready(waiting: Sequence[SweepRun], running: Sequence[Running]) -> SweepRun | None:
    """The first run whose shared phases nobody is about to train.

    If the run that trains them has failed, perhaps by what only its own arm does later,
    the runs that share them begin by themselves.
    """
    unfinished = {run.folder for run in waiting if run.stop_after} | {one.run.folder for one in running}
    return next((run for run in waiting if run.shared not in unfinished), None)


def start(
    run: SweepRun,
    worker: Worker,
    state: State,
    folder: Path,
    provenance: Callable[[], Mapping[str, str]],
    launch: Callable[[SweepRun, Worker, Path], Any],
    say: Callable[[str], None],
) -> list[Running]:
    """Start a run; nothing runs if its folder can't be made, which is recorded."""
    log = folder / "logs" / f"{run.name.replace('/', ',')}.log"
    attempts = state.of(run)["attempts"] + 1
    try:
        state.set(run, status="running", attempts=attempts, started=_now(), worker=worker.name, **provenance())
        begin_with_shared(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = log.stat().st_size if log.exists() else 0
        started = Running(run, worker, launch(run, worker, log), log, begin, time.monotonic())
    except OSError as error:
        state.set(run, status="failed", reason=f"could not begin: {error}")
        say(f"{run.name}: failed: could not begin: {error}")
        return []
    return [started]


def start_process(run: SweepRun, worker: Worker, log: Path) -> subprocess.Popen:
    """Start the process of a run on a part of this machine."""
    cores = ",".join(map(str, worker.cores))
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "jaxreason.sweep.child", str(os.getpid()), cores, *run.command()],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | worker.environment,
            start_new_session=True,  # Ctrl-C is for the sweep, which stops its runs one by one
        )


def ended(one: Running, state: State, retries: int, say: Callable[[str], None]) -> str:
    """Record how a process ended; return the status of its run."""
    code = one.process.returncode
    lines = last_lines(one.log, one.begin)
    if state.of(one.run)["status"] == "pruned":
        state.set(one.run, ended=_now(), exit=code)
        say(f"{one.run.name}: stopped early: {state.of(one.run)['reason']}")
    elif one.run.is_done():
        state.set(one.run, status="done", ended=_now(), exit=code, seconds=round(time.monotonic() - one.begun_s, 1))
    else:
        reason = how_it_ended(code, lines)
        again = state.of(one.run)["attempts"] <= (LOCKED_RETRIES if IN_USE in reason else retries)
        state.set(one.run, status="waiting" if again else "failed", ended=_now(), exit=code, reason=reason, last_lines=lines)
        say(f"{one.run.name}: {'will be tried again' if again else 'failed'}: {reason} (log: {one.log})")
    return state.of(one.run)["status"]


def how_it_ended(code: int, lines: Sequence[str]) -> str:
    """Say in a line how a process failed."""
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        return f"killed by {name}" + (", perhaps for the memory it took" if -code == signal.SIGKILL else "")
    kinds = ("error: ", "warning: ") if code == 0 else ("error: ",)  # such a run says why its last checkpoint is missing
    errors = (line for kind in kinds for line in reversed(lines) if line.startswith(kind))
    return f"exit {code}: {next(errors, lines[-1] if lines else 'no output').removeprefix('error: ')}"


def last_lines(log: Path, begin: int) -> list[str]:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 10_000))
        text = file.read().decode("utf-8", "backslashreplace")
        return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-LAST_LINES:]
    return []


def stop(running: Sequence[Running], state: State, say: Callable[[str], None]) -> None:
    """Ask processes to save and end; kill those that do not."""
    if not running:
        return
    say(f"stopping {len(running)} runs; they save themselves (again Ctrl-C: kill them)")
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGTERM)
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        for one in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.1, deadline_s - time.monotonic()))
    except KeyboardInterrupt:
        pass
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        status = "done" if one.run.is_done() else "stopped"
        status = "pruned" if state.of(one.run)["status"] == "pruned" else status
        with contextlib.suppress(OSError):  # a full disk must not hide the cause
            state.set(one.run, status=status, ended=_now(), exit=one.process.returncode)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only set what the yielded function returns;
    a second SIGINT raises KeyboardInterrupt.
    """
    got: list[int] = []

    def note(number, frame) -> None:
        if got and number == signal.SIGINT:
            raise KeyboardInterrupt
        got.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(got)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
