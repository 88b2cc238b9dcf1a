"""A model of a few thousand parameters with a sampler and a completer, for all tests
that sample.

`jaxreason` pads with 0. Here 0 is also the end-of-sequence token, so any code that
infers a length from padding fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.batching import from_groups
from jaxreason.logp import compile_token_logp
from jaxreason.model import ModelConfig, transformer
from jaxreason.objectives import dapo
from jaxreason.rollout import Completer, Request, collect
from jaxreason.sampler import compile_sampler
from jaxreason.types import Group, Task, Verdict

ALPHABET = "_abcdefghijk"
EOS = 0


def decode(ids) -> str:
    return "".join(ALPHABET[i] for i in ids)


def encode(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]


@functools.cache
def make_model(**fields):
    """Make `(model, params)`; `params["bias"]` is added to the logits, so that a test
    chooses how likely a token is.
    """
    shape = {"vocab_size": len(ALPHABET), "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}
    made = transformer(ModelConfig(**shape | fields))
    model = made._replace(
        unembed=lambda params, hidden: made.unembed(params, hidden) + params["bias"],
        head=lambda params: {**made.head(params), "bias": params["bias"]},
    )
    rng = np.random.default_rng(0)

    def draw(path, x):
        return jnp.float32(path[-1].key == "scale") + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)

    # Not `init`: what it draws does not matter here, and it compiles for longer than a
    # whole sampler.
    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(made.init, jax.random.key(0)))
    return model, {**params, "bias": jnp.zeros(model.config.vocab_size)}


def biased(params, **bias) -> dict:
    """Shift the logits of the named tokens in params: `biased(params, a=2.0,
    _=-1e9)`.
    """
    return {**params, "bias": jnp.zeros(len(ALPHABET)).at[np.array(encode("".join(bias)))].set(np.array([*bias.values()]))}


def new_completer(
    model, *, slots=12, length=24, chunk_tokens=4, prompt_buckets=(8,), rows=4, max_tokens=12, eos_ids=(EOS,), **more
) -> Completer:
    more = {"prompt_rows": 2, "prompt_length": prompt_buckets[-1]} | more
    return Completer(
        sampler=compile_sampler(model, slots=slots, length=length, eos_ids=eos_ids, chunk_tokens=chunk_tokens, **more),
        observe=lambda observation, ended: encode(observation),
        decode=decode,
        eos_ids=eos_ids,
        prompt_buckets=prompt_buckets,
        rows=rows,
        max_tokens=max_tokens,
    )


make_completer = functools.cache(new_completer)  # shared by all tests: its only state is compiled programs


def make_requests(problems: int, attempts: int, *, longest: int = 8) -> list[Request]:
    """Make `attempts` at each of some problems, with prompts of 1 to `longest` tokens
    in a scrambled order of lengths.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, len(ALPHABET), 1 + (5 * p) % longest).tolist() for p in range(problems)]
    tasks = [Task(f"question {p}", "a", id=str(p)) for p in range(problems)]
    return [Request(tasks[p], p, g, prompts[p]) for p in range(problems) for g in range(attempts)]


def verify(text: str, task: Task) -> Verdict:
    """Accept a text that contains the answer, and reward its length, so that nearly
    every text gets its own verdict.
    """
    return Verdict(float(len(text)), task.answer in text, text, "found" if task.answer in text else "not found")


def roll(completer, params, requests, environment, *, key=0, temperature=1.0, **more):
    """Return the rollouts of `collect`, without its costs."""
    weights = completer.sampler.prepare(params)
    return collect(completer, weights, requests, environment, key=jax.random.key(key), temperature=temperature, **more)[0]


@functools.cache
def logits(model):
    """Make `logits(params, tokens_BT) -> logits_BTV`, jitted, of whole rows without a
    cache.
    """

    def of(params, tokens_BT):
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.unembed(params, model.apply(params, tokens_BT, position_BT)[0])

    return jax.jit(of)


token_logp = functools.cache(compile_token_logp)
LONGEST = 48  # tokens in a row of `rescore`: one shape, whatever the rollouts


def rescore(model, params, rollouts) -> tuple:
    """Return the batch of some rollouts, and its log-probs as the learner computes
    them.
    """
    batch = from_groups([Group((r,)) for r in rollouts], dapo(), buckets=(LONGEST,), limit=LONGEST)
    return batch, np.asarray(token_logp(model)(params, batch))


def largest_gap(model, params, rollouts) -> float:
    """Return the largest difference between the sampler's and the learner's log-prob of
    a sampled token.
    """
    _, logp_BT = rescore(model, params, rollouts)
    gaps = [
        np.abs(r.logp - logp_BT[i, len(r.prompt) : len(r.prompt) + len(r.tokens)])[r.sampled].max()
        for i, r in enumerate(rollouts)
    ]
    return float(np.max(gaps))


def assert_same(got, expected, atol=1e-5):
    """Assert that two lists hold the same rollouts, in any order."""
    by_name = {(r.problem, r.attempt): r for r in got}
    assert len(by_name) == len(got) == len(expected)
    for want in expected:
        r = by_name[want.problem, want.attempt]
        name = f"problem {r.problem}, attempt {r.attempt}"
        np.testing.assert_array_equal(r.prompt, want.prompt, name)
        np.testing.assert_array_equal(r.tokens, want.tokens, name)
        np.testing.assert_array_equal(r.sampled, want.sampled, name)
        np.testing.assert_allclose(r.logp, want.logp, rtol=0, atol=atol, err_msg=name)
        assert (r.task, r.stop, r.text, r.verdict) == (want.task, want.stop, want.text, want.verdict), name
