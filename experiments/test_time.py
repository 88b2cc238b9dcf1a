r"""Votes and budgets of thinking at test time: what do they buy, before RL and after
it? Does the model before RL overtake the one after it when many samples are drawn?

    python -m jaxreason.sweep --experiment=experiments/test_time.py[:quick]

**Hypothesis.** After RL a vote over samples and a larger budget of thinking are worth
more than one short sample. And RL narrows what the model can solve at all: with enough
samples, the model before RL solves more problems (Yue et al. 2025, arXiv 2504.13837).

**Set-up.** Reversing strings of digits (`<407:` -> `40,7;4,70;,704;A704`): answers are
strings of six or seven digits, so that a lucky guess has no part in pass@k. A prior of
2,000 steps on human-like demonstrations of three to seven digits, then 100 steps of RL
on four to six digits; seeds 0 to 4. Both checkpoints of each seed are evaluated on 128
held-out strings of six digits (in RL's range) and of seven (beyond it), temperature 1,
64 samples each; and with the end of thinking forced after 8, 16, 24, 32, 40, 48 and 64
tokens, 4 samples each.

**Decision rule**, written before the run (2026-11-28). Differences are paired over
seeds, with 95 % t-intervals.

- "Votes help": majority@64 less the accuracy of one sample, seven digits, after RL: the
  interval is above 0.
- "Thinking helps": accuracy at the largest budget less that at 8 tokens, six digits,
  after RL: the interval is above 0, and no larger budget loses more than 0.02 on
  average against the one before it.
- "The base overtakes": pass@64 before RL less pass@64 after it, seven digits: shown if
  the interval is above 0, the opposite if it is below 0, else not shown.

**Findings** (2026-11-28, commit 7b3e9a1, one core of a 2-core AMD EPYC beside other
work, jax 0.10.2, five paired seeds, 36 minutes). None of the three is shown by its rule:

- "Votes help": 0.110 [-0.002, 0.222], **not shown**: with seven digits one sample after
  RL is 0.117 right, a vote of 64 0.226; the seeds differ too much.
- "Thinking helps": 0.974 [0.947, 1.001], yet **not shown** by the letter of the rule: all
  budgets below 40 tokens are useless, and from 16 to 24 tokens the accuracy falls by
  0.022 on average, where at most 0.02 was allowed. With 48 tokens, which hold all steps,
  it is 0.986 after RL and 0.379 before. Half the steps are worth nothing here.
- "The base overtakes": 0.070 [-0.086, 0.226], **not shown**. On average the curves of
  pass@k cross between 4 and 8 samples (0.602 before RL against 0.531 after it at 64),
  but one seed of five goes the other way.

Exploratory: with seven digits RL raised the accuracy of one sample (0.078 to 0.117) and
lowered that of a vote of 64 (0.364 to 0.226). With six digits, in RL's range, a vote of
64 before RL (0.995) is as good as RL: one sample after it is 0.981 right.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from jaxreason.estimators import mean_interval
from jaxreason.options import parse
from jaxreason.sweep import Sweep

BEFORE, AFTER = 2000, 2100  # steps of the checkpoints
BUDGETS = (8, 16, 24, 32, 40, 48, 64)
SUITES = {"six": 6, "seven": 7}  # digits


def task(lowest: int, highest: int, **more) -> dict:
    return {"name": "reversal", "length": (lowest, highest), **more}


def sweep(arg: str = "") -> Sweep:
    parse(arg, quick=False)  # it is quick as it is
    common = {
        "prior.source.task": task(3, 7, demonstrations="human", size=20_000, slip=0.08, guess=0.5),
        "rl.source.task": task(4, 6, size=4096),
        "rl.source.max_tokens": 60,
        "rl.steps": AFTER - BEFORE,
        "rl.evaluate_every": 25,
        "verifier": {"name": "exact", "marker": "A"},
        "evaluate.suites": {name: {"name": "reversal", "length": digits} for name, digits in SUITES.items()},
        "evaluate.temperatures": (1.0,),
        "sampler.max_tokens": 96,
        "log.tracker": "none",
    }
    return Sweep("configs/tiny.py", [{}], names=["reversal"], common=common, metric="eval/seven/t1/accuracy")


def figures(folder: Path, report) -> None:
    """Evaluate both checkpoints of each seed, and draw both curves; write numbers and
    verdicts to test_time.json.
    """
    seeds = report.arms[0].seeds
    votes = {step: [evaluate(folder, seed, step, samples=64) for seed in seeds] for step in (BEFORE, AFTER)}
    thinking = {step: [evaluate(folder, seed, step, samples=4, budgets=BUDGETS) for seed in seeds] for step in (BEFORE, AFTER)}
    told = judge(votes, thinking)
    (folder / "test_time.json").write_text(json.dumps(told, indent=2))
    print(json.dumps(told["verdicts"], indent=2))
    draw(told["curves"], folder / "figures" / "test_time.png")


def evaluate(folder: Path, seed: int, step: int, samples: int, budgets: tuple[int, ...] = ()) -> list[dict]:
    """Evaluate a checkpoint, or read its evaluation."""
    out = folder / "evaluations" / f"seed{seed}-{step}-{'budgets' if budgets else 'votes'}"
    checkpoint = folder / "runs" / "reversal" / f"seed{seed}" / "checkpoints" / str(step)
    command = [f"--checkpoint={checkpoint}", "--temperature=1", "--n=128", f"--samples={samples}", f"--workdir={out}"]
    if budgets:
        command += ["--suites=six", f"--thinking_tokens={','.join(map(str, budgets))}", "--end_of_thinking=A"]
    subprocess.run([sys.executable, "-m", "jaxreason.evaluate", *command], check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "evaluation.json").read_text())["evaluations"]


def judge(votes: dict, thinking: dict) -> dict:
    """Return the curves, a list of seeds at each point, and the rule's verdicts."""
    curves: dict[str, dict] = {}
    for step, name in ((BEFORE, "before RL"), (AFTER, "after RL")):
        for suite in SUITES:
            found = [next(e for e in run if e["suite"] == suite) for run in votes[step]]
            for use in ("pass", "majority"):
                curves[f"{suite}, {name}, {use}"] = {k: [e["curves"][use][k] for e in found] for k in found[0]["curves"][use]}
        budgets = sorted(e["thinking_tokens"] for e in thinking[step][0])
        curves[f"budget, {name}"] = {
            b: [next(e["accuracy"] for e in run if e["thinking_tokens"] == b) for run in thinking[step]] for b in budgets
        }
    after = curves["budget, after RL"]
    steps_up = np.diff([np.mean(values) for values in after.values()])
    voted, budget, overtaken = (
        mean_interval(np.subtract(*pair))
        for pair in (
            (curves["seven, after RL, majority"]["64"], curves["seven, after RL, pass"]["1"]),
            (after[max(after)], after[min(after)]),
            (curves["seven, before RL, pass"]["64"], curves["seven, after RL, pass"]["64"]),
        )
    )
    verdicts = {
        "votes help": (voted, "shown" if voted[1] > 0 else "not shown"),
        "thinking helps": (budget, "shown" if budget[1] > 0 and steps_up.min() >= -0.02 else "not shown"),
        "the base overtakes": (overtaken, "shown" if overtaken[1] > 0 else "the opposite" if overtaken[2] < 0 else "not shown"),
    }
    return {"verdicts": verdicts, "curves": curves}


