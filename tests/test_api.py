"""The Python API: the README's example as printed, a run and a checkpoint as policies,
and errors in one line.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import ROOT, load_config, run_config

import jaxreason as jr
from jaxreason import text
from jaxreason.environment import Turn
from jaxreason.model import ModelConfig, transformer, weights
from jaxreason.types import Group, Message

CHAT = Path(__file__).parent / "golden" / "chat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a Hugging Face folder with random weights, a tokenizer and a chat
    template.
    """
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = ModelConfig(text.load(CHAT).vocab_size, 16, 1, 2, 2, 8, 32, tied_embeddings=True)
    weights.save(folder, shape, transformer(shape).init(jax.random.key(0)), tokenizer_folder=CHAT)
    return folder


@pytest.fixture(scope="module")
def policy(checkpoint):
    return jr.load(checkpoint, max_prompt_tokens=64, max_tokens=8, slots=8)


def length_parity(words, task):
    return jr.Verdict(float(len(words) % 2), bool(len(words) % 2))


def test_the_example_of_the_readme(checkpoint, capsys):
    """Run its code, with this checkpoint instead of a downloaded one."""
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "jr.load" in code
    )
    assert len(example.strip().splitlines()) <= 12
    code = re.sub(r'jr\.load\("[^"]+"', f"jr.load({str(checkpoint)!r}, max_prompt_tokens=64", example)
    code = re.sub(r"max_tokens=\d+\)", "max_tokens=8)", code).replace("range(10)", "range(2)")
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize(
    ("objective", "options", "metric"),
    [
        ("gdpo", {"rewards": ("reward_a", "reward_b")}, "train/clip_fraction"),
        ("grpo", {"entropy_top": 0.5, "covariance": "kl", "covariance_fraction": 0.2}, "train/covariance_chosen"),
        ("grpo", {"entropy_target": 99.0, "entropy_delta": 0.25}, "train/entropy_coefficient"),
        ("ppo", {}, "train/value_loss"),
    ],
)
def test_objectives_that_complete_a_batch(checkpoint, objective, options, metric):
    def verify(words, task):
        return jr.Verdict(0.0, False, words, measures={"reward_a": len(words) % 2, "reward_b": len(words) % 3})

    policy = jr.load(checkpoint, max_prompt_tokens=64, max_tokens=8, slots=8, model={"value_head": objective == "ppo"})
    groups, found = jr.sample(policy, ["one", "two"], n=4, verify=verify), []
    for _ in range(2):
        policy, metrics = jr.train_step(policy, groups, objective=objective, lr=1e-3, objective_options=options)
        found.append(metrics)
    assert all(np.isfinite(metrics[metric]) for metrics in found)
    if "entropy_target" in options:  # the state of the objective goes on with the policy
        assert [metrics[metric] for metrics in found] == [0.0, 0.25]
        assert policy.state.control["entropy"]["coefficient"] == 0.5
        policy, _ = jr.train_step(policy, groups, objective="grpo", lr=1e-3)
        assert policy.state.control is None


def test_groups_come_in_the_order_of_their_prompts_and_again_with_their_seed(policy):
    groups = jr.sample(policy, ["one", jr.Task("two", "2", id="x")], n=3, seed=5)
    assert [[(r.task.question, r.attempt) for r in group.attempts] for group in groups] == [
        [("one", 0), ("one", 1), ("one", 2)],
        [("two", 0), ("two", 1), ("two", 2)],
    ]
    assert groups[1].attempts[0].task.id == "x"
    assert groups[0].attempts[0].verdict.reason == "not judged"
    again, other = jr.sample(policy, ["one"], n=3, seed=5), jr.sample(policy, ["one"], n=3, seed=6)
    assert [r.text for r in again[0].attempts] == [r.text for r in groups[0].attempts]
    assert [r.tokens.tolist() for r in other[0].attempts] != [r.tokens.tolist() for r in again[0].attempts]
    greedy = jr.sample(policy, ["one"], n=2, temperature=0)[0].attempts
    assert greedy[0].tokens.tolist() == greedy[1].tokens.tolist()


