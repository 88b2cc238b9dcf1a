r"""Does successive halving find the best learning rate and group size of the full grid,
and for which fraction of its FLOPs?

    python -m jaxreason.sweep --experiment=experiments/learning_rate.py[:quick]

**Hypothesis.** Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934, by
optuna's `SuccessiveHalvingPruner`) ends with an arm whose accuracy is that of the
grid's best up to the noise between seeds, for at most 40 % of the FLOPs of RL that the
grid takes.

**Arms.** RL of configs/tiny.py after its prior: learning rates 3e-5, 1e-4, 3e-4, 1e-3 x
groups of 4 and 16 (with 64 and 16 problems, so that a batch has 256 attempts). Every
run is made to its end, evaluated every 10 of 80 steps. A run is the same whether others
are stopped or not, so the search is replayed on the recorded curves: an arm that is
stopped at a rung costs what its run had used by then. The order in which arms arrive
decides what halving sees, so each seed is replayed in five random orders.

**Decision rule**, written before the run (2026-11-28). Accuracy at temperature 1 on 512
held-out chains; rungs at steps 10, 20 and 40 with a reduction factor of 2. "The search
works" is shown if, averaged over five orders and five seeds, the arm that it ends with
is below the grid's best arm (of the mean over seeds) by no more than the noise floor,
and the search used at most 40 % of the grid's FLOPs of RL.

**Findings** (2026-11-28, commit fa150ef, 2-core AMD EPYC, jax 0.10.2, five
paired seeds, 13 minutes). Negative by the rule: "the search works" is **not shown**. It
used 43.2 % of the grid's FLOPs (0.35 to 0.51 of them by seed, mean over orders) where
at most 40 % was asked. The arm that it ended with was 0.909 accurate on average, below
the grid's best by 0.038, within the noise floor of 0.039; it was the best arm itself in
14 of 25 searches.

- The grid's best is a rate of 1e-3 with groups of 4: 0.947 [0.928, 0.966], above 3e-4
  with groups of 4 (the baseline) by 0.070 [0.038, 0.102], corrected p 0.011.
- Groups of 16 with 1e-3 are unstable: 0.745 [0.340, 1] over seeds, as one seed of five
  collapsed. At the other rates groups of 4 and 16 differ by no more than 0.03.
- Rates below 3e-4 have not converged after 80 steps: 0.73 at 1e-4, 0.46 at 3e-5.

Exploratory, after these results: keeping a quarter at each rung in the place of half
costs 38.7 % of the FLOPs and ends at 0.924, with the best arm in 18 of 25 searches. With
eight arms, the first arms to arrive always survive their rungs, which is where halving
spends its FLOPs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxreason.options import parse
from jaxreason.sweep import Sweep, over, product, zip_

METRIC = "eval/chain/t1/accuracy"
ORDERS, FIRST_RUNG, FACTOR = 5, 10, 2


def sweep(arg: str = "") -> Sweep:
    parse(arg, quick=False)  # it is quick as it is
    groups = zip_(over("rl.source.group", [4, 16]), over("rl.source.problems", [64, 16]))
    arms = product(over("rl.optimizer.lr", [3e-4, 3e-5, 1e-4, 1e-3]), groups)
    names = [f"lr_{arm['rl.optimizer.lr']:g}_group_{arm['rl.source.group']}" for arm in arms]
    suite = {"evaluate.suites": {"chain": {"name": "chain", "ops": 5}}, "evaluate.temperatures": (1.0,), "evaluate.n": 512}
    common = {"rl.steps": 80, "rl.evaluate_every": 10, "log.tracker": "none"} | suite
    return Sweep("configs/tiny.py", arms, names=names, common=common, metric=METRIC)


def figures(folder: Path, report) -> None:
    """Replay the search on the curves, and write what it found to search.json."""
    from jaxreason.sweep.search import replay_halving

    curves = {
        arm.name: {seed: read_curve(folder / "runs" / arm.name / f"seed{seed}") for seed in arm.seeds} for arm in report.arms
    }
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in curves.values())))
    final = {name: float(np.mean([by_seed[seed][-1][1] for seed in seeds])) for name, by_seed in curves.items()}
    best = max(final, key=final.get)
    found = []
    for seed in seeds:
        for order in range(ORDERS):
            arms = list(np.random.default_rng((seed, order)).permutation(sorted(curves)))
            chosen, used = replay_halving({arm: curves[arm][seed] for arm in arms}, first=FIRST_RUNG, factor=FACTOR)
            whole = sum(by_seed[seed][-1][2] for by_seed in curves.values())
            found.append({"seed": seed, "order": order, "arm": chosen, "mean": final[chosen], "fraction": used / whole})
    told = {
        "best_of_grid": best,
        "accuracy_of_best": final[best],
        "accuracy_of_found": float(np.mean([one["mean"] for one in found])),
        "found_the_best": float(np.mean([one["arm"] == best for one in found])),
        "fraction_of_flops": float(np.mean([one["fraction"] for one in found])),
        "searches": found,
    }
    (folder / "search.json").write_text(json.dumps(told, indent=2))
    draw(curves, seeds, folder / "figures" / "learning_rate.png")
    print({name: value for name, value in told.items() if name != "searches"})


def draw(curves: dict, seeds: list[int], out: Path) -> None:
    """Draw accuracy against the learning rate: a curve per group size, a point per
    seed.
    """
    from jaxreason.look.figures import COLORS, new_axes, save

    axes = new_axes()
    for i, group in enumerate((4, 16)):
        rates = sorted(float(name.split("_")[1]) for name in curves if name.endswith(f"_group_{group}"))
        value_LS = np.array([[curves[f"lr_{rate:g}_group_{group}"][seed][-1][1] for seed in seeds] for rate in rates])
        axes.plot(rates, value_LS.mean(axis=1), color=COLORS[i], label=f"groups of {group}: mean over {len(seeds)} seeds")
        axes.plot(rates, value_LS, "o", color=COLORS[i], markersize=3.5)
    axes.set(xlabel="learning rate", ylabel="accuracy after RL (temperature 1)", xscale="log", ylim=(-0.02, 1.02))
    save(axes, out)


def read_curve(run: Path) -> list[tuple[int, float, float]]:
    """Read (step of RL, accuracy, FLOPs of RL so far) at each evaluation of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if METRIC in line]
    start = next(line for line in reversed(lines) if line["phase"] == "prior")

    def flops(line: dict) -> float:
        return line["ledger/sample_flops"] + line["ledger/learn_flops"]

    return [(line["step"] - start["step"], line[METRIC], flops(line) - flops(start)) for line in lines if line["phase"] == "rl"]
