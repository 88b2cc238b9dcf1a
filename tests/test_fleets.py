"""Jobs for SkyPilot, xpk and Slurm: golden files, values that quoting might change, and
the real packages where an environment variable points at them:

    JAXREASON_SKY_PYTHON    a Python that has skypilot
    JAXREASON_XPK           the program xpk
    JAXREASON_WRITE_GOLDEN  write tests/golden/fleets anew
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml as pyyaml
from runs import ROOT

from jaxreason.launch import shell
from jaxreason.launch.fleets import ENGINES, Job, job, sky, slurm, xpk, yaml

GOLDEN = ROOT / "tests" / "golden" / "fleets"
WORDS = ("-m", "jaxreason.main", "--config=configs/gsm8k.py", "--config.rl.steps=50")
END = "--code_when_stopped=75"


def a_job(workdir="gs://my-bucket/runs/mine", words=WORDS, **more) -> Job:
    return Job(name="mine", command=[*words, f"--workdir={workdir}", END], workdir=workdir, **{"type": "v5litepod-16"} | more)


JOBS = {
    "sky_tpu.yaml": ("sky", a_job(spot=True, zone="us-west4-a")),
    "sky_gpus.yaml": ("sky", a_job("/results/runs/mine", type="H100:8", nodes=2, mounts={"/results": "gs://my-bucket"})),
    "xpk_tpu.sh": ("xpk", a_job(cluster="my-cluster", spot=True, zone="us-west4-a", project="my-project")),
    "xpk_quotes.sh": (
        "xpk",
        a_job(
            "/results/mine",
            words=(*WORDS, "--config.text.instruction=it's $(5)"),
            cluster="my-cluster",
            type="H100:8",
            image="gcr.io/p/i:1",
            mounts={"/results": "results-storage"},
        ),
    ),
    "slurm_one.sbatch": ("slurm", a_job("/home/me/runs/mine", type="gpu:1", root="/home/me/jaxreason", time="1-00:00:00")),
    "slurm_two.sbatch": (
        "slurm",
        a_job("/home/me/runs/mine", type="h100:8", nodes=2, root="/home/me/my code", partition="gpu", account="lab", cpus=64),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_files_are_as_they_were(name):
    engine, made = JOBS[name]
    text = ENGINES[engine].file(job.check(made, ENGINES[engine]))
    if os.environ.get("JAXREASON_WRITE_GOLDEN"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def test_commands():
    made = JOBS["xpk_tpu.sh"][1]
    placed = ["--zone=us-west4-a", "--project=my-project"]
    assert xpk.ENGINE.stop(made) == [
        *("xpk", "workload", "delete", "--force", "--cluster=my-cluster", "--workload=mine"),
        *placed,
    ]
    assert xpk.ENGINE.listing(made) == ["xpk", "workload", "list", "--cluster=my-cluster", *placed]
    assert sky.ENGINE.submit(made, "a b.yaml") == ["sky", "jobs", "launch", "--yes", "--detach-run", "a b.yaml"]
    assert sky.ENGINE.stop(made) == ["sky", "jobs", "cancel", "--yes", "--name", "mine"]
    assert slurm.ENGINE.submit(made, "x/job.sbatch") == ["sbatch", "--parsable", "--output=x/%j.log", "x/job.sbatch"]
    assert slurm.ENGINE.stop(made) == ["scancel", "--me", "--name=mine"]


# --- values that quoting might change ---

HOSTILE = [
    *("no", "1e3", "~", "null", "0x1f", "1_000", "a: b", "a #b", "- a", "*a", "&a", "!a", "%a", "@a", "`id`", "{a}", "[a, b]"),
    *(
        "it's",
        'say "hi"',
        "$HOME",
        "$(id)",
        "${HOME}",
        "$$",
        "$(HOSTNAME)",
        "a;b",
        "a|b",
        "a&b",
        ">a",
        "\\",
        "\\n",
        "!!",
        "=",
        "",
    ),
    *(
        " a",
        "a ",
        "a\nb",
        "\na",
        "a\n\n b\n",
        "\t",
        "a\tb",
        "a\rb",
        "\x1b[0m",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
        "ü",
        "🙂",
        "a\\\nb",
    ),
    *("'", '"', "''", "|", ">-", "---", "...", "<<", "? a", "EOF", "%j", "{{a}}", "{args}", "EXIT", "\u202e"),
]
SHIM = """#!/bin/bash
[ "$1" = install ] && exit 0
printf '%s\\0' "$@" > "$FAKE_OUT"
exit "${FAKE_CODE:-0}"
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Put stand-ins on PATH that write their arguments to $FAKE_OUT."""
    folder = tmp_path / "jaxreason-venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "pip", "xpk"):
        (folder / name).write_text(SHIM)
    # srun runs what follows its own options.
    (folder / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (folder / "squeue").write_text('#!/bin/bash\necho "${FAKE_STATE:-RUNNING}"\n')
    (folder / "scontrol").write_text('#!/bin/bash\necho "$@" >> "$FAKE_OUT.scontrol"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FAKE_OUT", str(tmp_path / "out"))
    return tmp_path


def given(folder: Path) -> list[str]:
    return (folder / "out").read_bytes().decode().split("\0")[:-1]


def hostile(workdir: str, **more) -> Job:
    words = [f"--config.x{i}={value}" for i, value in enumerate(HOSTILE)]
    return a_job(workdir, words=(*WORDS, *words, *HOSTILE), **more)


@pytest.mark.parametrize("nodes", [1, 2])
def test_hostile_values_reach_a_run_of_sky(programs, monkeypatch, nodes):
    made = job.check(hostile("gs://my-bucket/it's$HOME:{x}/mine", type="H100:8", nodes=nodes), sky.ENGINE)
    task = pyyaml.safe_load(sky.file(made))
    monkeypatch.setenv("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2")
    monkeypatch.setenv("SKYPILOT_NUM_NODES", "2")
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    subprocess.run(["bash", "-c", task["run"]], check=True, cwd=programs)
    more = ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"] if nodes == 2 else []
    assert given(programs) == [*made.command, *more]


@pytest.mark.parametrize("image", ["", "gcr.io/p/i"])
def test_hostile_values_reach_a_run_of_xpk(programs, image):
    made = job.check(hostile("gs://my-bucket/mine", cluster="c", image=image), xpk.ENGINE)
    subprocess.run(["bash", "-c", xpk.file(made)], check=True, cwd=programs)
    words = given(programs)
    assert words == xpk.create(made)[1:]
    command = next(word for word in words if word.startswith("--command=")).partition("=")[2]
    assert "$" not in command  # what Kubernetes replaces
    assert command.isprintable()
    # As in xpk's container: YAML of one line, then bash.
    script = pyyaml.safe_load(f"- |\n  ({command}) & PID=$!;\n  wait $PID;\n  exit $?\n")[0]
    subprocess.run(["bash", "-c", script], check=True, cwd=programs)
    assert given(programs) == list(made.command)


def run_slurm(made: Job, programs: Path, **environment) -> int:
    name = programs / "job.sbatch"
    name.write_text(slurm.file(made), encoding="utf-8")
    variables = os.environ | {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "4"} | environment
    return subprocess.run(["bash", str(name)], env=variables, check=False).returncode


def test_hostile_values_reach_a_run_of_slurm(programs):
    root = programs / "a 'checkout' $HOME\n#SBATCH --time=1"
    root.mkdir()
    made = job.check(hostile(f"{root}/runs/mine", type="h100:8", root=str(root), nodes=2), slurm.ENGINE)
    assert run_slurm(made, programs) == 0
    assert given(programs) == list(made.command)


def test_slurm_reads_no_option_from_a_value(programs):
    """Slurm reads lines that begin with #SBATCH up to the first command."""
    made = a_job("/runs/mine\n#SBATCH --time=1", type="h100:8", root="/code\n#SBATCH --time=1")
    lines = slurm.file(made).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("--time=1\n" in line or line == "#SBATCH --time=1" for line in lines[:first])