def test_a_step_changes_the_policy_and_the_next_goes_on_from_it(checkpoint):
    policy = jr.load(checkpoint, max_prompt_tokens=64, max_tokens=8, slots=8)
    groups = jr.sample(policy, ["one", "two"], n=4, verify=length_parity)
    before = np.asarray(policy.params["final_norm"]["scale"])
    policy, metrics = jr.train_step(policy, groups, objective="grpo", lr=1e-2)
    assert (np.asarray(policy.params["final_norm"]["scale"]) != before).any()
    assert 0 < metrics["rollout/reward"] < 1
    assert metrics["rollout/logp_gap"] < 1e-4  # the learner scores the sampled tokens as the sampler did
    assert metrics["train/grad_norm"] > 0
    policy, _ = jr.train_step(policy, groups, objective="grpo", lr=1e-2)
    assert int(policy.state.step) == 2
    policy, _ = jr.train_step(policy, groups, objective="dapo", lr=1e-2, optimizer_options={"name": "sgd"})
    assert int(policy.state.step) == 1  # another optimizer: its state starts anew


def test_a_step_that_can_not_be_made_leaves_the_policy_whole(policy):
    groups = jr.sample(policy, ["one", "two"], n=4, verify=length_parity)
    for wrong in (
        {"microbatches": 3},
        {"microbatches": 0},
        {"optimizer_options": {"b1": None}},
        {"optimizer_options": {"eps": "1"}},
    ):
        with pytest.raises((ValueError, TypeError)):
            jr.train_step(policy, groups, lr=1e-3, **wrong)
        assert len(jr.sample(policy, ["one"])) == 1


def test_wrong_calls_are_one_line(policy, checkpoint, tmp_path):
    groups = jr.sample(policy, ["one"], n=2)
    first = dataclasses.replace(groups[0], attempts=groups[0].attempts[:1])
    for call, message in [
        (lambda: jr.sample(policy, "one"), "allowed: a list of questions"),
        (lambda: jr.sample(policy, [], n=2), "allowed: a list of questions"),
        (lambda: jr.sample(policy, ["one"], n=0), "n of 1 or more"),
        (lambda: jr.sample(policy, ["one"], verify="number"), r"jr\.verify\.make\('number'\)"),
        (lambda: jr.sample(policy, ["one"], n=2, verify=lambda text, task: 1.0), "verify failed for 2 of 2 completions"),
        (lambda: jr.sample(policy, ["one"], temperature=float("nan")), "temperature got nan"),
        (lambda: jr.sample(policy, ["one " * 99]), "allowed: 1 to 64"),
        (lambda: jr.train_step(policy, [], lr=1.0), "allowed: one size"),
        (lambda: jr.train_step(policy, [groups[0], first], lr=1.0), r"groups of \[2, 1\] rollouts"),
        (lambda: jr.train_step(policy, [first], lr=1.0), "sample with n=2 or more"),
        (lambda: jr.train_step(policy, groups, objective="grop", lr=1.0), "did you mean 'grpo'"),
        (lambda: jr.train_step(policy, groups, lr=1.0, optimizer_options={"b3": 1}), "unknown field of optimizer 'b3'"),
        (lambda: jr.train_step(policy, groups, lr=1.0, objective_options={"kl_coefficient": 0.1}), "keeps no reference policy"),
        (lambda: jr.train_step(policy, groups, lr=1.0, objective="ppo"), r"no value head; allowed: load\(\.\.\., model="),
        (
            lambda: jr.train_step(policy, groups, lr=1.0, objective="gdpo"),
            "no verdict of the batch has the measure 'reward_number'",
        ),
        (lambda: jr.load(checkpoint, mesh={"dta": 1}), "did you mean 'data'"),
        (lambda: jr.load(checkpoint, model={"widht": 1}), "did you mean 'width'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no folder"):
        jr.load(tmp_path / "nothing")
    with pytest.raises(AttributeError, match="load, sample"):
        jr.samples  # noqa: B018


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g: jr.sample(p, ["one"], n=1.5), r"sample: n got 1.5 \(float\); allowed: int"),
        (lambda p, g: jr.sample(p, ["one"], n=True), r"sample: n got True \(bool\); allowed: int"),
        (lambda p, g: jr.sample(p, ["one"], temperature="1"), r"sample: temperature got '1' \(str\); allowed: float"),
        (lambda p, g: jr.sample(p, ["one"], temperature=float("inf")), "sample: temperature got inf"),
        (lambda p, g: jr.sample(p, ["one"], seed="1"), "sample: seed got '1'"),
        (lambda p, g: jr.sample(p, ["one", 2]), r"prompts=\['one', 2\], n=1; allowed: a list of questions or tasks"),
        (lambda p, g: jr.sample(p, 3), "prompts=3, n=1; allowed: a list of questions or tasks"),
        (lambda p, g: jr.sample("folder", ["one"]), "sample got policy of type str; allowed: a policy from jr.load"),
        (lambda p, g: jr.train_step(p, g, lr="1e-3"), r"train_step: lr got '1e-3' \(str\); allowed: float"),
        (lambda p, g: jr.train_step(p, g, lr=float("nan")), "train_step: lr got nan"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, microbatches=1.5), "train_step: microbatches got 1.5"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, objective=3), "train_step: objective got 3"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options={"eps": "1"}), "optimizer.eps got '1'"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options={"name": "sgd", "b1": 0.5}), "sgd does not read it"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, objective_options={"clip_low": "1"}), "objective.clip_low|clip_low"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options=[1]), "train_step: optimizer_options got"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options={"lr": 5.0}), "train_step got lr twice"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, objective_options={"name": "lm"}), "train_step got objective twice"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options={"schedule_kind": "cosine"}), "its rate is constant"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options={"warmup_steps": 1}), "its rate is constant"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, optimizer_options={"betas": [0.9]}), r"got betas=\[0.9\] in optimizer_options"),
        (lambda p, g: jr.train_step(p, g, lr=1.0, objective_options={"lo": 0.1}), "is called 'clip_low' now; write clip_low"),
        (lambda p, g: jr.sample(p, ["one"], temperature=1e-45), "allowed: 0 .greedy., or 0.0001 and more"),
        (
            lambda p, g: jr.train_step(p, list(g[0].attempts), lr=1.0),
            "train_step got a list of Rollout; allowed: a list of groups",
        ),
        (lambda p, g: jr.train_step(p, g[0], lr=1.0), "train_step got a Group; allowed: a list of groups"),
        (lambda p, g: jr.train_step(p, None, lr=1.0), "train_step got a NoneType; allowed: a list of groups"),
        (lambda p, g: jr.train_step(p, [["a", "b"]], lr=1.0), "train_step got a list of list; allowed"),
        (
            lambda p, g: jr.train_step(p, [Group(()), Group(())], lr=1.0),
            r"train_step got groups of \[0, 0\] rollouts; allowed: one size, 1 or",
        ),
        (lambda p, g: jr.train_step(p, rewarded(g, float("nan")), lr=1.0), "the reward nan of attempt 0 at problem 0; allowed"),
        (lambda p, g: jr.train_step(p, rewarded(g, float("inf")), lr=1.0), "the reward inf of attempt 0"),
        (lambda p, g: jr.train_step(p, rewarded(g, "1"), lr=1.0), "the reward '1' of attempt 0"),
        (lambda p, g: jr.train_step(p, jr.sample(p, ["one"], 2, temperature=0), lr=1.0), r"greedy rollouts \(temperature=0\)"),
    ],
)
def test_arguments_of_a_wrong_kind_are_one_line(policy, call, message):
    groups = jr.sample(policy, ["one"], n=2)
    with pytest.raises(ValueError, match=message) as error:
        call(policy, groups)
    assert "\n" not in str(error.value)


