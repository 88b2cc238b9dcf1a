r"""Does it matter which policy-gradient objective is used?

    python -m jaxreason.sweep \
        --experiment=experiments/objectives.py[:task=search][,updates=4]

**Hypothesis.** With one update per batch all these objectives have the gradient of
REINFORCE with some baseline and some length normalisation, so they end alike; which
reward is paid matters far more. With several updates per batch those without a clip
fall behind.

**Set-up.** Tasks: `chain` of configs/tiny.py (2,000 steps of prior, then RL on chains
of 2 to 5 operations, evaluated on 5), and `search`, the trial and error of
self_correction.py (`inverse_chain`, 3,000 steps of prior). RL has 80 steps (chain) or
120 (search) of 32 problems x 8 attempts; ppo has four fifths of them, since the pass of
its critic adds a quarter to the FLOPs of a step (with `updates=4` a tenth). Each
objective has its own published aggregation and clips. The learning rate is that of the
task's other experiments for all of them (3e-4 and 5e-4), so none is tuned; that of
ppo's value head is 1e-3. Seeds 0 to 4, paired; the prior of a seed is trained once. 512
held-out problems, temperature 1.

**Arms.** rloo (baseline), reinforce, grpo, dr_grpo, dapo, gspo, cispo, ppo; and rloo
with random rewards, and with a reward for any answer that can be read.
`updates=4` makes four updates from each batch, with a quarter of the steps, for the
arms that have a ratio and for rloo whose ratio is truncated at 2 (`correct=token`).

**Decision rule**, written before the run (2026-11-28).

1. An objective "is better" or "is worse" than rloo if its paired difference has a
   corrected p below 0.05 in the report.
2. "The choice matters less than the seed" is shown if the highest and lowest mean of
   the eight differ by less than twice the standard deviation of rloo over its seeds.
3. "The reward matters" is shown if both controls end below rloo with a corrected p
   below 0.05.

**Findings** (2026-11-28, commit c12ed0f, 2-core AMD EPYC with AVX-512, jax 0.10.2,
five seeds, means with 95 % t-intervals over seeds, beside other work: 17 minutes and 76
minutes; `updates=4` was not run):

| arm | chain | minus rloo | search | minus rloo |
|---|---|---|---|---|
| before RL | 0.220 | | 0.279 | |
| rloo | 0.865 [0.805, 0.925] | | 0.453 [0.255, 0.651] | |
| reinforce | 0.864 [0.818, 0.910] | -0.001 [-0.020, 0.019] | 0.472 [0.272, 0.672] | +0.019 [-0.163, 0.201] |
| grpo | 0.852 [0.811, 0.892] | -0.013 [-0.044, 0.017] | 0.511 [0.277, 0.744] | +0.057 [-0.052, 0.167] |
| dr_grpo | 0.864 [0.822, 0.905] | -0.001 [-0.023, 0.021] | 0.441 [0.245, 0.636] | -0.013 [-0.031, 0.006] |
| dapo | 0.868 [0.813, 0.923] | +0.003 [-0.010, 0.015] | 0.452 [0.253, 0.652] | -0.001 [-0.015, 0.014] |
| gspo | 0.853 [0.806, 0.900] | -0.012 [-0.039, 0.015] | 0.509 [0.278, 0.740] | +0.056 [-0.042, 0.154] |
| cispo | 0.865 [0.809, 0.920] | +0.000 [-0.017, 0.017] | 0.448 [0.273, 0.623] | -0.005 [-0.055, 0.046] |
| ppo | 0.772 [0.705, 0.839] | -0.093 [-0.109, -0.076] | 0.504 [0.309, 0.699] | +0.051 [-0.045, 0.147] |
| random_reward | 0.123 [0.114, 0.132] | -0.742 [-0.805, -0.678] | 0.139 [0.106, 0.173] | -0.314 [-0.505, -0.123] |
| format_reward | 0.133 [0.120, 0.147] | -0.732 [-0.789, -0.674] | 0.211 [0.154, 0.268] | -0.242 [-0.449, -0.035] |

1. On chains **ppo is worse** than rloo (corrected p 7e-4); of no other objective is a
   difference shown, on either task. ppo makes a fifth fewer updates, and its value head
   learns at a rate that nobody tuned.
2. "The choice matters less than the seed" is **shown** on both tasks, on chains
   narrowly: the eight means spread over 0.096 (twice the deviation of rloo is 0.098;
   without ppo they spread over 0.016), on search over 0.070 (0.319).
3. "The reward matters" is **shown** on chains (corrected p 4e-5 and 3e-5), and **not
   shown** on search by its rule: the controls end at 0.14 and 0.21, below where they
   began, but the five seeds of rloo differ by 0.44 (corrected p 0.09 and 0.25).

Exploratory, from the attempts per rollout on search: from the weakest prior (seed 0)
the objectives that weigh each rollout by its length (`per_sequence`: grpo, gspo) end at
5.3 and 5.2 attempts per rollout, all others at 1.0 to 1.7, and none is more accurate
for it (0.19 to 0.24). On the other four seeds all eight end at 3.2 to 6.2. One seed
shows nothing, but it agrees with the known bias of that weight towards long wrong
rollouts (arXiv 2503.20783). Figures:
experiments/figures/objectives_chain.png, objectives_inverse_chain.png.
"""

