"""The live table: it stays at the bottom of a terminal, and no output is lost."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len
from rich.console import Console
from runs import HANG_S, ROOT, SMOKE

from jaxreason.runtime import live, terminal
from jaxreason.runtime import log as run_log


class Screen:
    """A terminal with the control sequences that programs here use. Lines that scroll
    off its top are kept.
    """

    def __init__(self, width=80, height=24):
        self.width, self.height, self.lines, self.top = width, height, {}, 0
        self.row = self.column = 0
        self.saved = (0, 0)

    def feed(self, text):
        for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|\x1b[78D]|[\r\n]|[^\x1b\r\n]", text):
            self.do(part)
        return self

    def do(self, part):
        if part == "\r":
            self.column = 0
        elif part in ("\n", "\x1bD"):
            if self.row == self.height - 1:
                self.top += 1
            else:
                self.row += 1
        elif part == "\x1b7":
            self.saved = (self.row, self.column)
        elif part == "\x1b8":
            self.row, self.column = self.saved
        elif part == "\x1b[J":
            at = self.top + self.row
            self.lines = {row: line for row, line in self.lines.items() if row <= at}
            self.lines[at] = self.lines.get(at, "")[: self.column]
        elif re.fullmatch(r"\x1b\[\d+A", part):
            self.row = max(0, self.row - int(part[2:-1]))
        elif not re.fullmatch(r"\x1b\[\d*m", part):
            assert not part.startswith("\x1b"), f"unknown sequence {part!r}"
            if self.column == self.width:
                self.do("\n")
                self.column = 0
            line = self.lines.get(self.top + self.row, "").ljust(self.column)
            self.lines[self.top + self.row] = line[: self.column] + part + line[self.column + 1 :]
            self.column += 1

    def text(self):
        return "\n".join(self.lines.get(row, "").rstrip() for row in range(max(self.lines, default=-1) + 1)).rstrip("\n")


def in_terminal(words, width=100, height=24, send=()):
    """Run a program in a terminal; return what it wrote and its exit code. `send` are
    (text to wait for, signal).
    """
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {
            "COLUMNS": str(width),
            "LINES": str(height),
            "TERM": "xterm",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        os.execv(words[0], words)
    seen, send, deadline = b"", list(send), time.monotonic() + HANG_S
    try:
        while time.monotonic() < deadline:
            try:
                found = os.read(fd, 1 << 16)
            except OSError:  # the program has ended
                break
            if not found:
                break
            seen += found
            while send and send[0][0] in seen:
                os.kill(pid, send.pop(0)[1])
    finally:
        os.close(fd)
        _, status = os.waitpid(pid, 0)
    return seen.decode(errors="replace"), os.waitstatus_to_exitcode(status)


VALUES = {
    "phase": "rl",
    "rollout/reward": 0.5,
    "rollout/correct": 0.25,
    "rollout/length": 88.4,
    "train/loss": 0.125,
    "train/entropy": 0.7,
    "perf/tokens_per_s": 12345.0,
    "time/sample_s": 6.0,
    "time/verify_s": 1.0,
    "time/learn_s": 3.0,
    "eval/chain/greedy/accuracy": 0.125,
}


def plain(lines):
    return [re.sub(r"\x1b\[[0-9]*m", "", line) for line in lines]


def test_the_table_has_a_text_under_each_label():
    at = terminal.At(VALUES, 40, 200, 10, 50, step_s=2.0)
    assert plain(terminal.table(at, 100, 8)) == [
        "   phase    step    eta  run eta  reward  accuracy  length    loss  entropy  tokens/s  sampling",
        "rl 10/50  40/200  1m20s    5m20s   0.500     0.250      88  0.1250    0.700    12,345       60%",
        "verifying  learning  chain/greedy",
        "      10%       30%         0.125",
    ]


@pytest.mark.parametrize("width", [1, 20, 40, 79, 200])
@pytest.mark.parametrize("height", [-1, 1, 2, 5, 8])
def test_the_table_fits_its_terminal(width, height):
    lines = plain(terminal.table(terminal.At(VALUES, 40, 200, 10, 50, step_s=2.0), width, height))
    assert max(map(len, lines)) <= width
    assert 2 <= len(lines) <= max(2, height)
    hostile = terminal.At({"phase": "r\x1b[2Jl\n数数数数数数数数数数数", "eval/\x1b]/t1/accuracy": 0.5}, 1, 2)
    for line in plain(terminal.table(hostile, width, height)):
        assert not set(line) & {"\x1b", "\n"}
        assert cell_len(line) <= width


def test_output_of_all_kinds_stays_above_the_table():
    screen, table = Screen(width=20, height=6), ["label", "value"]
    screen.feed(live.frame(table))
    for i in range(9):
        screen.feed(f"message {i}\r\n")  # of the compiler, which knows nothing of the table
        screen.feed(live.frame(table))
    screen.feed("downloading")  # a line that is not ended
    screen.feed(live.frame(table)).feed(live.frame(["label", "other", "more"]))
    screen.feed(" 50%\r\n").feed(live.frame(table))
    assert screen.text().splitlines() == [*(f"message {i}" for i in range(9)), "downloading 50%", "", *table]


@pytest.mark.process
def test_a_table_of_a_run_does_not_scroll_and_nothing_is_lost(tmp_path):
    code = (
        "import os, sys, time, warnings\nfrom jaxreason.runtime import log as run_log\n"
        "log = run_log.open_log(sys.argv[1], total_steps=40, tracker='none')\n"
        "for step in range(1, 41):\n"
        "    log.write(step, 'rl', {'rollout/reward': step / 40, 'time/step_s': 1.0}, phase_step=step, phase_steps=40)\n"
        "    log._live.draw()\n"
        "    if step == 10: log.say('warning: said')\n"
        "    if step == 20: print('printed 1\\nprinted 2')\n"
        "    if step == 25: warnings.warn('warned')\n"
        "    if step == 30: os.write(2, b'of the compiler\\n')\n"
        "log.doing('saving')\nlog._live.draw()\n"
        "if sys.argv[2] == 'fails': raise RuntimeError('it fails')\n"
        "log.close()\nprint('after')\n"
    )
    for how in ("ends", "fails"):
        wrote, code_ = in_terminal([sys.executable, "-c", code, str(tmp_path / how), how])
        shown = Screen(width=100).feed(wrote).text()
        assert code_ == (how == "fails")
        for line in ("warning: said", "printed 1", "printed 2", "of the compiler"):
            assert shown.splitlines().count(line) == 1
        assert shown.count("UserWarning: warned") == 1
        assert shown.count("reward") == 1  # one table, at the end
        assert "rl 40/40" in shown
        assert "1.000" in shown
        assert "rl 39/40" not in shown
        assert "\x1b[?25l" not in wrote  # the cursor is never hidden
        assert ("RuntimeError: it fails" if how == "fails" else "after") in shown


@pytest.mark.process
@pytest.mark.parametrize("times", [1, 2])
def test_a_whole_run_in_a_terminal_that_is_interrupted(tmp_path, times):
    words = [sys.executable, "-m", "jaxreason.main", f"--config={SMOKE}", f"--workdir={tmp_path}/run", "--config.phases=rl"]
    words += ["--config.rl.steps=100000", "--config.log.report=false", "--config.evaluate.suites={}"]
    signals = [(b"tokens/s", signal.SIGINT), (b"once more ends at once", signal.SIGINT)][:times]
    wrote, code = in_terminal(words, send=signals)
    shown = Screen(width=100).feed(wrote).text()
    assert code == 130
    assert shown.count("got Ctrl-C: saving after this step, then ending; once more ends at once") == 1
    assert re.search(r"^interrupted; the same command continues from (step \d+|the start)$", shown.splitlines()[-1])
    assert shown.count("tokens/s") <= 1  # a second Ctrl-C erases the table
    assert times == 2 or len(re.findall(r"rl \d+/100000", shown)) == 1


@pytest.mark.process
def test_a_finished_run_leaves_its_table_and_no_activity(tmp_path):
    words = [
        sys.executable,
        "-m",
        "jaxreason.main",
        f"--config={SMOKE}",
        f"--workdir={tmp_path}/run",
        "--config.log.report=false",
    ]
    wrote, code = in_terminal(words)
    shown = Screen(width=100).feed(wrote).text()
    assert code == 0
    assert "waiting for the last checkpoint" not in shown  # it was shown if the wait took long enough
    assert shown.count("tokens/s") == 1


def test_without_a_terminal_there_are_no_control_characters(tmp_path):
    code = (
        "import sys\nfrom jaxreason.runtime import log as run_log\n"
        "log = run_log.open_log(sys.argv[1], total_steps=2, tracker='none')\n"
        "log.write(1, 'rl', {'train/loss': 0.5})\nlog.say('said')\nlog.close()\n"
    )
    for term in ("xterm", "dumb"):
        environment = os.environ | {"TERM": term}
        words = [sys.executable, "-c", code, str(tmp_path / term)]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=HANG_S, env=environment)
        assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
        assert ended.stderr == "rl  step 1/2  loss 0.5000\nsaid\n"


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    console = Console(file=file, force_terminal=True, width=80)
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        log = run_log.RunLog(metrics, (), console, total_steps=2, start_s=0.0)
        log.write(1, "rl", {"train/loss": 0.5})
        log._live.draw()
        log.say("hello")
        log.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    with pytest.raises(BrokenPipeError):
        file.close()
