"""Sources: streams of batches. A paradigm is a source and an objective.

`Source(init, next, save)`: `init() -> state`; `next(state, params, key) -> (state,
NextBatch)`; `save(state)` is the part of a state that the checkpoint stores, as JSON,
and `next` also accepts a saved state. The key is derived from (seed, phase): equal
state, params and key give an equal batch. Every process draws the same, whole batch;
the processes divide expensive work among them.

    corpus           windows of a token stream          pretraining
    demonstrations   worked solutions                   imitation
    rollouts         its own verified attempts          reinforcement learning
    kept_rollouts    its own right attempts             rejection sampling, STaR
    mix              batches of several sources, by weight

Your own is `module:maker` in `rl.source.name`. Its maker takes `parts` (tokenizer,
sampler and so on, `build.tasks.Parts`), `objective`, `microbatches` and `steps` by
name, and then the fields of its section; it returns a `Source`. `jaxreason.batching`
makes a batch of demonstrations, of windows or of groups. A mix, with its parts by name:

    {"name": "mix", "weights": {"solved": 0.1}, "of": {
        "own": {"name": "rollouts", "task": ..., "problems": 8, "group": 8},
        "solved": {"name": "demonstrations", "task": ..., "rows": 8, "max_tokens": 64}}}

    interface   `Source` and `NextBatch`
    streams     corpus, demonstrations
    attempts    rollouts, and sampling ahead of the learner
    mixing      mix
    sampling    the groups of a batch, by all processes together
    replay      groups of earlier batches
    curriculum  tasks to pass over
    keeping     attempts that become demonstrations
    rewards     what is paid for an attempt
    hints       what a teacher is shown beside the prompt
    saved       groups as JSON, for checkpoints
"""

from jaxreason.sources.attempts import latency, measure, rollouts
from jaxreason.sources.curriculum import CURRICULA, SuccessRate, make_curriculum
from jaxreason.sources.interface import NextBatch, Source
from jaxreason.sources.keeping import Keep, choose, kept_attempts
from jaxreason.sources.mixing import Part, mix
from jaxreason.sources.rewards import REWARDS, paid, shuffle_rewards
from jaxreason.sources.streams import corpus, demonstrations

__all__ = [
    "CURRICULA",
    "REWARDS",
    "Keep",
    "NextBatch",
    "Part",
    "Source",
    "SuccessRate",
    "choose",
    "corpus",
    "demonstrations",
    "kept_attempts",
    "latency",
    "make_curriculum",
    "measure",
    "mix",
    "paid",
    "rollouts",
    "shuffle_rewards",
]
