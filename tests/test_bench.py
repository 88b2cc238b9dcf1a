"""The benchmarks: floors by hand, look-up against its definition, and a whole run of
the command on a very small model.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT

from jaxreason.bench.cache import attend_shared, writes
from jaxreason.bench.lookup import steps_with_lookup
from jaxreason.bench.machine import Ceiling
from jaxreason.bench.sampler import decode_cost, floors, prefill_cost
from jaxreason.cost import forward_flops, layer_weights
from jaxreason.model import ModelConfig, transformer
from jaxreason.model.cache import make
from jaxreason.model.layers import attend

SHAPE = ModelConfig(vocab_size=10, width=4, layers=2, heads=2, kv_heads=1, head_size=2, feed_forward=5)
LAYER = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5  # q, k and v, o, and the three of the MLP


def test_floors_by_hand():
    assert layer_weights(SHAPE) == LAYER == 108
    weights = 2 * LAYER + 40
    # Two rollouts: 3 + 2 tokens, and 1 + 1. Before the tokens sampled stand 3 and 4
    # positions, and 1.
    cost = decode_cost(SHAPE, [(3, [2]), (1, [1])], slots=2)
    assert cost.flops == 2 * weights * 3 + 4 * 2 * 2 * 2 * (3 + 4 + 1)
    assert cost.bytes == 4 * (weights * 3 / 2 + 2 * 2 * 1 * 2 * (3 + 4 + 1))
    bare = decode_cost(SHAPE, [(3, [2]), (1, [1])], slots=2, attention=False, itemsize=2)
    assert (bare.flops, bare.bytes) == (2 * weights * 3, 2 * weights * 3 / 2)
    # Three attempts at one prompt of 3 tokens: it is read at each of the two steps that
    # the longest takes.
    for shared, prompt in ((True, 3 * 2), (False, 3 * (2 + 1 + 2))):
        cost = decode_cost(SHAPE, [(3, [2, 1, 2])], slots=3, shared=shared)
        assert cost.bytes == 4 * (weights * 5 / 3 + 2 * 2 * 1 * 2 * (prompt + 1 + 0 + 1))
        assert cost.flops == 2 * weights * 5 + 4 * 2 * 2 * 2 * (3 * 5 + 1 + 0 + 1)
    prefill = prefill_cost(SHAPE, [3, 1])
    assert prefill.flops == 2 * 2 * LAYER * 4 + 4 * 2 * 2 * 2 * (1 + 2 + 3 + 1)
    assert prefill.bytes == 4 * 2 * LAYER


def test_flops_of_a_forward_pass_by_hand_and_by_the_compiler():
    # Five tokens attend to 1 to 5 positions, two to 1 and 2; logits of the two and the
    # one that are trained on.
    by_hand = 2 * 2 * LAYER * 7 + 4 * 2 * 2 * 2 * (15 + 3) + 2 * 4 * 10 * 3
    assert forward_flops(SHAPE, [(3, 2), (1, 1)]) == by_hand
    shape = dataclasses.replace(SHAPE, vocab_size=64, width=64, heads=4, kv_heads=2, head_size=32, feed_forward=256)
    model, T = transformer(shape), 32

    def forward(params, tokens_BT):
        return model.unembed(params, model.apply(params, tokens_BT, jnp.broadcast_to(jnp.arange(T), (2, T)))[0])

    params = jax.eval_shape(model.init, jax.random.key(0))
    compiled = jax.jit(forward).lower(params, jax.ShapeDtypeStruct((2, T), jnp.int32)).compile()
    # XLA computes the whole square of attention, and norms, softmax and rotations.
    square = 4 * shape.layers * shape.heads * shape.head_size * 2 * (T * T - T * (T + 1) / 2)
    assert compiled.cost_analysis()["flops"] == pytest.approx(forward_flops(shape, [(0, T)] * 2) + square, rel=0.05)


def test_the_floor_is_the_longer_of_computing_and_reading():
    groups, slow, fast = [(3, [2, 2])], 1e-3, 1e30
    computing = floors(SHAPE, groups, 2, Ceiling(slow, fast))
    reading = floors(SHAPE, groups, 2, Ceiling(fast, slow))
    decode, prefill = decode_cost(SHAPE, groups, 2), prefill_cost(SHAPE, [3])
    assert computing["full"] == pytest.approx((decode.flops + prefill.flops) / slow)
    assert reading["full"] == pytest.approx((decode.bytes + prefill.bytes) / slow)
    assert computing["full, unshared"] == pytest.approx((decode.flops + 2 * prefill.flops) / slow)
    assert computing["2N"] < computing["full"] > computing["decode"]
    assert reading["full"] < reading["full, unshared"]


@pytest.mark.parametrize(
    ("prompt", "completion", "guesses", "steps"),
    [
        ("abcd", "efgh", 3, 4),  # nothing occurs twice
        ("abcdefabc", "defx", 3, 1),  # abc was followed by def: three right, and x comes with them
        ("abcdefabc", "defx", 1, 2),  # d right, e comes with it; f right, x comes with it
        ("abcdefabc", "dxfe", 3, 3),  # d right and x instead of e; f and e alone
        ("ab", "ababab", 2, 4),  # a and b alone: only then has ab an earlier end; aba, and then b with nothing left to check
        ("xabyab", "y", 3, 1),  # the guess is right, and there is no step less than one
        ("abcabdab", "d", 3, 1),
    ],
)
def test_lookup_by_hand(prompt, completion, guesses, steps):
    assert steps_with_lookup([*map(ord, prompt)], [*map(ord, completion)], guesses) == steps


def slow_steps(prompt, completion, guesses):
    """Count the same steps by searching backwards through the text at every step."""
    text, end, steps = [*prompt], len(prompt) + len(completion), 0
    whole = [*prompt, *completion]
    while len(text) < end:
        guess = []
        for n in (3, 2):
            starts = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]] if len(text) >= n else []
            if starts:
                tail = text[starts[-1] + n :]
                guess = [tail[i % len(tail)] for i in range(guesses)]
                break
        right = 0
        while right < len(guess) and len(text) + right < end and guess[right] == whole[len(text) + right]:
            right += 1
        text = whole[: len(text) + right + 1]
        steps += 1
    return steps


def test_lookup_is_what_a_search_finds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt, completion = (rng.integers(0, 3, rng.integers(1, 40)).tolist() for _ in range(2))
        guesses = int(rng.integers(1, 8))
        assert steps_with_lookup(prompt, completion, guesses) == slow_steps(prompt, completion, guesses)


def test_reading_a_prompt_once_is_reading_copies_of_it():
    rng = np.random.default_rng(0)
    P, G, N, K, H, C, prompt = 2, 3, 4, 2, 8, 5, 7

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q = normal(P * G, 1, N, H)
    far, near = ({"k": normal(B, K, H, n), "v": normal(B, K, n, H)} for B, n in ((P, prompt), (P * G, C)))
    visible_P, visible_BTC = np.array([7, 4]), rng.random((P * G, 1, C)) < 0.6
    visible_BTC[..., 0] = True
    got = attend_shared(q, far, near, visible_P, visible_BTC)
    whole = {name: np.concatenate([far[name].repeat(G, axis=0), near[name]], axis=-1 if name == "k" else -2) for name in "kv"}
    seen_BTC = np.broadcast_to((np.arange(prompt) < visible_P[:, None]).repeat(G, axis=0)[:, None], (P * G, 1, prompt))
    expected = attend(q, whole["k"], whole["v"], np.concatenate([seen_BTC, visible_BTC], axis=-1))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_all_ways_to_write_write_the_same():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 3, 1, 2, 4)).astype(np.float32)
    caches = [write(make(3, 6, 2, 4, "float32"), k, v, np.full((3, 1), 2)) for write in writes().values()]
    assert len(caches) == 3
    for cache in caches[1:]:
        for name in "kv":
            np.testing.assert_array_equal(cache[name], caches[0][name])
    assert np.count_nonzero(caches[0]["k"]) == k.size


def bench(*arguments):
    done = subprocess.run([sys.executable, "-m", "jaxreason.bench", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


TINY = ["--config=configs/tiny.py:smoke", "--model=vocab_size=64", "--prompts=3", "--group=2", "--tokens=9", "--prompt_tokens=5"]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("work", ["exact", "natural"])
def test_the_sampler_is_measured(work):
    code, lines, err = bench("sampler", *TINY, f"--work={work}", "--slots=8", "--eos_id=5", "--repeats=2")
    assert code == 0, err
    found = {line["what"]: line["value"] for line in lines}
    assert all(line.keys() >= {"unit", "work", "cores", "device", "date", "jax"} for line in lines)
    assert found["rollout length"] == 9 if work == "exact" else 1 <= found["rollout length"] <= 9
    assert 0 < found["slot occupancy"] <= 6 / 8
    for floor in ("2N", "full", "full, unshared"):
        # Of medians: of two batches their mean, so not to the last digit.
        share = found["generated tokens"] / found[f"floor, {floor}"]
        assert found[f"share of the floor, {floor}"] == pytest.approx(share, rel=0.5)
    # Alike where reading the weights takes longer than all products: that is for the
    # machine to say.
    assert found["floor, 2N"] >= found["floor, full"] >= found["floor, full, unshared"] > 0
    assert found["peak memory"] > 50
    assert found["completed rollouts"] == pytest.approx(found["generated tokens"] / found["rollout length"], rel=0.5)
    for name in ("cold", "compiled programs kept"):
        assert 0 < found[f"first batch, {name}"] < found[f"start to first batch, {name}"]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", ["learner", "step"])
def test_the_learner_is_measured(name):
    work = ["--work=natural", "--microbatches=3", "--repeats=2", "--kl=0.1", "--eos_id=5", "--config.sharding.mesh.data=1"]
    code, lines, err = bench(name, *TINY, *work)
    assert code == 0, err
    found = {line["what"]: line["value"] for line in lines}
    assert 0 < found["packing efficiency"] <= 1
    for part in ("reference", "update"):
        assert 0 < found[f"{part}, share of the floor (model FLOPs utilisation)"] < 1
        assert found[f"{part}, tokens"] > 0
    assert found["peak memory"] > 50
    assert ("rollout" in found) == (name == "step")
    if name == "step":
        assert found["step"] == pytest.approx(found["rollout"] + found["reference"] + found["update"], rel=0.3)


@pytest.mark.process
def test_lookup_is_measured(tmp_path):
    rows = [{"prompt": "12+34=", "text": "46;12+34=46"}, {"prompt": "1+1=", "text": "2"}, {"prompt": "3", "text": ""}]
    rows.append({"prompt": "<bos>3", "text": "<pad>4"})  # an early model samples special tokens
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [f"--rollouts={tmp_path / 'rollouts.jsonl'}", "--slots=2", "--guesses=1,3", "--repeats=1"]
    code, lines, err = bench("lookup", "--config=configs/tiny.py:smoke", *found)
    assert code == 0, err
    value = {line["what"]: line for line in lines}
    assert 1 < value["tokens a step, 1 guessed"]["value"] <= value["tokens a step, 3 guessed"]["value"]
    cost = value["cost of a step that checks 3 guesses, 2 slots"]
    assert cost["speedup"] == pytest.approx(value["tokens a step, 3 guessed"]["value"] / cost["value"], rel=0.01)


@pytest.mark.process
def test_the_sandbox_is_measured():
    code, lines, err = bench("sandbox", "--backend=rlimits", "--repeats=2")
    assert code == 0, err
    assert len(lines) == 6
    assert {line["backend"] for line in lines} == {"rlimits"}


@pytest.mark.process
def test_choices_of_the_cache_are_measured():
    small = ["--layers=1", "--heads=2", "--kv_heads=1", "--head_size=4", "--slots=4", "--columns=16", "--prompts=8", "--group=2"]
    code, lines, err = bench("cache", *small)
    assert code == 0, err
    assert len(lines) == 3 + 2
    assert all(line["value"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["samplr"], "unknown benchmark 'samplr' (did you mean 'sampler'?)"),
        (["sampler"], "error: needed: --config=FILE"),
        (["step", "configs/tiny.py"], "got the arguments 'configs/tiny.py'; needed: --config=FILE"),
        (["cache", "--slots=16,many"], "allowed: integers of 1 or more, separated by commas"),
        (["cache", "--layer=2"], "Did you mean: layers ?"),
        (["cache", "--config=configs/tiny.py"], "this command has no --config"),
        (["sandbox", "--repeat=2"], "Did you mean: repeats ?"),
        (["sampler", *TINY, "--model=widht=3"], "unknown field of config.model 'widht'"),
        (["sampler", *TINY, "--questions=/nowhere.jsonl"], "/nowhere.jsonl"),
        (
            ["learner", *TINY, "--microbatches=4", "--config.sharding.mesh.data=1"],
            "6 rows do not divide over 4 micro-batches",
        ),
        (["lookup", "--config=configs/tiny.py:smoke"], "--rollouts=FILE"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, message):
    code, lines, err = bench(*arguments)
    assert code == 1
    assert not lines
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert message in err.strip().splitlines()[-1]
