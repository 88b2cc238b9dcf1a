"""Metrics: sums and counts, the files of a run, its progress and tables."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from runs import load_config

from jaxreason import metrics
from jaxreason.build import build, from_earlier, make_log
from jaxreason.options import command
from jaxreason.runtime import checkpoint, files, terminal
from jaxreason.runtime import log as run_log
from jaxreason.runtime.trackers import STORED, NoTracker, read_names, run_id
from jaxreason.train import train
from jaxreason.types import Evaluation, Rollout, Task, Verdict


def strict(line):
    """Parse strict JSON: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(path):
    return [strict(line) for line in path.read_bytes().decode("ascii").splitlines()]


def on_paper(terminal=False, encoding="utf-8", width=200):
    """Make a console that writes to bytes, like a file or a terminal of that
    encoding.
    """
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False, legacy_windows=False)

    def printed():
        file.flush()
        return raw.getvalue().decode(encoding)

    return console, printed


ROLLOUT = Rollout(
    task=Task("1 + 1?", "2", id="set/7"),
    problem=4,
    attempt=1,
    prompt=np.array([5, 6], np.int32),
    tokens=np.array([1, 2, 3], np.int32),
    logp=np.array([-0.5, -0.25, -1.0], np.float32),
    sampled=np.ones(3, bool),
    stop="eos",
    text="so 2",
    verdict=Verdict(1.0, True, "2", "equal"),
    temperature=0.7,
)
# Markup, ANSI, carriage return, bell, bidirectional override, zero width, lone
# surrogate, C1 control sequence introducer.
NASTY = "[red]x[/red] [/] \x1b[2J \r \x07 \u202e \u200b \ud800 \x9b31m"


def test_means_weigh_by_count_and_divide_once():
    a = {"train/loss": (6.0, 3), "rollout/reward": (1.0, 2)}
    b = {"train/loss": (jnp.float32(2.0), jnp.int32(1)), "eval/x": (0.0, 0)}
    merged = metrics.merge(a, b, {})
    values = metrics.divide(merged)
    assert values["train/loss"] == 2.0
    assert metrics.divide(metrics.merge({"m": (30.0, 3)}, {"m": (0.0, 1)})) == {"m": 7.5}  # the mean of means is 5
    assert values["rollout/reward"] == 0.5
    assert math.isnan(values["eval/x"])
    assert all(type(value) is float for value in values.values())
    assert a == {"train/loss": (6.0, 3), "rollout/reward": (1.0, 2)}


def test_lines_are_flat_strict_and_flushed(tmp_path):
    with run_log.open_log(tmp_path / "run", total_steps=2, tracker="none", live=False) as log:
        log.write(0, "prior", {"train/loss": np.float32(0.5), "train/grad_norm": math.nan}, phase_step=0, phase_steps=2)
        log.write(1, "rl", {"train/loss": jnp.float32(-math.inf)})
        first, second = lines(tmp_path / "run" / "metrics.jsonl")  # before it is closed
        assert first.pop("time_s") >= 0
        assert first == {"step": 0, "phase": "prior", "phase_step": 0, "train/loss": 0.5, "train/grad_norm": None}
        assert second["train/loss"] is None
        with pytest.raises(ValueError, match="metrics named step"):
            log.write(2, "rl", {"step": 1.0})


