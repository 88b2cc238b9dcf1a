"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): a frozen base, and two
thin matrices beside each chosen projection.

Params of an adapted model are `{"frozen": base, "lora": adapters, ...}`. Params under
"frozen" have no gradient and no optimizer state; all others, including a value head,
are trained. The train step takes the base as a donated argument and returns it, so that
compiled programs do not contain it as a constant. Checkpoints, samplers and shardings
treat params as one tree, as without adapters.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxreason.model.config import LORA_TARGETS, Lora


def init(key, layers, lora: Lora):
    """Draw adapters for stacked layers: A from a normal of variance 1 / fan-in, B zero,
    so that the model is unchanged at the start.
    """
    adapters: dict = {}
    for i, (target, part) in enumerate(LORA_TARGETS.items()):
        if target not in lora.targets:
            continue
        shape = layers[part][target]["kernel"].shape
        inputs = 3 if target == "o" else 2  # the input of o has two axes: heads and head size
        a = math.prod(shape[1:inputs]) ** -0.5 * jax.random.normal(jax.random.fold_in(key, i), (*shape[:inputs], lora.rank))
        b = jnp.zeros((shape[0], lora.rank, *shape[inputs:]))
        adapters.setdefault(part, {})[target] = {"a": {"kernel": a}, "b": {"kernel": b}}
    return adapters


def beside(layers, adapters):
    """Insert each adapter into the layers' tree, beside the kernel that it adapts. No
    array is copied.
    """
    layers = {part: dict(modules) for part, modules in layers.items()}
    for part, modules in adapters.items():
        for target, adapter in modules.items():
            layers[part][target] = layers[part][target] | adapter
    return layers


def merge(params, lora: Lora | None):
    """Return plain params that compute the same as the adapted ones: `W + alpha / rank
    * A B`, in the wider of the two dtypes.

    Params without adapters are returned unchanged. Merged kernels are new arrays; the
    other arrays are those of the base.
    """
    if "lora" not in params:
        return params
    base = params["frozen"]
    layers = {part: dict(modules) for part, modules in base["layers"].items()}
    for part, modules in params["lora"].items():
        for target, adapter in modules.items():
            module, (a, b) = layers[part][target], (adapter[name]["kernel"] for name in "ab")
            layers[part][target] = module | {"kernel": merged_kernel(module["kernel"], a, b, lora.scale)}
    return {**{k: v for k, v in params.items() if k not in ("frozen", "lora")}, **base, "layers": layers}


@jax.jit
def merged_kernel(kernel, a, b, scale):
    """Return `kernel + scale * a b` for each layer. a is [L, inputs, rank] and b is [L,
    rank, outputs]; inputs and outputs may be several axes.
    """
    return kernel + scale * jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
