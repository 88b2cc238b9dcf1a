"""The host loop: rollouts depend on their requests alone; where they stop; forced tokens; what is compiled and when."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
import tiny_roller as t

from jaxreason.environment import Environment, Step, single_turn
from jaxreason.rollout import Request, collect
from jaxreason.sharding import make_mesh, shardings
from jaxreason.types import Task, Verdict

JUDGE = single_turn(t.verify)
NEVER, ALWAYS = -1e9, 1e9
make_roller = functools.cache(t.make_roller)


@pytest.fixture(scope="module")
def made():
    """A model and params under which rollouts have all lengths up to the limit."""
    model, params = t.make_model()
    return model, t.biased(params, _=0.8)


# --- a rollout depends on its request alone ---


@pytest.fixture(scope="module")
def requests():
    return t.make_requests(9, 3)


@pytest.fixture(scope="module")
def expected(made, requests):
    """What all variants must give, with twice as many requests as slots."""
    rollouts = t.roll(make_roller(made[0], slots=12), made[1], requests, JUDGE, temperature=0.9)
    assert [(r.problem, r.attempt) for r in rollouts] == [(r.problem, r.attempt) for r in requests]
    assert len({len(r.tokens) for r in rollouts}) > 6
    assert len({r.tokens.tobytes() for r in rollouts}) > 20
    return rollouts


VARIANTS = {
    "one slot": {"slots": 1},
    "three slots": {"slots": 3},
    "more slots than requests": {"slots": 32},
    "chunks of one token": {"chunk_tokens": 1},
    "chunks longer than rollouts": {"chunk_tokens": 16},
    "longer cache": {"length": 40},
    "wider prompt bucket": {"prompt_buckets": (16,)},
    "several prompt buckets": {"slots": 3, "prompt_buckets": (2, 5, 8)},
    "several row buckets": {"row_buckets": (1, 3, 8)},
    "scan": {"scan_layers": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_do_not_depend_on_the_sampler(made, requests, expected, variant):
    more = dict(VARIANTS[variant])
    model = t.make_model(scan_layers=more.pop("scan_layers", False))[0]
    got = t.roll(make_roller(model, **{"slots": 8, **more}), made[1], requests, JUDGE, temperature=0.9)
    assert [(r.problem, r.attempt) for r in got] == [(r.problem, r.attempt) for r in requests]
    t.assert_same(got, expected)


def test_rollouts_do_not_depend_on_order_or_neighbours(made, requests, expected):
    model, params = made
    roller = make_roller(model, slots=12)
    order = np.random.default_rng(1).permutation(len(requests))
    got = t.roll(roller, params, [requests[i] for i in order], JUDGE, temperature=0.9)
    assert [(r.problem, r.attempt) for r in got] == [(requests[i].problem, requests[i].attempt) for i in order]
    t.assert_same(got, expected)

    few = [5, 17, 18]
    t.assert_same(t.roll(roller, params, [requests[i] for i in few], JUDGE, temperature=0.9), [expected[i] for i in few])
    others = [r._replace(problem=r.problem + 100, prompt=[3, *r.prompt[:4]]) for r in requests]
    mixed = [x for pair in zip(others, requests, strict=True) for x in pair]
    t.assert_same(t.roll(roller, params, mixed, JUDGE, temperature=0.9)[1::2], expected)


@pytest.mark.parametrize(("axes", "scan"), [({"data": 8}, False), ({"data": 2, "fsdp": 4}, True)], ids=str)
def test_rollouts_do_not_depend_on_the_mesh(made, requests, expected, axes, scan):
    mesh, model = make_mesh(**axes), t.make_model(scan_layers=scan)[0]
    params = jax.device_put(made[1], shardings(made[1], mesh))
    roller = t.make_roller(model, slots=16, mesh=mesh)
    t.assert_same(t.roll(roller, params, requests, JUDGE, temperature=0.9), expected)
    slots = roller.sampler.empty()
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(slots)} == {8}
    assert slots.tokens_SC.addressable_shards[0].data.shape == (2, 24)
    assert {x.sharding.shard_shape(x.shape)[scan] for x in jax.tree.leaves(slots.cache)} == {16 // 8}
    assert roller.sampler.decode._cache_size() == roller.sampler.insert._cache_size() == 1


def test_another_key_gives_other_rollouts(made, requests, expected):
    roller = make_roller(made[0], slots=12)
    got = t.roll(roller, made[1], requests, JUDGE, temperature=0.9, key=1)
    same = [g.tokens.tolist() == e.tokens.tolist() for g, e in zip(got, expected, strict=True)]
    assert sum(same) < 5  # some consist of the end alone


def test_nothing_is_wanted(made):
    assert t.roll(make_roller(made[0], slots=12), made[1], [], JUDGE) == []


# --- where rollouts stop ---


def test_immediate_end(made, requests):
    for r in t.roll(make_roller(made[0], slots=12), t.biased(made[1], _=ALWAYS), requests, JUDGE):
        assert (r.tokens.tolist(), r.sampled.tolist(), r.stop, r.text) == ([t.EOS], [True], "eos", "")
        assert r.verdict.parsed == ""
        assert r.logp == pytest.approx(0, abs=1e-6)


def test_no_end_before_the_limit(made, requests):
    roller = make_roller(made[0], slots=12)
    for r in t.roll(roller, t.biased(made[1], _=NEVER), requests, JUDGE):
        assert (len(r.tokens), len(r.text), r.stop, r.sampled.all()) == (12, 12, "limit", True)
    # A limit of each roller, over the same compiled sampler.
    for r in t.roll(roller._replace(max_tokens=5), t.biased(made[1], _=NEVER), requests, JUDGE):
        assert (len(r.tokens), r.stop) == (5, "limit")


def test_padding_is_not_the_end(made, requests):
    # Token 0 pads prompts and rows; a sampler that has another end samples it like any other.
    roller = make_roller(made[0], slots=12, eos_ids=(4,))
    for r in t.roll(roller, t.biased(made[1], _=ALWAYS), requests, JUDGE):
        assert (r.text, r.stop) == ("_" * 12, "limit")


def test_any_of_several_ends_stops_and_is_left_out_of_the_text(made, requests):
    eos_ids = (t.EOS, 4, 7)
    rollouts = t.roll(make_roller(made[0], slots=12, eos_ids=eos_ids), made[1], requests, JUDGE)
    ends = [int(r.tokens[-1]) for r in rollouts if r.stop == "eos"]
    assert set(ends) == set(eos_ids)
    for r in rollouts:
        kept = r.tokens[:-1] if r.stop == "eos" else r.tokens
        assert not set(kept.tolist()) & set(eos_ids)
        assert r.text == t.decode(kept) == r.verdict.parsed
        assert r.stop == "eos" or len(r.tokens) == 12


def test_the_end_in_the_last_place_is_an_end(made, requests, expected):
    roller = make_roller(made[0], slots=12)
    ended = [r for r in expected if r.stop == "eos" and len(r.tokens) > 2]
    for n in {len(r.tokens) for r in ended}:
        same = [r for r in ended if len(r.tokens) == n]
        wanted = [q for q in requests if (q.problem, q.attempt) in {(r.problem, r.attempt) for r in same}]
        t.assert_same(t.roll(roller._replace(max_tokens=n), made[1], wanted, JUDGE, temperature=0.9), same)
        for r in t.roll(roller._replace(max_tokens=n - 1), made[1], wanted, JUDGE, temperature=0.9):
            assert (r.stop, len(r.tokens), len(r.text)) == ("limit", n - 1, n - 1)


def test_a_completion_ends_with_the_cache(made):
    roller = make_roller(made[0], slots=3, length=8)
    lengths = [1, 2, 5, 7, 8]
    wanted = [Request(Task("", "a"), n, 0, [1] * n) for n in lengths]
    rollouts = t.roll(roller._replace(max_tokens=4), t.biased(made[1], _=NEVER), wanted, JUDGE)
    assert [len(r.tokens) for r in rollouts] == [min(4, 8 - n) for n in lengths]
    assert {r.stop for r in rollouts} == {"limit"}


def test_a_prompt_must_be_neither_empty_nor_too_long(made):
    roller = make_roller(made[0], slots=12)
    with pytest.raises(ValueError, match="prompt of problem 7 has 0 tokens; allowed: 1 to 8"):
        t.roll(roller, made[1], [Request(Task("", ""), 7, 0, [])], JUDGE)
    with pytest.raises(ValueError, match=r"prompt of problem 7 has 9 tokens; allowed: 1 to 8; raise sampler.max_prompt_tokens"):
        t.roll(roller, made[1], [Request(Task("", ""), 7, 0, [1] * 9)], JUDGE)


# --- forced tokens ---


def scripted(observations, heard=None):
    """Answer a turn of a task with the next of `observations(task)`; judge when there are none left, or no room."""

    def step(state, text, final):
        task, turn = state
        assert turn < 9, "the loop does not get on"
        if heard is not None:
            heard.setdefault(task.id, []).append((text, final))
        left = observations(task)[turn:]
        if final or not left:
            return state, Step(verdict=Verdict(float(turn), final, text))
        return (task, turn + 1), Step(observation=left[0])

    return Environment(reset=lambda task: (task, 0), step=step)


def several(task):
    return ["kk", "ijk", "bcdbc"][: int(task.id) % 4]


def turns(r) -> list[str]:
    """The texts that were sampled between observations, without their ends."""
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
    """Rollouts with up to three observations, and what their environments heard."""
    heard = {}
    wanted = [r._replace(task=dataclasses.replace(r.task, id=f"{r.problem * 3 + r.attempt}")) for r in t.make_requests(8, 3)]
    roller = make_roller(made[0], slots=5, length=32, max_tokens=24)
    return wanted, t.roll(roller, made[1], wanted, scripted(several, heard)), heard


def test_forced_tokens_are_appended_and_not_sampled(conversations):
    _, rollouts, _ = conversations
    complete = [r for r in rollouts if r.stop == "eos"]
    assert {len(several(r.task)) for r in complete} == {0, 1, 2, 3}
    for r in complete:
        forced = t.decode(r.tokens[~r.sampled])
        assert forced == "".join(several(r.task))
        assert (r.logp[~r.sampled] == 0).all()
        assert (r.logp[r.sampled] < 0).all()
        starts = [i for i in range(1, len(r.tokens)) if r.sampled[i - 1] and not r.sampled[i]]
        assert len(starts) == len(several(r.task))
        assert all(r.tokens[i - 1] == t.EOS for i in starts)  # behind the end of a turn
    assert {r.stop for r in rollouts} == {"eos", "limit"}


def test_after_forced_tokens_sampler_and_learner_agree(made, conversations):
    model, params = made
    _, rollouts, _ = conversations
    assert t.largest_gap(model, params, [r for r in rollouts if not r.sampled.all()]) < 1e-5
    batch, _ = t.rescore(model, params, rollouts)
    for i, r in enumerate(rollouts):
        own = slice(len(r.prompt), len(r.prompt) + len(r.tokens))
        np.testing.assert_array_equal(batch.weight_BT[i, own] > 0, r.sampled)
        assert (batch.segment_BT[i, own] == 1).all()  # they are seen all the same


def test_the_environment_hears_what_was_written_since_it_spoke(conversations):
    _, rollouts, heard = conversations
    for r in rollouts:
        said = heard[r.task.id]
        assert [text for text, _ in said] == turns(r)
        assert [final for _, final in said] == [False] * (len(said) - 1) + [r.stop == "limit"]
        assert r.verdict.parsed == said[-1][0]


def test_conversations_do_not_depend_on_the_sampler(made, conversations):
    wanted, rollouts, _ = conversations
    roller = make_roller(made[0], slots=16, length=40, max_tokens=24, chunk_tokens=3)
    t.assert_same(t.roll(roller, made[1], wanted, scripted(several)), rollouts)


def test_forced_tokens_are_cut_at_the_limit_and_the_rollout_judged(made, requests):
    heard = {}
    roller = make_roller(made[0], slots=12)
    wanted = [r for r in requests if r.attempt == 0]
    rollouts = t.roll(roller, t.biased(made[1], _=ALWAYS), wanted, scripted(lambda task: ["bcdefghijkbcdefghijk"], heard))
    for r in rollouts:
        assert (t.decode(r.tokens), r.stop) == ("_bcdefghijkb", "limit")
        assert r.sampled.tolist() == [True] + [False] * 11
        assert heard[r.task.id] == [("", False), ("", True)]
        assert r.verdict.correct  # which here is what it heard of `final`
        assert r.verdict.parsed == ""


def test_an_empty_observation_ends_the_rollout(made, requests):
    heard = {}
    wanted = [r for r in requests if r.attempt == 0]
    roller = make_roller(made[0], slots=12)
    alone = t.roll(roller, made[1], wanted, JUDGE)
    for r, lone in zip(t.roll(roller, made[1], wanted, scripted(lambda task: [""] * 5, heard)), alone, strict=True):
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
    roller = make_roller(made[0], slots=12)._replace(max_tokens=len(ended.tokens))
    (r,) = t.roll(roller, made[1], wanted, scripted(lambda task: ["bc"] * 20, heard), temperature=0.9)
    np.testing.assert_array_equal(r.tokens, ended.tokens)
    assert heard[r.task.id][-1][1], "the step that judges must be told that it is the last"
    assert len(heard[r.task.id]) <= 2


# --- verifiers ---


def test_a_verifier_that_raises_costs_a_wrong_verdict(made, requests):
    def brittle(text, task):
        if task.id == "3":
            raise KeyError("no such thing")
        return t.verify(text, task)

    rollouts = t.roll(make_roller(made[0], slots=12), made[1], requests, single_turn(brittle))
    for r in rollouts:
        if r.problem == 3:
            assert (r.verdict.reward, r.verdict.correct, r.verdict.parsed) == (0.0, False, None)
            assert r.verdict.reason == "verifier error: KeyError: 'no such thing'"
        else:
            assert r.verdict == t.verify(r.text, r.task)


# --- costs ---


def test_what_was_spent(made, requests):
    roller = make_roller(made[0], slots=12)
    layout = roller.sampler.prepare(made[1])
    rollouts, spent = collect(roller, layout, requests, JUDGE, key=jax.random.key(0), temperature=1.0)
    assert spent.tokens == sum(len(r.tokens) for r in rollouts)
    assert spent.sample_s > 0
    assert spent.verify_s > 0


def test_each_shape_is_compiled_once(made, caplog):
    model, params = made
    prompt_buckets, row_buckets = (4, 8), (1, 4)
    roller = t.make_roller(model, slots=4, prompt_buckets=prompt_buckets, row_buckets=row_buckets)
    sampler = roller.sampler

    def compiled(params, key, temperature):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            t.roll(roller, params, ragged, JUDGE, key=key, temperature=temperature)
        return [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]

    ragged = t.make_requests(30, 2)
    assert compiled(params, 0, 1.0)
    assert sampler.insert._cache_size() == len(prompt_buckets) * len(row_buckets)
    assert sampler.decode._cache_size() == 1
    assert sampler.empty._cache_size() == sampler.prepare._cache_size() == 1
    assert compiled(jax.tree.map(lambda x: x + 0.01, params), 1, 0.7) == []


def test_forced_lengths_share_few_shapes(made):
    model, params = made
    roller = t.make_roller(model, slots=1, length=32, max_tokens=24)
    lengths = {str(n): "b" * n for n in range(1, 9)}
    wanted = [Request(Task("", "", id=name), int(name), 0, [1]) for name in lengths]
    t.roll(roller, t.biased(params, _=ALWAYS), wanted, scripted(lambda task: [lengths[task.id]]))
    assert roller.sampler.force._cache_size() == 4  # 1, 2, 4, 8