def test_tensorboard_has_the_values_without_tensorflow(tmp_path):
    with run_log.open_log(tmp_path, total_steps=2, live=False) as log:
        log.write(7, "rl", {"train/loss": 0.25, "train/grad_norm": math.nan})
    (events,) = (tmp_path / "tensorboard").iterdir()
    from tensorboardX.proto.event_pb2 import Event

    data, seen = events.read_bytes(), []
    while data:  # a record: length, checksum of it, event, checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert seen == [(7, "train/loss", 0.25)]
    assert "tensorflow" not in sys.modules


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path):
    """Write more lines than any queue holds, since a writer without a reader would wait
    forever.
    """
    said = []
    with run_log.open_log(tmp_path, total_steps=40, live=False) as log:
        log.say = said.append
        log.write(1, "rl", {"train/loss": 0.5})
        (events,) = (tmp_path / "tensorboard").iterdir()
        before, full = events.read_bytes(), os.open("/dev/full", os.O_WRONLY)
        (opened,) = (fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(events))
        os.dup2(full, int(opened))
        os.close(full)
        for step in range(2, 41):
            log.write(step, "rl", {"train/loss": 0.5})
    (line,) = said
    assert line.startswith(f"warning: can't write to {tmp_path}/tensorboard: No space left on device; ")
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 41))
    assert events.read_bytes() == before


