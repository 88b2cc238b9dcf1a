"""The supervisor of a sweep: `python -m jaxreason.lab.supervisor FOLDER LOCK`, where
LOCK is the number of an open file.

It starts the sweep of FOLDER/lab.json, stops it when its cost reaches its reservation
or when the file FOLDER/stop appears, and writes status and cost to
FOLDER/outcome.json at the end. It outlives the server. It inherits an open file that
the server has locked, and so does the sweep, so the lock is held as long as one of them
lives. If this process is killed, the sweep saves itself and ends (see `sweep.child`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxreason.lab import cost
from jaxreason.lab.audit import write_json
from jaxreason.runtime.workdir import json_object

POLL_S = 0.5
PATIENCE_S = 180.0  # that a sweep has to save its runs; it gives them 120 s


def start(plan: dict, folder: Path, lock: int) -> subprocess.Popen:
    """Start the sweep, by a list of words."""
    cores = ",".join(map(str, os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)))
    words = ["-m", "jaxreason.sweep.child", str(os.getpid()), cores, "-m", "jaxreason.sweep", *plan["words"]]
    with (folder / "sweep.log").open("ab") as log:
        keywords = {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
            "pass_fds": [lock],
        }
        return subprocess.Popen([sys.executable, *words], **keywords)


def reason_to_stop(plan: dict, folder: Path) -> str:
    """Return why the sweep is to end: "" if it may continue."""
    if (folder / "stop").exists():
        return "stopped"
    states = cost.read_states(folder)
    shared = {run["shared"] for run in plan["runs"]}
    for run in plan["runs"]:  # else each run would train these phases itself, which nobody reserved
        if run["folder"] in shared and states.get(run["name"], {}).get("status") == "failed":
            return f"stopped since {run['name']}, which the runs share, failed"
    used = cost.so_far(plan, states, time.time())
    over = [unit for unit, amount in plan["reserved"].items() if used[unit] > amount]
    return f"stopped at its reservation of {over[0]}" if over else ""


def supervise(folder: Path, lock: int) -> dict:
    """Run the sweep to its end; return the contents of outcome.json."""
    plan = json_object(folder / "lab.json")
    process, status, asked_s = start(plan, folder, lock), "", 0.0
    while process.poll() is None:
        time.sleep(POLL_S)
        if not status and (status := reason_to_stop(plan, folder)):
            asked_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
        if status and time.monotonic() - asked_s > PATIENCE_S:
            process.kill()
    ended = status or ("done" if process.returncode == 0 else "failed")
    return {"status": ended, "exit": process.returncode, "used": cost.at_end(plan, cost.read_states(folder))}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda number, frame: (where / "stop").touch())  # as when the machine is shut down
    write_json(where / "outcome.json", supervise(where, int(sys.argv[2])))
