"""The plan: what a config needs of TPUs that are not here. Skipped without libtpu,
except for errors that come before it is needed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from runs import ROOT, load_config

from jaxreason import sharding
from jaxreason.plan import arrays, chips, memory, programs, report, search
from jaxreason.plan import config as plan_config
from jaxreason.plan.config import check_sizes, read
from jaxreason.plan.work import flags_for

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no compiler for TPUs: pip install 'jaxreason[tpu]'"
)
SMALL = "v5e:2x4"


def command(*arguments):
    """Run the real command; return (exit code, stdout, stderr)."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    got = subprocess.run(
        [sys.executable, "-m", "jaxreason.plan", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    return got.returncode, got.stdout, got.stderr


def work_of(topology=SMALL, name="tiny", options="", **fields):
    config = load_config(name, options, **fields).to_dict()
    return read(config, topology, None)


def test_the_persistent_cache_is_off_only_while_a_plan_compiles(tmp_path):
    changed = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in changed}

    def compiled(factor):
        jax.jit(lambda x: factor * x).lower(1.0).compile()
        return len(list(tmp_path.iterdir())) > 0

    try:
        for name, value in changed.items():
            jax.config.update(name, value)
        with arrays.without_cache():
            assert not compiled(2)
        assert compiled(3)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        arrays.compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no --config given"]),
        (["--config=configs/nope.py"], ["no config file 'configs/nope.py'"]),
        (["--config=configs/tiny.py"], ["no --topology given", "--topology=list"]),
        (["--config=configs/tiny.py", "--topology=v5e:4x9"], ["unknown topology 'v5e:4x9'", "did you mean 'v5e:4x8'"]),
        (["--config=configs/tiny.py", "loose"], ["loose"]),
        (["--config=configs/tiny.py", "--efficiency=2"], ["efficiency"]),
        (["--config=configs/tiny.py", "--config.rl.stepz=3"], ["stepz"]),
        (["--config=configs/tiny.py", "--topology=v5e:1x1", "--prices=/nowhere.json"], ["No such file", "/nowhere.json"]),
        (["--config=configs/tiny.py", "--topology=v5e:1x1", "--compare=/nowhere.hlo"], ["No such file", "/nowhere.hlo"]),
        (["--config=configs/tiny.py", "--topology=v5e:1x1", "--compare=README.md"], ["README.md, which is no compiled HLO"]),
    ],
)
def test_a_mistyped_command_is_one_line(arguments, words):
    code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1, err
    for word in ["error: ", *words]:
        assert word in err


def test_a_missing_compiler_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        arrays.devices_of.__wrapped__("v5e:2x4")


@pytest.mark.process
def test_the_list_shows_what_is_known():
    code, out, err = command("--topology=list")
    assert (code, err) == (0, "")
    for name in chips.topology_names():
        assert name in out.split()


def test_prices_are_checked(tmp_path):
    path = tmp_path / "prices.json"
    for text, message in {
        '{"v5f": 1}': r"did you mean 'v5p'",
        '{"v5e": "1"}': "allowed: a number",
        "[1]": "needed: an object",
        "v5e: 1": r"prices\.json, which is no JSON .*; needed: an object such as",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.read_prices(str(path))
    path.write_text('{"v5e": 0.5}')
    assert report.read_prices(str(path)) == {"v5e": 0.5}


def test_the_memory_that_a_refused_program_needed_is_read():
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.50T) exceeds"
    assert programs.needed(refusal) == 2.5 * 2**40
    assert programs.needed("RESOURCE_EXHAUSTED: ... Used 20.10G of 15.75G hbm. Exceeded") == 20.1 * 2**30
    assert report.finite(programs.needed("RESOURCE_EXHAUSTED: something else")) is None


@pytest.mark.parametrize("answer", [*range(9), None])
def test_the_first_that_fits_is_found_in_few_tries(answer):
    tried = []

    def fit(choice):
        tried.append(choice)
        return answer is not None and choice >= answer

    assert search.first_that_fits(range(9), fit) == answer
    assert len(tried) <= 5
    assert len(set(tried)) == len(tried)