def test_a_policy_that_was_used_up_is_refused(checkpoint):
    before = jr.load(checkpoint, max_prompt_tokens=64, max_tokens=8, slots=8)
    groups = jr.sample(before, ["one", "two"], n=4, verify=length_parity)
    jr.train_step(before, groups, lr=1e-3)
    for call in (lambda: jr.sample(before, ["one"]), lambda: jr.train_step(before, groups, lr=1e-3)):
        with pytest.raises(ValueError, match="that a train_step has used up; use the one that it returned"):
            call()


def rewarded(groups, reward):
    (first, *rest), *others = [group.attempts for group in groups]
    return [Group((dataclasses.replace(first, verdict=jr.Verdict(reward, False)), *rest)), *map(Group, others)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": {"data": 1.5}}, r"mesh.data got 1.5 \(float\); allowed: int"),
        ({"mesh": {"data": 0}}, "mesh got .*; allowed: positive sizes"),
        ({"mesh": {"data": -2}}, "mesh got .*; allowed: positive sizes"),
        ({"mesh": 2}, r"load: mesh got 2 \(int\); allowed: a section or None"),
        ({"slots": "8"}, "load: slots got '8'"),
        ({"max_tokens": 8.0}, "load: max_tokens got 8.0"),
        ({"seed": 1.5}, "load: seed got 1.5"),
        ({"model": {"dtype": 3}}, r"model.dtype got 3 \(int\); allowed: str"),
        ({"text": {"system": 3}}, "text.system got 3"),
        ({"text": "plain"}, "load: text got 'plain'"),
    ],
)
def test_fields_of_load_of_a_wrong_kind_are_one_line(checkpoint, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        jr.load(checkpoint, **fields)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"load: path got 3 \(int\)"):
        jr.load(3)


