"""The same train step learns by imitation and by reward, from random weights, in
seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import learner, objectives, optimizer, sources
from jaxreason.environment import single_turn
from jaxreason.logp import compile_token_logp
from jaxreason.rollout import Completer
from jaxreason.sampler import compile_sampler
from jaxreason.types import Prompted, Task, TrainState, Verdict

EOS_ID, PAID = 2, 7


def train(model, params, source, objective, steps, lr=1e-2):
    """Return params and the metrics of each step."""
    rule = optimizer.make(steps, lr=lr)
    step_fn = learner.compile_train_step(model, objective, rule)
    params = jax.tree.map(jnp.copy, params)
    state, at, history = TrainState(params, rule.init(params), jnp.int32(0)), source.init(), []
    for step in range(steps):
        at, drawn = source.next(at, state.params, jax.random.fold_in(jax.random.key(0), step))
        state, metrics = step_fn(state, drawn.batch)
        history.append(drawn.metrics | metrics)
    return state.params, history


@pytest.fixture(scope="module")
def completer(tiny):
    return Completer(
        sampler=compile_sampler(tiny(layers=1)[0], slots=64, length=8, eos_ids=(EOS_ID,), chunk_tokens=4),
        observe=lambda observation, ended: [],
        decode=lambda ids: " ".join(map(str, ids)),
        eos_ids=(EOS_ID,),
        prompt_buckets=(4,),
        rows=8,
        max_tokens=3,
    )


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "expert_iteration"])
def test_every_objective_finds_what_is_paid_for(tiny, completer, name):
    """One token of sixteen earns 1 as the first token. Chance is 1/16; each objective
    must find it nearly always.
    """
    model, params = tiny(layers=1)

    def verify(text, task):
        right = text.split(" ")[0] == str(PAID)
        return Verdict(float(right), right)

    tasks = [Task(str(i), str(PAID)) for i in range(8)] * 100
    objective = objectives.make(name)
    source = sources.rollouts(
        [Prompted(task, [1, 3 + int(task.question)]) for task in tasks],
        single_turn(verify),
        completer,
        objective,
        problems=8,
        group=16,
        temperature=1.0,
        buckets=(8,),
    )
    _, history = train(model, params, source, objective, steps=40)
    reward = [m["rollout/reward"][0] / m["rollout/reward"][1] for m in history]
    assert reward[0] < 0.3
    assert np.mean(reward[-5:]) > 0.9, reward


def test_next_token_prediction_reaches_the_bigram_count_model(tiny):
    """On text of a Markov chain the unigram count model is far worse than the bigram
    one, and no model is better than the latter.
    """
    V, rng = 12, np.random.default_rng(0)
    chain = rng.dirichlet(np.full(V, 0.15), size=V)
    stream = [0]
    for _ in range(40_000):
        stream.append(rng.choice(V, p=chain[stream[-1]]))
    stream = np.array(stream) + 3
    length, held_out = 32, 64
    windows = stream[: len(stream) // length * length].reshape(-1, length)
    train_windows, test = windows[:-held_out], windows[-held_out:]
    first, second = train_windows[:, :-1].ravel(), train_windows[:, 1:].ravel()
    unigram = (np.bincount(second, minlength=16) + 0.1) / (len(second) + 1.6)
    pairs = np.full((16, 16), 0.01)
    np.add.at(pairs, (first, second), 1)
    bigram = pairs / pairs.sum(1, keepdims=True)
    unigram_nll = -np.log(unigram[test[:, 1:]]).mean()
    bigram_nll = -np.log(bigram[test[:, :-1], test[:, 1:]]).mean()
    assert unigram_nll - bigram_nll > 0.5  # there is something to learn

    model, params = tiny(layers=1)
    objective = objectives.make("lm")
    batches = [train_windows[rng.permutation(len(train_windows))[:32]] for _ in range(200)]
    params, _ = train(model, params, sources.corpus(batches, objective, rows=32), objective, steps=200)

    from jaxreason import batching, evaluation

    text = evaluation.Text("held_out", [batching.from_windows(test, objective)])
    nll = evaluation.score(compile_token_logp(model), params, [text])["held_out"]
    share = (unigram_nll - nll) / (unigram_nll - bigram_nll)
    assert 0.95 < share < 1.02, (unigram_nll, bigram_nll, nll)