@needs_libtpu
@pytest.mark.parametrize("topology", chips.topology_names())
def test_every_topology_that_is_listed_exists(topology):
    assert len(arrays.devices_of(topology)) == chips.chips_of(topology)


@needs_libtpu
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rl.microbatches": 5},
            r"256 rows a batch, which do not divide over 8 devices .*microbatches may be 1, 2, 4, 8, 16, 32;",
        ),
        ({"sharding.mesh.fsdp": 16}, r"needs a multiple of 16 devices; there are 8"),
        ({"sharding.mesh.tensor": 8}, r"which does not divide over tensor=8"),
        ({"sampler.slots": 12}, r"12 slots, which do not divide over 8 devices"),
        ({"model.name": "tinny"}, r"unknown model 'tinny' \(did you mean 'tiny'\?\)"),
        ({"rl.objective.name": "grop"}, r"did you mean 'grpo'"),
        ({"rl.microbatches": 0}, r"config.rl.microbatches got 0; allowed: 1 or more"),
        ({"rl.source.max_tokens": -100}, r"config.rl.source.max_tokens got -100; allowed: 1 or more"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_compiled(fields, message, monkeypatch):
    monkeypatch.setattr(programs, "compile_program", None)
    with pytest.raises(ValueError, match=message):
        work_of(**fields)


@pytest.mark.parametrize(
    ("source", "microbatches", "message"),
    [
        ({"name": "corpus", "rows": -4, "length": 64}, None, r"config.rl.source.rows got -4; allowed: 1 or more"),
        ({"name": "corpus", "rows": 4, "length": 0}, None, r"config.rl.source.length got 0; allowed: 1 or more"),
        ({"name": "rollouts", "problems": -4, "group": 8}, 1, r"config.rl.source.problems got -4; allowed: 1 or more"),
        ({"name": "rollouts", "problems": 4, "group": 8}, 0, r"config.rl.microbatches got 0; allowed: 1 or more"),
        (
            {"name": "rollouts", "problems": 4, "group": 8, "max_tokens": 73},
            1,
            r"config.rl.source.max_tokens got 73; allowed: 1 to config.sampler.max_tokens=72",
        ),
    ],
)
def test_a_size_that_no_run_can_have_is_refused(source, microbatches, message):
    with pytest.raises(ValueError, match=message):
        check_sizes({"source": source, "microbatches": microbatches}, 72, "config.rl")


@needs_libtpu
def test_attempts_that_share_a_prompt_stand_in_one_row():
    alone, shared = (work_of(**{"rl.microbatches": 1, "rl.source.rollouts_per_prompt": n}) for n in (1, 4))
    prompt, completion = dict(alone.sampler)["max_prompt_tokens"], alone.new_tokens
    assert (alone.rows, alone.length) == (256, prompt + completion)
    assert (shared.rows, shared.length) == (64, prompt + 4 * completion + 3)


@needs_libtpu
def test_a_pretrained_model_needs_no_download(tmp_path):
    shape = work_of(name="gsm8k", options="model=qwen3_8b", **{"rl.microbatches": 1}).shape
    assert (shape.layers, shape.vocab_size, shape.scan_layers) == (36, 151936, True)
    with pytest.raises(ValueError, match="nothing is downloaded here"):
        work_of(name="gsm8k", options="model=Qwen/Qwen3-8B")
    config = {"model_type": "qwen2", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2, "intermediate_size": 128}))
    assert work_of(name="gsm8k", options=f"model={tmp_path}", **{"rl.microbatches": 1}).shape.vocab_size == 320


