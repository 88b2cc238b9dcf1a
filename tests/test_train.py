"""The loop: a run that is stopped and started again ends as if uninterrupted; the files
that it writes; controls.
"""

import json

import jax
import numpy as np
import pytest
from runs import Killed, grouped, killed_after, load_config, maths, params_of, read_lines, run_config

from jaxreason import sharding
from jaxreason.runtime import checkpoint, resume
from jaxreason.train import Diverged

FEW = {
    "sharding.mesh.data": 1,
    "prior.steps": 3,
    "rl.steps": 4,
    "rl.evaluate_every": 2,
    "checkpoint.every_steps": 2,
    "rl.objective.kl_coefficient": 0.1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Make the uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run_config(load_config("tiny", "smoke", **FEW), workdir)


@pytest.mark.process
@pytest.mark.parametrize("saves", [1, 2, 3])  # in the first phase, at its end, in the second with its reference policy
def test_cut_off_and_started_again_is_uninterrupted(tmp_path, monkeypatch, whole, saves):
    with monkeypatch.context() as patch:
        killed_after(patch, saves)
        with pytest.raises(Killed):
            run_config(load_config("tiny", "smoke", **FEW), tmp_path)
    lines_when_killed = len(read_lines(tmp_path / "metrics.jsonl"))
    summary = run_config(load_config("tiny", "smoke", **FEW), tmp_path)

    workdir, expected = whole
    assert summary["evaluations"] == expected["evaluations"]
    (step, params), (whole_step, whole_params) = params_of(tmp_path), params_of(workdir)
    assert step == whole_step == 7
    jax.tree.map(np.testing.assert_array_equal, params, whole_params)
    assert read_lines(tmp_path / "rollouts.jsonl") == read_lines(workdir / "rollouts.jsonl")

    assert maths(tmp_path) == maths(workdir)
    assert lines_when_killed <= len(maths(tmp_path))


@pytest.mark.slow
@pytest.mark.process
def test_sampling_one_step_ahead_on_devices_of_its_own_is_sampling_in_place(tmp_path, monkeypatch):
    """The same lag gives the same run, bit for bit, on any devices, also when it is
    stopped with a batch sampled ahead and started again.
    """
    lagged = FEW | {"rl.objective.name": "dapo", "rl.source.lag": 1, "prior.steps": 30, "rl.steps": 5, "rl.source.problems": 8}
    places = {
        "in place": {"sharding.mesh.data": 4},
        "apart": {"sharding.mesh.data": -1, "sharding.sampling_devices": 4},
        "no lag": {"sharding.mesh.data": 4, "rl.source.lag": 0},
    }
    for name, place in places.items():
        config = load_config("tiny", "smoke", **lagged | place)
        config.evaluate.suites = {"chain": config.evaluate.suites.chain}
        if name == "apart":
            with monkeypatch.context() as patch:
                killed_after(patch, saves=2)
                with pytest.raises(Killed):
                    run_config(config, tmp_path / name)
        run_config(config, tmp_path / name)
    here, apart, fresh = (tmp_path / name for name in places)
    jax.tree.map(np.testing.assert_array_equal, params_of(apart)[1], params_of(here)[1])
    assert read_lines(apart / "rollouts.jsonl") == read_lines(here / "rollouts.jsonl")
    assert maths(apart) == maths(here)
    gaps = [[line["rollout/logp_gap"] for line in maths(d) if "rollout/logp_gap" in line] for d in (here, fresh)]
    assert max(gaps[1]) < 1e-5 > gaps[0][0]  # on-policy, as the first batch of a phase is
    assert max(gaps[0]) > 1e-3  # one update stale, after one that some attempt was paid in


@pytest.mark.slow
@pytest.mark.process
def test_a_reference_policy_in_the_hosts_memory_changes_nothing(tmp_path, monkeypatch, whole):
    moves, keep_in = [], sharding.keep_in

    def watched(tree, memory):
        moved = keep_in(tree, memory)
        moves.append((memory, {x.sharding.memory_kind for x in jax.tree.leaves(moved)}))
        return moved

    monkeypatch.setattr(sharding, "keep_in", watched)
    config = load_config("tiny", "smoke", **FEW, **{"rl.offload_reference": True})
    with monkeypatch.context() as patch:
        killed_after(patch, saves=3)
        with pytest.raises(Killed):
            run_config(config, tmp_path)
    run_config(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path)[1], params_of(whole[0])[1])
    assert maths(tmp_path) == maths(whole[0])
    assert all(kinds == {memory} for memory, kinds in moves)
    assert [memory for memory, _ in moves].count("pinned_host") == 2  # at the start of the phase, and when it continues


