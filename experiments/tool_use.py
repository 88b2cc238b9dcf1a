r"""Does a model learn by RL alone to call a calculator, and does it then depend on it?

    python -m jaxreason.sweep --experiment=experiments/tool_use.py

**Hypothesis.** A model whose prior calls the calculator in a quarter of its solutions
learns from right answers alone to call it always. It does not learn the arithmetic:
without the calculator, in training or at test time, it stays where it was.

**Arms** (configs/tools.py, `47*83+512:`; seeds 0 to 4, paired): RL with the calculator
(`tool`, baseline); the same RL without it, where the model itself writes what follows
`=` (`no_tool`); RL with the calculator and random rewards (`random_reward`). Every run
is evaluated on 512 held-out problems with what it was trained with (`calculator`) and
without the calculator (`no_tool`).

**Decision rule**, written before the run (2026-11-28); seed 0 of `tool` had been seen
while the config was made. Temperature 1, differences paired over seeds, 95 %
t-intervals.

1. "Learns to call" is shown if the accuracy of `tool` after RL less that after its
   prior has an interval above 0.3, and its mean number of calls is at least 1.9 of the
   2 that a solution needs.
2. "Depends on it" is shown if `tool` without the calculator at test time is at most
   0.02 right on every seed.
3. "Training without it does not help" is shown if `no_tool` ends below 0.05 on every
   seed.
4. "The reward matters" is shown if `random_reward` ends below `tool` with a corrected p
   below 0.05.
"""

from __future__ import annotations

from pathlib import Path

from jaxreason.options import parse
from jaxreason.sweep import Sweep

METRIC = "eval/calculator/t1/accuracy"


def sweep(arg: str = "") -> Sweep:
    parse(arg, quick=False)  # it is quick as it is
    arms = {
        "tool": {},
        "no_tool": {"environment": {"name": "single_turn"}},
        "random_reward": {"rl.source.reward": "random"},
    }
    common = {"log.tensorboard": False}
    return Sweep("configs/tools.py", list(arms.values()), names=list(arms), common=common, metric=METRIC)


def figures(folder: Path, report) -> None:
    """Draw the accuracy over RL's steps, with the calculator and without it, and write
    the numbers of the decision rule.
    """
    import json

    import numpy as np

    from jaxreason.estimators import mean_interval
    from jaxreason.look.figures import COLORS, new_axes, save
    from jaxreason.sweep.results import accuracy_before

    runs = {arm.name: [folder / "runs" / arm.name / f"seed{seed}" for seed in arm.seeds] for arm in report.arms}
    found = {name: [evaluations(run) for run in each] for name, each in runs.items()}
    before_after = np.array([accuracy_before(run, "rl", "calculator", 1.0) for run in runs["tool"]])
    told = {
        "gain of tool": mean_interval(before_after[:, 1] - before_after[:, 0]),
        **{
            f"{name}, {suite}, {measure}": [one[suite][-1][measure] for one in each]
            for name, each in found.items()
            for suite in ("calculator", "no_tool")
            for measure in ("accuracy", "tool_calls")
        },
    }
    (folder / "tool_use.json").write_text(json.dumps(told, indent=2))
    print(json.dumps(told, indent=2))
    axes = new_axes()
    lines = [
        ("tool", "calculator", "-"),
        ("tool", "no_tool", ":"),
        ("no_tool", "calculator", "-"),
        ("random_reward", "calculator", "-"),
    ]
    for i, (name, suite, style) in enumerate(lines):
        steps = [point["step"] for point in found[name][0][suite]]
        value_SK = np.array([[point["accuracy"] for point in one[suite]] for one in found[name]])
        label = f"{name}, calculator taken away at test time" if suite == "no_tool" else name
        axes.plot(steps, value_SK.mean(axis=0), style, color=COLORS[i], label=label)
        axes.fill_between(steps, value_SK.min(axis=0), value_SK.max(axis=0), color=COLORS[i], alpha=0.15, linewidth=0)
    axes.set(xlabel="step (RL begins at 1,000)", ylabel="accuracy at temperature 1", ylim=(-0.02, 1.02))
    save(axes, folder / "figures" / "tool_use.png")


def evaluations(run: Path) -> dict[str, list[dict]]:
    """Return, for each suite, its evaluations at temperature 1 since the prior's end."""
    import json

    summary = json.loads((run / "summary.json").read_text())
    found: dict[str, list[dict]] = {}
    for one in summary["evaluations"]:
        if one["temperature"] == 1.0 and one["step"] >= 1000:
            point = {"step": one["step"], "accuracy": one["accuracy"], "tool_calls": one["measures"].get("tool_calls", 0.0)}
            found.setdefault(one["suite"], []).append(point)
    return found
