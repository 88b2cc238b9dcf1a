"""The ledger: tokens and FLOPs against counts by hand, sums that only grow, and the
entries of a run with all kinds of work.
"""

import dataclasses
import json
import time
import types

import numpy as np
import pytest
from runs import grouped, load_config, read_lines, run_config

from jaxreason import batching, objectives
from jaxreason.cost import layer_weights
from jaxreason.model.config import Lora, sized
from jaxreason.runtime import compiling, energy, ledger
from jaxreason.runtime.peak import Peak
from jaxreason.types import Rollout, Task, Verdict

CONFIG = sized("tiny", vocab_size=40)


def rollout(problem, prompt, tokens, forced=0, temperature=1.0):
    return Rollout(
        task=Task(f"question {problem}", "a"),
        problem=problem,
        attempt=0,
        prompt=np.arange(prompt),
        tokens=np.arange(tokens),
        logp=np.zeros(tokens, np.float32),
        sampled=np.arange(tokens) >= forced,
        stop="eos",
        text="",
        verdict=Verdict(0.0, False),
        temperature=temperature,
    )


def by_hand(config, positions, logits) -> float:
    """Count FLOPs token by token: each is read at its position, and attends to itself
    and to all tokens before it.
    """
    each = 2 * config.layers * layer_weights(config)
    attention = [4 * config.layers * config.heads * config.head_size * (position + 1) for position in positions]
    return sum(each + a for a in attention) + 2 * config.width * config.vocab_size * logits


def test_sampling_reads_each_prompt_once():
    # Two attempts at a problem, one at another that has as long a prompt, and the first
    # problem at another temperature.
    rollouts = [rollout(7, 5, 3), rollout(7, 5, 6, forced=2), rollout(8, 5, 1), rollout(7, 5, 2, temperature=0.0)]
    work = ledger.sampling(CONFIG, rollouts)
    assert work["tokens"] == 3 + 4 + 1 + 2
    positions = [*range(5)] * 3 + [*range(5, 8), *range(5, 11), *range(5, 6), *range(5, 7)]
    assert work["flops"] == pytest.approx(by_hand(CONFIG, positions, 3 + 6 + 1 + 2), rel=1e-12)
    assert ledger.sampling(CONFIG, []) == {"tokens": 0.0, "flops": 0.0}


@pytest.mark.parametrize("pack", [False, True])
def test_learning_is_three_times_forward_however_rows_are_packed(pack):
    pairs = [(list(range(n)), [False] * p + [True] * (n - p)) for n, p in ((6, 2), (3, 1), (4, 3), (2, 1))]
    batch = batching.from_demonstrations(pairs, objectives.sft(), buckets=(8,), pack=pack, microbatches=2)
    positions = [t for ids, _ in pairs for t in range(len(ids))]
    forward = by_hand(CONFIG, positions, sum(sum(trainable) for _, trainable in pairs))
    work = ledger.learning(CONFIG, batch, updates=2, passes=0)
    assert work["tokens"] == 2 * 15
    assert work["flops"] == pytest.approx(6 * forward, rel=1e-12)
    beside = ledger.learning(CONFIG, batch, updates=2, passes=1)
    assert beside["flops"] == pytest.approx(7 * forward, rel=1e-12)
    assert ledger.reading(CONFIG, [batch, batch]) == pytest.approx(2 * forward, rel=1e-12)
    # A frozen base has no gradient of its own weights; adapters of rank 2 on q read the
    # width and write the heads.
    lora = dataclasses.replace(CONFIG, lora=Lora(rank=2, targets=("q",)))
    adapters = 2 * CONFIG.layers * 2 * (CONFIG.width + CONFIG.heads * CONFIG.head_size) * 15
    work = ledger.learning(lora, batch, updates=1, passes=0)
    assert work["flops"] == pytest.approx(2 * forward + 3 * adapters, rel=1e-12)


def test_learning_reads_a_shared_prompt_once():
    rollouts = [rollout(7, 5, 3), rollout(7, 5, 4, forced=2), rollout(8, 1, 2), rollout(8, 1, 1)]
    how = {"buckets": (14,), "limit": 4, "rollouts_per_prompt": 2, "pack": True}
    batch = batching.from_groups(grouped(rollouts, 2), objectives.reinforce_batch(), **how)
    # Each later attempt reads the prompt's last token again, at its position, and its
    # own.
    positions = [*range(8), *range(4, 9), *range(3), *range(2)]
    trained = int((batch.weight_BT != 0).sum())
    work = ledger.learning(CONFIG, batch, updates=1, passes=0)
    assert work["tokens"] == len(positions)
    assert work["flops"] == pytest.approx(3 * by_hand(CONFIG, positions, trained), rel=1e-12)