def test_a_checkpoint_without_an_item_of_the_hosts_part_is_refused_by_its_name(tmp_path, whole):
    """It is refused before anything else is read, and no value is guessed. Only items
    that a run saves are demanded.
    """
    made = checkpoint.open_checkpoints(whole[0] / "checkpoints", read_only=True)
    host = made.peek(made.latest())
    made.close()
    assert host.keys() == resume.Progress.names() | {"config", "versions", "revision", "revisions"}
    for name in sorted(resume.Progress.needed()):
        made = checkpoint.open_checkpoints(tmp_path / name)
        made.save(7, {"w": np.zeros(1)}, {key: value for key, value in host.items() if key != name})
        made.wait()
        message = f"^checkpoint 7 lacks {name}: another version made it; choose another --workdir$"
        with pytest.raises(resume.NotResumable, match=message):
            resume.find_newest(None, made, print)
        assert made.steps() == [7]  # it is not damaged, and stays
        made.close()


def test_a_finished_run_keeps_its_files_in_order(whole):
    workdir, summary = whole
    assert summary["steps"] == 7
    assert summary["wall_s"] > 0
    assert summary["config"]["rl"]["steps"] == 4
    phases = [(e["phase"], e["step"]) for e in summary["evaluations"] if e["suite"] == "chain" and e["temperature"] == 0]
    assert phases == [("start", 0), ("prior", 3), ("rl", 5), ("rl", 7)]
    on_policy = [line for line in read_lines(workdir / "metrics.jsonl") if "rollout/logp_gap" in line]
    assert len(on_policy) == 4
    for line in on_policy:  # sampler and learner agree, so the ratio of the on-policy update is 1
        assert line["rollout/logp_gap"] < 1e-5
        assert line["rollout/kl_sampler_learner"] < 1e-8
        depths = {name: value for name, value in line.items() if name.startswith("rollout/kl_sampler_learner/")}
        assert "rollout/kl_sampler_learner/0_63" in depths
        assert all(value is not None and value < 1e-8 for value in depths.values())  # depths without a token are left out
    assert on_policy[0]["train/kl"] == pytest.approx(0, abs=1e-7)  # the reference is the policy at the phase's start
    assert json.loads((workdir / "summary.json").read_text())["done"]


def run_on(workdir, data: int, fsdp: int):
    """Return the rollouts and the params of a run on some devices."""
    fields = {"prior.steps": 2, "rl.steps": 2, "rl.microbatches": 1, "prior.microbatches": 1}
    config = load_config("tiny", "smoke", **fields, **{"sharding.mesh.data": data, "sharding.mesh.fsdp": fsdp})
    config.evaluate.suites = {}
    run_config(config, workdir)
    return read_lines(workdir / "rollouts.jsonl"), params_of(workdir)[1]["params"]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return run_on(tmp_path_factory.mktemp("one"), 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_a_whole_run_on_eight_devices_is_the_run_on_one(tmp_path, on_one_device, data, fsdp):
    (one, one_params), (many, many_params) = on_one_device, run_on(tmp_path, data, fsdp)
    assert [r["text"] for r in one] == [r["text"] for r in many]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one_params, many_params)


def test_a_run_that_diverges_stops_and_says_so(tmp_path):
    """Huge steps make the loss NaN; earlier files are kept, and the message is one
    line.
    """
    config = load_config("tiny", "smoke", **{"prior.steps": 8, "prior.max_skipped": 3, "prior.log_every": 1})
    config.prior.optimizer = {"name": "sgd", "lr": 1e17, "clip_norm": None}
    config.evaluate.suites = {}
    config.checkpoint.every_steps = 1
    with pytest.raises(Diverged, match=r"not finite for 3 batches in a row, up to step \d \(phase prior\).*prior.optimizer.lr"):
        run_config(config, tmp_path)
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "train/skipped" in line]
    skipped = [line["train/skipped"] for line in lines]
    assert skipped[0] == 0
    assert skipped[-3:] == [1, 1, 1]
    assert lines[-1]["train/loss"] is None
    assert (tmp_path / "checkpoints").is_dir()


def test_random_reward_control_pays_as_many_but_not_the_right_ones(tmp_path):
    from jaxreason.sources import shuffle_rewards
    from jaxreason.types import Rollout, Task, Verdict

    task, none = Task("q", "a"), np.zeros(0, np.int32)
    drawn = [
        Rollout(task, i, 0, none, none, none.astype(np.float32), none.astype(bool), "eos", "", Verdict(float(i < 8), i < 8))
        for i in range(32)
    ]
    dealt = [r for group in shuffle_rewards(grouped(drawn, 8), jax.random.key(0)) for r in group.attempts]
    assert sum(r.verdict.reward for r in dealt) == 8
    assert [r.verdict.correct for r in dealt] == [r.verdict.correct for r in drawn]
    assert 0 < sum(r.verdict.reward for r in dealt if r.verdict.correct) < 8


def test_params_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Use fewer steps than it takes to stop a run with NaN gradients."""
    from jaxreason.build import run as build_

    config = load_config("tiny", "smoke", **{"checkpoint.every_steps": 1})
    config.phases, config.evaluate.suites = ("prior",), {}
    init = build_.init_params
    monkeypatch.setattr(build_, "init_params", lambda *given: jax.tree.map(lambda x: x * np.nan, init(*given)))
    with pytest.raises(Diverged, match="the params are not finite at step 1, so they are not saved"):
        run_config(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