@pytest.mark.parametrize(
    ("code", "environment", "queued"),
    [
        (75, {}, True),
        (143, {}, True),
        (0, {}, False),
        (1, {}, False),
        (75, {"FAKE_STATE": "COMPLETING"}, False),
        (75, {"SLURM_RESTART_COUNT": "20"}, False),
    ],
)
def test_slurm_queues_a_run_again_that_was_asked_to_stop(programs, code, environment, queued):
    made = a_job("/runs/mine", type="gpu:1", root=str(programs))
    assert run_slurm(made, programs, FAKE_CODE=str(code), **environment) == code
    said = programs / "out.scontrol"
    assert (said.read_text() if said.exists() else "") == ("requeue 12\n" if queued else "")


def test_yaml_reads_back_what_was_written():
    assert pyyaml.safe_load(yaml.write({value: value for value in HOSTILE})) == {value: value for value in HOSTILE}
    random.seed(0)
    letters = "ab \n\t\r:#-'\"\\|>{}[]$%&*!?@`,=~0.1e\x00\x07\x85\xa0\u2028\ufeff\u202eü🙂"
    for _ in range(3000):
        words = ["".join(random.choices(letters, k=random.randrange(12))) for _ in range(4)]
        values = {"a": words[0], "b": words[1] + "\n" + words[2] + "\n", "list": words, "more": {"x": {"y": words[3], "n": 3}}}
        assert pyyaml.safe_load(yaml.write(values, {"a": "a comment\nof two lines"})) == values
    for wrong in ("\udc80", "\n\udc80\n\n"):
        with pytest.raises(ValueError, match="no UTF-8"):
            yaml.write({"a": wrong})
    with pytest.raises(ValueError, match="allowed: a text"):
        yaml.write({"a": 0.5})
    numbers = {text: text for text in (".5", ".0", ".1_0", ".5e3", "1e3", "0x1", "1:30", "2001-01-01")}
    assert pyyaml.safe_load(yaml.write(numbers)) == numbers


