"""Pytest set-up: eight virtual CPU devices, one compilation cache for all tests, and a
maker of small models that caches their params.
"""

import functools
import os
import tempfile

# Before jax is imported by anyone. Tests spend their time compiling small programs.
# That is 2 to 5 times faster without optimisation, and twice as fast again without MLIR
# for fused loops. Flags that are set already come last and win.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()
# Compiled programs are kept for all workers of a test run and for the commands that
# tests run. Set JAX_COMPILATION_CACHE_DIR to keep them between test runs too.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="jaxreason-tests-")  # removed at exit
    os.environ["XDG_CACHE_HOME"] = _folder.name
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_folder.name, "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Set the number of processes of `-n auto`: some tests need 2 GiB, and the
    processes that they start are not counted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)


def pytest_collection_modifyitems(config, items):
    """Leave out tests marked slow or soak, unless -m names their marker."""
    left_out = {name for name in ("slow", "soak") if name not in config.option.markexpr}
    dropped = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def tiny():
    """Make `tiny(**fields) -> (model, params)`: two layers, width 16, 24 tokens;
    `fields` replace those of its ModelConfig.
    """
    import jax

    from jaxreason.model import ModelConfig, transformer

    shape = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}
    same_params = {"scan_layers": False, "remat": "none", "dtype": "float32", "rope_theta": 1e4}

    @functools.cache
    def init(config):
        return jax.jit(transformer(config).init)(jax.random.key(0))

    @functools.cache
    def make(**fields):
        config = ModelConfig(**shape | fields)
        return transformer(config), init(ModelConfig(**shape | fields | same_params))

    return make
