"""Checkpoints: restored on any mesh as they were saved; the remains of a killed save
are never read.
"""

import logging
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from runs import ROOT

from jaxreason.runtime.checkpoint import Damaged, check_writable, fingerprints, open_checkpoints
from jaxreason.types import TrainState


def new_state(optimizer=None, width=16, dtype=jnp.float32):
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = {"layers": {"w": jnp.arange(8 * width, dtype=dtype).reshape(8, width)}, "norm": jnp.ones(width)}
    return TrainState(params, optimizer.init(params), jnp.int32(3))


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def checkpoints(tmp_path):
    opened = open_checkpoints(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


def test_round_trip(checkpoints, tmp_path):
    state, host = new_state(), {"phase": 1, "config": "ü", "evaluations": [{"accuracy": 0.5}], "source": {"position": 7}}
    assert checkpoints.latest() is None
    checkpoints.save(5, state, host, reference={"w": jnp.full(3, 2.0)})
    checkpoints.wait()
    assert checkpoints.latest() == 5

    reader = open_checkpoints(tmp_path / "checkpoints", read_only=True)
    assert reader.peek(5) == host
    restored, restored_host = reader.restore(5, abstract(state))
    assert restored_host == host
    assert_same(restored, state)
    assert_same(reader.restore_params(5, abstract(state.params)), state.params)
    assert_same(reader.restore_reference(5, abstract({"w": jnp.zeros(3)})), {"w": jnp.full(3, 2.0)})
    with pytest.raises(ValueError, match="read_only"):
        reader.save(6, state, host)
    reader.close()


def test_bfloat16_and_raw_random_keys(checkpoints):
    state = {"w": jnp.arange(6, dtype=jnp.bfloat16), "key": jax.random.key_data(jax.random.key(7))}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    assert_same(checkpoints.restore(1, abstract(state))[0], state)


def test_restores_onto_another_mesh(checkpoints):
    devices = np.array(jax.devices())
    if len(devices) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    rows = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
    columns = NamedSharding(Mesh(devices.reshape(2, 4), ("data", "model")), PartitionSpec("model", "data"))
    w = jnp.arange(128.0).reshape(8, 16)
    checkpoints.save(1, {"w": jax.device_put(w, rows)}, {})
    checkpoints.wait()
    for sharding in (rows, columns, jax.sharding.SingleDeviceSharding(devices[5])):
        restored, _ = checkpoints.restore(1, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)})
        assert restored["w"].sharding == sharding
        np.testing.assert_array_equal(restored["w"], w)


def test_saving_copies_state_and_host(checkpoints):
    state, host = {"w": jnp.zeros((256, 1024))}, {"evaluations": []}
    checkpoints.save(1, state, host)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(20):  # donated while the save runs
        state = advance(state)
    host["evaluations"].append("later")
    checkpoints.wait()
    restored, restored_host = checkpoints.restore(1, abstract(state))
    assert float(jnp.abs(restored["w"]).max()) == 0
    assert restored_host == {"evaluations": []}


def test_keeps_the_newest(checkpoints, tmp_path):
    for step in (1, 2, 30):
        checkpoints.save(step, {"w": jnp.full(2, float(step))}, {"step": step})
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "30"]
    assert checkpoints.latest() == 30
    assert checkpoints.peek(2) == {"step": 2}