@pytest.mark.process
@needs_libtpu
def test_the_command_plans_a_config_and_its_flops_are_those_of_the_formula():
    code, out, err = command(
        "--config=configs/tiny.py", f"--topology={SMALL}", "--json", "--config.rl.objective.kl_coefficient=0.1"
    )
    found = json.loads(out)
    assert code == 0, err
    assert found["fits"]
    assert set(found["stages"]) == {
        *("train step", "reference log-probs", "lay out weights", "prefill", "decode", "grow the cache")
    }
    for name, program in found["programs"].items():
        assert program["loops_of_given_length"] <= 1, name  # the one whose length we know
        assert program["bytes"] > 0, name
        assert program["flops"] == pytest.approx(program["flops_by_formula"], rel=0.03), name
    (update,) = (program for name, program in found["programs"].items() if name.startswith("train step"))
    # Eight devices with an eighth of the rows each: the gradients of all params,
    # float32, are summed in a ring.
    assert update["sent"]["all-reduce of 8"]["bytes"] >= 2 * 7 / 8 * 4 * found["parameters"]
    params = found["stages"]["train step"]["params"]
    assert params == 4 * found["parameters"]
    assert {stage["reference"] for stage in found["stages"].values()} == {params}
    for stage in found["stages"].values():
        assert stage["total"] == sum(size for kind, size in stage.items() if kind != "total")
    predicted = found["prediction"]
    assert predicted["steps_per_hour"] * predicted["step_s"] == pytest.approx(3600)
    assert predicted["usd"] == pytest.approx(predicted["chip_hours"] * 1.2)


def shrink(monkeypatch, hbm_bytes):
    """Set the memory of the chip."""
    monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v5e"]._replace(hbm_bytes=hbm_bytes))


@needs_libtpu
def test_a_config_that_does_not_fit_gets_smaller_microbatches_and_fewer_slots(monkeypatch):
    work = work_of(**{"rl.microbatches": 1, "sampler.slots": 1024})
    found = {stage.name: stage.bytes for stage in memory.stages_of(work)}
    smaller = {stage.name: stage.bytes for stage in memory.stages_of(work._replace(microbatches=4).with_slots(64))}
    for name in ("train step", "decode", "grow the cache"):
        assert smaller[name] < found[name]
    shrink(monkeypatch, max(smaller.values()))
    assert not memory.fits(memory.stages_of(work), work)
    other = search.find_fitting(work)
    assert memory.fits(memory.stages_of(other), other)
    assert other.mesh == work.mesh
    changed = flags_for(work, other)
    assert f"--config.rl.microbatches={other.microbatches}" in changed
    assert 1 <= other.microbatches <= 4
    assert other.slots >= 64


@needs_libtpu
def test_a_train_step_bound_by_the_network_gets_fewer_microbatches(monkeypatch):
    """Each micro-batch gathers the params and sums their gradient."""
    work = work_of(**{"sharding.mesh.fsdp": 8, "sharding.mesh.data": 1, "rl.microbatches": 8, "rl.source.problems": 32})
    steps = {n: programs.compile_train(work._replace(microbatches=n)).program for n in (1, 8)}
    assert steps[8].sent_bytes > 2 * steps[1].sent_bytes

    def with_network(bytes_per_s):
        monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v5e"]._replace(ici_bytes_per_s=bytes_per_s))
        return search.fewer_microbatches(work)

    at_peak = {n: max(chips.roofline(p, work.chip)[:2]) for n, p in steps.items()}
    assert with_network(2 * steps[8].sent_bytes / at_peak[8]) is None  # nor is this work bound by it
    assert with_network(steps[1].sent_bytes / at_peak[1] / 2) is None  # even one micro-batch is
    other = with_network(1.1 * steps[1].sent_bytes / at_peak[1])
    assert other.microbatches < 8
    told = report.describe_fewer(work, other)
    assert told["flags"] == [f"--config.rl.microbatches={other.microbatches}"]
    assert told["bound"] != "network"
    assert f"--config.rl.microbatches={other.microbatches} {told['bound']} does" in report.faster(told)


@needs_libtpu
def test_params_that_do_not_fit_get_another_mesh(monkeypatch):
    work = work_of(**{"model.width": 256, "rl.microbatches": 1, "sampler.slots": 64})
    whole = memory.still_stages(work)[0].bytes
    shrink(monkeypatch, 0.9 * whole)
    assert [stage.name for stage in memory.stages_of(work)] == ["between steps", "lay out weights"]  # nothing is compiled for it
    meshes = [dict(mesh) for mesh in search.other_meshes(work)]
    assert meshes
    assert all(mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 8 for mesh in meshes)
    assert meshes[0]["fsdp"] > 1
    tried = work._replace(mesh=tuple(meshes[0].items()))
    assert f"--config.sharding.mesh.fsdp={meshes[0]['fsdp']}" in flags_for(work, tried)


