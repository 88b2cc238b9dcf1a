"""Sandboxes and the machine: what they take of it that no limit of a process counts,
and machines on which descriptors, threads or users are few.
"""

import ctypes
import os
import subprocess
import sys
import threading
import time

import pytest
from programs import PRELUDE, namespace, processes_of
from runs import ROOT

from jaxreason.sandbox import Sandbox, bwrap

held = pytest.mark.skipif(bool(bwrap.refusal()), reason=bwrap.refusal())
WHOLE = "0 0 4294967295\n"

MAKES = {
    "files": "while True: os.close(os.open(str(i := i + 1), os.O_CREAT))",
    "folders": "while True: os.mkdir(str(i := i + 1))",
    "links": "open('a', 'w').close()\nwhile True: os.link('a', str(i := i + 1))",
    "symbolic links": "while True: os.symlink('a', str(i := i + 1))",
    "sockets": "while True:\n    with socket.socket(socket.AF_UNIX) as s: s.bind(str(i := i + 1))",
}


@held
@pytest.mark.process
@pytest.mark.parametrize("name", MAKES)
def test_files_are_counted(name):
    """Each takes memory of the kernel, which the size of /tmp does not count."""
    box = Sandbox(timeout_s=100.0, files_mb=2)
    session = box.session()
    space = namespace(session)
    assert session.run(f"{PRELUDE}\ni = 0\n{MAKES[name]}").reason == "crashed"  # long before its time is up
    assert not processes_of(space)


@held
def test_as_many_small_files_as_blocks_may_be_made():
    code = "for i in range(400): open(str(i), 'w').write('x')\nimport time\ntime.sleep(1)\nprint('done')"
    assert Sandbox(timeout_s=100.0, files_mb=2).run(code).stdout == "done\n"


@held
def test_no_signal_ends_the_first_process():
    code = f"{PRELUDE}\nfor n in range(1, 65):\n    try: os.kill(1, n)\n    except OSError: pass\nprint('sent', flush=True)"
    session = Sandbox(timeout_s=100.0).session()
    assert session.run(code).stdout == "sent\n"
    assert session.run("import time\ntime.sleep(0.5)\nprint('lives')").stdout == "lives\n"
    session.close()


@pytest.mark.process
@pytest.mark.parametrize("backend", [pytest.param("bwrap", marks=held), "rlimits"])
def test_folders_of_any_depth_and_rights_are_removed(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nos.symlink('/', 'root')\nopen('a\\nb', 'w')"
    shut = "import os\nos.makedirs('a/b/c')\nopen('a/b/c/d', 'w')\nfor path in ('a/b/c', 'a/b', 'a'): os.chmod(path, 0)"
    session = Sandbox(backend, timeout_s=100.0, files_mb=32).session()
    for code in (deep, shut, "import os\nprint(os.listdir())"):
        result = session.result({"do": "run", "code": code, "stdin": "", "fork": True})
        assert result.reason == "", result
    if backend == "bwrap":  # which empties it between programs
        assert result.stdout == "[]\n"
    session.result({"do": "run", "code": deep, "stdin": "", "fork": True})
    session.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.process
@pytest.mark.parametrize("backend", [pytest.param("bwrap", marks=held), "rlimits"])
def test_without_descriptors_none_starts_and_none_is_lost(backend, tmp_path):
    """In a process of its own, as it takes all descriptors."""
    code = f"""
import os, resource, tempfile
from jaxreason.sandbox import Sandbox
tempfile.tempdir = {str(tmp_path)!r}
box = Sandbox({backend!r}, timeout_s=60.0)
box.run("1")
before, (_, hard) = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
for more in range(25):
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + more, hard))
    try:
        box.session().close()
        said = "began"
    except RuntimeError as error:
        assert "did not start" in str(error), error
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert len(os.listdir("/proc/self/fd")) == before, more
print(said, box.run("print(1)").stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "began 1\n\n", done.stderr
    assert os.listdir(tmp_path) == []


@held
@pytest.mark.process
def test_without_threads_none_is_warmed_until_there_are(monkeypatch):
    box = Sandbox(timeout_s=60.0)
    box._warm = 1
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        assert box.run("print(1)").stdout == "1\n"
    box.session().close()
    deadline = time.monotonic() + 60
    while not box._ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert box._ready
    box.close()


# --- users ---


@pytest.mark.parametrize(
    ("uids", "gids", "expected"),
    [
        (WHOLE, WHOLE, range(bwrap.FIRST_UID, bwrap.FIRST_UID + 2**30)),
        ("0 100000 65536\n", "0 100000 65536\n", range(32768, 65534)),  # a container
        ("0 1000 1\n1 100000 65536\n", "0 1000 1\n1 100000 65536\n", range(32769, 65535)),  # of a user who is not root
        ("0 100000 65536\n", "0 100000 40000\n", range(32768, 39998)),
        ("0 1000 1\n", "0 1000 1\n", range(0)),
        ("0 1000 1000\n", "0 1000 1000\n", range(0)),
    ],
)
def test_users_that_root_may_become(uids, gids, expected):
    assert bwrap.users(uids, gids) == expected


@held
@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can map users")
@pytest.mark.parametrize("mapped", ["0 0 65536", "0 0 1"])
def test_root_of_a_container_has_many_sandboxes(mapped):
    """Each has its own limit of processes, also where few users exist."""
    code = """
import os, sys
from jaxreason.sandbox import Sandbox, bwrap
os.write(1, b"?")
os.read(0, 1)
if why := bwrap.refusal():
    sys.exit(why)
box = Sandbox(timeout_s=60.0)
sessions = [box.session() for _ in range(8)]
print(*(s.run("import os\\nos.fork() or os._exit(0)\\nprint(os.getuid() > 0)").stdout.strip() for s in sessions))
"""
    libc = ctypes.CDLL(None, use_errno=True)

    def unshare():
        if libc.unshare(0x10000000):
            raise OSError(ctypes.get_errno(), "no user namespace")

    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=unshare
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no user namespace here: {error}")
    with process:
        assert process.stdout.read(1) == b"?"
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{process.pid}/{name}", "w") as file:
                file.write(mapped)
        said, _ = process.communicate(b"!", timeout=300)
    assert said.decode().split() == ["True"] * 8
