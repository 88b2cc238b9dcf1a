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

**Findings** (2026-11-28, commit 3c21ec3, 2-core AMD EPYC with AVX-512, two runs at a
time beside other work, jax 0.10.2; 1,000 + 60 steps; means over seeds 0 to 4 with 95 %
t-intervals; 13 minutes; experiments/figures/tool_use.png). All four are **shown**:

| arm | accuracy, T = 1 | calls per solution | without the calculator at test time |
|---|---|---|---|
| tool | 0.795 [0.398, 1] | 1.97 | 0.000 on every seed |
| no_tool | 0.008 [0, 0.017] | - | 0.004 |
| random_reward | 0.030 [0, 0.076] | 0.39 | 0.000 on every seed |

1. The gain of `tool` over its prior is 0.716 [0.362, 1.070], with 1.97 of 2 calls. Four
   seeds end between 0.89 and 0.96. **Seed 1 ends at 0.225**: it learned to call (1.93
   calls per solution), but copies digits wrongly into the second call, as its prior
   did. RL taught the habit of calling in 20 steps; it did not teach copying in 60.
2. and 3. No run can do the sums itself: at most 0.000 with the calculator taken away,
   and at most 0.018 where it never was there.
4. Random rewards end 0.766 [0.378, 1.153] below, corrected p 0.011. Their calls per
   solution stay low: 0.32 to 0.41 after the prior, 0.15 to 0.56 at the end.
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
