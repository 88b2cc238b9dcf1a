"""Credit for each attempt within a rollout: ends and rewards from the environment,
advantages against loops over ragged groups, and what carries them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_completer as t
from runs import load_config

from jaxreason import batching, objectives, sources
from jaxreason.build import build
from jaxreason.environment import Turn, retry, single_turn
from jaxreason.environment.verdicts import checked
from jaxreason.objectives import credit
from jaxreason.runtime.files import rollout_record
from jaxreason.sources import sampling
from jaxreason.sources.saved import pack, unpack
from jaxreason.types import Group, Prompted, Rollout, Task, Verdict

# --- what the environment tells ---


def judge(text, task):
    return Verdict(float(text == "7") - 0.25 * (text == "9"), text == "7", text)


def play(environment, turns):
    state, step = environment.reset(Task("", "7")), None
    for text, tokens in turns:
        state, step = environment.step(state, Turn(text, "eos", False, tokens))
    return step.verdict


@pytest.mark.parametrize(
    ("turns", "attempts"),
    [
        ([("7", 3)], ()),  # one attempt: nothing to tell apart
        ([("5", 3), ("7", 8)], ((3, 0.0), (8, 0.5))),
        ([("9", 3), ("5", 8), ("7", 9)], ((3, -0.25), (8, 0.0), (9, 0.25))),  # a penalty is not discounted
        ([("5", None), ("7", None)], ()),  # no known ends
    ],
)
def test_a_verdict_tells_the_end_and_reward_of_each_attempt(turns, attempts):
    verdict = play(retry(single_turn(judge), attempts=3, discount=0.5), turns)
    assert verdict.attempts == attempts
    if attempts:
        assert verdict.reward == attempts[-1][1]
    assert checked(verdict).attempts == attempts


def test_an_attempt_without_room_for_another_keeps_its_end():
    environment = retry(single_turn(judge), attempts=3, tell="check")
    state, _ = environment.step(environment.reset(Task("", "7")), Turn("5", "eos", False, 2))
    state, _ = environment.step(state, Turn("9", "eos", False, 4))
    _, step = environment.step(state, Turn("", "limit", True, 4))
    assert step.verdict.attempts == ((2, 0.0), (4, -0.25))


@pytest.mark.parametrize(
    ("attempts", "message"),
    [
        (3, "attempts are 3; allowed: pairs"),
        (((1, "a"),), "attempts are .*; allowed: pairs"),
        (((5, 1.0), (3, 1.0)), "attempts are .*; allowed: ends that do not fall"),
        (((-1, 1.0),), "attempts are .*; allowed: ends that do not fall"),
        (((1, float("nan")),), "attempts are .*; allowed: ends that do not fall and finite"),
    ],
)
def test_attempts_of_a_users_verdict_are_checked(attempts, message):
    with pytest.raises((TypeError, ValueError), match=message):
        checked(Verdict(0.0, False, attempts=attempts))


# --- advantages ---

# Of two problems: per rollout the lengths of its attempts, and their rewards.
RAGGED = (
    (((2, 0.0), (3, 1.0)), ((4, 1.0),), ((1, 0.0), (2, 0.0), (2, 0.5))),
    (((3, 1.0),), ((1, 1.0), (1, 1.0)), ((2, 1.0),)),  # equal rewards
)


def rollout(problem, attempt, parts, seed=0) -> Rollout:
    """Make a rollout of some attempts, with two forced tokens between them."""
    rng = np.random.default_rng((seed, problem, attempt))
    sampled = [*itertools.chain.from_iterable([*[True] * n, False, False] for n, _ in parts)][:-2]
    ends = np.cumsum([n for n, _ in parts]).tolist()
    found = tuple((end, reward) for end, (_, reward) in zip(ends, parts, strict=True))
    verdict = Verdict(parts[-1][1], parts[-1][1] == 1, attempts=found if len(parts) > 1 else ())
    logp = np.where(sampled, rng.uniform(-2, -0.1, len(sampled)), 0).astype(np.float32)
    tokens = rng.integers(1, 9, len(sampled)).astype(np.int32)
    return Rollout(
        Task("", ""), problem, attempt, np.array([1, 2, 3]), tokens, logp, np.array(sampled), "eos", "", verdict,
        author="".join("tm"[x] for x in sampled),
    )  # fmt: skip


def groups(ragged=RAGGED):
    return [Group(tuple(rollout(p, g, parts) for g, parts in enumerate(group))) for p, group in enumerate(ragged)]


def rewards_of(group):
    return [reward for parts in group for _, reward in parts]


def slow_advantage(name, p, reward):
    mine, every = rewards_of(RAGGED[p]), [r for group in RAGGED for r in rewards_of(group)]
    if len(set(mine)) == 1 and name not in ("reinforce", "reinforce_pp"):
        return 0.0
    others = (sum(mine) - reward) / (len(mine) - 1)
    return {
        "dr_grpo": reward - statistics.fmean(mine),
        "grpo": (reward - statistics.fmean(mine)) / (statistics.pstdev(mine) + 1e-6),
        "rloo": reward - others,
        "maxrl": reward / statistics.fmean(mine) - 1,
        "reinforce": reward - statistics.fmean(every),
        "reinforce_pp": (reward - statistics.fmean(every)) / (statistics.pstdev(every) + 1e-6),
    }[name]


@pytest.mark.parametrize("layout", [{}, {"pack": True}, {"rollouts_per_prompt": 3}, {"pack": True, "rollouts_per_prompt": 3}])
@pytest.mark.parametrize("name", ["dr_grpo", "grpo", "rloo", "maxrl", "reinforce", "reinforce_pp"])
def test_each_token_has_the_advantage_of_its_attempt(name, layout):
    objective = objectives.make(name)
    batch, whole = (
        batching.from_groups(groups(), objective, buckets=(64,), limit=20, credit=c, **layout) for c in credit.CREDITS[::-1]
    )
    for number, (p, parts) in enumerate(((p, parts) for p, group in enumerate(RAGGED) for parts in group), start=1):
        here = batch.rollout_BT == number
        expected = [slow_advantage(name, p, reward) for n, reward in parts for _ in range(n)]
        np.testing.assert_allclose(batch.advantage_BT[here & (batch.weight_BT != 0)], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.weight_BT, whole.weight_BT)  # the aggregation stays that of rollouts
    changed = {f.name for f in dataclasses.fields(batch) if not np.array_equal(getattr(batch, f.name), getattr(whole, f.name))}
    assert changed == {"advantage_BT"}
    assert not np.any(batch.advantage_BT[batch.rollout_BT > 3]) or name.startswith("reinforce")


def test_single_attempts_are_credited_as_before():
    single = [Group(tuple(rollout(p, g, ((g + 1, float(g == p)),)) for g in range(3))) for p in range(2)]
    for name in ("grpo", "rloo", "centre"):
        objective = objectives.make("reinforce") if name == "centre" else objectives.make(name)
        one, other = (batching.from_groups(single, objective, buckets=(32,), limit=9, credit=c) for c in credit.CREDITS)
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_weighting_that_reads_advantages_sees_the_farthest_attempt():
    objective = objectives.make("dr_grpo", weigh="per_kept_token")
    batch = batching.from_groups(groups(), objective, buckets=(64,), limit=20, credit="attempt")
    weighed = [bool(batch.weight_BT[batch.rollout_BT == n].any()) for n in range(1, 7)]
    assert weighed == [True, True, True, False, False, False]


def test_attempts_with_other_rewards_make_a_group_informative():
    alike = groups(((((1, 0.0), (2, 1.0)), ((2, 1.0),)), (((1, 1.0),), ((2, 1.0),))))
    assert [credit.are_mixed(group) for group in alike] == [False, False]
    assert [credit.are_mixed(group, credit="attempt") for group in alike] == [True, False]
    assert sampling.most_mixed(alike[::-1], 1, credit="attempt") == [alike[0]]
    assert sampling.missing(alike, 2, 3, credit="attempt") == 2
    assert sources.measure(alike, credit="attempt")["rollout/informative_groups"] == (1.0, 2.0)


# --- what carries them ---


def test_saved_groups_keep_the_attempts_and_those_of_earlier_versions_load():
    made = groups()
    stream = SimpleNamespace(tasks=[Prompted(group.task, group.prompt) for group in made], group=len(made[0].attempts))
    packed = json.loads(json.dumps(pack(made)))
    pairs = [
        (a, b) for x, y in zip(unpack(packed, stream), made, strict=True) for a, b in zip(x.attempts, y.attempts, strict=True)
    ]
    assert all(a.verdict == b.verdict for a, b in pairs)
    assert any(a.verdict.attempts for a, _ in pairs)
    old = packed | {"verdict": [values[:5] for values in packed["verdict"]]}
    assert all(r.verdict.attempts == () for group in unpack(old, stream) for r in group.attempts)


def test_a_record_lists_the_attempts_of_a_rollout():
    records = [rollout_record(r) for r in groups()[0].attempts]
    assert [record.get("attempts") for record in records] == [[[2, 0.0], [5, 1.0]], None, [[1, 0.0], [3, 0.0], [5, 0.5]]]


def test_sampled_rollouts_tell_where_their_attempts_end():
    model, params = t.make_model()
    params = t.biased(params, j=1.0, k=1.0, _=1.5)
    completer = t.make_completer(model, slots=5, length=44, max_tokens=36)
    environment = retry(single_turn(t.verify), attempts=3, message="hh", role="")
    seen = 0
    for r in t.roll(completer, params, t.make_requests(8, 3), environment):
        tries = int(r.verdict.measures["tries"])
        assert len(r.verdict.attempts) == (tries if tries > 1 else 0)
        if tries == 1:
            continue
        seen += 1
        index_T = np.cumsum(r.sampled)
        for (begin, end), (_, reward) in zip(
            itertools.pairwise([0, *(end for end, _ in r.verdict.attempts)]), r.verdict.attempts, strict=True
        ):
            own = r.tokens[r.sampled & (index_T > begin) & (index_T <= end)]
            text = t.decode([i for i in own if i != t.EOS])
            assert reward == len(text)  # `verify` pays the length of the attempt's own text
        assert r.verdict.attempts[-1] == (int(r.sampled.sum()), r.verdict.reward)
    assert seen > 5


# --- what is refused ---


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (
            {"name": "ppo"},
            {"model.value_head": True},
            "objective 'ppo' makes advantages of single tokens by a critic; allowed: 'rollout'",
        ),
        ({"name": "pass_at_k"}, {}, "objective 'pass_at_k' rewards sets of rollouts; allowed"),
        ({"name": "expert_iteration"}, {}, "objective 'expert_iteration' imitates whole rollouts; allowed"),
        (
            {"name": "grpo", "advantage": "centre_group_scale_batch"},
            {},
            "objective 'grpo' compares each group with the whole batch",
        ),
        ({"name": "gdpo"}, {}, "objective 'gdpo' takes measures of whole rollouts; allowed"),
        ({"name": "grpo"}, {"rl.source.reward": "random"}, "credit got 'attempt' and reward 'random', which pays whole rollouts"),
        ({"name": "grpo"}, {"rl.source.credit": "turn"}, "source.credit got 'turn'; allowed: rollout, attempt"),
    ],
)
def test_objectives_without_credit_for_attempts_are_refused(objective, fields, message):
    config = load_config("tiny", "smoke", **{name: value for name, value in fields.items() if name != "rl.source.credit"})
    config.rl.source.credit = fields.get("rl.source.credit", "attempt")
    config.rl.objective = objective
    with pytest.raises(ValueError, match=message) as caught:
        build(config, say=[].append)
    assert "\n" not in str(caught.value)


def test_objectives_with_credit_for_attempts_are_built():
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "dppo", "sapo", "rloo", "maxrl", "reinforce", "reinforce_pp"):
        credit.check_credit(objectives.make(name), name)
    credit.check_credit(objectives.make("pass_at_k", advantage="leave_one_out"), "pass_at_k")