def draw(curves: dict, out: Path) -> None:
    """Draw pass@k and majority@k of seven digits, and accuracy against the budget."""
    from jaxreason.look.figures import COLORS, new_axes, save

    for suffix, names, xlabel in (
        (
            "",
            [f"seven, {when} RL, {use}" for use in ("pass", "majority") for when in ("before", "after")],
            "samples k (seven digits)",
        ),
        ("_budget", ["budget, before RL", "budget, after RL"], "tokens of thinking (six digits)"),
    ):
        axes = new_axes()
        for i, name in enumerate(names):
            x = [int(k) for k in curves[name]]
            value_KS = np.array(list(curves[name].values()))
            style = "--" if name.endswith("majority") else "-"
            label = (
                name.replace("seven, ", "")
                .replace("budget, ", "")
                .replace(", pass", ": pass@k")
                .replace(", majority", ": majority@k")
            )
            axes.plot(x, value_KS.mean(axis=1), style, color=COLORS[i % 2], label=label)
            axes.fill_between(x, value_KS.min(axis=1), value_KS.max(axis=1), color=COLORS[i % 2], alpha=0.15, linewidth=0)
        axes.set(xlabel=xlabel, ylabel="accuracy", ylim=(-0.02, 1.02))
        if not suffix:
            axes.set_xscale("log", base=2)
        save(axes, out.with_name(out.stem + suffix + ".png"))