def test_tools_answer_the_calls_of_a_model(checkpoint):
    section = {"name": "with_tools", "tools": ("calculator",)}
    policy = jr.load(checkpoint, max_prompt_tokens=256, max_tokens=8, slots=8, environment=section)
    (group,) = jr.sample(policy, ["one"], n=2, verify=length_parity)
    assert [r.verdict.measures["tool_calls"] for r in group.attempts] == [0, 0]
    assert "calculator" in policy.tokenizer.decode(group.attempts[0].prompt)
    environment = policy.playing(length_parity).environment
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "3+4"}}</tool_call>'
    state, step = environment.step(environment.reset(group.attempts[0].task), Turn(call, "eos", False))
    assert step.observation == [Message("tool", "7")]
    assert environment.step(state, Turn("7", "eos", False))[1].verdict.correct
    with pytest.raises(ValueError, match="environment got name='retry'; allowed: with_tools or single_turn"):
        jr.load(checkpoint, environment={"name": "retry"})
    with pytest.raises(ValueError, match="did you mean 'calculator'"):
        jr.load(checkpoint, environment=section | {"tools": ("calculater",)})


def test_a_run_keeps_its_tools(tmp_path):
    summary = run_config(load_config("tools", "smoke", **{"prior.steps": 2, "rl.steps": 1}), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(summary["config"] | {"revisions": {}}))
    for section, measures in ((None, {"tool_calls", "tool_errors"}), ({"name": "single_turn"}, set())):
        policy = jr.load(tmp_path, max_prompt_tokens=12, max_tokens=8, slots=8, environment=section)
        (group,) = jr.sample(policy, ["2*3+4:"], n=2)
        assert {*group.attempts[0].verdict.measures} == measures
        assert group.attempts[0].verdict.reason == "not judged"


def test_a_mesh_of_all_devices(checkpoint):
    policy = jr.load(checkpoint, max_prompt_tokens=64, max_tokens=8, slots=8, mesh={"data": -1})
    assert policy.mesh.size == jax.device_count()
    assert len(jr.sample(policy, ["one"], n=np.int64(2))[0].attempts) == 2


def test_slow_work_is_announced_once_on_stderr(checkpoint, capsys):
    policy = jr.load(checkpoint, max_prompt_tokens=60, max_tokens=6, slots=8)
    said = []
    for _ in range(2):
        groups = jr.sample(policy, ["one"], n=2, seed=1)
        policy, _ = jr.train_step(policy, groups, lr=1e-3)
        out, err = capsys.readouterr()
        assert out == ""
        said.append(err.splitlines())
    assert said == [[f"loading {checkpoint} ...", "compiling the sampler ...", "compiling the train step ..."], []]


def test_import_does_not_wait_for_jax():
    code = "import sys, jaxreason; assert not {'jax', 'flax'} & sys.modules.keys(); print(sorted(dir(jaxreason)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train_step" in done.stdout


def test_scalars_of_numpy_and_jax_are_numbers_and_a_policy_prints_in_a_line(checkpoint):
    policy = jr.load(checkpoint, max_prompt_tokens=64, max_tokens=8, slots=8)
    assert len(repr(policy)) < 200
    assert "0 steps trained" in repr(policy)
    groups = jr.sample(policy, ["one"], n=np.int64(4), temperature=np.float32(1), verify=length_parity)
    assert isinstance(groups[0], jr.Group)
    assert isinstance(groups[0].attempts[0], jr.Rollout)
    for lr in (np.float32(1e-3), jax.numpy.float32(1e-3)):
        policy, _ = jr.train_step(policy, groups, lr=lr, optimizer_options={"b1": np.float32(0.5)})
    assert "2 steps trained" in repr(policy)  # the same optimizer for both: its state went on
    with pytest.raises(ValueError, match="load: path got ''; allowed: a Hugging Face id"):
        jr.load("")


def test_a_name_in_another_case_is_near():
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        jr.api.optimizers.make(steps=1, name="adamW", lr=1e-3)
