r"""Does a teacher's distribution buy more than rewards, and than demonstrations?

    python -m jaxreason.sweep --experiment=experiments/self_distillation.py[:smoke]

**Hypothesis.** On-policy distillation from a teacher that RL has trained ends near the
teacher, above RL with the same FLOPs: it learns from every token, and RL from one bit
per attempt. Imitation of the demonstrations that made the prior adds little; of the
right ones alone more. A model that has never read a hint can't use one, so being its
own teacher with the answer or a right attempt in its prompt teaches it nothing.

**Set-up.** The task is `chain` of configs/tiny.py: 2,000 steps of prior, then 80 steps
of RL (rloo) on chains of 2 to 5 operations, evaluated on 512 held-out chains of 5 at
temperature 1. Seeds 0 to 4, paired; the prior of a seed is trained once. The other arms
have as many steps as cost about the same FLOPs (`STEPS`): fewer with a teacher, whose pass
adds a quarter; more of imitation, which samples nothing, and with hints, whose attempts
became short. The teacher of a seed is a run of its own, with the seed's prior and
160 steps of RL; its FLOPs are not counted.

**Arms.** `rl`: rloo (baseline). `sft_human`: imitation of the prior's demonstrations,
with slips and guesses. `sft_right`: of those whose answer is right. `distil`: reverse
KL over the vocabulary from the teacher, on the policy's own attempts. `distil_token`:
the same from the sampled token alone. `self_answer` and `self_attempt`: `self_distil`
with the answer, or a right attempt of the same group, in front of the question.

**Decision rule**, written before the run (2026-11-28). Differences are paired over
seeds, with corrected p as in the report.

0. The arms are compared if the mean FLOPs of each phase `rl` (in the ledger) are within
   10 % of the baseline's; otherwise the steps are changed and all arms are run again.
1. "A teacher's distribution teaches faster than rewards" is shown if `distil` ends
   above `rl` with p below 0.05.
2. "The vocabulary teaches more than the token" is shown if `distil` ends above
   `distil_token` with p below 0.05.
3. "Imitation does not reach it" is shown if both arms of imitation end below `rl` with
   p below 0.05, and "being right matters" if `sft_right` ends above `sft_human`.
4. "A hint teaches nothing to a model that never read one" is shown if the intervals of
   both `self_` arms, less the accuracy before RL, contain 0 or are below it.

**Findings**, 2026-11-28 (commit d7c106b with the steps of this file, one core of a
2-core AMD EPYC with AVX-512, jax 0.10.2, float32, seeds 0 to 4, about 75 minutes beside
other work). Before the phase accuracy is 0.220; means with 95 % t-intervals over seeds:

| arm | steps | FLOPs, rl = 1 | accuracy | minus rl | p |
|---|---|---|---|---|---|
| `rl` | 80 | 1 | 0.858 [0.795, 0.921] | | |
| `sft_human` | 139 | 1.00 | 0.271 [0.256, 0.287] | -0.587 [-0.656, -0.518] | 9e-5 |
| `sft_right` | 117 | 1.00 | 0.592 [0.580, 0.604] | -0.266 [-0.340, -0.193] | 2e-3 |
| `distil` | 64 | 1.01 | 0.854 [0.816, 0.891] | -0.005 [-0.037, 0.028] | 0.71 |
| `distil_token` | 64 | 1.01 | 0.832 [0.790, 0.873] | -0.027 [-0.051, -0.002] | 0.08 |
| `self_answer` | 130 | 1.13 | 0.105 [0.021, 0.188] | -0.754 [-0.842, -0.665] | 9e-5 |
| `self_attempt` | 142 | 1.21 | 0.099 [0.020, 0.178] | -0.759 [-0.789, -0.729] | 1e-6 |

0. A first run had 106, 106, 56 and 56 steps of imitation and of hints: 0.77, 0.91, 0.45
   and 0.44 of rl's FLOPs. Those four arms were run again as above. The two with hints
   are still beyond 10 %, since on one or two seeds their attempts grew to the limit of
   tokens; it favours them, and they end last.
1. **Not shown**: `distil` ends as `rl` does, although its teachers (0.883 to 0.928)
   are better than both and their FLOPs are not counted. With the same number of steps it
   is ahead early (0.80 against 0.72 after 24).
2. **Shown**: `distil` less `distil_token` is 0.022 [0.010, 0.034], p 0.008.
3. **Shown**: both arms of imitation end below `rl`; and being right matters, `sft_right`
   less `sft_human` is 0.321 [0.304, 0.338], p 8e-7.
4. **Shown**: less the accuracy before, `self_answer` is -0.115 [-0.240, 0.009] and
   `self_attempt` -0.121 [-0.204, -0.038]. Eight steps are enough to unlearn: a prompt of
   unknown form makes a bad teacher. It says nothing about models that can read a hint.

Figure: experiments/figures/self_distillation.png. Its points between are of 128
problems, harder ones than the rest of the 512 of the last point.
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

STEPS = {"rl": 80, "sft_human": 139, "sft_right": 117, "distil": 64, "self_answer": 130, "self_attempt": 142}
OF_TEACHER = 160  # steps of RL
METRIC = "eval/chain/t1/accuracy"
TEACHER = "{folder}/teachers/seed{seed}"
HINT = "{hint};{question}"  # in the tokenizer's few characters
PRIOR = {  # the demonstrations of the prior
    "name": "chain",
    "ops": (2, 5),
    "size": 20_000,
    "guess": 0.55,
    "stop_early": 0.15,
    "slip": 0.1,
}
COMMON = {"evaluate.temperatures": (1.0,), "log.tracker": "none"}


def sweep(arg: str = "") -> Sweep:
    options = parse(arg, smoke=False)
    steps = dict.fromkeys(STEPS, 2) if options.smoke else STEPS

    def imitation(demonstrations: str, steps: int) -> dict:
        source = {"name": "demonstrations", "task": PRIOR | {"demonstrations": demonstrations}, "rows": 256, "max_tokens": 56}
        return {"rl.source": source, "rl.objective": {"name": "sft"}, "rl.steps": steps}

    def hinted(hint: str, steps: int) -> dict:
        source = {"rl.source.hint": hint, "rl.source.hint_text": HINT}
        return {"rl.objective": {"name": "self_distil"}, "rl.steps": steps, **source}

    taught = {"rl.reference": TEACHER, "rl.steps": steps["distil"]}
    arms = {
        "rl": {"rl.steps": steps["rl"]},
        "sft_human": imitation("human", steps["sft_human"]),
        "sft_right": imitation("verified", steps["sft_right"]),
        "distil": {"rl.objective": {"name": "distil"}, **taught},
        "distil_token": {"rl.objective": {"name": "distil", "over": "token"}, **taught},
        "self_answer": hinted("answer", steps["self_answer"]),
        "self_attempt": hinted("attempt", steps["self_attempt"]),
    }
    common = COMMON | {"rl.evaluate_every": 1 if options.smoke else 8}
    return Sweep(config_of(options.smoke), list(arms.values()), names=list(arms), common=common, metric=METRIC)


def config_of(smoke: bool) -> str:
    return "configs/tiny.py:smoke" if smoke else "configs/tiny.py"


def prepare(folder: Path, seeds) -> None:
    """Train the teacher of each seed; one that is finished is kept."""
    smoke = folder.name.startswith("self_distillation-smoke")
    for seed in seeds:
        run = folder / "teachers" / f"seed{seed}"
        if (run / "summary.json").is_file() and json.loads((run / "summary.json").read_text())["done"]:
            continue
        steps = [] if smoke else [f"--config.rl.steps={OF_TEACHER}"]
        words = [f"--config={config_of(smoke)}", f"--workdir={run}", f"--config.seed={seed}", *steps]
        subprocess.run([sys.executable, "-m", "jaxreason.main", *words], check=True, stdout=subprocess.DEVNULL)


def figures(folder: Path, report) -> None:
    """Print the numbers of the decision rule; draw the accuracy of each arm over the
    steps of its second phase.
    """
    from jaxreason.look.figures import COLORS, new_axes, save

    axes, told = new_axes(), {}
    for i, arm in enumerate(report.arms):
        summaries = [json.loads((folder / "runs" / arm.name / f"seed{seed}" / "summary.json").read_text()) for seed in arm.seeds]
        found = [[e for e in summary["evaluations"] if e["suite"] == "chain" and e["phase"] != "start"] for summary in summaries]
        value_SK = np.array([[e["accuracy"] for e in each] for each in found])
        steps = np.array([e["step"] for e in found[0]])
        axes.plot(steps - steps[0], value_SK.mean(axis=0), color=COLORS[i % len(COLORS)], label=arm.name)
        axes.fill_between(
            steps - steps[0], value_SK.min(axis=0), value_SK.max(axis=0), color=COLORS[i % len(COLORS)], alpha=0.15, linewidth=0
        )
        flops = [of_phase(folder / "runs" / arm.name / f"seed{seed}") for seed in arm.seeds]
        told[arm.name] = {
            "before": value_SK[:, 0],
            "gain": mean_interval(value_SK[:, -1] - value_SK[:, 0]),
            "FLOPs of the phase": flops,
        }
    text = json.dumps(told, indent=2, default=lambda value: np.round(value, 4).tolist())
    (folder / "self_distillation.json").write_text(text)
    print(text)
    axes.set(xlabel="step after the prior", ylabel="accuracy at temperature 1")
    save(axes, folder / "figures" / "self_distillation.png")


def of_phase(run: Path) -> float:
    """Return the FLOPs of sampling and learning after the prior."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ledgers = [line for line in lines if "ledger/learn_flops" in line]  # at evaluations
    total = {line["phase"]: line["ledger/sample_flops"] + line["ledger/learn_flops"] for line in ledgers}
    return total["rl"] - total["prior"]