@needs_libtpu
@pytest.mark.parametrize(
    ("fields", "of_params"),
    [
        ({}, ("layers", "layers")),  # a copy of the layers, one array each; the rest is the learner's
        ({"sharding.mesh.fsdp": 8, "sharding.mesh.data": 1}, (1, 1)),  # whole again, beside the eighths
        ({"sharding.mesh.fsdp": 8, "sharding.mesh.data": 1, "model.dtype": "bfloat16"}, (0.5 + 1 / 16, 0.5)),  # and cast before
    ],
    ids=str,
)
def test_memory_to_lay_out_and_keep_the_samplers_weights(fields, of_params):
    config = load_config("tiny")
    with config.unlocked():
        config.model.dtype = "float32"
        config.update_from_flattened_dict(fields)
    work = read(config.to_dict(), SMALL, None)
    _, peak, left = arrays.weights_of(work)
    params = arrays.state_of(work_of()).params
    whole = arrays.size_of(params)
    of_params = [arrays.size_of(params["layers"]) / whole if share == "layers" else share for share in of_params]
    assert (peak / whole, left / whole) == (pytest.approx(of_params[0], rel=0.01), pytest.approx(of_params[1], rel=0.01))


@needs_libtpu
def test_each_process_of_several_samples_its_share_on_its_own_chips():
    axes = {"sharding.mesh.fsdp": 8, "sharding.mesh.data": 1, "sharding.mesh.tensor": 2, "sampler.slots": 64}
    work = work_of("v5e:4x4", **axes)
    completer, meshes = arrays.completer_of(work), arrays.meshes_of(work)
    assert (arrays.processes_of(work), dict(meshes.sample.shape)) == (4, {"data": 2, "fsdp": 1, "tensor": 2})
    assert len({d.process_index for d in meshes.sample.devices.flat}) == 1
    assert completer.sampler.slots == 16
    assert [w.slots for w in search.slot_choices(work)] == [64, 32, 16, 8]
    assert arrays.processes_of(work_of(SMALL)) == 1
    with pytest.raises(ValueError, match="slots got 62, which do not divide over 4 processes"):
        work_of("v5e:4x4", **axes | {"sampler.slots": 62})
    with pytest.raises(ValueError, match="sampling on 4 devices of each process got tensor=8"):
        work_of("v5e:4x4", **axes | {"sharding.mesh.fsdp": 2, "sharding.mesh.tensor": 8})


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:4x8", "v5p:2x2x4", "v6e:4x8"])
def test_every_mesh_that_divides_can_be_laid_on_a_slice(topology):
    devices = arrays.devices_of(topology)
    for fsdp in (1, 2, 4, 8, 16):
        tensor = 16 // fsdp
        mesh = sharding.make_mesh(fsdp=fsdp, tensor=tensor, devices=devices)
        assert mesh.devices.shape == (len(devices) // 16, fsdp, tensor)
        assert set(mesh.devices.flat) == set(devices)


@needs_libtpu
def test_on_a_slice_the_axis_tensor_spans_hosts_and_is_turned_into_them():
    axes, devices = {"data": 1, "fsdp": 8, "tensor": 4}, arrays.devices_of("v5e:4x8")
    learn, sample = sharding.make_meshes(axes, devices=devices, process=7)
    turned = sharding.within_processes(learn, 4)
    spanned = [{len({d.process_index for d in group}) for group in m.devices.reshape(-1, 4)} for m in (learn, turned)]
    assert spanned == [{2}, {1}]
    assert (turned.devices[7:] == sample.devices).all()  # so nothing moves once it is gathered
    assert sharding.within_processes(learn, 8) is None


@needs_libtpu
def test_devices_that_only_sample_hold_nothing_of_the_learner():
    config = load_config("tiny")
    config.sharding.sampling_devices = 4
    work = read(config.to_dict(), SMALL, None)
    assert (arrays.meshes_of(work).learn.size, arrays.meshes_of(work).sample.size) == (4, 4)
    *_, laid_out = memory.still_stages(work)
    assert set(laid_out.kinds) == {"sampler's weights"}
    assert laid_out.bytes == arrays.size_of(arrays.state_of(work).params)


@needs_libtpu
def test_a_reference_policy_in_the_hosts_memory_is_there_only_while_it_scores():
    kl = {"rl.objective.kl_coefficient": 0.1, "model.layers": 1}
    here, away = (memory.learner_stages(work_of(**kl, **{"rl.offload_reference": offload})) for offload in (False, True))
    params = here[0].kinds["params"]
    assert [stage.kinds["reference"] for stage in here] == [params, params]
    assert [stage.kinds["reference"] for stage in away] == [0, params]


@pytest.fixture
def here(monkeypatch):
    """Plan for the devices of this machine, since there may be no compiler for TPUs."""
    caches = (arrays.meshes_of, arrays.model_of, arrays.state_of, programs.compiled_pass)
    for module in (arrays, plan_config, report):
        monkeypatch.setattr(module, "devices_of", lambda topology: jax.devices()[: chips.chips_of(topology)])
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("objective", "passes"),
    [
        ({"name": "grpo"}, []),
        ({"name": "grpo", "kl_coefficient": 0.1, "kl_in": "reward"}, ["reference log-probs"]),
        ({"name": "ppo", "entropy_top": 0.2}, ["values", "entropies"]),
        ({"name": "dapo", "covariance": "clip", "entropy_target": 0.2}, []),
    ],
)
def test_every_pass_of_an_objective_is_counted(here, objective, passes):
    config = load_config("tiny", **{"model.layers": 1, "model.value_head": True})
    config.rl.objective = objective
    work = read(config.to_dict(), SMALL, "rl")
    names = programs.passes_of(work)
    assert names == passes
    assert len(names) == work.objective.passes
    made = programs.compile_passes(work)
    assert [one.name.rpartition(",")[0] for one in made] == names
    assert all(one.program.flops > 0.9 * one.flops > 0 for one in made)
    made.append(programs.compile_train.__wrapped__(work))  # whatever the loss reads of a batch is there
    seconds = [chips.roofline(one.program, work.chip).seconds for one in made]
    assert report.predict(work, made, 1.0, None).learning_s == pytest.approx(sum(seconds))