from __future__ import annotations

from pathlib import Path

from jaxreason.options import parse
from jaxreason.sweep import Sweep

OBJECTIVES = ("rloo", "reinforce", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo")
TASKS = {
    "chain": ("configs/tiny.py", 80, {}),
    "search": (
        "configs/tiny.py:task=inverse_chain",
        120,
        {
            "prior.steps": 3000,
            "prior.source.task.lucky": 0.15,
            "prior.source.task.slip": 0.02,
            "prior.source.task.check_slip": 0.02,
            "rl.optimizer.lr": 5e-4,
            "rl.source.max_tokens": 96,
            "sampler.max_tokens": 96,
        },
    ),
}


def sweep(arg: str = "") -> Sweep:
    options = parse(arg, task="chain", updates=1, choices={"task": TASKS, "updates": (1, 4)})
    config, steps, common = TASKS[options.task]
    steps //= options.updates
    ratio = {"correct": "token", "correct_high": 2.0} if options.updates > 1 else {"correct": "none"}
    arms = {name: {"rl.objective": {"name": name, **(ratio if name in ("rloo", "reinforce") else {})}} for name in OBJECTIVES}
    arms["ppo"] |= {"rl.steps": steps * 4 // 5 if options.updates == 1 else steps * 9 // 10, "rl.optimizer.value_lr": 1e-3}
    if options.updates > 1:
        del arms["reinforce"]
    else:
        arms |= {f"{reward}_reward": arms["rloo"] | {"rl.source.reward": reward} for reward in ("random", "format")}
    shared = {
        "model.value_head": True,  # in all arms, so that they share a prior; only ppo trains it
        "rl.steps": steps,
        "rl.updates_per_batch": options.updates,
        "rl.evaluate_every": steps // 4,
        "evaluate.temperatures": (1.0,),
        "log.tracker": "none",
    }
    suite = {"chain": "chain", "search": "inverse_chain"}[options.task]
    metric = f"eval/{suite}/t1/accuracy"
    return Sweep(config, list(arms.values()), names=list(arms), common=common | shared, metric=metric)


def figures(folder: Path, report) -> None:
    """Draw the accuracy of each arm before and after RL, a point per seed."""
    from jaxreason.look.figures import COLORS, new_axes, save
    from jaxreason.sweep.results import accuracy_before

    suite = report.metric.split("/")[1]
    axes = new_axes()
    for i, arm in enumerate(report.arms):
        runs = [folder / "runs" / arm.name / f"seed{seed}" for seed in arm.seeds]
        before, after = zip(*(accuracy_before(run, "rl", suite, 1.0) for run in runs), strict=True)
        axes.plot([i - 0.15] * len(runs), before, "o", color="#999999", markersize=3)
        axes.plot([i + 0.15] * len(runs), after, "o", color=COLORS[i % len(COLORS)], markersize=4)
    axes.set_xticks(range(len(report.arms)), [arm.name.replace("_", "\n") for arm in report.arms], fontsize=7)
    axes.set(ylabel="accuracy before (grey) and after RL (T = 1)", ylim=(-0.02, 1.02))
    save(axes, folder / "figures" / f"objectives_{suite}.png")