# --- refusals ---


@pytest.mark.parametrize(
    ("engine", "what", "said"),
    [
        ("sky", {"type": "v5e-16"}, "unknown --type of SkyPilot 'v5e-16'"),
        ("sky", {"type": "H100:3"}, "unknown --type of SkyPilot 'H100:3'"),
        ("xpk", {"type": "v5litepod-4", "cluster": "c"}, "unknown --type of xpk 'v5litepod-4'"),
        ("slurm", {}, "--type got 'v5litepod-16'; allowed: NAME:COUNT"),
        ("slurm", {"type": "h100:8\n#SBATCH"}, "--type got"),
        ("slurm", {"type": "h100:8", "partition": "a b"}, "--partition got 'a b'"),
        ("slurm", {"type": "h100:8", "account": "a\n#SBATCH --x"}, "--account got"),
        ("slurm", {"type": "h100:8", "time": "24"}, "--time got '24'"),
        ("slurm", {"type": "h100:8", "nodes": 0}, "--nodes got 0"),
        ("sky", {"nodes": 2}, "--nodes got 2; allowed: 1 for TPUs"),
        ("sky", {"zone": "here"}, "--zone got 'here'"),
        ("sky", {"workdir": "runs/mine"}, "lost with the machine"),
        ("sky", {"workdir": "/results/../x", "mounts": {"/results": "gs://my-bucket"}}, "lost with the machine"),
        *(
            ("sky", {"workdir": f"gs://{name}"}, "gs://BUCKET/FOLDER")
            for name in ("b", "my-bucket", "my-bucket/a b", "my-bucket/../a")
        ),
        ("sky", {"workdir": "s3://my-bucket/a"}, "gs://BUCKET/FOLDER"),
        ("sky", {"workdir": "/r/x", "mounts": {"/r": "my-bucket"}}, "--mount got 'my-bucket'"),
        ("sky", {"workdir": "/r: x/y", "mounts": {"/r: x": "gs://my-bucket"}}, "--mount got the folder '/r: x'"),
        ("xpk", {}, "--cluster got ''"),
        ("xpk", {"cluster": "c", "workdir": "/x"}, "lost with the machine"),
        ("xpk", {"cluster": "c", "image": "--privileged"}, "--image got '--privileged'"),
        ("xpk", {"cluster": "c", "root": "/my code; id"}, "the checkout is in '/my code; id'"),
        ("xpk", {"cluster": "c", "name": "a" * 41}, "--name got 'aaa"),
        ("xpk", {"cluster": "c", "name": "Mine"}, "--name got 'Mine'"),
        ("xpk", {"cluster": "c", "name": "mine\n"}, "--name got"),
        ("sky", {"command": ["\udc80"]}, "no UTF-8"),
        ("slurm", {"type": "gpu:1", "python": "\udc80"}, "no UTF-8"),
        ("slurm", {"type": "gpu:1", "time": "\u0662\u0664:00:00"}, "--time got"),
        ("slurm", {"type": "gpu:1\u0662"}, "--type got"),
        ("slurm", {"type": "gpu:1", "partition": "a\ufb00"}, "--partition got"),
        *(
            ("sky", {"mounts": {folder: "gs://my-bucket"}}, "--mount got the folder")
            for folder in ("/..", "/a/../b", "/a/.", "/é")
        ),
        ("sky", {"mounts": {"/a": "gs://my-bucket/é"}}, "--mount got"),
    ],
)
def test_values_that_an_engine_can_not_take(engine, what, said):
    made = a_job()._replace(**what)
    with pytest.raises(ValueError) as error:
        job.check(made, ENGINES[engine])
    assert said in str(error.value)


