"""jaxreason: train reasoning models by reinforcement learning on verified answers, in JAX."""

__version__ = "0.1.0"
