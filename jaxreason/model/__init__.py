"""Models; the only package that imports flax. `transformer(ModelConfig) -> Model`;
`weights` converts from and to Hugging Face folders.
"""

from jaxreason.model.config import ModelConfig
from jaxreason.model.interface import Model
from jaxreason.model.transformer import transformer

__all__ = ["Model", "ModelConfig", "transformer"]