def test_options_of_a_sweep():
    read = job.parse_options("xpk", xpk.ENGINE, "type=v5litepod-16, cluster=c,slices=2,spot=true,mount=/r=store,mount=/s=more")
    assert read == {"type": "v5litepod-16", "cluster": "c", "slices": 2, "spot": True, "mounts": {"/r": "store", "/s": "more"}}
    for text, said in (
        ("clusster=c", "unknown --engine_options of xpk 'clusster' (did you mean 'cluster'?)"),
        ("spot=yes", "allowed: true or false"),
        ("slices=two", "allowed: a whole number"),
        ("spot", "allowed: NAME=VALUE"),
        ("mount=/r", "--mount got '/r'"),
        ("type=a,type=b", "--engine_options has 'type' twice"),
        ("mount=/r=a,mount=/r=b", "--engine_options has the mount '/r' twice"),
        ("slices=" + "9" * 5000, "allowed: a whole number"),
    ):
        with pytest.raises(ValueError) as error:
            job.parse_options("xpk", xpk.ENGINE, text)
        assert said in str(error.value)


def test_names_of_any_text():
    made = {job.short_name(text, "seed", longest=40) for text in (*HOSTILE, "a" * 200, "rl.lr=1e-4", "rl.lr=1e-5")}
    assert len(made) == len({*HOSTILE, "a" * 200, "rl.lr=1e-4", "rl.lr=1e-5"})
    for name in made:
        assert job.check_name(name, 37) == name


def test_answers_of_the_engines():
    queue = [{"job_name": "a", "status": "RUNNING"}, {"job_name": "b", "status": "FAILED_SETUP"}]
    assert sky.active("a line first\n" + json.dumps([*queue, {"job_name": "c", "status": "SUCCEEDED"}])) == {"a": "RUNNING"}
    assert sky.active("[]") == {}
    for wrong in ("", "no jobs", "[1]", '[{"job_name": 1}]', "[{"):
        with pytest.raises(ValueError, match="sky jobs queue answered"):
            sky.active(wrong)
    rows = [("Jobset Name", "Needed", "Status", "Status Message"), ("mine", "4", "Admitted", "it is  admitted")]
    rows += [("new", "<none>", "<none>", "<none>"), ("other", "4", "Finished", "Job finished")]
    table = "\n".join(("[XPK] list", *("   ".join(f"{word:<14}" for word in row) for row in rows), "[XPK] done"))
    assert xpk.active(table) == {"mine": "Admitted", "new": "<none>"}
    with pytest.raises(ValueError, match="xpk workload list answered"):
        xpk.active("error")
    assert slurm.active("a|RUNNING\nb|PENDING\n\n") == {"a": "RUNNING", "b": "PENDING"}


def test_other_lines_of_an_answer_are_neither_jobs_nor_no_jobs():
    queue = json.dumps([{"job_name": "a", "status": "RUNNING"}])
    for line in (
        "[yellow] Warning\n",
        "[I 11-28 10:00] Starting\n",
        "[1] 4242\n",
        "[]\n",
        "Loading [3/3]\r",
        "[" * 100_000 + "\n",
    ):
        assert sky.active(f"{line}{queue}\n{line}") == {"a": "RUNNING"}
    for wrong in ("[1] 4242\n", queue[:-4], f'[{{"job_name": "a", "tasks": {queue}', "[" * 100_000):
        with pytest.raises(ValueError, match="sky jobs queue answered"):
            sky.active(wrong)
    table = "Jobset Name   Status      Status Message\nmade                      \nmore\nmine          Admitted    it is\n"
    assert xpk.active(table) == {"made": "", "more": "", "mine": "Admitted"}
    assert slurm.active("welcome | to us\na|b|RUNNING\n") == {"a|b": "RUNNING"}
    assert slurm.active("\n") == {}
    for wrong in ("slurm_load_jobs error: Unable to contact slurm controller", "welcome | to us"):
        with pytest.raises(ValueError, match="squeue answered"):
            slurm.active(wrong)


