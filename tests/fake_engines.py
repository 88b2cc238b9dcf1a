"""A stand-in for `sky`, `xpk`, `sbatch`, `squeue` and `gcloud storage rsync`: jobs are
entries of a file.

`$FAKE_FLEET` is a folder. `calls.jsonl` in it gets each command, `jobs.json` has the
state of each job by name, and `bucket` is the bucket. `plan.json` says what goes wrong:
{"submit": "quota", "after": 1, "hang": true, "taken": "error after that", "listing": "no network", "rsync": "..."}.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

FLEET = Path(os.environ.get("FAKE_FLEET", "/nonexistent"))


def read(name, default):
    return json.loads((FLEET / name).read_text()) if (FLEET / name).exists() else default


def fail(message):
    if sys.argv[1] == "xpk":
        print(f"[XPK] Error: {message}\n[XPK] XPK failed, error code 1")
    else:
        print(f"Traceback\nError: {message}", file=sys.stderr)
    sys.exit(1)


def submit(name, plan):
    jobs = read("jobs.json", {})
    if plan.get("submit") and len(jobs) >= plan.get("after", 0):
        fail(plan["submit"])
    assert jobs.get(name, "ended") == "ended", f"{name} is submitted twice"
    jobs[name] = "waits"
    (FLEET / "jobs.json").write_text(json.dumps(jobs))
    if plan.get("taken"):
        fail(plan["taken"])
    if plan.get("hang"):
        time.sleep(3600)


def listing(shown, head, plan):
    if plan.get("listing"):
        fail(plan["listing"])
    print(head + "\n".join(shown(name, state) for name, state in read("jobs.json", {}).items() if state != "ended"))


def main(program, words):
    with (FLEET / "calls.jsonl").open("a") as file:
        file.write(json.dumps([program, *words]) + "\n")
    plan = read("plan.json", {})
    text = Path(words[-1]).read_text() if words[-1].endswith((".yaml", ".sbatch")) else ""
    if words[:2] == ["workload", "create"]:
        submit(next(word.partition("=")[2] for word in words if word.startswith("--workload=")), plan)
    elif words[:2] == ["jobs", "launch"]:
        submit(re.search(r"^name: (.*)$", text, re.MULTILINE)[1], plan)
    elif program == "sbatch":
        submit(re.search(r"--job-name=(.*)$", text, re.MULTILINE)[1], plan)
    elif program == "squeue":
        listing(lambda name, state: f"{name}|{'PENDING' if state == 'waits' else 'RUNNING'}", "", plan)
    elif words[:2] == ["workload", "list"]:
        kinds = {"waits": "QuotaReserved", "runs": "Admitted"}
        row = "{:40}   {:13}   {}"
        head = row.format("Jobset Name", "Status", "Status Message\n")
        listing(lambda name, state: row.format(name, kinds[state], "a message"), head, plan)
    elif words[:2] == ["jobs", "queue"]:
        if plan.get("listing"):
            fail(plan["listing"])
        kinds = {"waits": "PENDING", "runs": "RUNNING", "ended": "FAILED"}
        print(json.dumps([{"job_name": name, "status": kinds[state]} for name, state in read("jobs.json", {}).items()]))
    elif words[:2] == ["storage", "rsync"]:
        if plan.get("rsync"):
            fail(plan["rsync"])
        source = FLEET / "bucket" / words[-2].removeprefix("gs://")
        if not source.is_dir():
            fail(f"(gcloud.storage.rsync) Did not find existing container at: {words[-2]}")
        left_out = re.compile(next(word.partition("=")[2] for word in words if word.startswith("--exclude=")))
        for path in sorted(source.rglob("*")):
            name = str(path.relative_to(source))
            if path.is_file() and not left_out.match(name):
                (Path(words[-1]) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(words[-1]) / name)
    else:
        fail(f"unknown command {program} {words}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