def test_resume_cuts_what_came_after_and_time_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "phase": "rl", "time_s": 100.0 * step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 2, "pha')
    with run_log.open_log(tmp_path, total_steps=9, resume_step=2, tracker="none", live=False) as log:
        log.write(3, "rl", {"train/loss": 1.0})
    seen = lines(path)
    assert [line["step"] for line in seen] == [1, 2, 3]
    assert 200 <= seen[2]["time_s"] < 300
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    assert files.truncate(path, 3) == files.Kept()
    path.write_text('{"step": 1}\n{"step": 1, "b": 2}\n{"step": 2}\n{"step": 3}')
    assert files.truncate(path, 3) == ({"step": 3}, 0, [1, 1, 2, 3], None)
    assert path.read_text().endswith('{"step": 3}\n')  # a whole last line is kept, and ended
    assert files.truncate(path, 1) == ({"step": 1, "b": 2}, 2, [1, 1], None)
    assert path.read_text() == '{"step": 1}\n{"step": 1, "b": 2}\n'
    assert files.truncate(path, 0) == (None, 2, [], None)
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "text": "to')  # cut off while it was written
    assert files.truncate(path, 9) == ({"step": 2}, 1, [1, 2], None)


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path):
    with run_log.open_log(tmp_path / "run", total_steps=2, tracker="wandb", write=False) as log:
        log.write(1, "rl", {"train/loss": 1.0})
        log.say("hello")
    files.write_summary(tmp_path / "summary.json", {}, write=False)
    files.write_rollouts(tmp_path / "rollouts.jsonl", [ROLLOUT], 1, "rl", write=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line_before_the_folder_is_touched(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    line = rf"^config\.log\.tracker names {library}, which is not installed; pip install 'jaxreason\[{library}\]'$"
    with pytest.raises(NoTracker, match=line):
        run_log.open_log(tmp_path / "run", total_steps=1, tracker=f"tensorboard,{library}")
    with pytest.raises(NoTracker, match=line):
        make_log(tracker=library)  # of `build`, before any compilation
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tracker", "names"),
    [
        ("tensorboard", ("tensorboard",)),
        (" WandB, tensorboard,wandb", ("wandb", "tensorboard")),
        (("trackio", "tensorboard"), ("trackio", "tensorboard")),
        ("", ()),
        ("none", ()),
        ((), ()),
    ],
)
def test_trackers_are_named_by_one_field(tracker, names):
    assert read_names(tracker) == names


def test_a_tracker_that_does_not_exist_is_one_line():
    assert make_log()["log_options"]["tracker"] == ("tensorboard",)
    with pytest.raises(
        ValueError, match=r"^unknown tracker in config\.log\.tracker 'wandbb' \(did you mean 'wandb'\?\); one of: n"
    ):
        make_log(tracker="tensorboard,wandbb")
    with pytest.raises(
        ValueError, match=r"^config\.log\.tracker got 'none,wandb'; allowed: none alone, or names of: tensorboard, t"
    ):
        make_log(tracker="none,wandb")


@pytest.mark.parametrize(("field", "value"), [("tensorboard", "False"), ("wandb", "{}"), ("trackio.project", "x")])
def test_the_fields_of_earlier_versions_name_the_new_one(field, value):
    name = field.partition(".")[0]
    with pytest.raises(ValueError, match=rf"^field '{name}' of config\.log is gone; write config\.log\.tracker={name}\b"):
        command.read("configs/tiny.py:smoke", {f"log.{field}": value})


@pytest.mark.parametrize(
    ("log", "tracker"),
    [
        ({"tensorboard": True, "wandb": None, "trackio": None}, "tensorboard"),
        ({"tensorboard": False, "wandb": None}, ""),
        ({"tensorboard": True, "wandb": {"project": "mine"}, "trackio": {}}, "tensorboard,wandb,trackio"),
        ({"wandb": {}}, "tensorboard,wandb"),
        ({}, "tensorboard"),
    ],
)
def test_runs_of_earlier_versions_keep_their_trackers(log, tracker):
    config = load_config("tiny", "smoke").to_dict()
    there, _ = from_earlier({**config, "log": {"rollouts_kept": 16, **log}})
    assert there["log"]["tracker"] == tracker
    assert there["log"]["rollouts_kept"] == 16
    assert not {"tensorboard", "wandb", "trackio"} & there["log"].keys()


def test_progress_shows_what_is_there():
    values = {
        "phase": "rl",
        "rollout/reward": 0.5,
        "rollout/correct": 0.25,
        "rollout/length": 88.4,
        "train/entropy": 0.7,
        "perf/tokens_per_s": 12345.0,
        "time/sample_s": 6.0,
        "time/verify_s": 1.0,
        "time/learn_s": 3.0,
        "eval/countdown/accuracy": 0.125,
    }
    assert terminal.progress(terminal.At(values, 40, 200, 10, 50, step_s=2.0)) == (
        "rl 10/50  step 40/200  eta 1m20s  run 5m20s at this pace  reward 0.500  accuracy 0.250  length 88  entropy 0.700  "
        "tokens/s 12,345  countdown 0.125  sampling 60% verifying 10% learning 30%"
    )
    assert terminal.progress(terminal.At({"phase": "prior"}, 40, 200)) == "prior  step 40/200"
    assert (
        terminal.progress(terminal.At({"phase": "rl"}, 150, 200, 0, 50, step_s=144.0)) == "rl 0/50  step 150/200  eta 2h00m"
    )  # the last phase


def test_pace_forgets_the_compiling_step_and_the_last_phase():
    pace = run_log.Pace()
    for step_s in (60.0, 1.0, 2.0):
        pace = pace.after("prior", step_s)
    assert pace.step_s == pytest.approx(1.1)
    assert math.isnan(pace.after("rl", 30.0).step_s)


def test_without_a_terminal_lines_are_plain_and_rare(monkeypatch):
    console, printed = on_paper()
    now = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    log = run_log.RunLog(io.StringIO(), (), console, total_steps=100, start_s=0.0)
    for step in range(1, 101):
        now[0] = 0.5 * step
        log.write(step, "rl", {"train/loss": float(step)} | ({"eval/x/accuracy": 0.5} if step == 50 else {}))
    log.say("done \x1b[2J")
    log.close()
    steps = [line.split("step ")[1].split("/")[0] for line in printed().splitlines()[:-1]]
    assert steps == ["1", "21", "41", "50", "70", "90", "100"]  # every ten seconds, at an evaluation, and at the end
    assert printed().endswith("done \\x1b[2J\n")
    assert "\r" not in printed()
    assert "\x1b" not in printed()


def test_evaluations_before_and_after():
    console, printed = on_paper()
    evaluations = [
        Evaluation("start", 0, "[b]arith", 0.1, 0.05, 0.2, 100, 0.0),
        Evaluation("prior", 5, "[b]arith", 0.2, 0.1, 0.3, 100, 0.0),
        Evaluation("prior", 10, "[b]arith", 0.3, 0.2, 0.4, 100, 0.0),
        Evaluation("prior", 10, "words", 0.5, 0.4, 0.6, 100, 1.0),
        Evaluation("rl", 20, "[b]arith", 0.512, 0.47, 0.56, 100, 0.0),
    ]
    terminal.print_evaluations(evaluations, console=console)
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed().splitlines() if "0." in line]
    assert rows == [
        ["[b]arith", "0", "0.100 0.05-0.20", "0.300 0.20-0.40", "0.512 0.47-0.56", "+0.412"],
        ["words", "1", "-", "0.500 0.40-0.60", "-", "-"],
    ]
    for title in ("start", "after prior", "after rl", "change"):
        assert title in printed()
    alone, printed = on_paper()
    terminal.print_evaluations(evaluations[:1], console=alone)
    assert "change" not in printed()


