"""jaxreason: train reasoning models by reinforcement learning on verified answers, in
JAX.

    import jaxreason as jr

`jr.load`, `jr.sample` and `jr.train_step` are the notebook API (`jaxreason.api`),
`jr.verify` makes verifiers and `jr.Task` is a problem. Each is imported on first use,
so that `import jaxreason` does not import jax.
"""

import importlib

__version__ = "0.1.0"

FRONT_DOOR = {
    "load": "jaxreason.api",
    "sample": "jaxreason.api",
    "train_step": "jaxreason.api",
    "Policy": "jaxreason.api",
    "Group": "jaxreason.types",
    "Rollout": "jaxreason.types",
    "Task": "jaxreason.types",
    "Verdict": "jaxreason.types",
}


def __getattr__(name: str):
    if name == "verify":  # the package itself: `jr.verify.make("number")`
        return importlib.import_module("jaxreason.verify")
    if name not in FRONT_DOOR:
        raise AttributeError(f"module 'jaxreason' has no attribute {name!r}; it has: verify, {', '.join(FRONT_DOOR)}")
    return getattr(importlib.import_module(FRONT_DOOR[name]), name)


def __dir__():
    return sorted([*globals(), *FRONT_DOOR, "verify"])
