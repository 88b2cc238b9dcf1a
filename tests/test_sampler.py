"""The sampler against the learner, against the distribution that it reports, and
against leftovers of its own slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_completer as t
from scipy import stats

from jaxreason import sharding
from jaxreason.draw import LOWEST_TEMPERATURE, Filter, draw, invert, is_temperature, kept, sample
from jaxreason.environment import single_turn
from jaxreason.model import ModelConfig, transformer
from jaxreason.model.config import Lora
from jaxreason.plan import hlo
from jaxreason.rollout import Request
from jaxreason.sampler import EMPTY, EOS, LIMIT, RUNNING, attempt_keys, cache_buckets, compile_sampler
from jaxreason.sharding import make_mesh
from jaxreason.types import Task

JUDGE = single_turn(t.verify)


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scan"])
def made(request):
    model, params = t.make_model(scan_layers=request.param)
    return model, t.biased(params, _=0.8)


# --- the learner takes the same log-probs ---


@pytest.mark.parametrize(("slots", "length"), [(3, 20), (16, 33)])
def test_decoded_logp_is_teacher_forced_logp(made, slots, length):
    model, params = made
    requests = t.make_requests(8, 2)
    assert {len(r.prompt) for r in requests} == set(range(1, 9))
    completer = t.make_completer(model, slots=slots, length=length)
    for temperature in (1.0, 0.7):
        rollouts = t.roll(completer, params, requests, JUDGE, temperature=temperature)
        assert len({len(r.tokens) for r in rollouts}) > 4
        assert {r.stop for r in rollouts} == {"eos", "limit"}
        assert t.largest_gap(model, params, rollouts) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("int8", 0.1)])  # nats
def test_a_smaller_cache_costs_little_and_not_nothing(made, dtype, bound):
    model, params = made
    completer = t.make_completer(model, slots=16, cache_dtype=dtype)
    cache = completer.sampler.empty().cache
    kept = {path[-1].key: x.dtype.name for path, x in jax.tree_util.tree_leaves_with_path(cache)}
    assert {kept["k"], kept["v"]} == {dtype}
    rollouts = t.roll(completer, params, t.make_requests(8, 2), JUDGE)
    assert 1e-3 < t.largest_gap(model, params, rollouts) < bound


def test_in_bfloat16_sampler_and_learner_round_alike():
    """Both multiply the same numbers in another order. bfloat16 keeps 8 bits, 0.02 for
    logits near 4; 0.06 nats measured.
    """
    model, params = t.make_model(dtype="bfloat16", scan_layers=True)
    for cache_dtype in (None, "float32"):
        rollouts = t.roll(t.make_completer(model, slots=16, cache_dtype=cache_dtype), params, t.make_requests(8, 2), JUDGE)
        assert t.largest_gap(model, params, rollouts) < 0.1


@pytest.mark.parametrize(("length", "expected"), [(24, (24,)), (159, (159,)), (160, (128, 160)), (1000, (128, 256, 512, 1000))])
def test_cache_buckets_double(length, expected):
    assert cache_buckets(length) == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(24, (24,)), (79, (79,)), (80, (64, 80)), (160, (64, 96, 128, 160)), (300, (64, 96, 128, 192, 300))]
)
def test_fine_cache_buckets_have_one_between_any_two(length, expected):
    assert cache_buckets(length, fine=True) == expected


# --- the distribution ---

LOGITS = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.3, 1.5, -0.5, 0.1], np.float32)


def tempered(logits, temperature):
    scaled = np.exp(np.asarray(logits, np.float64) / temperature)
    return scaled / scaled.sum()


def test_the_lowest_temperature_is_all_but_greedy():
    logits = 20 * jax.random.normal(jax.random.key(0), (256, 64))
    uniforms = jax.random.uniform(jax.random.key(1), (256, 2))
    tokens, logp = jax.jit(sample)(logits, uniforms, LOWEST_TEMPERATURE)
    best_two = jnp.sort(logits, axis=-1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > 0.01  # hundred times the temperature
    assert np.isfinite(logp).all()
    assert (tokens == logits.argmax(axis=-1))[clear].all()
    assert [t for t in (0, -0.0, 1e-9, 1e-4, 1, -1, float("nan"), float("inf")) if is_temperature(t)] == [0, -0.0, 1e-4, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_tempered_softmax(temperature):
    draws = 4000
    uniforms = jax.random.uniform(jax.random.key(1), (draws, 2))
    tokens, logp = jax.jit(sample)(jnp.tile(LOGITS, (draws, 1)), uniforms, temperature)
    expected = tempered(LOGITS, temperature)
    observed = np.bincount(tokens, minlength=len(LOGITS))
    assert stats.chisquare(observed, draws * expected).pvalue > 0.01
    # The test would notice the other temperature.
    assert stats.chisquare(observed, draws * tempered(LOGITS, 1.7 - temperature)).pvalue < 1e-6
    np.testing.assert_allclose(logp, np.log(expected)[tokens], atol=1e-5)


@pytest.mark.parametrize("words", [5, 128, 300])
def test_draws_follow_their_weights_over_blocks(words):
    """Vocabularies smaller than a block, one block, and with a last block that is not
    full; a token of weight 0 is never drawn.
    """
    rng = np.random.default_rng(words)
    weight_V = rng.exponential(size=words).astype(np.float32)
    weight_V[rng.permutation(words)[: words // 3]] = 0
    draws = 200 * words
    uniforms = jax.random.uniform(jax.random.key(3), (draws, 2))
    observed = np.bincount(np.asarray(draw(jnp.broadcast_to(weight_V, (draws, words)), uniforms)), minlength=words)
    assert len(observed) == words
    assert not observed[weight_V == 0].any()
    expected = draws * weight_V.astype(np.float64) / weight_V.sum(dtype=np.float64)
    some = weight_V > 0
    assert stats.chisquare(observed[some], expected[some]).pvalue > 0.01
    assert stats.chisquare(observed[some], np.roll(expected[some], 1)).pvalue < 1e-6  # the test would notice a shift


def test_a_share_that_rounds_to_the_whole_draws_something_possible():
    p_SN = jnp.array([[0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    for width in (1, 2, 4, 16):
        assert invert(p_SN, jnp.array([1.0, 1.0]), width).tolist() == [2, 3]
        assert invert(p_SN, jnp.array([0.0, 0.0]), width).tolist() == [1, 3]


def slow_kept(p, top_k, top_p, min_p):
    """Return the tokens that a filter keeps of one row, by its definition."""
    alive = set(range(len(p)))
    if top_k:
        alive = set(sorted(alive, key=lambda i: -p[i])[:top_k])
    nucleus, share = set(), 0.0
    for i in sorted(alive, key=lambda i: -p[i]):
        if share < top_p * sum(p[j] for j in alive):
            nucleus.add(i)
        share += p[i]
    return [i for i in sorted(nucleus) if p[i] >= min_p * max(p)]


FILTERS = [
    (0, 1.0, 0.0),
    (3, 1.0, 0.0),
    (1, 1.0, 0.0),
    (99, 1.0, 0.0),
    (0, 0.8, 0.0),
    (0, 0.01, 0.0),
    (0, 1.0, 0.3),
    (5, 0.7, 0.25),
]


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_filters_keep_what_they_say(filter):
    p_SV = np.random.default_rng(0).exponential(size=(20, 12)).astype(np.float32) ** 2
    found = np.asarray(kept(jnp.asarray(p_SV), Filter(*filter)))
    for row, p in zip(found, p_SV.astype(np.float64), strict=True):
        assert np.flatnonzero(row).tolist() == slow_kept(p, *filter)
        np.testing.assert_array_equal(row[row > 0], p.astype(np.float32)[row > 0])


@pytest.mark.parametrize("filter", FILTERS[4:], ids=str)
def test_samples_follow_the_filtered_distribution_and_so_does_their_logp(filter):
    draws, temperature = 4000, 0.8
    uniforms = jax.random.uniform(jax.random.key(2), (draws, 2))
    step = jax.jit(sample, static_argnums=3)
    tokens, logp = step(jnp.tile(LOGITS, (draws, 1)), uniforms, temperature, Filter(*filter))
    expected = np.zeros(len(LOGITS))
    words = slow_kept(tempered(LOGITS, temperature), *filter)
    expected[words] = tempered(LOGITS, temperature)[words]
    expected /= expected.sum()
    observed = np.bincount(tokens, minlength=len(LOGITS))
    assert observed[expected == 0].sum() == 0
    if len(words) > 1:
        assert stats.chisquare(observed[words], draws * expected[words]).pvalue > 0.01
    np.testing.assert_allclose(logp, np.log(expected[np.asarray(tokens)]), atol=1e-5)


def test_the_untempered_logp_is_that_of_the_model(made):
    model, params = made
    completer = t.make_completer(model, slots=16, logp_temperature_1=True)
    plain = t.make_completer(model, slots=16)
    requests = t.make_requests(8, 2)
    more = {"temperature": 0.6, "filter": Filter(top_k=4)}
    rollouts = t.roll(completer, params, requests, JUDGE, **more)
    t.assert_same(rollouts, without := t.roll(plain, params, requests, JUDGE, **more))
    assert all(r.logp_temperature_1 is None for r in without)
    as_one = [dataclasses.replace(r, logp=r.logp_temperature_1, temperature=1.0) for r in rollouts]
    assert t.largest_gap(model, params, as_one) < 1e-5
    assert max(np.abs(r.logp - r.logp_temperature_1).max() for r in rollouts) > 0.1


def test_temperature_zero_takes_the_most_likely_token(made):
    model, params = made
    rollouts = t.roll(t.make_completer(model, slots=16, length=33), params, t.make_requests(8, 2), JUDGE, temperature=0.0)
    tokens_BT = np.zeros((len(rollouts), 20), np.int32)
    for row, r in zip(tokens_BT, rollouts, strict=True):
        row[: len(r.prompt) + len(r.tokens)] = [*r.prompt, *r.tokens]
    logp_BTV = jax.nn.log_softmax(t.logits(model)(params, tokens_BT))
    for r, logp_TV in zip(rollouts, np.asarray(logp_BTV), strict=True):
        logp_TV = logp_TV[len(r.prompt) - 1 :][: len(r.tokens)]
        np.testing.assert_array_equal(r.tokens, logp_TV.argmax(axis=1))
        np.testing.assert_allclose(r.logp, logp_TV.max(axis=1), atol=1e-5)  # that of temperature 1
    assert len({r.tokens.tobytes() for r in rollouts}) > 4


def test_attempts_at_a_problem_follow_the_model():
    model, params = t.make_model()
    prompt = [3, 1, 4]
    requests = [Request(Task("", "a"), 5, g, prompt) for g in range(2048)]
    completer = t.make_completer(model, slots=256, length=8, chunk_tokens=1, max_tokens=1)
    logits = t.logits(model)(params, np.array([prompt]))[0, -1]
    for temperature in (1.0, 0.7):
        rollouts = t.roll(completer, params, requests, JUDGE, temperature=temperature)
        tokens, logp = (np.array([getattr(r, name)[0] for r in rollouts]) for name in ("tokens", "logp"))
        expected = tempered(logits, temperature)
        assert stats.chisquare(np.bincount(tokens, minlength=len(t.ALPHABET)), 2048 * expected).pvalue > 0.01
        np.testing.assert_allclose(logp, np.log(expected)[tokens], atol=1e-5)


# --- the noise ---


def test_attempt_keys_are_distinct_over_seeds_phases_steps_problems_and_attempts():
    fold, seen = jax.random.fold_in, set()
    problem_R, attempt_R = (x.ravel().astype(np.uint32) for x in np.meshgrid(np.arange(24), np.arange(8)))
    keys = [fold(fold(jax.random.key(seed), phase), step) for seed in (0, 1) for phase in (0, 1, 2**31) for step in range(8)]
    for key in keys:
        seen |= {row.tobytes() for row in np.asarray(attempt_keys(key, problem_R, attempt_R))}
    assert len(seen) == len(keys) * len(problem_R)


def test_noise_is_never_shared_and_comes_back_with_its_key():
    # A model that has no preference among very many tokens: a token is a fingerprint of
    # the noise that chose it.
    model, params = t.make_model(vocab_size=2**20, width=2, layers=1, heads=1, kv_heads=1, head_size=2, feed_forward=2)
    params = jax.tree.map(jnp.zeros_like, params)
    requests = [Request(Task("", ""), p, g, [1]) for p in range(3) for g in range(3)]
    completer = t.make_completer(model, slots=5, length=8, eos_ids=(2**20,), max_tokens=4)._replace(decode=str)

    def fingerprints(key, requests=requests):
        return {(r.problem, r.attempt): tuple(r.tokens.tolist()) for r in t.roll(completer, params, requests, JUDGE, key=key)}

    first, second = fingerprints(1), fingerprints(2)
    tokens = [token for found in (first, second) for row in found.values() for token in row]
    assert len(tokens) == 2 * 9 * 4
    assert len(set(tokens)) == len(tokens)
    assert fingerprints(1) == first
    assert fingerprints(1, requests[4:5]) == {(1, 1): first[1, 1]}


# --- the state ---


@pytest.fixture(scope="module")
def small(made):
    """Make a model, a compiled sampler of four slots, and params that never end a
    sequence.
    """
    model, params = made
    compiled = compile_sampler(model, slots=4, length=12, eos_ids=(t.EOS,), chunk_tokens=2, prompt_rows=1, prompt_length=4)
    return model, compiled, compiled.prepare(t.biased(params, _=-1e9))


PROMPTS = np.array([[5, 6, 7, 0], [8, 9, 0, 0]], np.int32)
LENGTHS = np.array([3, 2], np.int32)
KEYS = np.asarray(attempt_keys(jax.random.key(0), np.arange(4, dtype=np.uint32), np.zeros(4, np.uint32)))


def insert(compiled, params, slots, rows, places, limits, shared=None):
    """Put prompt `rows[i]`, with key i, into slot `places[i]`; but put prompt `shared`
    into the row that its slots share.
    """
    own_S, limit_S, key_S = np.full(4, -1, np.int32), np.zeros(4, np.int32), np.zeros_like(KEYS)
    start_S, tokens_ST, length_S = np.zeros(4, bool), np.zeros((4, 12), np.int32), np.ones(4, np.int32)
    prompt_S, prompt_R = np.full(4, -1, np.int32), np.array([-1 if shared is None else shared], np.int32)
    for i, (row, s) in enumerate(zip(rows, places, strict=True)):
        start_S[s], limit_S[s], key_S[s], length_S[s], tokens_ST[s, :4] = True, limits[i], KEYS[i], LENGTHS[row], PROMPTS[row]
        if row == shared:
            prompt_S[s] = 0
        else:
            own_S[s] = row
    slots = compiled.copy_prompts(slots, compiled.prefill(params, PROMPTS, LENGTHS), own_S, prompt_R)
    tokens_R = np.array([0 if shared is None else LENGTHS[shared] - 1], np.int32)
    return compiled.start_rollouts(slots, start_S, tokens_ST, length_S, limit_S, key_S, prompt_S, tokens_R)


def decode(compiled, params, slots, times=1):
    for _ in range(times):
        slots = compiled.decode(params, slots, np.float32(1))
    return slots


def test_insert_fills_the_slots_it_is_told_to(small):
    _, compiled, params = small
    slots = compiled.empty()
    assert slots.stop_S.tolist() == [EMPTY] * 4
    slots = insert(compiled, params, slots, [1, 0], [2, 0], [7, 3])
    assert slots.stop_S.tolist() == [LIMIT, EMPTY, RUNNING, EMPTY]  # slot 0 is full with its prompt
    assert slots.length_S[jnp.array([0, 2])].tolist() == [3, 2]
    assert slots.tokens_ST[jnp.array([0, 2]), :4].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    np.testing.assert_array_equal(slots.key_S[2], KEYS[0])
    before = jax.device_get(slots)
    after = jax.device_get(decode(compiled, params, slots))
    assert after.length_S[[0, 2]].tolist() == [3, 4]  # chunk_tokens more in the one that runs
    assert after.sampled_ST[2].tolist() == [False, False, True, True] + [False] * 8
    idle = [0, 1, 3]
    np.testing.assert_array_equal(before.tokens_ST[idle], after.tokens_ST[idle])
    for old, new in zip(jax.tree.leaves(before.cache), jax.tree.leaves(after.cache), strict=True):
        np.testing.assert_array_equal(old[idle], new[idle])
        assert (old[2] != new[2]).any()


def test_slots_that_share_a_prompt_sample_as_with_a_copy_each(small):
    """Slots 0 and 3 share one prompt in one place; slot 1 has its own. Rollouts that
    end or start beside them change nothing.
    """
    _, compiled, params = small
    placed = ([0, 1, 0], [0, 1, 3], [12, 12, 12])
    apart = decode(compiled, params, insert(compiled, params, compiled.empty(), *placed), 5)
    used = decode(compiled, params, insert(compiled, params, compiled.empty(), [1], [3], [12], shared=1), 5)
    slots = insert(compiled, params, used, *placed, shared=0)
    together = decode(compiled, params, slots, 5)
    for s in (0, 1, 3):
        np.testing.assert_array_equal(together.tokens_ST[s], apart.tokens_ST[s])
        np.testing.assert_allclose(together.logp_ST[s], apart.logp_ST[s], atol=1e-5)
    # Nothing of the prompt is in their own columns: two tokens of theirs were written
    # from position 0 on.
    one = jax.device_get(decode(compiled, params, insert(compiled, params, compiled.empty(), [0], [0], [12], shared=0)))
    assert [bool(one.cache[0]["v"][0, :, c].any()) for c in range(4)] == [True, True, False, False]


def test_a_refilled_slot_sees_nothing_of_its_last_tenant(small):
    _, compiled, params = small

    def second(slots):
        slots = decode(compiled, params, insert(compiled, params, slots, [0], [1], [12]), 5)
        return jax.device_get((slots.tokens_ST[1], slots.logp_ST[1], slots.sampled_ST[1]))

    used = decode(compiled, params, insert(compiled, params, compiled.empty(), [1], [1], [12]), 5)
    assert int(used.length_S[1]) == 12
    for got, expected in zip(second(used), second(compiled.empty()), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_halted_slot_stops_and_the_others_go_on(small):
    _, compiled, params = small
    slots = insert(compiled, params, compiled.empty(), [0, 1], [0, 1], [12, 12])
    slots = compiled.stop_slots(decode(compiled, params, slots), np.array([True, False, False, False]))
    assert decode(compiled, params, slots).length_S[:2].tolist() == [5, 6]


def test_forced_tokens_may_cut_a_slot_back(small):
    """Tokens sampled after the cut leave no trace."""
    _, compiled, params = small
    tokens_ST = np.zeros((4, 12), np.int32)
    tokens_ST[0, :2] = [7, 9]
    start_S, count_S, limit_S = np.array([[4, -1, -1, -1], [2, 0, 0, 0], [12] * 4], np.int32)

    def finish(times):
        slots = decode(compiled, params, insert(compiled, params, compiled.empty(), [0], [0], [12]), times)
        slots = compiled.append_tokens(params, slots, start_S, tokens_ST, count_S, limit_S)
        return jax.device_get(decode(compiled, params, slots, 4))

    short, long = finish(1), finish(3)  # cut back by one token, and by five
    for name in ("tokens_ST", "logp_ST", "sampled_ST", "length_S", "stop_S"):
        np.testing.assert_array_equal(getattr(short, name)[0], getattr(long, name)[0], name)
    assert short.sampled_ST[0].tolist() == [False] * 3 + [True] + [False] * 2 + [True] * 6
    assert not short.logp_ST[0, 4:6].any()


def test_force_appends_up_to_the_limit_and_lets_run_on(small):
    model, compiled, params = small
    slots = insert(compiled, params, compiled.empty(), [0, 0, 1], [0, 1, 2], [12, 6, 12])
    before = jax.device_get(decode(compiled, params, slots))
    tokens_ST = np.zeros((4, 12), np.int32)
    tokens_ST[:, :4] = [[3, 4, 0, 0], [3, 4, 2, 2], [5] * 4, [5] * 4]
    start_S, count_S, limit_S = np.array([[5, 5, -1, -1], [2, 4, 0, 0], [12, 6, 0, 0]], np.int32)
    slots = compiled.append_tokens(params, jax.device_put(before), start_S, tokens_ST, count_S, limit_S)
    assert slots.length_S[:3].tolist() == [7, 6, 4]
    assert slots.stop_S.tolist() == [RUNNING, LIMIT, RUNNING, EMPTY]
    assert slots.tokens_ST[:2, 5:8].tolist() == [[3, 4, 0], [3, 0, 0]]
    np.testing.assert_array_equal(slots.tokens_ST[2:], before.tokens_ST[2:])
    np.testing.assert_array_equal(slots.logp_ST, before.logp_ST)
    np.testing.assert_array_equal(slots.sampled_ST, before.sampled_ST)

    slots = jax.device_get(decode(compiled, params, slots, 4))
    assert slots.length_S[:3].tolist() == [12, 6, 12]
    assert slots.sampled_ST[0].tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 5
    logp_STV = jax.nn.log_softmax(t.logits(model)(params.decode, slots.tokens_ST))
    expected = np.take_along_axis(np.asarray(logp_STV)[:, :-1], slots.tokens_ST[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(slots.logp_ST[:, 1:], np.where(slots.sampled_ST[:, 1:], expected, 0), atol=1e-5)


def test_a_stopped_slot_does_not_change(small, made):
    _, compiled, params = small
    ending = compiled.prepare(t.biased(made[1], _=1e9))
    slots = decode(compiled, ending, insert(compiled, ending, compiled.empty(), [1], [1], [12]))
    slots = jax.device_get(decode(compiled, params, insert(compiled, params, slots, [0], [0], [4])))
    assert slots.length_S[:2].tolist() == [4, 3]  # though a chunk is of two tokens
    assert slots.stop_S.tolist() == [LIMIT, EOS, EMPTY, EMPTY]
    again = jax.device_get(decode(compiled, params, jax.device_put(slots)))
    jax.tree.map(np.testing.assert_array_equal, slots, again)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(rank=2, targets=("q", "o", "down"), base_dtype="bfloat16")], ids=["plain", "lora"])
@pytest.mark.parametrize("scan", [False, True])
def test_weights_are_merged_and_cast_on_their_shards_and_then_gathered(lora, scan, monkeypatch):
    shape = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}
    model = transformer(ModelConfig(**shape, dtype="bfloat16", scan_layers=scan, lora=lora))
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), jax.jit(model.init)(jax.random.key(0)))
    mesh, sent, send = make_mesh(data=1, fsdp=4, tensor=2), [], sharding.send
    monkeypatch.setattr(sharding, "send", lambda params, mesh: sent.append(params) or send(params, mesh))
    whole, split = (compile_sampler(model, slots=4, length=8, eos_ids=(0,), mesh=m).prepare for m in (None, mesh))
    prepared = split(jax.device_put(params, sharding.shardings(params, mesh)))
    jax.tree.map(np.testing.assert_array_equal, prepared, whole(params))
    kernels = [x["layers"]["attention"]["q"]["kernel"] for x in sent if "layers" in x]
    assert [k.dtype for k in kernels] == [jnp.bfloat16] * len(kernels)
    shards = [k.sharding.shard_shape(k.shape) for k in kernels]
    assert shards == [(1, 4, 2, 8)] * 2 + [(2, 4, 2, 8)] * (not scan)  # layer by layer, and for prompts on a CPU as they are


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}], ids=str)
def test_prompts_are_prefilled_by_all_devices_together(axes):
    """Seven prompts: one per device, or two per pair of devices that halve the work."""
    shape = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}
    model = transformer(ModelConfig(**shape, scan_layers=True))
    params = jax.jit(model.init)(jax.random.key(0))

    def flops(mesh):
        sampler = compile_sampler(model, slots=8, length=16, eos_ids=(0,), prefill_tokens=16, mesh=mesh)
        weights = sampler.prepare(params)
        program = sampler.prefill.lower(weights, np.zeros((7, 16), np.int32), np.ones(7, np.int32)).compile()
        assert {x.shape[0] for x in jax.tree.leaves(program.out_info)} == {7}
        return hlo.program_cost(program.as_text(), devices=8).flops

    assert flops(make_mesh(**axes)) == pytest.approx(flops(None) / 7)


def test_slots_must_divide_over_the_mesh():
    with pytest.raises(ValueError, match="12 slots, which do not divide over 8 devices"):
        compile_sampler(t.make_model()[0], slots=12, length=8, eos_ids=(0,), mesh=make_mesh(data=4, fsdp=2))
    with pytest.raises(ValueError, match="6 rows of prompts, which do not divide over 8 devices"):
        compile_sampler(t.make_model()[0], slots=8, length=8, eos_ids=(0,), prompt_rows=6, mesh=make_mesh(data=4, fsdp=2))


def test_buckets_must_end_with_the_length():
    for buckets in [(4,), (8, 4), (4, 4, 8), (0, 8)]:
        with pytest.raises(ValueError, match=r"cache buckets .*; allowed: rising sizes that end with its length, 8"):
            compile_sampler(t.make_model()[0], slots=2, length=8, eos_ids=(0,), buckets=buckets)


def test_smaller_sizes_must_fall_and_divide():
    model = t.make_model()[0]
    for sizes in [(8,), (4, 4), (2, 4), (0,)]:
        with pytest.raises(ValueError, match=r"sampler got 8 slots and then .*; allowed: falling numbers, 1 or more"):
            compile_sampler(model, slots=8, sizes=sizes, length=8, eos_ids=(0,))
    with pytest.raises(ValueError, match="4 slots, which do not divide over 8 devices"):
        compile_sampler(model, slots=8, sizes=(4,), length=8, eos_ids=(0,), mesh=make_mesh())
