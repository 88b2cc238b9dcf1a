"""The host loop: rollouts depend only on their requests; where they stop; forced
tokens; what is compiled, and when.
"""

import dataclasses
import logging
import threading

import jax
import numpy as np
import pytest
import tiny_completer as t

from jaxreason.draw import ALL, Filter
from jaxreason.environment import Environment, Step, single_turn
from jaxreason.rollout import Budget, Request, collect, warm_up
from jaxreason.sampler import RUNNING
from jaxreason.sharding import make_mesh, row_devices, shardings
from jaxreason.types import Task, Verdict

JUDGE = single_turn(t.verify)
NEVER, ALWAYS = -1e9, 1e9


@pytest.fixture(scope="module")
def made():
    """Make a model and params whose rollouts have all lengths up to the limit."""
    model, params = t.make_model()
    return model, t.biased(params, _=0.8)


# --- a rollout depends on its request alone ---


@pytest.fixture(scope="module")
def requests():
    return t.make_requests(9, 3)


@pytest.fixture(scope="module")
def expected(made, requests):
    """Return the rollouts that all variants must give, with twice as many requests as
    slots.
    """
    rollouts = t.roll(t.make_completer(made[0], prompt_rows=0), made[1], requests, JUDGE, temperature=0.9)
    assert [(r.problem, r.attempt) for r in rollouts] == [(r.problem, r.attempt) for r in requests]
    assert len({len(r.tokens) for r in rollouts}) > 6
    assert len({r.tokens.tobytes() for r in rollouts}) > 20
    return rollouts