def test_remains_of_a_killed_save_are_ignored_and_removed(checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints.save(3, {"w": jnp.ones(2)}, {"step": 3})
    checkpoints.wait()
    shutil.copytree(folder / "3", folder / "9.orbax-checkpoint-tmp")
    os.remove(folder / "9.orbax-checkpoint-tmp" / "host" / "metadata")

    reader = open_checkpoints(folder, read_only=True)
    assert reader.latest() == 3
    assert (folder / "9.orbax-checkpoint-tmp").exists()  # a reader must not remove what a live run is writing
    reader.close()
    writer = open_checkpoints(folder)
    assert writer.latest() == 3
    writer.save(7, {"w": jnp.full(2, 7.0)}, {"step": 7})
    writer.wait()
    assert writer.latest() == 7
    np.testing.assert_array_equal(writer.restore(7, abstract({"w": jnp.ones(2)}))[0]["w"], [7, 7])
    writer.close()
    assert sorted(p.name for p in folder.iterdir()) == ["3", "7"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (new_state(optax.sgd(0.1, momentum=0.9)), r"opt_state\..* is missing there and float32"),
        (new_state(optax.sgd(0.1)), r"opt_state\..* there and missing here"),
        (new_state(width=32), r"float32\[8, 16\] there and float32\[8, 32\] here"),
        (new_state(dtype=jnp.bfloat16), r"float32\[8, 16\] there and bfloat16\[8, 16\] here"),
    ],
)
def test_a_state_of_another_config_is_refused_in_one_line(checkpoints, wanted, message):
    checkpoints.save(1, new_state(), {})
    checkpoints.wait()
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.restore(1, abstract(wanted))
    assert "\n" not in str(error.value)


def test_params_may_be_cast_but_not_reshaped(checkpoints):
    checkpoints.save(1, new_state(), {})
    checkpoints.wait()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), new_state().params)
    assert_same(checkpoints.restore_params(1, abstract(half)), half)
    with pytest.raises(ValueError, match="norm"):
        checkpoints.restore_params(1, abstract({"layers": half["layers"]}))
    with pytest.raises(ValueError, match="has no reference"):
        checkpoints.restore_reference(1, abstract(half))


def test_values_that_are_not_json_fail_at_once(checkpoints):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, {"w": jnp.ones(2)}, {"accuracy": jnp.ones(())})
    assert checkpoints.latest() is None


def test_a_save_that_fails_is_said_and_the_next_is_tried(checkpoints, tmp_path):
    checkpoints.save(1, {"w": jnp.ones(2)}, {})
    checkpoints.wait()
    assert checkpoints.failure() is None
    checkpoints.save(1, {"w": jnp.ones(2)}, {})
    assert "the save of step 1 failed" in checkpoints.failure()
    assert checkpoints.failure() is None
    checkpoints.save(2, {"w": jnp.zeros(2)}, {})
    checkpoints.wait()
    assert checkpoints.failure() is None
    assert checkpoints.steps() == [2, 1]


