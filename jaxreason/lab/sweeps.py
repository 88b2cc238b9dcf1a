"""Start, watch, stop and read sweeps: `python -m jaxreason.sweep` in processes of their
own, in the folder of the lab.

    FOLDER/audit.jsonl          see `audit`
    FOLDER/sweeps/ID/           a sweep, as `jaxreason.sweep` makes it, and beside it
      lab.json                  its words, runs, bounds and reservation
      sweep.log                 its output
      stop                      asks its supervisor to stop it
      outcome.json              its status at the end, and its cost
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxreason.lab import budget, cost, gate, rollouts
from jaxreason.lab.audit import Audit, write_json
from jaxreason.runtime.workdir import json_object

SLOW_S = 600.0  # that a command which only reads may take


class Lab:
    """A folder with the sweeps of a budget. One process has it: see `__main__`."""

    def __init__(self, root: Path, folder: Path, amounts: Mapping[str, float]):
        self.root, self.folder, self.amounts = root, folder, dict(amounts)
        (folder / "sweeps").mkdir(parents=True, exist_ok=True)
        self.audit = Audit(folder / "audit.jsonl")
        self.audit.write("started", budget=self.amounts)
        self.settle()

    # --- the budget ---

    def settle(self) -> None:
        """Book the costs of sweeps that ended since the last call. A sweep whose
        supervisor was killed costs its whole reservation.
        """
        for sweep, one in budget.reservations(self.audit.lines).items():
            if one["used"] is not None or self.runs_now(sweep):
                continue
            outcome = json_object(self.path(sweep) / "outcome.json") or {}
            used = outcome.get("used")
            if not isinstance(used, dict) or not all(cost.is_amount(used.get(unit)) for unit in budget.UNITS):
                outcome, used = {"status": "lost"}, {unit: one["reserved"].get(unit, 0.0) for unit in budget.UNITS}
            self.audit.write("ended", client=one["client"], sweep=sweep, status=str(outcome.get("status")), used=used)

    def budget(self) -> dict[str, dict[str, float]]:
        """Return budget, spent, reserved and remaining by unit."""
        return budget.state(self.amounts, self.audit.lines)

    def path(self, sweep: str) -> Path:
        return self.folder / "sweeps" / sweep

    def runs_now(self, sweep: str) -> bool:
        """Tell whether the supervisor of a sweep lives: it holds a lock."""
        try:
            with (self.folder / "sweeps" / f"{sweep}.lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # removed, with its folder
            return False
        return False

    def known(self, sweep: str) -> dict:
        """Return the reservation of a sweep of this lab.

        Raises:
          ValueError: there is no such sweep.
        """
        found = budget.reservations(self.audit.lines)
        if sweep not in found:
            raise ValueError(gate.unknown_name_message("sweep", sweep[:100], found))
        return found[sweep]

    # --- start and stop ---

    def dry_run(self, **asked: Any) -> tuple[gate.Request, dict]:
        """Check a request, and return it with the runs that it would make."""
        request = gate.request(self.root, **asked)
        sweep = f"{len(budget.reservations(self.audit.lines)) + 1:04d}-{re.sub(r'[^A-Za-z0-9_]', '_', request.name)[:40]}"
        words = [*request.words, f"--folder={self.path(sweep)}", "--nofigures"]
        printed = self.command("jaxreason.sweep", *words, "--dry_run", "--json")
        plan = json.loads(printed.splitlines()[-1])
        gate.check_runs(len(plan["runs"]))
        return request, plan | {"sweep": sweep, "words": words}

    def command(self, module: str, *words: str) -> str:
        """Run a module of this package; return its output.

        Raises:
          ValueError: it failed; the message is its last line.
        """
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SLOW_S,
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or f"{module} failed").splitlines()
            raise ValueError(
                next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1]).removeprefix("error: ")
            )
        return done.stdout

    def start(self, most: Mapping[str, float | None], note: str, **asked: Any) -> dict[str, Any]:
        """Reserve the cost of a sweep and start it.

        Raises:
          ValueError: it is not allowed, costs more than is left, or another one runs.
        """
        self.settle()
        if running := [name for name, one in budget.reservations(self.audit.lines).items() if one["used"] is None]:
            raise ValueError(f"sweep {running[0]} runs and has the devices; wait for its end, or stop it")
        request, plan = self.dry_run(**asked)
        flops = plan["flops_at_most"]
        if flops is not None and not flops > 0:
            raise ValueError("the sweep has neither steps nor evaluations, so there is nothing to run")
        keywords = {"flops": flops, "asked": most, "joules_known": request.watts is not None or counts_joules()}
        reserved = budget.to_reserve(self.amounts, self.audit.lines, **keywords)
        folder = self.path(plan["sweep"])
        if folder.exists():
            raise ValueError(f"{folder} exists and is no sweep of audit.jsonl; move it away")
        self.audit.write("reserve", sweep=plan["sweep"], reserved=reserved, words=request.words, note=note)
        folder.mkdir()
        devices = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
        plan |= {"reserved": reserved, "devices_per_run": int(devices[1]) if devices else 1}
        write_json(folder / "lab.json", plan)
        self.supervise(plan["sweep"], folder)
        return {"sweep": plan["sweep"], "runs": len(plan["runs"]), "reserved": reserved, "budget": self.budget()}

    def supervise(self, sweep: str, folder: Path) -> None:
        """Start the supervisor of a sweep, which inherits its lock from here."""
        with (self.folder / "sweeps" / f"{sweep}.lock").open("wb") as lock, (folder / "sweep.log").open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            subprocess.Popen(
                [sys.executable, "-m", "jaxreason.lab.supervisor", str(folder), str(lock.fileno())],
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # it outlives the server, and signals to the server's group
            )

    def stop(self, sweep: str) -> dict[str, Any]:
        """Ask the supervisor of a sweep to stop it. The runs save themselves first."""
        self.settle()
        one = self.known(sweep)
        if one["used"] is None:
            (self.path(sweep) / "stop").touch()
        return {"sweep": sweep, "status": "stopping" if one["used"] is None else one["status"]}

    # --- read ---

    def plan(self, sweep: str) -> dict:
        """Return lab.json of a sweep.

        Raises:
          ValueError: there is none: it did not begin, or its folder was removed or
            damaged; or a file of the sweep is a link out of the lab.
        """
        self.known(sweep)
        self.check_own(self.path(sweep))
        found = json_object(self.path(sweep) / "lab.json")
        if found is None:
            raise ValueError(f"the folder of sweep {sweep} is gone or did not begin; its cost stays booked")
        runs = found.get("runs")
        if not isinstance(runs, list) or not all(is_run(run) for run in runs):
            raise ValueError(f"lab.json of sweep {sweep} is damaged; its cost stays booked")
        for run in runs:
            self.check_own(Path(run["folder"]))
        return found

    def check_own(self, folder: Path) -> None:
        """Raise ValueError if a folder, or an entry of it, is elsewhere by a link."""
        home = (self.folder / "sweeps").resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in (folder, *(entry for entry in folder.iterdir() if entry.is_symlink())):
                if not path.resolve().is_relative_to(home):
                    raise ValueError(f"{path} is a link out of the lab, which is not read; remove the link")

    def run_folder(self, sweep: str, run: str) -> Path:
        """Return the folder of a run of a sweep, by its name.

        Raises:
          ValueError: the sweep has no such run.
        """
        runs = {one["name"]: Path(one["folder"]) for one in self.plan(sweep)["runs"]}
        if run not in runs:
            raise ValueError(gate.unknown_name_message(f"run of {sweep}", run[:200], runs))
        return runs[run]

    def status(self, sweep: str) -> dict[str, Any]:
        """Return the status of a sweep and of its runs, and the cost so far."""
        self.settle()
        one, plan = self.known(sweep), self.plan(sweep)
        states = cost.read_states(self.path(sweep))
        runs = []
        for run in plan["runs"]:
            state, seen = states.get(run["name"], {}), cost.last_metrics(Path(run["folder"]), cost.TAIL_BYTES)
            said = {
                "run": run["name"],
                "status": state.get("status", "waiting"),
                "step": seen.get("step", 0),
                "steps": run["steps"],
            }
            said |= {"reason": state["reason"]} if state.get("reason") else {}
            said |= {name: seen[name] for name in ("phase", "rollout/reward", "train/loss") if seen.get(name) is not None}
            runs.append(said | {name: value for name, value in seen.items() if re.fullmatch(r"eval/[^/]+/[^/]+/accuracy", name)})
        used = cost.so_far(plan, states, time.time()) if one["used"] is None else one["used"]
        found = {"sweep": sweep, "status": one["status"], "reserved": one["reserved"], "used": used, "runs": runs}
        if one["status"] == "failed":
            with contextlib.suppress(OSError):
                found["last_lines"] = (self.path(sweep) / "sweep.log").read_text(errors="replace").splitlines()[-5:]
        return found

    def listed(self) -> list[dict[str, Any]]:
        """Return all sweeps of this lab, the newest last."""
        self.settle()
        found = budget.reservations(self.audit.lines)
        names = ("status", "reserved", "used", "client", "note", "time")
        return [{"sweep": sweep, **{name: one.get(name) for name in names}} for sweep, one in found.items()]

    def report(self, sweep: str) -> dict[str, Any]:
        """Return the report of a sweep, written again if the sweep did not."""
        self.settle()
        one, folder = self.known(sweep), self.path(sweep)
        self.plan(sweep)
        if one["used"] is None:
            raise ValueError(f"sweep {sweep} runs; its report is written at its end, see status")
        if not (folder / "report.json").is_file():
            try:
                self.command("jaxreason.sweep", f"--report={folder}", "--nofigures")
            except ValueError:  # it also fails after writing the report, if a run failed
                if not (folder / "report.json").is_file():
                    raise
        found = json_object(folder / "report.json") or {}
        names = ("metric", "baseline", "arms", "comparisons", "effects", "noise_floor", "pareto", "missing", "problems", "code")
        text = (folder / "report.md").read_text(encoding="utf-8", errors="replace") if (folder / "report.md").is_file() else ""
        return {"sweep": sweep, "status": one["status"], "used": one["used"], "text": text} | {n: found.get(n) for n in names}

    def compare(self, a: tuple[str, str], b: tuple[str, str]) -> dict[str, Any]:
        """Compare the last evaluations of two runs, given as (sweep, run)."""
        folders = [self.run_folder(*one) for one in (a, b)]
        printed = self.command("jaxreason.evaluate", "--compare", *map(str, folders))
        return {"a": "/".join(a), "b": "/".join(b), "text": printed}

    def rollouts(self, sweep: str, run: str, **asked: Any) -> dict[str, Any]:
        return {"sweep": sweep, "run": run} | rollouts.page(self.run_folder(sweep, run), **asked)


def is_run(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(name), str) for name in ("name", "folder"))


def counts_joules() -> bool:
    """Tell whether a counter of this machine can be read, without starting jax."""
    from jaxreason.runtime import energy

    try:
        gpus = list(Path("/proc/driver/nvidia/gpus").glob("*")) or list(Path("/dev").glob("nvidia[0-9]*"))
        domains = energy.gpu_domains([0]) if gpus else energy.package_domains(energy.POWERCAP)
        for domain in domains:
            domain.read_j()
    except energy.NoCounter:
        return False
    return True
