"""Runs as jobs of a cluster that this process follows, by submitit: `--engine=slurm
--follow` in the place of processes on this machine. `fleet` hands runs over instead.

A job runs the same command in the same folder, which its node must see. A worker here
is a job at a time. If the sweep itself dies its jobs go on; a sweep that is started
again waits for those that still hold the lock of their folder.
"""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxreason.sweep.queue import Worker
from jaxreason.sweep.runs import SweepRun

EXECUTORS = ("slurm", "local")


def parse_options(text: str) -> dict[str, Any]:
    """Read `timeout_min=600,gpus_per_node=1,slurm_partition=gpu` as keyword arguments
    of submitit's `update_parameters`.

    Raises:
      ValueError: a part that is no NAME=VALUE.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--engine_options has {part!r}; allowed: NAME=VALUE,NAME=VALUE, as submitit's update_parameters")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


class Jobs:
    """Submits runs; called as the queue's `launch`."""

    def __init__(self, executor: str, folder: Path, options: Mapping[str, Any]):
        import submitit

        self.executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=executor)
        self.executor.update_parameters(**{"timeout_min": 24 * 60, "name": folder.name} | dict(options))

    def __call__(self, run: SweepRun, worker: Worker, log: Path) -> Job:
        # A job inherits that Ctrl-C is ignored: a local one is in the process group of
        # the terminal, but the sweep stops its runs one by one.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            words = (run.command(), str(log.resolve()), os.getcwd(), dict(worker.environment))
            return Job(self.executor.submit(execute, *words))
        finally:
            signal.signal(signal.SIGINT, before)


def execute(words: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
    """In the job: run the command of a run, and return its exit code.

    A run saves itself at its first SIGTERM and ends at once at a second one. Slurm
    signals all processes of a job, so there SIGTERM is not passed on. SIGUSR2, by which
    submitit announces the end of a job's time, asks the run to save itself too.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    child = ["-m", "jaxreason.sweep.child", str(os.getpid()), ",".join(map(str, cores)), *words]
    is_local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    with open(log, "ab") as out:
        keywords = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT, "cwd": folder}
        keywords["start_new_session"] = is_local  # else in the process group that Slurm may signal
        process = subprocess.Popen([sys.executable, *child], env=os.environ | environment, **keywords)

        def save(number: int, frame) -> None:
            if is_local or number != signal.SIGTERM:
                process.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, save)
        return process.wait()


class Job:
    """A job with the methods of a process that the queue uses."""

    def __init__(self, job):
        self.job, self.returncode = job, None

    def poll(self) -> int | None:
        if self.returncode is None and self.job.done():
            try:
                self.returncode = int(self.job.result())
            except Exception:  # submitit's errors tell of a job that was cancelled, timed out or lost
                self.returncode = 1
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Ask the job to end. The run saves itself at the first time of asking."""
        if type(self.job).__name__ != "LocalJob":
            self.job.cancel(check=False)
            return
        # `cancel` of a local job kills its task after a second; SIGTERM is passed on.
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(int(self.job.job_id), signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        end_s = time.monotonic() + (600.0 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end_s:
                raise subprocess.TimeoutExpired("job", timeout or 600.0)
            time.sleep(0.5)
        return self.returncode