def test_amounts_add_up_by_kind():
    first = ledger.add(ledger.empty(), "learn", tokens=3, flops=5.0, device_s=2.0)
    both = ledger.add(first, "learn", tokens=4, flops=1.0, device_s=0.5, bytes=9.0, joules=50.0)
    assert both["learn"] == {"tokens": 7.0, "flops": 6.0, "bytes": 9.0, "device_s": 2.5, "joules": 50.0}
    assert both["sample"] == both["evaluate"] == both["compile"] == dict.fromkeys(ledger.UNITS, 0.0)
    assert first["learn"]["tokens"] == 3.0
    assert ledger.named(both)["ledger/learn_flops"] == 6.0
    assert ledger.named(both)["time/ledger/learn_joules"] == 50.0
    # Names of whatever varies between identical runs begin with `time/`.
    varies = {name for name in ledger.named(both) if name.endswith(("_s", "joules"))}
    assert all(name.startswith("time/") for name in varies)
    assert {name for name in ledger.named(both) if "bytes" in name} == {"ledger/sample_bytes", "ledger/evaluate_bytes"}


@pytest.mark.parametrize("shared", [False, True])
def test_decoding_reads_weights_once_per_step_and_the_cache_before_each_token(shared):
    rollouts = [rollout(7, 5, 3), rollout(7, 5, 6), rollout(8, 4, 1), rollout(7, 5, 2, temperature=0.0)]
    own = sum(range(3)) + sum(range(6)) + sum(range(2))
    prompts = 5 * 6 + 4 * 1 + 5 * 2 if shared else 5 * (3 + 6 + 2) + 4 * 1
    decoding = ledger.Decoding(slots=2, weight_bytes=1000.0, position_bytes=10.0, shares_prompts=shared)
    assert ledger.decode_bytes(decoding, rollouts) == 1000 * 12 / 2 + 10 * (own + prompts)
    assert ledger.decode_bytes(decoding, []) == 0


def test_a_sampler_reads_its_weights_and_cache():
    from jaxreason.build.sampler import decoding_of
    from jaxreason.model import transformer

    sampler = types.SimpleNamespace(slots=16, devices=4, prompt_rows=0)
    c = dataclasses.replace(CONFIG, dtype="bfloat16")
    found = decoding_of(transformer(c), sampler, "float32")
    assert (found.slots, found.shares_prompts) == (4, False)
    assert found.weight_bytes == 2 * (c.layers * layer_weights(c) + c.width * c.vocab_size)
    assert found.position_bytes == 4 * 2 * c.layers * c.kv_heads * c.head_size


def evaluation(accuracy, suite="chain", temperature=0.0, n=50):
    return {"suite": suite, "temperature": temperature, "accuracy": accuracy, "n": n}


def test_cost_is_per_correct_answer_gained():
    used = ledger.add(ledger.empty(), "learn", tokens=80, flops=400.0, device_s=4.0, joules=200.0)
    used = ledger.add(used, "compile", tokens=0, flops=0, device_s=4.0)
    others = [evaluation(0.9, "other"), evaluation(0.0, temperature=1.0)]
    path = [evaluation(0.1, n=100), *others, evaluation(0.8), *others, evaluation(0.5), *others]
    found = ledger.per_correct_answer(used, path, True)
    assert found == pytest.approx(
        {"suite": "chain", "temperature": 0.0, "gained": 20.0, "tokens": 4.0, "flops": 20.0, "device_s": 0.4, "joules": 10.0}
    )
    assert ledger.per_correct_answer(used, path, False)["joules"] is None
    for none in ([], path[:1], path[:3], [evaluation(0.5), evaluation(0.5)], [evaluation(0.5), evaluation(0.4)]):
        assert ledger.per_correct_answer(used, none, True) is None


