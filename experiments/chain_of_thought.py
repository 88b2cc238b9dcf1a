r"""Is written-out thinking worth more than the same compute spent on direct answers?

    python -m jaxreason.sweep --experiment=experiments/chain_of_thought.py[:quick]

**Hypothesis.** A model of 0.15 M params learns chains of five operations from written
work, and does not learn them from direct answers: not at the same size and the same
training FLOPs, not with four times these FLOPs, and not with twice the layers.

**Arms.** Next-token prediction alone (no RL) on 20,000 correct documents of 1 to 8
operations: all steps written out (baseline, 500 steps); answers alone for 500 steps and
for 2,000; answers alone for 500 steps with 6 layers in the place of 3. Windows are
packed, so equal steps are equal tokens and FLOPs. Seeds 0 to 4, paired; 512 held-out
chains of 5 operations, greedy.

**Decision rule**, written before the run (2026-11-28). "Thinking pays" is shown if each
of the three direct arms is below the baseline with a corrected p below 0.05 and an
interval above 0.3. "Direct answers are not learned" is shown if the upper end of each
direct arm's interval over seeds is below 0.4: it may guess (0.1) or use the last
operations, but not compute.

**Findings** (2026-11-28, commit b68ae6d, 2-core Intel Xeon with AVX-512, jax 0.10.2,
five seeds, means with 95 % t-intervals over seeds). Negative at this budget:

- "Thinking pays" is **not shown** with 500 steps: thinking 0.280 [0.085, 0.475] against
  direct 0.152 [0.140, 0.164], difference -0.128 [-0.323, 0.067]; direct with 2,000
  steps 0.192 [0.173, 0.211]; with 6 layers 0.159 [0.140, 0.178]. No corrected p is below
  0.42. After 500 steps two of five seeds had begun to learn the steps (0.36 and 0.51),
  three had not (0.13 to 0.25).
- "Direct answers are not learned" is **shown**: the highest upper end is 0.211. Four
  times the steps gain 0.039 [0.016, 0.063], corrected p 0.01; chance is 0.1.

Exploratory, since its arm was added after these results: with 2,000 steps each,
`thinking_4x_steps` reaches 0.998 [0.995, 1.000] and `direct_4x_steps` 0.192, a
difference of 0.806 [0.784, 0.827] at 4.16e12 and 4.07e12 FLOPs (five paired seeds,
t-test p 5e-8; the exact sign-flip test can't go below 0.06 with five seeds).
experiments/figures/chain_of_thought.png: thinking passes from 0.2 to 0.9 between 375
and 625 steps. 500 steps, the budget of the rule, ended inside this transition.
"""

from __future__ import annotations

from jaxreason.options import parse
from jaxreason.sweep import Sweep

DIRECT = {"prior.source.task.demonstrations": "human", "prior.source.task.guess": 1.0, "prior.source.task.guess_right": 1.0}


def sweep(arg: str = "") -> Sweep:
    parse(arg, quick=False)  # it is quick as it is
    arms = {
        "thinking": {"prior.source.task.demonstrations": "expert", "prior.steps": 500},
        "direct": DIRECT | {"prior.steps": 500},
        "direct_4x_steps": DIRECT | {"prior.steps": 2000},
        "direct_2x_layers": DIRECT | {"prior.steps": 500, "model.layers": 6},
        "thinking_4x_steps": {"prior.source.task.demonstrations": "expert", "prior.steps": 2000},
    }
    common = {"phases": ("prior",), "prior.evaluate_every": 125, "log.tracker": "none"}
    return Sweep("configs/tiny.py", list(arms.values()), names=list(arms), common=common, metric="eval/chain/greedy/accuracy")
