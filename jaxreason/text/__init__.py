"""Text to token ids and back: tokenizers, chat templates, and the prompt formats that
training and sampling share.
"""

from jaxreason.text.chat import Format, chat, encode_chat, plain
from jaxreason.text.template import load_template, render, template_path
from jaxreason.text.tokenizer import (
    TOKENIZERS,
    Tokenizer,
    byte_level,
    characters,
    check_same,
    check_vocabulary,
    load,
    make,
    pieces,
    with_eos,
)

FORMATS = {"plain": plain, "chat": chat}

__all__ = [
    "FORMATS",
    "TOKENIZERS",
    "Format",
    "Tokenizer",
    "byte_level",
    "characters",
    "chat",
    "check_same",
    "check_vocabulary",
    "encode_chat",
    "load",
    "load_template",
    "make",
    "pieces",
    "plain",
    "render",
    "template_path",
    "with_eos",
]