def test_utilisation_is_of_the_peak_rates():
    used = ledger.add(ledger.empty(), "sample", tokens=1, flops=30.0, bytes=8.0, device_s=3.0)
    used = ledger.add(used, "learn", tokens=1, flops=90.0, device_s=3.0)
    used = ledger.add(used, "compile", tokens=0, flops=0, device_s=9.0)
    peak = Peak("a chip", 100.0, 10.0, "table")
    shares = ledger.utilisation(used, peak)
    assert shares == {
        "sample": pytest.approx({"mfu": 0.1, "bandwidth": 8 / 30}),
        "learn": {"mfu": pytest.approx(0.3), "bandwidth": None},
    }
    assert ledger.utilisation(used, None) is None
    cost = {"suite": "chain", "temperature": 0.0, "gained": 20, "tokens": 4.0, "flops": 2e9, "device_s": 0.4, "joules": None}
    summary = {"ledger": used, "utilisation": shares, "peak": peak._asdict(), "joules_from": None}
    lines = ledger.report(summary | {"per_correct_answer_gained": cost})
    assert lines[0] == "sample: 1 tokens, 30 FLOPs, 3.0 device seconds, 10.0% of peak FLOP/s, 26.7% of peak bandwidth"
    assert lines[-1].startswith(
        "per correct answer gained (20 on chain at temperature 0): 2e+09 FLOPs, 4 tokens, 0.4 device seconds"
    )
    lines = ledger.report(summary | {"joules_from": "watts", "peak": None, "per_correct_answer_gained": None})
    assert lines[-1] == "joules: estimated from config.log.watts, not metered"
    assert "0 J" in lines[0]


def test_a_run_enters_all_that_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")  # this machine may have a counter
    few = {"prior.steps": 3, "rl.steps": 4, "rl.evaluate_every": 2, "log.watts": 40.0, "sharding.mesh.data": 1}
    few |= {"prior.log_every": 1, "rl.log_every": 1, "rl.source.dynamic_sampling": 2}
    summary = run_config(load_config("tiny", "smoke", **few), tmp_path)
    found, lines = summary["ledger"], read_lines(tmp_path / "metrics.jsonl")
    assert json.loads((tmp_path / "summary.json").read_text())["ledger"] == found

    def total(name):
        return sum(line[name] for line in lines if name in line)

    assert found["learn"]["tokens"] == pytest.approx(total("train/tokens"))
    assert all(found[kind]["device_s"] * 40 == pytest.approx(found[kind]["joules"]) for kind in found)
    units = set(ledger.UNITS) - {"bytes"}
    assert all(found[kind][unit] > 0 for kind in ("sample", "learn", "evaluate") for unit in units)
    assert all((found[kind]["bytes"] > 0) == (kind in ledger.DECODING) for kind in found)
    assert (summary["joules_from"], summary["utilisation"]) == ("watts", None)
    assert found["sample"]["device_s"] == pytest.approx(total("time/sample_s") + total("time/verify_s"), rel=1e-6)
    # Every evaluation records the totals so far, so that accuracy can be set against cost.
    at = [line["ledger/sample_flops"] for line in lines if "ledger/sample_flops" in line]
    assert at == sorted(at)
    assert at[0] == 0 < at[-1] == found["sample"]["flops"]


def test_compilation_is_apart(tmp_path, monkeypatch):
    """Use a train step that takes a second to compile, even if it runs fast."""
    from jaxreason import learner

    token_outputs = learner.token_outputs

    def slow_to_trace(*args, **kwargs):
        time.sleep(1.0)
        return token_outputs(*args, **kwargs)

    monkeypatch.setattr(learner, "token_outputs", slow_to_trace)
    few = {"phases": ("prior",), "prior.steps": 3, "prior.log_every": 1, "sharding.mesh.data": 1}
    config = load_config("tiny", "smoke", **few)
    with config.unlocked():
        config.evaluate.suites = {}
    found = run_config(config, tmp_path)["ledger"]
    first, second, third = [line for line in read_lines(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert first["time/compile_s"] > 1 > third["time/compile_s"]
    assert max(line["time/step_s"] for line in (first, second, third)) < 1
    assert max(line["time/learn_s"] for line in (first, second, third)) < 1
    assert first["perf/tokens_per_s"] == pytest.approx(first["train/tokens"] / first["time/step_s"])
    assert found["compile"]["device_s"] > 1
    assert found["learn"]["device_s"] < 1


def test_parts_of_a_compilation_that_contain_others_count_once():
    covered = compiling.Covered()
    for start_s, end_s in ((1, 2), (2.5, 3), (0.5, 4), (5, 6), (6, 7), (6.5, 7.5)):
        covered.add(start_s, end_s)
    assert covered.total_s == pytest.approx(3.5 + 2.5)
