"""The train step is one function: devices, micro-batches, packing and remat change only
the rounding of its sums.

Combinations of mesh, micro-batches, remat and objective make five updates from five
batches, both with one rollout per row and with rollouts that share rows. Losses, whole
gradients and parameter changes equal those of one device, one micro-batch, one row per
rollout and no remat. By default each pair of values occurs in some combination; the
full product is marked slow.

The optimizer is AdamW with an eps of 1e-4. With the usual 1e-8 Adam turns entries that
are pure rounding into whole steps, and runs differ there by the learning rate. With an
eps far above a gradient's rounding, some 1e-8 here, they differ by less than lr x
rounding / eps per step; and the change of an entry depends on its size, which Adam
would otherwise hide.

Found (jax 0.10.2, CPU, 2026-11-24), relative to the largest entry of each array: losses
differ by at most 1.2e-6, gradients by 1.1e-5 (1.9e-6 in the first step), changes by
3.6e-5. If one micro-batch counts 1.001 times, losses are off by 4e-4; without the last
micro-batch, by 0.9.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import grouped

from jaxreason import batching, learner, objectives, optimizer, sharding
from jaxreason.learner import new_state
from jaxreason.model import ModelConfig, transformer
from jaxreason.types import Rollout, Task, Verdict

SHAPE = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 8, "kv_heads": 4, "head_size": 4, "feed_forward": 32}
R, G, T, STEPS = 32, 4, 16, 5
MESHES = {
    "one device": {"data": 1},
    "data=8": {"data": 8},
    "fsdp=8": {"data": 1, "fsdp": 8},
    "data=2 tensor=4": {"data": 2, "tensor": 4},  # as many as there are heads of keys
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
MICROBATCHES = (1, 4)
REMATS = {"none": {"scan_layers": False}, "full": {"scan_layers": True}}  # scanned, as accelerators have it
OBJECTIVES = {name: objectives.make(name, kl_coefficient=0.1, entropy_coefficient=0.01) for name in ("grpo", "dapo")}
BOUNDS = {"loss": 1e-5, "gradient": 5e-5, "update": 2e-4}  # a few times the differences found


def rollouts(step: int) -> list[Rollout]:
    """Make attempts of 3 to T tokens, right or wrong, each at its own temperature; some
    tokens are forced.
    """
    rng = np.random.default_rng(step)
    made = []
    for i in range(R):
        whole = T if i == 0 else rng.integers(3, T)  # one of T in each batch: so all have one shape
        prompt = rng.integers(1, whole - 1)
        length = whole - prompt
        sampled = (rng.random(length) < 0.9) | (np.arange(length) == 0)
        right = bool(rng.random() < 0.5)
        made.append(
            Rollout(
                task=Task("", ""),
                problem=i // G,
                attempt=i % G,
                prompt=rng.integers(0, 24, prompt),
                tokens=rng.integers(0, 24, length),
                logp=np.where(sampled, rng.normal(-3.2, 0.2, length), 0).astype(np.float32),
                sampled=sampled,
                stop="eos",
                text="",
                verdict=Verdict(float(right), right),
                temperature=float(rng.uniform(0.7, 1.3)),
            )
        )
    return made


@functools.cache
def batches(objective: str, pack: bool, microbatches: int) -> list:
    how = {"buckets": (T,), "limit": T, "pack": pack, "microbatches": microbatches}
    made = [batching.from_groups(grouped(rollouts(step), G), OBJECTIVES[objective], **how) for step in range(STEPS)]
    assert all((batch.segment_BT.max() > 1) == pack for batch in made)
    # A token's reference log-prob may be anything, but must not depend on where the
    # token stands.
    return [dataclasses.replace(batch, reference_logp_BT=0.9 * batch.behaviour_logp_BT) for batch in made]


def recorded() -> optax.GradientTransformation:
    """Wrap an optimizer so that its state keeps the gradient of the step."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads))


def compiled(params, objective: str, mesh: str, microbatches: int, remat: str):
    """Compile one combination; return `run(pack) -> (losses, gradients, params)` of
    five updates.
    """
    mesh = sharding.make_mesh(**MESHES[mesh])
    model = transformer(ModelConfig(**SHAPE, remat=remat, **REMATS[remat]), mesh)
    descent = optax.chain(recorded(), optimizer.make(STEPS, lr=1e-2, eps=1e-4, weight_decay=0.1, clip_norm=1.0))
    fresh = jax.device_get(new_state(params, descent))
    placed = sharding.shardings(fresh, mesh)
    step = learner.compile_train_step(model, OBJECTIVES[objective], descent, microbatches=microbatches, state_shardings=placed)
    rows = sharding.put_rows(batches(objective, False, microbatches)[0], mesh)
    step = step.lower(jax.device_put(fresh, placed), rows).compile()  # packed, rows have the same shapes

    def run(pack: bool):
        state, losses, gradients = jax.device_put(fresh, placed), [], []
        for batch in batches(objective, pack, microbatches):
            state, metrics = step(state, sharding.put_rows(batch, mesh))
            losses.append(metrics["loss"][0])
            gradients.append(jax.device_get(state.opt_state[0]))
        return jax.device_get((losses, gradients, state.params))

    return run


def difference(tree, expected) -> float:
    """Return the largest difference of any array, relative to the array's largest
    entry.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


# Indices of objective, mesh, micro-batches and remat. Each mesh meets both values of
# the others, and so do they each other.
PAIRS = [((k + mesh // 2) % 2, mesh, k, (k + mesh) % 2) for mesh in range(len(MESHES)) for k in range(2)]
PRODUCT = [(sum(index) % 2, *index) for index in itertools.product(range(len(MESHES)), range(2), range(2))]


def test_pairs_are_all_there():
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in PAIRS} == {(row[i], row[j]) for row in PRODUCT}


@pytest.mark.parametrize("indices", [PAIRS, pytest.param(PRODUCT, marks=pytest.mark.slow)], ids=["pairs", "product"])
def test_devices_microbatches_packing_and_remat_change_only_rounding(indices):
    params = jax.jit(transformer(ModelConfig(**SHAPE)).init)(jax.random.key(0))
    grid = [("grpo", 0, 0, 0), ("dapo", 0, 0, 0)]  # the reference of all others
    grid += [(list(OBJECTIVES)[objective], *index) for objective, *index in indices if any(index)]
    grid = [(name, list(MESHES)[mesh], MICROBATCHES[parts], list(REMATS)[remat]) for name, mesh, parts, remat in grid]
    with ThreadPoolExecutor(2) as pool:  # compiling is nearly all that takes time here
        runs = list(pool.map(lambda how: compiled(params, *how), grid))
    expected = {}
    for how, run in zip(grid, runs, strict=True):
        for pack in (False, True):
            losses, gradients, trained = run(pack)
            found = {"loss": losses, "gradient": gradients, "update": jax.tree.map(np.subtract, trained, params)}
            for name, wanted in expected.setdefault(how[0], found).items():
                apart = difference(found[name], wanted)
                where = "{} on {}, micro-batches {}, remat {}".format(*how) + f", {pack=}"
                assert apart < BOUNDS[name], f"{where}: {name} is {apart:.1e} off"