VARIANTS = {
    "one slot": {"slots": 1},
    "three slots, chunks of one token": {"slots": 3, "chunk_tokens": 1},
    "more slots than requests, chunks longer than rollouts": {"slots": 32, "chunk_tokens": 16},
    "longer cache, wider prompt bucket": {"length": 40, "prompt_buckets": (16,)},
    "cache buckets, one of them shorter than the prompts": {"length": 24, "buckets": (4, 9, 14, 24)},
    "cache buckets of one slot, which shrinks between rollouts": {"slots": 1, "buckets": (8, 16, 24), "chunk_tokens": 2},
    "prompts prefilled three tokens at a time, all at once": {"prefill_tokens": 3, "rows": 9},
    "prompts prefilled two at a time of five": {"prefill_tokens": 17, "rows": 5},
    "prompts prefilled one by one": {"rows": 1},
    "fewer slots for the last, in three steps": {"sizes": (5, 2, 1), "chunk_tokens": 2, "buckets": (8, 16, 24)},
    "each prompt in one place": {"prompt_rows": 9},
    "one place for a prompt": {"prompt_rows": 1, "slots": 5, "chunk_tokens": 1},
    "shared prompts, and columns for completions alone": {"prompt_rows": 4, "buckets": (12, 24), "sizes": (3,)},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_do_not_depend_on_the_sampler(made, requests, expected, variant):
    completer = t.make_completer(made[0], **{"slots": 8, **VARIANTS[variant]})
    got = t.roll(completer, made[1], requests, JUDGE, temperature=0.9)
    assert [(r.problem, r.attempt) for r in got] == [(r.problem, r.attempt) for r in requests]
    t.assert_same(got, expected)


def test_a_prompt_of_more_attempts_than_share_it(made):
    """The ninth attempt of problem 1 takes the slot of problem 0 and a place that
    another attempt has left, whose slot stays empty.

    The keys are known to give such an order: when the empty slot was counted too, one
    of them gave another rollout.
    """
    prompts = ([1, 2, 3], [4, 5, 6, 7])
    wanted = [Request(Task("", "a"), p, g, prompts[p]) for p, attempts in enumerate((1, 9)) for g in range(attempts)]
    for key in range(20):
        alone, shared = (
            t.roll(t.make_completer(made[0], slots=9, prompt_rows=rows), made[1], wanted, JUDGE, key=key) for rows in (0, 2)
        )
        t.assert_same(shared, alone)


@pytest.mark.parametrize(("problems", "attempts", "shared", "own"), [(6, 3, 6, 0), (6, 1, 0, 6), (1, 9, 1, 0)])
def test_a_prompt_is_copied_once_for_those_who_share_it(made, problems, attempts, shared, own):
    """It is copied to a row of prompts if several attempts share it, else to the slot.
    A row is free again when all its attempts have ended.
    """
    completer, copies = t.make_completer(made[0], slots=3, prompt_rows=2), []

    def copy_prompts(slots, prefilled, own_S, prompt_R):
        copies.append(((prompt_R >= 0).sum(), (own_S >= 0).sum()))
        return completer.sampler.copy_prompts(slots, prefilled, own_S, prompt_R)

    spied = completer._replace(sampler=completer.sampler._replace(copy_prompts=copy_prompts))
    t.roll(spied, t.biased(made[1], _=ALWAYS), t.make_requests(problems, attempts), JUDGE)
    assert np.sum(copies, axis=0).tolist() == [shared, own]


def test_rollouts_do_not_depend_on_order_or_neighbours(made, requests, expected):
    model, params = made
    completer = t.make_completer(model, slots=12)
    order = np.random.default_rng(1).permutation(len(requests))
    got = t.roll(completer, params, [requests[i] for i in order], JUDGE, temperature=0.9)
    assert [(r.problem, r.attempt) for r in got] == [(requests[i].problem, requests[i].attempt) for i in order]
    t.assert_same(got, expected)

    few = [5, 17, 18]
    t.assert_same(t.roll(completer, params, [requests[i] for i in few], JUDGE, temperature=0.9), [expected[i] for i in few])
    others = [r._replace(problem=r.problem + 100, prompt=[3, *r.prompt[:4]]) for r in requests]
    mixed = [x for pair in zip(others, requests, strict=True) for x in pair]
    t.assert_same(t.roll(completer, params, mixed, JUDGE, temperature=0.9)[1::2], expected)


MESHES = [
    ({"data": 8}, False),
    ({"data": 2, "fsdp": 4}, True),
    ({"data": 2, "fsdp": 2, "tensor": 2}, False),
    ({"tensor": 2}, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "scan"), MESHES, ids=str)
def test_rollouts_do_not_depend_on_the_mesh(made, requests, expected, axes, scan):
    mesh, model = make_mesh(**axes), t.make_model(scan_layers=scan)[0]
    params = jax.device_put(made[1], shardings(made[1], mesh))
    rows, tensor = row_devices(mesh), mesh.shape["tensor"]
    sizes = (8,) if rows < 8 else ()
    completer = t.new_completer(model, slots=16, sizes=sizes, mesh=mesh, buckets=(8, 24), prompt_rows=rows)
    t.assert_same(t.roll(completer, params, requests, JUDGE, temperature=0.9), expected)
    greedy = t.roll(t.make_completer(made[0]), made[1], requests, JUDGE, temperature=0.0)
    t.assert_same(t.roll(completer, params, requests, JUDGE, temperature=0.0), greedy)
    for slots in (completer.sampler.empty(), completer.sampler.resize(completer.sampler.empty(), 24)):
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(slots)} == {8}
        assert slots.tokens_ST.addressable_shards[0].data.shape == (16 // rows, 24)
        shards = {x.sharding.shard_shape(x.shape)[:2] for x in jax.tree.leaves(slots.cache)}
        assert shards == {(16 // rows, 2 // tensor)}  # slots, and heads of keys and values
    assert 2 <= completer.sampler.decode._cache_size() <= 2 * (1 + len(sizes))
    assert completer.sampler.prefill._cache_size() == 1
    layers = completer.sampler.prepare(params).decode["layers"]
    for kernel in (layers[0]["mlp"]["gate_up"]["kernel"], layers[0]["attention"]["qkv"]["kernel"]):
        assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size // tensor  # gathered but for `tensor`


@pytest.mark.slow
def test_a_vocabulary_that_does_not_divide_over_the_mesh(requests):
    model, params = t.make_model(vocab_size=13)
    completer = t.make_completer(model)._replace(decode=str)
    expected = t.roll(completer, params, requests, JUDGE)
    mesh = make_mesh(data=4, tensor=2)
    completer = t.new_completer(model, slots=12, mesh=mesh, prompt_rows=0)._replace(decode=str)
    t.assert_same(t.roll(completer, jax.device_put(params, shardings(params, mesh)), requests, JUDGE), expected)


def test_another_key_gives_other_rollouts(made, requests, expected):
    completer = t.make_completer(made[0])
    got = t.roll(completer, made[1], requests, JUDGE, temperature=0.9, key=1)
    same = [g.tokens.tolist() == e.tokens.tolist() for g, e in zip(got, expected, strict=True)]
    assert sum(same) < 5  # some consist of the end alone


def test_nothing_is_wanted(made):
    assert t.roll(t.make_completer(made[0]), made[1], [], JUDGE) == []


# --- where rollouts stop ---


def test_immediate_end(made, requests):
    for r in t.roll(t.make_completer(made[0]), t.biased(made[1], _=ALWAYS), requests, JUDGE):
        assert (r.tokens.tolist(), r.sampled.tolist(), r.stop, r.text) == ([t.EOS], [True], "eos", "")
        assert r.verdict.parsed == ""
        assert r.logp == pytest.approx(0, abs=1e-6)


def test_no_end_before_the_limit(made, requests):
    completer = t.make_completer(made[0])
    for r in t.roll(completer, t.biased(made[1], _=NEVER), requests, JUDGE):
        assert (len(r.tokens), len(r.text), r.stop, r.sampled.all()) == (12, 12, "limit", True)
    # A limit of each completer, over the same compiled sampler.
    for r in t.roll(completer._replace(max_tokens=5), t.biased(made[1], _=NEVER), requests, JUDGE):
        assert (len(r.tokens), r.stop) == (5, "limit")


def test_padding_is_not_the_end(made, requests):
    # Token 0 pads prompts and rows; a sampler that has another end samples it like any
    # other.
    completer = t.make_completer(made[0], eos_ids=(4,))
    for r in t.roll(completer, t.biased(made[1], _=ALWAYS), requests, JUDGE):
        assert (r.text, r.stop) == ("_" * 12, "limit")


def test_any_of_several_ends_stops_and_is_left_out_of_the_text(made, requests):
    eos_ids = (t.EOS, 4, 7)
    rollouts = t.roll(t.make_completer(made[0], eos_ids=eos_ids), made[1], requests, JUDGE)
    ends = [int(r.tokens[-1]) for r in rollouts if r.stop == "eos"]
    assert set(ends) == set(eos_ids)
    for r in rollouts:
        kept = r.tokens[:-1] if r.stop == "eos" else r.tokens
        assert not set(kept.tolist()) & set(eos_ids)
        assert r.text == t.decode(kept) == r.verdict.parsed
        assert r.stop == "eos" or len(r.tokens) == 12


def test_the_end_in_the_last_place_is_an_end(made, requests, expected):
    completer = t.make_completer(made[0])
    ended = [r for r in expected if r.stop == "eos" and len(r.tokens) > 2]
    for n in {len(r.tokens) for r in ended}:
        same = [r for r in ended if len(r.tokens) == n]
        wanted = [q for q in requests if (q.problem, q.attempt) in {(r.problem, r.attempt) for r in same}]
        t.assert_same(t.roll(completer._replace(max_tokens=n), made[1], wanted, JUDGE, temperature=0.9), same)
        for r in t.roll(completer._replace(max_tokens=n - 1), made[1], wanted, JUDGE, temperature=0.9):
            assert (r.stop, len(r.tokens), len(r.text)) == ("limit", n - 1, n - 1)


def test_a_completion_ends_with_the_cache(made):
    completer = t.make_completer(made[0], slots=3, length=8)
    wanted = [Request(Task("", "a"), n, g, [1] * n) for n in (1, 2, 5, 7, 8) for g in range(6)]
    rollouts = t.roll(completer._replace(max_tokens=4), made[1], wanted, JUDGE)
    for r in rollouts:
        ended = len(r.tokens) > 0 and r.tokens[-1] == t.EOS
        assert r.stop == ("eos" if ended else "limit")
        assert ended or len(r.tokens) == min(4, 8 - len(r.prompt))
    assert {len(r.tokens) for r in rollouts if r.stop == "limit"} == {0, 1, 3, 4}


def test_a_prompt_must_be_neither_empty_nor_too_long(made):
    completer = t.make_completer(made[0])
    with pytest.raises(ValueError, match="prompt of problem 7 has 0 tokens; allowed: 1 to 8"):
        t.roll(completer, made[1], [Request(Task("", ""), 7, 0, [])], JUDGE)
    with pytest.raises(ValueError, match=r"prompt of problem 7 has 9 tokens; allowed: 1 to 8; raise sampler.max_prompt_tokens"):
        t.roll(completer, made[1], [Request(Task("", ""), 7, 0, [1] * 9)], JUDGE)


# --- stop strings ---


def with_stops(completer, *strings):
    return completer._replace(stop_strings=strings)


@pytest.mark.slow
def test_a_stop_string_ends_the_text_where_it_is_complete(made, requests):
    """Its two letters are two tokens; with chunks of 4, 1 and 16 tokens it also
    straddles chunks.
    """
    params, strings = t.biased(made[1], _=-1.0), ("ab", "c", "ghi")
    free = t.roll(t.make_completer(made[0]), params, requests, JUDGE)
    stopped = t.roll(with_stops(t.make_completer(made[0]), *strings), params, requests, JUDGE)
    assert {r.stop for r in stopped} == {"stop", "eos", "limit"}
    assert any(r.text.endswith("ab") for r in stopped)
    for r, whole in zip(stopped, free, strict=True):
        ends = [whole.text.find(s) + len(s) for s in strings if s in whole.text]
        if not ends:
            t.assert_same([r], [whole])
            continue
        n = min(ends)
        assert (r.stop, r.text, len(r.tokens)) == ("stop", whole.text[:n], n)
        np.testing.assert_array_equal(r.tokens, whole.tokens[:n])
        np.testing.assert_allclose(r.logp, whole.logp[:n], atol=1e-5)  # a prompt may be shared in one and copied in the other
        assert r.verdict.parsed == r.text
    for shape in ({"chunk_tokens": 1}, {"chunk_tokens": 16, "slots": 3}, {"slots": 32, "chunk_tokens": 5}):
        t.assert_same(t.roll(with_stops(t.make_completer(made[0], **shape), *strings), params, requests, JUDGE), stopped)


def test_a_stop_string_may_begin_and_end_inside_tokens(made, requests):
    """A token has three letters here. A stop string covers the last letter of one, a
    whole one, and the first letter of a third.
    """
    spell = lambda ids: "".join("x" + t.ALPHABET[i] + "y" for i in ids)  # noqa: E731
    completer = t.make_completer(made[0])._replace(decode=spell)
    params = t.biased(made[1], _=NEVER)
    found = 0
    free = t.roll(completer, params, requests, JUDGE)
    for r, whole in zip(t.roll(with_stops(completer, "yxayx"), params, requests, JUDGE), free, strict=True):
        place = whole.text.find("yxayx")
        assert r.stop == ("limit" if place < 0 else "stop")
        found += place >= 0
        n = len(whole.tokens) if place < 0 else -(-(place + 5) // 3)  # the token in which it ends is whole
        np.testing.assert_array_equal(r.tokens, whole.tokens[:n])
    assert 5 < found < len(requests)


@pytest.mark.slow
def test_after_a_stop_string_an_observation_goes_on_from_there(made):
    """Tokens sampled after the stop string, up to the end of the chunk, leave no
    trace.
    """
    model, params = made[0], t.biased(made[1], _=-3.0, a=1.0)
    talk = [r._replace(task=dataclasses.replace(r.task, id="3")) for r in t.make_requests(8, 2)]
    completers = [
        with_stops(t.make_completer(model, slots=slots, length=36, max_tokens=28, chunk_tokens=chunk), "a")
        for slots, chunk in ((5, 4), (16, 7), (2, 1))
    ]
    first, *others = (t.roll(completer, params, talk, scripted(several)) for completer in completers)
    for other in others:
        t.assert_same(other, first)
    assert t.largest_gap(model, params, first) < 1e-5
    assert sum(len(turns(r)) == 4 for r in first) > 5
    for r in first:
        assert all(turn.endswith("a") and turn.count("a") == 1 for turn in turns(r)[:-1] if "_" not in turn)


# --- a budget for thinking ---


def thinker(completer, tokens=4, end="k"):
    return completer._replace(thinking=Budget(tokens, end, t.encode(end)))


def test_thinking_is_ended_at_its_budget_unless_it_has_ended(made, requests):
    params = t.biased(made[1], _=-1.0)
    free = t.roll(t.make_completer(made[0]), params, requests, JUDGE)
    completer = thinker(t.make_completer(made[0]), end="jk")
    rollouts = t.roll(completer, params, requests, JUDGE)
    kinds = set()
    for r, whole in zip(rollouts, free, strict=True):
        if len(whole.tokens) < 4 or (len(whole.tokens) == 4 and whole.stop == "eos") or "jk" in whole.text[:4]:
            kinds.add("free")
            t.assert_same([r], [whole])
            continue
        kinds.add("forced")
        np.testing.assert_array_equal(r.tokens[:4], whole.tokens[:4])
        assert t.decode(r.tokens[4:6]) == "jk"
        assert r.sampled.tolist() == [True] * 4 + [False] * 2 + [True] * (len(r.tokens) - 6)
        assert r.stop in ("eos", "limit")
        assert len(r.tokens) == 12 or r.stop == "eos"
        assert r.verdict.parsed == r.text  # one turn: both the thinking and the answer
    assert kinds == {"free", "forced"}
    assert t.largest_gap(made[0], params, [r for r in rollouts if len(r.tokens) > 0]) < 1e-5
    other = thinker(t.make_completer(made[0], slots=3, chunk_tokens=16, buckets=(8, 16, 24)), end="jk")
    t.assert_same(t.roll(other, params, requests, JUDGE), rollouts)


def test_thinking_that_has_ended_goes_on_to_the_limit(made, requests):
    params = t.biased(made[1], _=NEVER, k=ALWAYS)
    for r in t.roll(thinker(t.make_completer(made[0])), params, requests, JUDGE):
        assert (r.text, r.sampled.all(), r.stop) == ("k" * 12, True, "limit")


def test_a_budget_at_the_limit_forces_nothing(made, requests):
    params = t.biased(made[1], _=NEVER)
    free = t.roll(t.make_completer(made[0]), params, requests, JUDGE)
    t.assert_same(t.roll(thinker(t.make_completer(made[0]), tokens=12), params, requests, JUDGE), free)
    for r in t.roll(thinker(t.make_completer(made[0]), tokens=11, end="jkjk"), params, requests, JUDGE):
        assert (r.sampled.tolist(), r.stop, len(r.tokens)) == ([True] * 11 + [False], "limit", 12)


# --- forced tokens ---


def scripted(observations, heard=None):
    """Answer a turn of a task with the next of `observations(task)`; judge when none is
    left, or no room.
    """

    def step(state, turn):
        task, count = state
        assert count < 9, "the loop does not get on"
        if heard is not None:
            heard.setdefault(task.id, []).append((turn.text, turn.final))
        left = observations(task)[count:]
        if turn.final or not left:
            return state, Step(verdict=Verdict(float(count), turn.final, turn.text))
        return (task, count + 1), Step(observation=left[0])

    return Environment(reset=lambda task: (task, 0), step=step)


def several(task):
    return ["kk", "ijk", "bcdb"][: int(task.id) % 4]


def turns(r) -> list[str]:
    """Return the texts sampled between observations, without their ends."""
    pieces, was_sampled = [[]], True
    for token, sampled in zip(r.tokens, r.sampled, strict=True):
        if sampled and not was_sampled:
            pieces.append([])
        if sampled:
            pieces[-1].append(token)
        was_sampled = sampled
    if not was_sampled:
        pieces.append([])
    return [t.decode(p[:-1] if p and p[-1] == t.EOS else p) for p in pieces]


@pytest.fixture(scope="module")
def conversations(made):
    """Make rollouts with up to three observations, and record what their environments
    receive.
    """
    heard = {}
    params = t.biased(made[1], _=2.0)
    wanted = [r._replace(task=dataclasses.replace(r.task, id=f"{r.problem * 3 + r.attempt}")) for r in t.make_requests(8, 3)]
    completer = t.make_completer(made[0], slots=5, length=36, max_tokens=28)
    return params, wanted, t.roll(completer, params, wanted, scripted(several, heard)), heard


def test_forced_tokens_are_appended_and_not_sampled(conversations):
    _, _, rollouts, _ = conversations
    complete = [r for r in rollouts if r.stop == "eos"]
    assert {len(several(r.task)) for r in complete} == {0, 1, 2, 3}
    for r in complete:
        forced = t.decode(r.tokens[~r.sampled])
        assert forced == "".join(several(r.task))
        assert "".join(t.decode([token]) for token, author in zip(r.tokens, r.author, strict=True) if author == "t") == forced
        assert (r.logp[~r.sampled] == 0).all()
        assert (r.logp[r.sampled] < 0).all()
        starts = [i for i in range(1, len(r.tokens)) if r.sampled[i - 1] and not r.sampled[i]]
        assert len(starts) == len(several(r.task))
        assert all(r.tokens[i - 1] == t.EOS for i in starts)  # behind the end of a turn
    assert {r.stop for r in rollouts} == {"eos", "limit"}


def test_after_forced_tokens_sampler_and_learner_agree(made, conversations):
    model, (params, _, rollouts, _) = made[0], conversations
    assert t.largest_gap(model, params, [r for r in rollouts if not r.sampled.all()]) < 1e-5
    batch, _ = t.rescore(model, params, rollouts)
    for i, r in enumerate(rollouts):
        own = slice(len(r.prompt), len(r.prompt) + len(r.tokens))
        np.testing.assert_array_equal(batch.weight_BT[i, own] > 0, r.sampled)
        assert (batch.segment_BT[i, own] == 1).all()  # they are seen all the same


def test_the_environment_hears_what_was_written_since_it_spoke(conversations):
    _, _, rollouts, heard = conversations
    for r in rollouts:
        said = heard[r.task.id]
        assert [text for text, _ in said] == turns(r)
        assert [final for _, final in said] == [False] * (len(said) - 1) + [r.stop == "limit"]
        assert r.verdict.parsed == said[-1][0]


def test_conversations_do_not_depend_on_the_sampler(made, conversations):
    params, wanted, rollouts, _ = conversations
    completer = t.make_completer(made[0], slots=16, length=44, max_tokens=28, chunk_tokens=3)
    t.assert_same(t.roll(completer, params, wanted, scripted(several)), rollouts)


def test_forced_tokens_are_cut_at_the_limit_and_the_rollout_judged(made, requests):
    heard = {}
    completer = t.make_completer(made[0])
    wanted = [r for r in requests if r.attempt == 0]
    rollouts = t.roll(completer, t.biased(made[1], _=ALWAYS), wanted, scripted(lambda task: ["bcdefghijkbcdefghijk"], heard))
    for r in rollouts:
        assert (t.decode(r.tokens), r.stop) == ("_bcdefghijkb", "limit")
        assert r.sampled.tolist() == [True] + [False] * 11
        assert r.author == "m" + "t" * 11
        assert heard[r.task.id] == [("", False), ("", True)]
        assert r.verdict.correct  # here: the value of `final` that it received
        assert r.verdict.parsed == ""


def test_an_empty_observation_ends_the_rollout(made, requests):
    heard = {}
    wanted = [r for r in requests if r.attempt == 0]
    completer = t.make_completer(made[0])
    alone = t.roll(completer, made[1], wanted, JUDGE)
    for r, lone in zip(t.roll(completer, made[1], wanted, scripted(lambda task: [""] * 5, heard)), alone, strict=True):
        np.testing.assert_array_equal(r.tokens, lone.tokens)
        assert r.sampled.all()
        assert (heard[r.task.id][0], heard[r.task.id][1:]) == (
            (lone.text, lone.stop == "limit"),
            [] if lone.stop == "limit" else [("", True)],
        )


def test_an_end_in_the_last_place_leaves_no_room_for_an_observation(made, requests, expected):
    ended = next(r for r in expected if r.stop == "eos" and len(r.tokens) > 2)
    wanted = [q for q in requests if (q.problem, q.attempt) == (ended.problem, ended.attempt)]
    heard = {}
    completer = t.make_completer(made[0])._replace(max_tokens=len(ended.tokens))
    (r,) = t.roll(completer, made[1], wanted, scripted(lambda task: ["bc"] * 20, heard), temperature=0.9)
    np.testing.assert_array_equal(r.tokens, ended.tokens)
    assert heard[r.task.id][-1][1], "the step that judges must be told that it is the last"
    assert len(heard[r.task.id]) <= 2


# --- verifiers ---


def test_a_verifier_that_raises_costs_a_wrong_verdict(made, requests):
    def brittle(text, task):
        if task.id == "3":
            raise KeyError("no such thing")
        return t.verify(text, task)

    rollouts = t.roll(t.make_completer(made[0]), made[1], requests, single_turn(brittle))
    for r in rollouts:
        if r.problem == 3:
            assert (r.verdict.reward, r.verdict.correct, r.verdict.parsed) == (0.0, False, None)
            assert r.verdict.reason == "verifier error: KeyError: 'no such thing'"
        else:
            assert r.verdict == t.verify(r.text, r.task)


# --- costs ---


def test_costs_of_a_collection_are_measured(made, requests):
    completer = t.make_completer(made[0])
    layout = completer.sampler.prepare(made[1])
    rollouts, spent = collect(completer, layout, requests, JUDGE, key=jax.random.key(0), temperature=1.0)
    assert spent.tokens == sum(len(r.tokens) for r in rollouts)
    assert spent.sample_s > 0
    assert spent.verify_s > 0
    assert spent.prompt_tokens == sum(len(p) for p in {tuple(r.prompt) for r in requests})  # each once, though slots are few


def least_slot_steps(rollouts, sizes) -> int:
    """Count slots x steps if all start together and each step has the smallest size
    that holds the remaining rollouts.
    """
    lengths = [len(r.tokens) for r in rollouts]
    return sum(min(n for n in sizes if n >= sum(x > step for x in lengths)) for step in range(max(lengths)))


def test_occupancy_counts_the_steps_of_all_slots(made, requests):
    """With one slot no step is lost; if all start together, the others wait for the
    longest.
    """

    def spend(params, wanted, environment, **shape):
        completer = t.make_completer(made[0], **shape)
        layout = completer.sampler.prepare(params)
        return collect(completer, layout, wanted, environment, key=jax.random.key(0), temperature=1.0)

    rollouts, spent = spend(made[1], requests, JUDGE, slots=32)
    longest = max(len(r.tokens) for r in rollouts)
    assert longest > min(len(r.tokens) for r in rollouts)
    assert (spent.tokens, spent.slot_steps) == (sum(len(r.tokens) for r in rollouts), 32 * longest)
    fewer = spend(made[1], requests, JUDGE, slots=32, sizes=(8, 2), chunk_tokens=1)[1]
    assert (fewer.tokens, fewer.slot_steps) == (spent.tokens, least_slot_steps(rollouts, (32, 8, 2)))
    _, alone = spend(made[1], requests, JUDGE, slots=1)
    assert alone.slot_steps == alone.tokens == spent.tokens
    talk = [r._replace(task=dataclasses.replace(r.task, id=f"{r.problem * 3 + r.attempt}")) for r in t.make_requests(4, 3)]
    rollouts, spent = spend(t.biased(made[1], _=2.0), talk, scripted(several), slots=1, length=36, max_tokens=28)
    assert spent.slot_steps == spent.tokens < sum(len(r.tokens) for r in rollouts)


def test_no_slots_are_moved_when_nobody_is_left_in_them(made, requests):
    model, params = made
    completer = t.make_completer(model, slots=12, sizes=(6, 2))
    still_running = []

    def compact(slots, row_R):
        still_running.append(int(np.sum(np.asarray(slots.stop_S)[row_R] == RUNNING)))
        return completer.sampler.compact(slots, row_R)

    counting = completer._replace(sampler=completer.sampler._replace(compact=compact))
    weights = completer.sampler.prepare(t.biased(params, _=-1e9))  # all end at once, at the limit
    collect(counting, weights, requests[:6], JUDGE, key=jax.random.key(0), temperature=1.0)
    assert still_running == [6]


def test_each_shape_is_compiled_once(made, requests, expected, caplog):
    model, params = made
    prompt_buckets = (4, 8)
    mixed = sorted(requests, key=lambda r: (len(r.prompt) > 4, r.attempt))  # unlike prompts side by side, short ones first
    completer = t.new_completer(model, slots=4, prompt_buckets=prompt_buckets, rows=2)
    sampler = completer.sampler

    def run(params, **more):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            rollouts = t.roll(completer, params, mixed, JUDGE, **more)
        return rollouts, [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]

    rollouts, compiled = run(params, temperature=0.9)
    t.assert_same(rollouts, expected)
    assert compiled
    assert sampler.prefill._cache_size() == len(prompt_buckets)
    assert sampler.decode._cache_size() == sampler.empty._cache_size() == 1
    assert run(jax.tree.map(lambda x: x + 0.01, params), key=1, temperature=0.7)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(), (2, 1)])
def test_after_a_warm_up_nothing_is_compiled(made, caplog, sizes):
    """Use a long ragged run over all buckets, with observations, stop strings, a
    thinking budget and two filters.
    """
    sampler = {"slots": 5, "sizes": sizes, "length": 44, "max_tokens": 30, "prompt_buckets": (4, 8), "buckets": (8, 16, 44)}
    completer = with_stops(thinker(t.new_completer(made[0], **sampler), tokens=14), "ab")
    filters = (ALL, Filter(top_k=6))
    weights = completer.sampler.prepare(made[1])
    warm_up(completer, weights, filters, appends_tokens=True)
    talk = [r._replace(task=dataclasses.replace(r.task, id=f"{r.problem + r.attempt}")) for r in t.make_requests(24, 3)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = []
        for filter in filters:
            rollouts, _ = collect(
                completer, weights, talk, scripted(several), key=jax.random.key(0), temperature=0.9, filter=filter
            )
            found += rollouts
    assert {r.stop for r in found} == {"eos", "limit", "stop"}
    assert len({len(r.prompt) + len(r.tokens) for r in found}) > 20
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert compiled == []
    assert completer.sampler.decode._cache_size() == 3 * (1 + len(sizes)) * 2  # buckets x sizes x filters


def test_observations_of_many_lengths_share_few_shapes(made, conversations):
    # They were of 2, 3 and 4 tokens. The completer is that of the conversations.
    completer = t.make_completer(made[0], slots=5, length=36, max_tokens=28)
    assert completer.sampler.append_tokens._cache_size() == 1


def test_verdicts_are_made_while_others_decode(made, requests):
    """The verdict of the first rollout waits until another has ended, which only
    happens if sampling continues.
    """
    ended = [threading.Event() for _ in range(2)]
    order = []

    def patient(text, task):
        number = len(order)
        order.append(text)
        if number < 2:
            ended[number].set()
        return t.verify(text, task) if number or ended[1].wait(60) else Verdict(-1.0, False, None, "nobody else ended")

    completer = t.make_completer(made[0], slots=2, chunk_tokens=1)
    t.assert_same(t.roll(completer, made[1], requests, single_turn(patient)), t.roll(completer, made[1], requests, JUDGE))


def test_an_observation_is_awaited_while_others_decode(made, requests):
    heard, others = threading.Event(), threading.Event()

    def step(state, turn):
        task, count = state
        if task.id == "0" and count == 0:
            heard.set()
            return (task, 1), Step(observation="kk" if others.wait(60) else "bb")
        if heard.is_set():
            others.set()
        return state, Step(verdict=Verdict(0.0, False, turn.text))

    completer = t.make_completer(made[0], slots=2, chunk_tokens=1)
    wanted = [r for r in requests if r.attempt == 0]
    first, *_ = t.roll(completer, t.biased(made[1], _=2.5), wanted, Environment(lambda task: (task, 0), step))
    assert t.decode(first.tokens[~first.sampled]) == "kk"


def test_an_environment_that_says_one_turn_must_give_verdicts(made, requests):
    step = lambda state, turn: (state, Step(observation="a"))  # noqa: E731
    with pytest.raises(ValueError, match="one_turn=True gave an observation"):
        t.roll(t.make_completer(made[0]), made[1], requests, Environment(lambda task: task, step, one_turn=True))


def test_must_finish_pays_nothing_for_what_was_cut_off(made, requests):
    always = lambda text, task: Verdict(1.0, True, text)  # noqa: E731
    params = t.biased(made[1], _=1.0)
    judged = {m: t.roll(t.make_completer(made[0]), params, requests, single_turn(always, must_finish=m)) for m in (False, True)}
    assert {r.stop for r in judged[True]} == {"eos", "limit"}
    for free, r in zip(judged[False], judged[True], strict=True):
        assert free.verdict == Verdict(1.0, True, r.text)
        assert r.verdict == (Verdict(0.0, False, None, "cut off") if r.stop == "limit" else free.verdict)


def test_must_finish_does_not_mind_an_end_at_the_very_limit(made, requests):
    """The last token that fits may be the end of sequence: the attempt is then
    complete.
    """
    always = lambda text, task: Verdict(1.0, True, text)  # noqa: E731
    completer = t.make_completer(made[0], max_tokens=1)
    rollouts = t.roll(completer, t.biased(made[1], _=ALWAYS), requests, single_turn(always, must_finish=True))
    assert {r.stop for r in rollouts} == {"eos"}
    assert all(r.verdict.correct for r in rollouts)