@needs_libtpu
def test_adapters_are_merged_beside_the_base():
    config = load_config("tiny")
    with config.unlocked():
        config.model.lora = {"rank": 4, "targets": ("q", "v")}
    work = read(config.to_dict(), SMALL, None)
    _, peak, left = arrays.weights_of(work)
    kernels = work.shape.layers * work.shape.width * work.shape.head_size * (work.shape.heads + work.shape.kv_heads) * 4
    layers = arrays.size_of(arrays.state_of(work).params["frozen"]["layers"])
    assert (peak, left) == (kernels + layers, layers)  # q and v merged, and then all layers one by one
    assert memory.resident(work)["optimizer"] < memory.resident(work)["params"] / 2


GSM8K = (ROOT / "configs/gsm8k.py").read_text()
SIZES = re.findall(r"^    (\d[\d.]*b) .*(v5e:\S+)", GSM8K, re.MULTILINE)  # of its docstring


@pytest.mark.parametrize(("size", "topology"), SIZES)
def test_each_size_of_gsm8k_has_room_for_what_needs_no_compiler(size, topology, monkeypatch):
    """Use as many devices of this machine as the topology has chips, since there may be
    no compiler for TPUs.
    """
    devices = jax.devices()[: chips.chips_of(topology)]
    for module in (arrays, plan_config):
        monkeypatch.setattr(module, "devices_of", lambda topology: devices)
    caches = (arrays.meshes_of, arrays.model_of, arrays.state_of, arrays.completer_of, arrays.slots_of)
    try:
        for cached in caches:
            cached.cache_clear()
        work = work_of(topology, "gsm8k", f"size={size},sft=10")
        stages, slots = memory.still_stages(work), arrays.size_of(arrays.slots_of(work))
    finally:
        for cached in caches:
            cached.cache_clear()
    assert max(stage.bytes for stage in stages) + slots < 0.85 * work.chip.hbm_bytes  # the rest is for temporaries


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("size", "topology"), SIZES)
@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_the_plan_agrees_that_each_size_of_gsm8k_fits(size, topology, phase):
    work = read(load_config("gsm8k", f"size={size},sft=10").to_dict(), topology, phase)
    assert memory.fits(memory.stages_of(work), work)
