r"""Does a new model learn more from the right attempts of an RL model than from the
human-like data on which that model began?

    python -m jaxreason.sweep --experiment=experiments/synthetic.py

**Hypothesis.** An RL model writes out all steps and gets them right, so its verified
attempts teach a new model more than human-like traces do: not only because wrong ones
are filtered out, nor because there are more of them.

**Set-up.** The task is `chain`. For each seed a teacher (configs/tiny.py as it is, seed
100 + seed: 2,000 steps of prior, 160 of RL on chains of 2 to 5 operations) attempts
5,000 new questions of 1 to 8 operations once, at temperature 1; `jaxreason.generate`
keeps the right attempts. A new model from other random weights has 1,000 steps of
next-token prediction on one of the data sets below, with the rows, the learning rate
and the model of the teacher's prior. All arms have the same questions; the teacher has
seen answer keys in RL that the human-like data do not have. The data sets differ in
their numbers of tokens, so the same steps repeat some of them more often.

**Arms.** `human`: the human-like traces of the questions, right and wrong (baseline).
`human_right`: those that the verifier accepts. `synthetic`: the kept attempts of the
teacher. `matched`: the first of these, as many as `human_right` has. `second`: the kept
attempts, at the same questions, of a model trained as in `synthetic`.

**Decision rule**, written before the run (2026-11-28). Accuracy at temperature 1 on 512
held-out chains of five operations. Differences are paired over seeds 0 to 4, with 95 %
t-intervals.

1. "It learns more" is shown if `synthetic` less `human` has an interval above 0.
2. "Not by the filter alone" is shown if `synthetic` less `human_right` does.
3. "Nor by the count" is shown if `matched` less `human_right` does.
4. "A second generation keeps it" is shown if `second` less `synthetic` has an interval
   above -0.05; "loses it" if it is below 0.

**Findings**, 2026-11-28 (commit d7c106b, one core of a 2-core AMD EPYC with AVX-512,
jax 0.10.2, float32, seeds 0 to 4, 55 minutes beside other work). Accuracy at
temperature 1, mean over seeds with its 95 % t-interval (chance is 0.1):

| arm | accuracy | questions |
|---|---|---|
| `human` | 0.113 [0.099, 0.127] | 5,000 |
| `human_right` | 0.114 [0.102, 0.126] | 2,020 to 2,099 |
| `matched` | 0.203 [0.158, 0.248] | the same |
| `synthetic` | 0.442 [0.240, 0.644] | 4,058 to 4,359 |
| `second` | 0.227 [0.046, 0.407] | 1,993 to 3,638 |

1. **Shown**: `synthetic` less `human` is 0.329 [0.120, 0.539].
2. **Shown**: `synthetic` less `human_right` is 0.328 [0.132, 0.524].
3. **Shown**: `matched` less `human_right` is 0.089 [0.054, 0.124].
4. **A second generation loses it**: `second` less `synthetic` is -0.216 [-0.423,
   -0.009]. Its data are fewer, as its teacher is right less often (0.44 against 0.92).

What this does not show: the teachers ended at 0.904 to 0.934, far above any arm, and
their training (5.4e12 FLOPs each) is not counted against `synthetic` (2.1e12 each). The
human-like data are bad by construction: more than half are guesses, and one guess in
ten is right and so stays in `human_right`. With 2,000 questions 1,000 steps repeat the
data often, and `matched` falls after step 500.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxreason import tasks, verify
from jaxreason.estimators import mean_interval
from jaxreason.options import parse
from jaxreason.sweep import Sweep

CONFIG, STEPS, QUESTIONS = "configs/tiny.py", 1000, 5000
METRIC = "eval/chain/t1/accuracy"
WEIGHTS = (0.12, 0.18, 0.20, 0.15, 0.12, 0.09, 0.08, 0.06)
HUMAN = {"demonstrations": "human", "guess": 0.55, "stop_early": 0.15, "slip": 0.1}  # as in configs/tiny.py
DATA = {"human_right", "synthetic", "matched", "second"}  # folders that `prepare` makes for each seed


def task(seed: int | None, size: int = QUESTIONS, **more) -> dict:
    """Return the section of the questions; without a seed, that of the run."""
    section = {"name": "chain", "ops": (1, 8), "ops_weights": WEIGHTS, "size": size, **more}
    return section if seed is None else {**section, "seed": seed}


def sweep(arg: str = "") -> Sweep:
    parse(arg, quick=False)  # it is quick as it is
    arms = {"human": {"prior.source.task": task(None, **HUMAN)}}
    arms |= {
        name: {"prior.source.task": {"name": "generated", "path": f"{{folder}}/data/seed{{seed}}/{name}"}}
        for name in sorted(DATA)
    }
    return Sweep(CONFIG, list(arms.values()), names=list(arms), common=student(), metric=METRIC)


def student(steps: int = STEPS) -> dict:
    """Return the fields of a model that is trained on a data set alone."""
    return {"phases": ("prior",), "prior.steps": steps, "prior.evaluate_every": 250, "log.tracker": "none"}


def prepare(
    folder: Path,
    seeds: Sequence[int],
    *,
    config: str = CONFIG,
    teacher: Sequence[str] = (),
    questions: int = QUESTIONS,
    steps=STEPS,
) -> None:
    """Make the teachers and the data sets; what is there is skipped. `teacher` has
    further flags of the teacher's run.
    """
    for seed in seeds:
        data, taught = folder / "data" / f"seed{seed}", folder / "teachers" / f"seed{seed}"
        train(config, taught, f"--config.seed={100 + seed}", *teacher)
        generate(taught, data / "synthetic", seed, questions)
        path = f"--config.prior.source.task={ ({'name': 'generated', 'path': str(data / 'synthetic')})!r}"
        changes = [f"--config.{name}={value}" for name, value in student(steps).items()]
        train(config, folder / "second" / f"seed{seed}", f"--config.seed={200 + seed}", path, *changes)
        generate(folder / "second" / f"seed{seed}", data / "second", seed, questions)
        right = list(human_right(seed, questions))
        write(data / "human_right", right)
        write(data / "matched", read(data / "synthetic")[: len(right)])


def train(config: str, workdir: Path, *changes: str) -> None:
    """Train a config; a run that is done is left as it is."""
    command = [sys.executable, "-m", "jaxreason.main", f"--config={config}", f"--workdir={workdir}", *changes]
    summary = workdir / "summary.json"
    if not (summary.is_file() and json.loads(summary.read_text())["done"]):
        print(f"training {workdir}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def generate(run: Path, out: Path, seed: int, questions: int) -> None:
    words = [f"--checkpoint={run}", f"--out={out}", f"--task={task(seed, questions)!r}", f"--n={questions}", "--attempts=1"]
    about = out / "about.json"
    if not (about.is_file() and json.loads(about.read_text())["done"]):
        subprocess.run([sys.executable, "-m", "jaxreason.generate", *words], check=True)


def human_right(seed: int, questions: int):
    """Yield the human-like traces that the verifier accepts."""
    judge, items = verify.make("exact", marker=";A"), tasks.load(**task(seed, questions, **HUMAN))
    for one in (items[i] for i in range(len(items))):
        if judge(one.solution, one).correct:
            yield {"question": one.question, "answer": one.answer, "solution": one.solution, "task": one.id}


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]


def write(folder: Path, rows: Sequence[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def figures(folder: Path, report) -> None:
    """Print the numbers of the decision rule, and draw the accuracy over the steps."""
    from jaxreason.look.figures import COLORS, new_axes, save

    found, axes = {}, new_axes()
    for i, arm in enumerate(report.arms):
        runs = [folder / "runs" / arm.name / f"seed{seed}" for seed in arm.seeds]
        curves = [[(e["step"], e["accuracy"]) for e in evaluations(run)] for run in runs]
        found[arm.name] = np.array(curves)[:, :, 1]
        axes.plot([step for step, _ in curves[0]], found[arm.name].mean(axis=0), color=COLORS[i % len(COLORS)], label=arm.name)
    pairs = (("synthetic", "human"), ("synthetic", "human_right"), ("matched", "human_right"), ("second", "synthetic"))
    told = {f"{a} less {b}": mean_interval(found[a][:, -1] - found[b][:, -1]) for a, b in pairs}
    sizes = {name: [len(read(one)) for one in sorted((folder / "data").glob(f"seed*/{name}"))] for name in sorted(DATA)}
    text = json.dumps({"differences": told, "tasks": sizes}, indent=2, default=lambda value: np.round(value, 4).tolist())
    (folder / "synthetic.json").write_text(text)
    print(text)
    axes.set(xlabel="step", ylabel="accuracy at temperature 1, five operations")
    save(axes, folder / "figures" / "synthetic.png")


def evaluations(run: Path) -> list[dict]:
    every = json.loads((run / "summary.json").read_text())["evaluations"]
    return [e for e in every if e["suite"] == "chain" and e["temperature"] == 1.0]
