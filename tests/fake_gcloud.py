"""A stand-in for `gcloud`, `ssh` and `scp`: slices are folders, a home folder per host,
and scripts run in them.

`$FAKE_CLOUD` is a folder. `calls.jsonl` in it gets each command; `plan.json` says what
goes wrong: {"create": "quota", "install": 1, "preempt": 2, "slow": 0.1, ...}.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ.get("FAKE_CLOUD", "/nonexistent"))
SHIM = """#!/bin/bash
# In the place of python: venv makes a shim like this one, pip does nothing, and the run
# writes a few lines.
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi
if [ "$1 $2" = "-m pip" ]; then
  if [ -f "$HOME/fail_pip" ]; then echo "no matching distribution" >&2; exit 1; fi
  exit 0
fi
for word in "$@"; do case "$word" in --workdir=*) folder="${word#--workdir=}";; esac; done
mkdir -p "$folder"
printf '%s\\n' "$@" > "$folder/command"
trap 'echo saved; exit 75' TERM
for step in 1 2 3; do echo "step $step"; sleep "${FAKE_STEP_S:-0.05}"; done
if [ -n "$FAKE_CUT_SHORT" ] && [ ! -f "$HOME/cut_short" ]; then touch "$HOME/cut_short"; exit 75; fi
echo done >> "$folder/summary.json"
exit "${FAKE_CODE:-0}"
"""


def read(name, default):
    path = CLOUD / name
    return json.loads(path.read_text()) if path.exists() else default


def fail(message, code=1):
    print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr)
    sys.exit(code)


def flag(words, name, default=None):
    return next((w.partition("=")[2] for w in words if w.startswith(f"--{name}=")), default)


def host(name, worker):
    home = CLOUD / "slices" / name / str(worker)
    (home / "bin").mkdir(parents=True, exist_ok=True)
    for python in ("python3", "python3.11", "python3.12", "python3.13"):
        (home / "bin" / python).write_text(SHIM)
        (home / "bin" / python).chmod(0o755)
    return home


def hosts(name):
    return sorted(path.name for path in (CLOUD / "slices" / name).iterdir() if path.is_dir())


def run_script(home, script):
    environment = {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"} | {
        k: v for k, v in os.environ.items() if k.startswith("FAKE")
    }
    done = subprocess.run(["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def tpu(verb, words, plan):
    name = next(w for w in words if not w.startswith("-")).partition(":")[0]
    folder = CLOUD / "slices" / name
    counts = read("counts.json", {})
    counts[verb] = counts.get(verb, 0) + 1
    (CLOUD / "counts.json").write_text(json.dumps(counts))
    if verb == "create":
        if plan.get("create"):
            fail(plan["create"])
        for worker in range(plan.get("hosts", 2)):
            host(name, worker)
        (folder / "state").write_text("READY")
    elif verb == "describe":
        if not folder.exists():
            fail(f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found")
        print(json.dumps({"name": name, "state": (folder / "state").read_text()}))
    elif verb == "delete":
        if not folder.exists():
            fail("NOT_FOUND: was not found")
        for pid in folder.glob("*/jaxreason-launch/*/pid"):
            subprocess.run(["kill", "-9", "--", f"-{pid.read_text().strip()}"], stderr=subprocess.DEVNULL)
        shutil.rmtree(folder)
    elif verb == "ssh":
        if not folder.exists() or (folder / "state").read_text() != "READY":
            fail("could not connect: the instance is not running", 255)
        script, worker = flag(words, "command"), flag(words, "worker")
        looks = counts["ssh"] if "wc -c" in script else 0
        times = plan.get("preempt", [])
        if looks and times and looks >= times[0]:
            (folder / "state").write_text("PREEMPTED")
            (CLOUD / "plan.json").write_text(json.dumps(plan | {"preempt": times[1:]}))
            fail("connection closed", 255)
        if plan.get("install") is not None and "pip install" in script:
            (folder / str(plan["install"]) / "fail_pip").touch()
        codes = [run_script(folder / w, script) for w in (hosts(name) if worker == "all" else [worker])]
        sys.exit(max(codes))
    elif verb == "scp":
        words = [w for w in words if not w.startswith("-")]
        source, goal = words
        if ":" in goal:
            for worker in hosts(goal.partition(":")[0]):
                shutil.copy(source, CLOUD / "slices" / goal.partition(":")[0] / worker / goal.partition(":")[2])
        else:
            found = CLOUD / "slices" / source.partition(":")[0] / "0" / source.partition(":")[2]
            if not found.is_dir():
                fail(f"{found.name}: no such file or directory")
            shutil.copytree(found, Path(goal) / found.name, dirs_exist_ok=True)


def queued(verb, words, plan):
    name = next(w for w in words if not w.startswith("-"))
    path = CLOUD / f"{name}.queued"
    if verb == "create":
        if plan.get("create"):
            fail(plan["create"])
        path.write_text(json.dumps(plan.get("queue", ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])))
    elif verb == "describe":
        if not path.exists():
            fail("NOT_FOUND: was not found")
        states = json.loads(path.read_text())
        if states[0] == "ACTIVE":
            tpu("create", [flag(words, "node-id", name)], plan | {"create": None})
        path.write_text(json.dumps(states[1:] or states))
        print(json.dumps({"state": {"state": states[0]}}))
    elif verb == "delete":
        path.unlink(missing_ok=True)
        if (CLOUD / "slices" / name).exists():
            tpu("delete", [name], plan)


def main(words):
    with (CLOUD / "calls.jsonl").open("a") as file:
        file.write(json.dumps(["gcloud", *words]) + "\n")
    plan = read("plan.json", {})
    time.sleep(plan.get("slow", 0))
    if plan.get("hang") and plan["hang"] in words:
        time.sleep(3600)
    if words[:2] == ["auth", "list"]:
        print("" if plan.get("logged_out") else "me@example.com")
    elif words[:2] == ["config", "get-value"]:
        print(plan.get("project", "my-project"))
    elif words[:4] == ["compute", "tpus", "locations", "list"]:
        print("us-west4-a\nus-east5-b")
    elif words[:3] == ["storage", "buckets", "describe"]:
        if plan.get("bucket"):
            fail(plan["bucket"])
    elif words[:2] == ["storage", "cp"]:
        (Path(words[-1]) / words[-2].rpartition("/")[2]).mkdir()
    elif words[:3] == ["compute", "tpus", "tpu-vm"]:
        tpu(words[3], words[4:], plan)
    elif words[:3] == ["compute", "tpus", "queued-resources"]:
        queued(words[3], words[4:], plan)
    else:
        fail(f"unknown command {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