@pytest.mark.process
def test_a_folder_that_is_gone_is_one_line_and_holds_nobody_up(tmp_path):
    """Orbax would print a page of errors, and its threads would wait 5 minutes at exit
    for a folder that was never made.
    """
    body = """
import sys
from pathlib import Path
import jax.numpy as jnp
from jaxreason.runtime.checkpoint import open_checkpoints
folder = Path(sys.argv[1], "checkpoints")
opened = open_checkpoints(folder)
for step in (1, 2):
    opened.save(step, {"w": jnp.ones(2)}, {})
    opened.wait()
    print(opened.failure())
    if step == 1:
        folder.rename(folder.with_name("aside"))
        folder.touch()
opened.close()
"""
    command, environment = [sys.executable, "-c", body, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    got = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert (got.returncode, got.stderr) == (0, "")
    first, second = got.stdout.splitlines()
    assert first == "None"
    assert second.startswith("the save of step 2 failed: [Errno 20] Not a directory: ")
    assert second.endswith("there is no checkpoint")


def flip_a_bit(path, at: float):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def files_of(checkpoint):
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def test_any_flipped_bit_or_cut_is_noticed_or_harmless(tmp_path):
    """Each file of a checkpoint is damaged in turn, at three places and by a cut: a
    different state is never restored.
    """
    state, host = new_state(), {"step": 1, "source": {"position": 3}}
    made = open_checkpoints(tmp_path / "made")
    made.save(1, state, host)
    made.close()
    noticed = []
    for i, file in enumerate(files_of(tmp_path / "made" / "1")):
        for at in (0.1, 0.5, 0.9, "cut"):
            folder = tmp_path / f"{i}-{at}"
            shutil.copytree(tmp_path / "made", folder)
            path = folder / file.relative_to(tmp_path / "made")
            if at == "cut":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            else:
                flip_a_bit(path, at)
            reader = open_checkpoints(folder, read_only=True)
            try:
                restored, restored_host = reader.restore(1, abstract(state))
            except Damaged as error:
                noticed.append(str(error))
            else:
                assert_same(restored, state)
                assert restored_host == host
            reader.close()
    assert len(noticed) >= 8
    assert all("checkpoint of step 1 at" in line and "\n" not in line for line in noticed)


def test_fingerprints_notice_each_bit_and_no_sharding():
    for dtype in ("float32", "bfloat16", "int32", "int8", "bool"):
        x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 6)), dtype)
        mark = fingerprints({"x": x})["x"]
        assert mark.startswith(dtype)
        rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
        assert fingerprints({"x": jax.device_put(x, rows)})["x"] == mark
        assert fingerprints({"x": x.T.reshape(8, 6)})["x"] != mark  # the same entries elsewhere
        assert fingerprints({"x": x.at[3, 4].set(x[3, 4] == 0)})["x"] != mark
    assert fingerprints({"a": {"b": jnp.float32(-0.0)}}) != fingerprints({"a": {"b": jnp.float32(0.0)}})


def test_the_best_and_every_tenth_stay_beside_the_newest(tmp_path):
    made = open_checkpoints(tmp_path, keep=1, keep_every_steps=10, keep_best="chain")
    accuracy = {4: 0.2, 8: 0.9, 10: 0.1, 14: 0.3, 18: 0.9, 20: 0.0, 24: 0.5}
    evaluations = []
    for step, value in accuracy.items():
        evaluations += [
            {"suite": "chain", "step": step, "temperature": 0.0, "accuracy": value},
            {"suite": "chain", "step": step, "temperature": 1.0, "accuracy": 1.0},
            {"suite": "other", "step": step, "temperature": 0.0, "accuracy": 1.0},
        ]
        made.save(step, {"w": jnp.ones(2)}, {"evaluations": evaluations})
    made.wait()
    assert made.failure() is None
    assert made.steps() == [24, 20, 18, 10]
    made.close()


def test_a_damaged_checkpoint_is_set_aside(checkpoints, tmp_path):
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.full(2, float(step))}, {})
    checkpoints.wait()
    checkpoints.set_aside(2)
    assert checkpoints.steps() == [1]
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()
    checkpoints.save(2, {"w": jnp.full(2, 3.0)}, {})
    checkpoints.wait()
    assert checkpoints.failure() is None
    np.testing.assert_array_equal(checkpoints.restore(2, abstract({"w": jnp.ones(2)}))[0]["w"], [3, 3])


def test_due(tmp_path):
    checkpoints = open_checkpoints(tmp_path, every_steps=10)
    assert [step for step in range(1, 31) if checkpoints.due(step)] == [10, 20, 30]
    checkpoints.close()


def test_folders_that_do_not_work(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (check_writable, open_checkpoints):
        with pytest.raises(ValueError, match=r"can't write to .*file/run: Not a directory") as error:
            make(tmp_path / "file" / "run")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no checkpoints at"):
        open_checkpoints(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="keep=0"):
        open_checkpoints(tmp_path, keep=0)
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_orbax_information_stays_out_of_the_log(checkpoints, caplog):
    logger = absl_logging.get_absl_logger()
    before = logger.level
    logger.addHandler(caplog.handler)
    try:
        logger.setLevel(logging.INFO)
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
        checkpoints.wait()
        absl_logging.info("ours")
    finally:
        logger.setLevel(before)
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"ours"}