def test_print_rollouts_shows_but_never_obeys():
    nasty = dataclasses.replace(ROLLOUT, text=NASTY + "\nnext", verdict=Verdict(0.0, False, NASTY, NASTY))
    console, printed = on_paper(width=60)
    terminal.print_rollouts([ROLLOUT, nasty, ROLLOUT], 2, console=console)
    shown = printed()
    assert "problem 4, attempt 1: correct, reward 1, 3 tokens" in shown
    assert shown.count("1 + 1?") == 2
    assert r"[red]x[/red] [/] \x1b[2J \r \x07 \u202e \u200b \ud800 \x9b31m" + "\nnext" in shown
    assert not any(char in shown for char in "\x1b\r\x07\u202e\u200b\x9b")
    ascii_console, printed = on_paper(encoding="ascii")
    terminal.print_rollouts(
        [dataclasses.replace(ROLLOUT, text="π é")], console=ascii_console, decode=lambda ids: f"<{ids.tolist()}>"
    )
    assert r"\u03c0 \xe9" in printed()
    assert "<[5, 6]>" in printed()


def test_visible_keeps_ordinary_text():
    text = "x² ≥ π\tü 数\nend 🙂"
    assert terminal.visible(text) == text


def test_write_rollouts(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    nasty = dataclasses.replace(ROLLOUT, text=NASTY, verdict=Verdict(math.nan, np.bool_(False), NASTY), logp=np.full(3, -np.inf))
    files.write_rollouts(path, [ROLLOUT], 3, "rl", decode=lambda ids: " ".join(map(str, ids)))
    files.write_rollouts(path, [nasty], 4, "rl")
    first, second = lines(path)
    assert first == {
        "step": 3,
        "phase": "rl",
        "problem": 4,
        "task": "set/7",
        "attempt": 1,
        "question": "1 + 1?",
        "prompt": "5 6",
        "text": "so 2",
        "answer": "2",
        "reward": 1.0,
        "correct": True,
        "parsed": "2",
        "reason": "equal",
        "stop": "eos",
        "logp_sum": -1.75,
        "length": 3,
        "sampled": 3,
        "temperature": 0.7,
    }
    assert second["text"] == second["parsed"] == NASTY
    assert (second["prompt"], second["reward"], second["logp_sum"], second["correct"]) == ([5, 6], None, None, False)


def test_each_token_has_an_author_and_each_rollout_an_advantage(tmp_path):
    path, sampled = tmp_path / "rollouts.jsonl", np.array([True, False, False, True, False])
    spoken = dataclasses.replace(ROLLOUT, tokens=np.arange(5), logp=np.zeros(5, np.float32), sampled=sampled, author="mtfmt")
    files.write_rollouts(path, [spoken, ROLLOUT], 1, "rl", pieces=lambda ids: list(map(str, ids)), advantages=[0.5, None])
    first, second = lines(path)
    assert (first["author"], second["author"]) == ("mtfmt", "mmm")
    assert first["advantage"] == 0.5
    assert "advantage" not in second


def test_rollouts_are_kept_in_whole_groups():
    rollouts = [dataclasses.replace(ROLLOUT, problem=problem, attempt=i) for problem in range(3) for i in range(4)]
    kept = {most: len(files.whole_groups(rollouts, most)) for most in (0, 1, 4, 7, 8, 11, 12, 100)}
    assert kept == {0: 0, 1: 4, 4: 4, 7: 4, 8: 8, 11: 8, 12: 12, 100: 12}
    assert files.whole_groups([], 5) == []


def test_summary_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    evaluation = Evaluation("rl", np.int64(3), "arith", jnp.float32(0.5), math.nan, math.inf, 8, 1.0)
    files.write_summary(path, {"final": [evaluation], "workdir": tmp_path, "curve": np.arange(2)})
    written = strict(path.read_text())
    assert written["final"][0] == evaluation._asdict() | {"accuracy": 0.5, "step": 3, "low": None, "high": None}
    assert (written["curve"], written["workdir"]) == ([0, 1], str(tmp_path))
    before = path.read_text()
    with pytest.raises(TypeError):
        files.write_summary(path, {"bad": object()})
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_disagreement_of_sampler_and_learner_is_told_beside_what_is_usual():
    assert terminal.mismatch({"train/nll": 1.0}) == []
    name = "rollout/kl_sampler_learner"
    whole, by_depth = terminal.mismatch({name: 2e-4, f"{name}_k1": -3e-5, f"{name}/0_63": 1e-4, f"{name}/4096_on": 0.5})
    assert whole.startswith(
        "KL of sampler and learner per token, when last logged: 0.0002 (k1: -3e-05); usual in bfloat16: 1e-05 to"
    )
    assert by_depth == "  at positions 0 to 63: 0.0001, 4096 on: 0.5"
    assert len(terminal.mismatch({name: 2e-4})) == 1
    (unknown,) = terminal.mismatch({name: float("nan")})
    assert "not known" in unknown
    assert "nan" not in unknown


# --- trackers ---


class Fake:
    """A library with the functions of W&B and trackio that a run uses. Runs stay."""

    def __init__(self, library="trackio", fails_at=None):
        self.library, self.logged, self.fails_at, self.ended, self.begun = library, [], fails_at, 0, []
        self.Histogram = lambda x: ("histogram", x)
        setattr(self, {"trackio": "Markdown", "wandb": "Html"}[library], lambda x: ("text", x))

    def init(self, **options):
        self.begun.append(options)
        if self.library == "wandb":  # W&B continues after the last step
            self.step = max((step for step, _ in self.logged), default=-1) + 1
        return self

    def log(self, values, step):
        if step == self.fails_at:
            raise ConnectionError("no network\nat all")
        self.logged.append((step, values))

    def finish(self):
        self.ended += 1


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_hosted_tracker_gets_metrics_histograms_and_texts(tmp_path, monkeypatch, library):
    fake = Fake(library)
    monkeypatch.setitem(sys.modules, library, fake)
    with run_log.open_log(tmp_path, total_steps=2, live=False, tracker=library, config={"seed": 3}) as log:
        log.write(1, "rl", {"train/loss": 0.5, "train/bad": math.nan})
        log.write_more(
            1, histograms={"rollout/lengths": [3, math.nan, 4], "none": [math.inf]}, texts={"eval/x": "# no <b>\nheading\x1b[31m"}
        )
    assert (fake.begun[0]["project"], fake.begun[0]["config"]) == ("jaxreason", {"seed": 3})
    assert fake.logged[0] == (1, {"train/loss": 0.5})
    assert fake.logged[1] == (1, {"rollout/lengths": ("histogram", [3.0, 4.0])})
    shown = {
        "trackio": "    # no <b>\n    heading\\x1b[31m",
        "wandb": '<pre style="white-space: pre-wrap"># no &lt;b&gt;\nheading\\x1b[31m</pre>',
    }
    assert fake.logged[2] == (1, {"eval/x": ("text", shown[library])})
    assert fake.ended == 1


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_run_that_resumes_continues_its_run_in_a_hosted_tracker(tmp_path, monkeypatch, library):
    fake = Fake(library)
    monkeypatch.setitem(sys.modules, library, fake)
    options = {"total_steps": 9, "live": False, "tracker": library, "config": {}}
    for resume_step, steps in ((-1, (1, 2, 3, 4)), (2, (3, 4, 5)), (5, (6,)), (-1, (1,))):
        with run_log.open_log(tmp_path, resume_step=resume_step, **options) as log:
            for step in steps:
                log.write(step, "rl", {"train/loss": 0.5})
    name = {"wandb": "id", "trackio": "name"}[library]
    first, second, third, anew = (begun[name] for begun in fake.begun)
    assert first == second == third != anew
    assert all(begun["resume"] == "allow" for begun in fake.begun)
    assert [begun["config"] for begun in fake.begun] == [{}, None, None, {}]
    got = [step for step, _ in fake.logged]
    if library == "wandb":  # steps that are repeated are in the run already, and W&B refuses them
        assert got == [1, 2, 3, 4, 5, 6]
    else:
        assert got == [1, 2, 3, 4, 3, 4, 5, 6, 1]


def test_a_damaged_or_missing_id_begins_a_new_run_of_the_tracker(tmp_path):
    first = run_id(tmp_path, continues=False)
    assert run_id(tmp_path, continues=True) == first
    for damaged in ("", "[]", '{"id": "../x"}', '{"id": 3}', "\xff"):
        (tmp_path / STORED).write_text(damaged, encoding="latin-1")
        made = run_id(tmp_path, continues=True)
        assert made != first
        assert run_id(tmp_path, continues=True) == made


@pytest.mark.process
def test_a_killed_run_that_resumes_is_one_run_of_the_real_trackio(tmp_path):
    """A killed process says no word to the library, and the next one continues."""
    pytest.importorskip("trackio")
    code = (
        "import os, sys, time\nfrom jaxreason.runtime import log as run_log\n"
        "resume, first, last, killed = map(int, sys.argv[2:])\n"
        "options = {'tracker': 'trackio', 'live': False, 'config': {'seed': 3}}\n"
        "log = run_log.open_log(sys.argv[1], total_steps=9, resume_step=resume, **options)\n"
        "for step in range(first, last + 1):\n"
        "    log.write(step, 'rl', {'train/loss': 1.0 / step})\n"
        "    log.write_more(step, histograms={'rollout/lengths': [1, 2]}, texts={'eval/x/0': f'text {step}'})\n"
        "    log._trackers.trackers[0]._run._flush_queues_inline() if killed else None\n"
        "os._exit(9) if killed else log.close()\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "db"), "JAX_PLATFORMS": "cpu"}
    for arguments in ((-1, 1, 4, 1), (2, 3, 6, 0)):
        words = [sys.executable, "-c", code, str(tmp_path / "run"), *map(str, arguments)]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
        assert ended.returncode == (9 if arguments[-1] else 0), ended.stderr
    read = (
        "from trackio.sqlite_storage import SQLiteStorage as s\nimport json\n"
        "(run,) = s.get_run_records('jaxreason')\n"
        "print(json.dumps([run['name'], s.get_logs('jaxreason', run['name'], run_id=run['id'])], default=str))\n"
    )
    shown = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=60, env=environment)
    assert shown.returncode == 0, shown.stderr
    name, logs = json.loads(shown.stdout.splitlines()[-1])
    assert name == f"run-{json.loads((tmp_path / 'run' / STORED).read_text())['id']}"
    assert {log["step"] for log in logs if "train/loss" in log} == set(range(1, 7))
    assert {log["eval/x/0"]["_value"] for log in logs if "eval/x/0" in log} == {f"    text {step}" for step in range(1, 7)}


def test_trackers_get_texts_of_every_evaluation(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    config = load_config("tiny", "smoke", **{"phases": ("rl",), "rl.steps": 2, "rl.evaluate_every": 1})
    checkpoints = checkpoint.open_checkpoints(tmp_path / "checkpoints", **config.checkpoint.to_dict())
    train(build(config), tmp_path, checkpoints, log_options={"live": False, "tracker": "trackio"})
    checkpoints.close()
    texts = {(step, name) for step, values in fake.logged for name in values if isinstance(values[name], tuple)}
    modes = [f"eval/{suite}/{mode}/{i}" for suite in ("chain", "chain_ood") for mode in ("greedy", "t1") for i in range(3)]
    assert {(step, name) for step, name in texts if name.startswith("eval/")} == {(s, name) for s in (0, 1, 2) for name in modes}


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path, monkeypatch):
    fake, said = Fake(fails_at=2), []
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with run_log.open_log(tmp_path, total_steps=4, live=False, tracker="trackio") as log:
        log.say = said.append
        for step in range(1, 5):
            log.write(step, "rl", {"train/loss": 0.5})
    (line,) = said
    assert line.startswith("warning: can't write to trackio: no network at all; ")
    assert [step for step, _ in fake.logged] == [1]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_histograms_are_of_the_rollouts_of_their_step(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    config = load_config("tiny", "smoke", **{"phases": ("rl",), "rl.steps": 3, "rl.log_every": 1})
    config.evaluate.suites = {}
    with config.unlocked():
        config.log.rollouts_kept = 10**6
    checkpoints = checkpoint.open_checkpoints(tmp_path / "checkpoints", **config.checkpoint.to_dict())
    train(build(config), tmp_path, checkpoints, log_options={"live": False, "tracker": "trackio"})
    checkpoints.close()
    written = {step: [] for step in (1, 2, 3)}
    for record in lines(tmp_path / "rollouts.jsonl"):
        written[record["step"]].append(float(record["length"]))
    found = {step: values["rollout/lengths"][1] for step, values in fake.logged if "rollout/lengths" in values}
    assert found == written


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    fake = Fake()
    fake.init = lambda **options: fake.log({}, fake.fails_at)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(NoTracker, match=r"^wandb can't begin a run: no network at all; .* out of config\.log\.tracker$"):
        run_log.open_log(tmp_path, total_steps=1, live=False, tracker="wandb")


def test_tensorboard_gets_histograms_and_texts_as_text(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with run_log.open_log(tmp_path, total_steps=2, live=False) as log:
        log.write_more(3, histograms={"rollout/lengths": [1, 2, 30], "none": []}, texts={"eval/x": "<script>\n\x1b[31m"})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {value.tag: (event.step, value) for value in event.summary.value}
        at += size + 16
    step, histogram = found["rollout/lengths"]
    assert (step, histogram.histo.num, histogram.histo.max) == (3, 3, 30)
    (text,) = [value for tag, (_, value) in found.items() if tag.startswith("eval/x")]
    assert text.tensor.string_val[0] == b"    <script>\n    \\x1b[31m"


def test_the_first_metrics_are_taken_as_they_are_and_later_ones_added_in_one_program():
    arrays = {f"m{i}": (jnp.float32(i), jnp.float32(1)) for i in range(40)}
    first = metrics.merge({}, arrays)
    assert all(first[name] is pair for name, pair in arrays.items()), "nothing is added to 0"
    before = metrics.add_arrays._cache_size()
    twice = metrics.merge(first, arrays, {"host": (2.0, 1.0)}, {"host": (3.0, 1.0)})
    assert metrics.add_arrays._cache_size() == before + 1
    assert float(twice["m7"][0]) == 14.0
    assert twice["host"] == (5.0, 2.0)


def test_the_worst_value_stays_the_worst():
    a, b = {"x_worst": (jnp.float32(3), jnp.float32(1)), "n_worst": (1.0, 1.0)}, {"x_worst": (jnp.float32(2), jnp.float32(1))}
    merged = metrics.merge(a, b, {"n_worst": (4.0, 1.0)})
    assert metrics.divide(merged) == {"x_worst": 3.0, "n_worst": 4.0}
