"""Eight virtual CPU devices for every test, and a maker of small models that keeps what it made."""

import functools
import os

# Before jax is imported by anyone.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest


@pytest.fixture(scope="session")
def tiny():
    """`tiny(**fields) -> (model, params)`: two layers, width 16, 16 words; `fields` replace fields of its ModelConfig."""
    import jax

    from jaxreason.model import ModelConfig, transformer

    shape = {"vocab_size": 16, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}

    @functools.cache
    def make(**fields):
        model = transformer(ModelConfig(**shape | fields))
        return model, jax.jit(model.init)(jax.random.key(0))

    return make
