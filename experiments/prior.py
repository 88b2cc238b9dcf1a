r"""Does RL on right answers need a prior that can already think a little?

    python -m jaxreason.sweep --experiment=experiments/prior.py[:quick]

**Hypothesis.** From random weights RL earns nothing. From a prior it gains, and what it
gains grows with the prior's accuracy at temperature 1. There is a threshold below which
it stays where it was.

**Arms.** The task is `chain` of configs/tiny.py: RL on chains of 2 to 5 operations,
evaluated on 512 held-out chains of 5. The prior has 2,000 (baseline), 1,000, 500 or 250
steps; traces with more slips (0.3 in the place of 0.1) at 2,000 steps; no prior at all;
and the baseline's prior with random rewards. Seeds 0 to 4, paired.

**Decision rule**, written before the run (2026-11-28). All accuracies at temperature 1,
after RL and after the prior.

1. "Needs a prior" is shown if without one the accuracy after RL is at most 0.13 (chance
   is 0.1) on every seed, and with 2,000 steps the gain over the prior has an interval
   over seeds that is above 0.3.
2. "Grows with the prior" is shown if, over all arms with a prior and verified rewards,
   the rank correlation of the arms' mean accuracies before and after RL is 1.
3. The threshold lies between the best prior from which the mean gain is below 0.1 and
   the worst from which it is above 0.3, if there are such priors.
4. "The reward matters" is shown if random rewards end below the baseline with a
   corrected p below 0.05.

**Findings.** Not yet run.
"""

from __future__ import annotations

from pathlib import Path

from jaxreason.options import parse
from jaxreason.sweep import Sweep

METRIC = "eval/chain/t1/accuracy"


def sweep(arg: str = "") -> Sweep:
    options = parse(arg, quick=False)
    arms = {f"prior_{steps}": {"prior.steps": steps} for steps in (2000, 1000, 500, 250)}
    arms["more_slips"] = {"prior.source.task.slip": 0.3}
    arms["no_prior"] = {"phases": ("rl",)}
    arms["random_reward"] = {"rl.source.reward": "random"}
    common = {"rl.steps": 80 if options.quick else 160, "rl.evaluate_every": 20, "log.tensorboard": False}
    return Sweep("configs/tiny.py", list(arms.values()), names=list(arms), common=common, metric=METRIC)


def figures(folder: Path, report) -> None:
    """Draw the accuracy after RL against that of the prior, a point per run."""
    from jaxreason.look.figures import COLORS, new_axes, save
    from jaxreason.sweep.results import accuracy_before

    axes = new_axes()
    for i, arm in enumerate(report.arms):
        runs = [folder / "runs" / arm.name / f"seed{seed}" for seed in arm.seeds]
        before, after = zip(*(accuracy_before(run, "rl", "chain", 1.0) for run in runs), strict=True)
        axes.plot(before, after, "o", color=COLORS[i % len(COLORS)], label=arm.name, markersize=5)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, zorder=0)
    axes.set(xlabel="accuracy before RL (temperature 1)", ylabel="accuracy after RL", xlim=(-0.02, 0.4), ylim=(-0.02, 1.02))
    save(axes, folder / "figures" / "prior.png")