def test_colours_are_no_part_of_an_answer():
    text = "\x1b[2K\x1b[1;33mWarning\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x1b\\ [1]\n"
    assert shell.run(["printf", "%s", text]).out == "Warning link [1]\n"


# --- the command ---


def command(*words):
    made = [sys.executable, "-m", "jaxreason.launch", *words]
    return subprocess.run(made, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)


ASK = ("--name=mine", "--type=v5litepod-16", "--config=configs/tiny.py:smoke", "--workdir=gs://my-bucket/mine")


@pytest.mark.process
def test_the_command_writes_a_file_and_says_how_to_go_on(tmp_path):
    done = command("sky", *ASK, "--spot", "--config.text.instruction=it's {question}", f"--out={tmp_path}/deep/er/job.yaml")
    assert done.returncode == 0, done.stderr
    task = pyyaml.safe_load((tmp_path / "deep/er/job.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert "instruction=it'" in task["run"]
    assert "--config.text.instruction=it'" in next(line for line in done.stdout.splitlines() if "jaxreason.plan" in line)
    for line in (f"  sky jobs launch --yes --detach-run {tmp_path}/deep/er/job.yaml", "  sky jobs cancel --yes --name mine"):
        assert line in done.stdout.splitlines()
    printed = command("xpk", *ASK, "--cluster=c", "--out=-")
    assert printed.stdout.startswith("#!/bin/bash\n")
    assert "to stop it:" in printed.stderr


@pytest.mark.process
@pytest.mark.parametrize(("module", "names"), [("launch", ("cluster", "mount", "zone")), ("sweep", ("engine", "place", "grid"))])
def test_help_names_the_flags(module, names):
    words = [sys.executable, "-m", f"jaxreason.{module}", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    for name in names:
        assert f"  --{name}: " in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sky", *ASK, "--cluster=c"], "got --cluster; `launch sky` reads: --mount, --name, --nodes"),
        (["sky", *ASK, "--config.rl.stepps=3"], "stepps"),
        (["sky", *ASK[:2], "--config=configs/none.py"], "allowed: a file of this checkout"),
        (["xpk", *ASK, "--type=v5e"], "unknown --type of xpk 'v5e'"),
        (["slurm", "--config=configs/tiny.py"], "--name got None"),
        (["slurm", *ASK, "more"], "`launch slurm` got 'more'; allowed: flags only, such as --name=more"),
        (["sky", *ASK, "--out=/proc/none/job.yaml"], "error: "),
    ],
)
def test_bad_input_is_one_line(words, said):
    done = command(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.strip().count("\n") == 0


# --- the real packages ---


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_SKY_PYTHON" not in os.environ, reason="JAXREASON_SKY_PYTHON names no Python with skypilot")
@pytest.mark.parametrize("made", [JOBS["sky_tpu.yaml"][1], JOBS["sky_gpus.yaml"][1], hostile("gs://my-bucket/mine")])
def test_skypilot_reads_the_task(tmp_path, made):
    (tmp_path / "job.yaml").write_text(sky.file(made), encoding="utf-8")
    code = (
        "import json, sky; t = sky.Task.from_yaml('job.yaml'); r = next(iter(t.resources)); print(json.dumps([t.name, "
        "t.num_nodes, list(r.accelerators), r.use_spot, r.job_recovery['recover_on_exit_codes'], t.run, list(t.storage_mounts)]))"
    )
    words = [os.environ["JAXREASON_SKY_PYTHON"], "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind = f"tpu-{made.type}" if made.is_tpu else made.type.partition(":")[0]
    expected = ["mine", made.nodes, [kind], made.spot, [75, 143], "\n".join(sky.run(made)) + "\n", list(made.mounts)]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_XPK" not in os.environ, reason="JAXREASON_XPK names no program xpk")
@pytest.mark.parametrize("words", [WORDS, (*WORDS, *HOSTILE)])
def test_xpk_makes_the_workload(programs, words):
    """A dry run with --docker-image, which needs no cluster and no docker."""
    made = job.check(a_job(words=words, cluster="my-cluster", image="gcr.io/p/i:1", zone="us-west4-a", project="p"), xpk.ENGINE)
    more = "--dry-run --skip-validation --output-manifest-file=manifest.yaml"
    (programs / "jaxreason-venv/bin/xpk").write_text(f'#!/bin/bash\nexec {os.environ["JAXREASON_XPK"]} "$@" {more}\n')
    done = subprocess.run(["bash", "-c", xpk.file(made)], cwd=programs, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobset = next(one for one in pyyaml.safe_load_all((programs / "manifest.yaml").read_text()) if one["kind"] == "JobSet")
    assert jobset["metadata"]["name"] == "mine"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    found = json.dumps(jobset)
    assert '"terminationGracePeriodSeconds": 120' in found
    assert "75" in found
    container = next(find(jobset, "containers"))[0]
    subprocess.run(container["command"], cwd=programs, check=True, capture_output=True)
    assert given(programs) == list(made.command)


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_XPK" not in os.environ, reason="JAXREASON_XPK names no program xpk")
def test_xpk_knows_the_types():
    for name in xpk.types():
        flag = "--device-type" if ":" in name else "--tpu-type"
        words = [
            "workload",
            "create",
            "--cluster=c",
            "--workload=w",
            "--command=x",
            f"{flag}={xpk.GPUS.get(name, name)}",
            "--bad",
        ]
        done = subprocess.run([os.environ["JAXREASON_XPK"], *words], capture_output=True, text=True)
        assert "unrecognized arguments: --bad" in done.stderr, (name, done.stderr)


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_XPK" not in os.environ, reason="JAXREASON_XPK names no program xpk")
def test_xpk_knows_the_commands():
    made = JOBS["xpk_tpu.sh"][1]
    for words in (xpk.ENGINE.stop(made), xpk.ENGINE.listing(made), xpk.ENGINE.watch(made)[0]):
        done = subprocess.run([os.environ["JAXREASON_XPK"], *words[1:], "--bad"], capture_output=True, text=True)
        assert "unrecognized arguments: --bad" in done.stderr, (words, done.stderr)


TABLE = """
from xpk.core import workload as w
S = w._WorkloadStatus
rows = [w._WorkloadListRow(s.value.lower(), "2026-11-28T10:00:00Z", "medium", 4, None, 0, s, "a b  c", None) for s in S]
print(w._render_workloads([*rows, w._WorkloadListRow("none", None, None, None, None, None, None, None, None)]))
"""


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_XPK" not in os.environ, reason="JAXREASON_XPK names no program xpk")
def test_the_table_of_xpk_is_read():
    words = [Path(os.environ["JAXREASON_XPK"]).with_name("python"), "-c", TABLE]
    table = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = {
        "admitted": "Admitted",
        "evicted": "Evicted",
        "quotareserved": "QuotaReserved",
        "unknown": "Unknown",
        "none": "<none>",
    }
    assert xpk.active(table) == found


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_SKY_PYTHON" not in os.environ, reason="JAXREASON_SKY_PYTHON names no Python with skypilot")
def test_skypilot_knows_the_commands(tmp_path):
    made, program = JOBS["sky_tpu.yaml"][1], Path(os.environ["JAXREASON_SKY_PYTHON"]).with_name("sky")
    for words in (sky.ENGINE.submit(made, "x.yaml"), sky.ENGINE.stop(made), sky.ENGINE.listing(made), *sky.ENGINE.watch(made)):
        for more, code in (("--help", 0), ("--bad", 2)):
            done = subprocess.run(
                [program, *words[1:], more], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True
            )
            assert done.returncode == code, (words, done.stderr)


@pytest.mark.process
@pytest.mark.skipif("JAXREASON_SKY_PYTHON" not in os.environ, reason="JAXREASON_SKY_PYTHON names no Python with skypilot")
def test_skypilot_knows_the_types(tmp_path):
    for i, name in enumerate(sky.types()):
        (tmp_path / f"{i}.yaml").write_text(sky.file(a_job(type=name)))
    code = "import glob, sky; print([len(list(sky.Task.from_yaml(name).resources)) for name in glob.glob('*.yaml')])"
    words = [os.environ["JAXREASON_SKY_PYTHON"], "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1] * len(sky.types())


def find(value, name):
    """Yield the values of a key anywhere in a tree."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == name:
            yield one
        yield from find(one, name)
