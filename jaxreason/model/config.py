"""The hyperparameters of a model: `ModelConfig`, its named sizes, and conversion from
and to a Hugging Face `config.json`.

Three dense families share one block and differ in two switches: Llama 3 (neither),
Qwen2.5 (`qkv_bias`) and Qwen3 (`qk_norm`). `from_hf` refuses features that the block
lacks (sliding windows, output biases, quantised weights). RoPE frequencies are computed
here because they depend only on these numbers. This module does not import jax. Not
supported: mixtures of experts, multimodal models, and kinds of RoPE whose frequencies
depend on the current length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from jaxreason.options import read_object, unknown_name_message

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")
ATTENTION = ("xla", "cudnn", "splash")
ROPE_KINDS = ("linear", "llama3", "yarn")
LORA_TARGETS = dict.fromkeys("qkvo", "attention") | dict.fromkeys(("gate", "up", "down"), "mlp")  # projection -> its module


def _positive(owner, *names: str, kind: type = Real) -> None:
    for name in names:
        _check_positive(name, getattr(owner, name), kind)


def _check_positive(name: str, value, kind: type = Real) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} got {value!r}; allowed: a positive {'whole ' if kind is Integral else ''}number")


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of RoPE frequencies beyond the pretraining context. Hashable, like
    ModelConfig.
    """

    kind: str  # "linear", "llama3" or "yarn"
    factor: float  # new context length / original context length
    original_max_position: int = 8192  # llama3 and yarn: original context length, in tokens
    low_freq_factor: float = 1.0  # llama3: up to this many rotations over the original context, divide a frequency by factor
    high_freq_factor: float = 4.0  # llama3: from this many rotations on, keep a frequency; blend in between
    beta_fast: float = 32.0  # yarn: from this many rotations over the original context on, keep a frequency
    beta_slow: float = 1.0  # yarn: up to this many rotations, divide a frequency by factor; blend in between
    truncate: bool = True  # yarn: round the ends of the ramp to whole dimensions
    attention_factor: float | None = None  # yarn: multiplies RoPE's sines and cosines; None: derived from factor and the mscales
    mscale: float | None = None  # yarn: with mscale_all_dim, determines attention_factor if that is None
    mscale_all_dim: float | None = None  # yarn: see mscale

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(unknown_name_message("rope scaling", self.kind, ROPE_KINDS))
        numbers = ("factor", "original_max_position", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        _positive(self, *numbers, *(n for n in ("attention_factor", "mscale", "mscale_all_dim") if getattr(self, n) is not None))
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(f"high_freq_factor got {self.high_freq_factor}; allowed: above {self.low_freq_factor=}")


@dataclass(frozen=True)
class Lora:
    """Adapters of the projections `targets`: `y = x W + alpha / rank * x A B`.
    Hashable, like ModelConfig.

    `base_dtype` is the dtype of the frozen params; None means `param_dtype`.
    """

    rank: int = 8  # rank of A and B
    alpha: float = 16.0  # adapter outputs are multiplied by alpha / rank
    targets: tuple[str, ...] = ("q", "v")  # projections with adapters: q, k, v, o, gate, up, down
    base_dtype: str | None = None  # dtype of the frozen params; None: param_dtype

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank got {self.rank}; allowed: 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha got {self.alpha}; allowed: above 0")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"lora.targets got {self.targets!r}; allowed: a tuple of one or more of {', '.join(LORA_TARGETS)}")
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in self.targets:
            if name not in LORA_TARGETS:
                raise ValueError(unknown_name_message("target of lora", name, LORA_TARGETS))
        if self.base_dtype not in (None, *DTYPES):
            raise ValueError(unknown_name_message("lora.base_dtype", self.base_dtype, (None, *DTYPES)))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of a decoder-only transformer: RMSNorm, RoPE, grouped-query
    attention, SwiGLU.
    """

    vocab_size: int  # number of tokens
    width: int  # size of the residual stream
    layers: int  # number of blocks
    heads: int  # number of query heads
    kv_heads: int  # number of key/value heads
    head_size: int  # size of each head
    feed_forward: int  # hidden size of the SwiGLU
    rope_theta: float = 10000.0  # base of the RoPE frequencies
    rope_scaling: RopeScaling | None = None  # stretching of RoPE frequencies for longer contexts
    norm_eps: float = 1e-6  # epsilon of RMSNorm, added to the mean square
    qkv_bias: bool = False  # biases of queries, keys and values (Qwen2.5)
    qk_norm: bool = False  # norms of queries and keys (Qwen3)
    tied_embeddings: bool = False  # use the embedding matrix as output projection
    value_head: bool = False  # second output: a value estimate per position
    lora: Lora | None = None  # adapters on a frozen base
    dtype: str = "float32"  # dtype of the computation
    head_dtype: str | None = None  # dtype of the final norm and the output projection; None: dtype
    param_dtype: str = "float32"  # dtype in which params are stored
    scan_layers: bool = False  # lax.scan over layers: compile time independent of depth, but slower on a CPU
    remat: str = "none"  # recomputed in the backward pass: none: nothing, full: whole layers, dots: all but products and splash
    attention: str = "xla"  # attention kernel: cudnn on NVIDIA GPUs, splash on TPUs, xla anywhere

    def __post_init__(self):
        _positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "feed_forward", kind=Integral)
        _positive(self, "rope_theta", "norm_eps")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads got {self.heads}; allowed: a multiple of kv_heads ({self.kv_heads})")
        if self.head_size % 2:
            raise ValueError(f"head_size got {self.head_size}; allowed: even numbers, as RoPE turns pairs")
        for name, allowed in (("dtype", DTYPES), ("param_dtype", DTYPES), ("remat", REMAT), ("attention", ATTENTION)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name_message(name, getattr(self, name), allowed))
        if self.head_dtype not in (None, *DTYPES):
            raise ValueError(unknown_name_message("head_dtype", self.head_dtype, (None, *DTYPES)))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling got {type(self.rope_scaling).__name__}; allowed: None or a RopeScaling")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"attention='cudnn' got dtype {self.dtype!r}; allowed: 'bfloat16'; or use attention='xla'")
        if self.attention == "cudnn" and (self.head_size % 8 or self.head_size > 256):
            raise ValueError(
                f"attention='cudnn' got head_size {self.head_size}; allowed: multiples of 8 up to 256 (up to 128 before "
                "Hopper); or use attention='xla'"
            )


def count_parameters(config: ModelConfig) -> int:
    """Count the parameters of the policy as Hugging Face does: tied embeddings count
    once, the value head does not count.
    """
    c = config
    attention = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads)
    attention += c.qkv_bias * c.head_size * (c.heads + 2 * c.kv_heads) + c.qk_norm * 2 * c.head_size
    layer = attention + 3 * c.width * c.feed_forward + 2 * c.width
    return c.layers * layer + c.width + (1 if c.tied_embeddings else 2) * c.vocab_size * c.width


# --- RoPE ---


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Compute RoPE's inverse frequencies, float32 [H/2], and the factor that multiplies
    its sines and cosines.

    They equal those of transformers' `ROPE_INIT_FUNCTIONS`: llama3 follows Llama 3.1's
    reference code, yarn Peng et al. 2023 (arXiv 2309.00071).
    """
    scaling, H = config.rope_scaling, config.head_size
    frequency = config.rope_theta ** -(np.arange(0, H, 2, dtype=np.float64) / H)
    factor = 1.0
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        frequency = _llama3_frequencies(frequency, scaling)
    elif scaling is not None:
        frequency, factor = _yarn_frequencies(frequency, scaling, config.rope_theta)
    return frequency.astype(np.float32), factor


def _llama3_frequencies(frequency: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Keep short wavelengths, divide long ones by the factor, and blend in between."""
    rotations = s.original_max_position * frequency / (2 * math.pi)
    keep = np.clip((rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return keep * frequency + (1 - keep) * frequency / s.factor


def _yarn_frequencies(frequency: np.ndarray, s: RopeScaling, theta: float) -> tuple[np.ndarray, float]:
    """Blend from kept to divided frequencies over dimensions (not rotations), and
    return the factor that sharpens attention.
    """
    pairs = len(frequency)

    def dimension(rotations):
        return pairs * math.log(s.original_max_position / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper limit counts all H dimensions although the ramp covers H/2 pairs, as in
    # every other implementation.
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    divide = np.clip((np.arange(pairs) - low) / (high - low if high != low else 0.001), 0, 1)

    def magnitude(scale=1.0):
        return 1.0 if s.factor <= 1 else 0.1 * scale * math.log(s.factor) + 1.0

    factor = s.attention_factor
    if factor is None:
        both = s.mscale and s.mscale_all_dim
        factor = magnitude(s.mscale) / magnitude(s.mscale_all_dim) if both else magnitude()
    return (1 - divide) * frequency + divide * frequency / s.factor, factor


# --- Hugging Face's config.json ---

FAMILIES = ("llama", "qwen2", "qwen3")
WHOLE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def read_hf(folder: Path, **overrides) -> ModelConfig:
    """Read the config.json in a folder with `from_hf`; errors name the file.

    Raises:
      ValueError: from `from_hf`, or the file is not a JSON object.
    """
    path = folder / "config.json"
    config_json = read_object(path)
    try:
        return from_hf(config_json, **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_hf(config_json: Mapping[str, Any], **overrides) -> ModelConfig:
    """Convert a Hugging Face `config.json`, then replace the fields named in
    `overrides`.

    A missing key gets its family's default in transformers. The stored dtype is
    ignored: dtypes are chosen per run.

    Raises:
      ValueError: an unsupported model type or variant, or a value of the wrong type.
    """
    c = config_json
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ValueError(unknown_name_message("model_type", family, FAMILIES))
    _refuse_variants(c, family)
    missing = [k for k in WHOLE if k not in c]
    if missing:
        raise ValueError(f"config.json of a {family} model lacks {', '.join(missing)}; is it the right config.json?")
    for key in (*WHOLE, *(k for k in ("num_key_value_heads", "head_dim") if c.get(k) is not None)):
        _check_positive(key, c[key], Integral)
    width, heads = c["hidden_size"], c["num_attention_heads"]
    rope_theta, rope_scaling = _rope_from_hf(c)
    fields = {
        "vocab_size": c["vocab_size"],
        "width": width,
        "layers": c["num_hidden_layers"],
        "heads": heads,
        "kv_heads": _given(c, "num_key_value_heads", heads),
        "head_size": _given(c, "head_dim", 128 if family == "qwen3" and "head_dim" not in c else width // heads),
        "feed_forward": c["intermediate_size"],
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": _number(c, "rms_norm_eps", 1e-6),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "tied_embeddings": _flag(c, "tie_word_embeddings"),
    }
    for name in overrides:
        if name not in ModelConfig.__dataclass_fields__:
            raise ValueError(unknown_name_message("field of ModelConfig", name, ModelConfig.__dataclass_fields__))
    return ModelConfig(**fields | overrides)


def _given(c: Mapping[str, Any], key: str, default):
    """Return a key of config.json; null counts as missing."""
    return default if c.get(key) is None else c[key]


def _number(c: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    value = _given(c, key, default)
    if value is not default:
        _check_positive(key, value)
    return value


def _flag(c: Mapping[str, Any], key: str) -> bool:
    value = _given(c, key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} got {value!r}; allowed: true or false")
    return value


# Settings of other architectures that change the computation, with the values that
# leave it unchanged. null leaves it unchanged too.
OFF = (0, 0.0, False)
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "clip_qkv"), OFF),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts"), OFF),
    **dict.fromkeys(("residual_multiplier", "embedding_multiplier", "attention_multiplier", "lm_head_multiplier"), (1, 1.0)),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb", "rotary_pct", "rope_percent"), (1, 1.0)),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "use_mrope", "alibi", "attention_sinks"), (False,)),
    **dict.fromkeys(("lm_head_bias", "use_bias", "use_parallel_residual", "parallel_attn", "scale_embeddings"), (False,)),
    **dict.fromkeys(("hidden_activation", "hidden_act"), ("silu", "swish")),
}


def _neutral(value: Any, allowed: tuple) -> bool:
    """Return whether a value is null or one of `allowed`. A bool never equals a number
    here.
    """
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _refuse_variants(c: Mapping[str, Any], family: str) -> None:
    """Raise ValueError for settings that change the computation in a way that the block
    does not support.
    """
    heads = c.get("num_attention_heads")
    wide = isinstance(c.get("hidden_size"), int) and isinstance(heads, int) and heads > 0
    head_size = c.get("head_dim") or (c["hidden_size"] // heads if wide else None)
    allowed = NEUTRAL | {
        "query_pre_attn_scalar": (head_size,),
        "rotary_dim": (head_size,),
        "use_qk_norm": (family == "qwen3",),
        "qk_layernorm": (family == "qwen3",),
    }
    biased = _flag(c, "attention_bias")  # adds a bias to the output projection too; qwen2 ignores this key
    kinds = c.get("layer_types") or ()
    refused = {
        **{key: not _neutral(c[key], values) for key, values in allowed.items() if key in c},
        "attention_bias": family != "qwen2" and biased,
        "mlp_bias": _flag(c, "mlp_bias"),
        "use_sliding_window": _flag(c, "use_sliding_window"),
        "layer_types": not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds),
        "quantization_config": c.get("quantization_config") is not None,
    }
    for key, bad in refused.items():
        if bad:
            got = "a quantised checkpoint" if key == "quantization_config" else repr(c[key])
            raise ValueError(f"config.json: {key} got {got}; not supported for {family}: choose a checkpoint without it")


YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
ROPE_KEYS = {  # keys allowed in rope_parameters or rope_scaling; keys of other kinds of RoPE are ignored
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "truncate", *YARN_NUMBERS),
    *("max_position_embeddings", "finetuned"),  # informative entries of stretched models, which no implementation reads
}


def _rope_from_hf(c: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read RoPE's settings from any of the places that versions of transformers use
    (see `_rope_parameters`).
    """
    rope = _rope_parameters(c)
    for key in ("rope_theta", "partial_rotary_factor"):  # transformers 4 and 5 prefer different places
        beside, inside = _number(c, key), _number(rope, key)
        if beside is not None and inside is not None and beside != inside:
            where = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
            raise ValueError(f"config.json: {key} is {beside} and in {where} {inside}; keep one")
    theta = float(_number(rope, "rope_theta", _number(c, "rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    partial_rotary = _number(rope, "partial_rotary_factor", _number(c, "partial_rotary_factor", 1.0))
    if partial_rotary != 1:
        raise ValueError(f"config.json: partial_rotary_factor got {partial_rotary}; allowed: 1")
    factor = _number(rope, "factor")
    if kind == "default":
        if factor not in (None, 1):
            raise ValueError(
                f"config.json: RoPE has a factor of {factor} but no rope_type to use it; give rope_type, "
                f"one of: {', '.join(ROPE_KINDS)}"
            )
        return theta, None
    if kind not in ROPE_KINDS:
        raise ValueError(unknown_name_message("rope_type in config.json", kind, ("default", *ROPE_KINDS)))
    most = _number(c, "max_position_embeddings")
    # As in transformers, a key beside rope_parameters takes precedence over one inside.
    original = _number(c, "original_max_position_embeddings", _number(rope, "original_max_position_embeddings", most))
    if factor is None and kind == "yarn" and original:
        factor = (most or original) / original
    needed = {"factor": factor}
    if kind == "llama3":
        needed |= {k: _number(rope, k) for k in ("low_freq_factor", "high_freq_factor")}
    if kind != "linear":
        needed["original_max_position_embeddings"] = original
    for key, value in needed.items():
        if value is None:
            raise ValueError(f"config.json: rope_type {kind!r} lacks {key}")
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": YARN_NUMBERS}.get(kind, ())
    more = {k: _number(rope, k) for k in names if rope.get(k) is not None}
    if kind == "yarn" and rope.get("truncate") is not None:
        more["truncate"] = _flag(rope, "truncate")
    if kind != "linear":
        more["original_max_position"] = original
    return theta, RopeScaling(kind=kind, factor=factor, **more)


def _rope_parameters(c: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `rope_scaling` and transformers 5's `rope_parameters`, which may be nested
    by kind of layer.

    Raises:
      ValueError: they contradict each other, or contain an unknown key.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = _given(c, name, {})
        if isinstance(given, Mapping) and "full_attention" in given:
            given = _given(given, "full_attention", {})  # `_refuse_variants` has already refused other kinds
        if not isinstance(given, Mapping):
            raise ValueError(f"config.json: {name} got {given!r}; allowed: null or an object")
        found = {key: value for key, value in given.items() if key != "type" and value is not None}
        if given.get("type") is not None and found.setdefault("rope_type", given["type"]) != given["type"]:
            raise ValueError(f"config.json: {name} has type {given['type']!r} and rope_type {given['rope_type']!r}; keep one")
        for key, value in found.items():
            if key not in ROPE_KEYS:
                raise ValueError(unknown_name_message(f"key of {name} in config.json", key, ROPE_KEYS))
            if key in rope and rope[key] != value and (key, rope[key]) != ("rope_type", "default"):
                raise ValueError(
                    f"config.json: {key} is {rope[key]!r} in rope_parameters and {value!r} in rope_scaling; keep one"
                )
        rope |= found
    return rope


def to_hf(config: ModelConfig, **tokens) -> dict[str, Any]:
    """Return the `config.json` that transformers (4 and 5) and vLLM read back as the
    same model.

    Args:
      config: its switches determine the family.
      **tokens: further entries, such as `eos_token_id` or `max_position_embeddings`;
        entries that are None are dropped.

    Raises:
      ValueError: no family of transformers has this combination of switches.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no Hugging Face family has qkv_bias and qk_norm; export needs at most one of them")
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    if family == "llama" and config.width % config.heads:
        raise ValueError(f"width {config.width} is no multiple of heads {config.heads}: transformers refuses such a llama")
    scaling = config.rope_scaling
    stretched = int(scaling.factor * scaling.original_max_position) if scaling and scaling.kind != "linear" else 32768
    out = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward,
        "hidden_act": "silu",
        "max_position_embeddings": stretched,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
    }
    out |= {"attention_bias": False, "mlp_bias": False} if family == "llama" else {"use_sliding_window": False}
    if family == "qwen3":
        out["attention_bias"] = False
    return out | {k: v for k, v in tokens.items() if v is not None}


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        out["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
        out |= {k: getattr(scaling, k) for k in names if getattr(scaling, k) is not None}
    return out


# --- named sizes ---


def _shape(width: int, layers: int, heads: int, kv_heads: int, head_size: int, feed_forward: int, **more):
    return partial(
        ModelConfig,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        feed_forward=feed_forward,
        **more,
    )


_smollm2 = partial(_shape, vocab_size=49152, head_size=64, rope_theta=1e5, norm_eps=1e-5, tied_embeddings=True)
_llama3 = partial(_shape, vocab_size=128256, kv_heads=8, rope_theta=5e5, norm_eps=1e-5)
_qwen2 = partial(_shape, vocab_size=151936, rope_theta=1e6, qkv_bias=True, tied_embeddings=True)
_qwen3 = partial(_shape, vocab_size=151936, kv_heads=8, head_size=128, rope_theta=1e6, qk_norm=True)

# Functions that make a ModelConfig and accept further fields:
# `SIZES["tiny"](vocab_size=32)`, `SIZES["qwen3_8b"](dtype="bfloat16")`.
SIZES: dict[str, Callable[..., ModelConfig]] = {
    "tiny": _shape(64, 3, 4, 2, 16, 192),
    "smollm2_135m": _smollm2(576, 30, 9, 3, feed_forward=1536),
    "smollm2_360m": _smollm2(960, 32, 15, 5, feed_forward=2560),
    "smollm2_1b7": _smollm2(2048, 24, 32, 32, feed_forward=8192, rope_theta=1.3e5),
    "llama3.2_1b": _llama3(
        2048, 16, 32, head_size=64, feed_forward=8192, tied_embeddings=True, rope_scaling=RopeScaling("llama3", 32.0)
    ),
    "llama3.2_3b": _llama3(
        3072, 28, 24, head_size=128, feed_forward=8192, tied_embeddings=True, rope_scaling=RopeScaling("llama3", 32.0)
    ),
    "llama3.1_8b": _llama3(4096, 32, 32, head_size=128, feed_forward=14336, rope_scaling=RopeScaling("llama3", 8.0)),
    "qwen2.5_0.5b": _qwen2(896, 24, 14, 2, 64, 4864),
    "qwen2.5_1.5b": _qwen2(1536, 28, 12, 2, 128, 8960),
    "qwen2.5_3b": _qwen2(2048, 36, 16, 2, 128, 11008),
    "qwen2.5_7b": _qwen2(3584, 28, 28, 4, 128, 18944, vocab_size=152064, tied_embeddings=False),
    "qwen3_0.6b": _qwen3(1024, 28, 16, feed_forward=3072, tied_embeddings=True),
    "qwen3_1.7b": _qwen3(2048, 28, 16, feed_forward=6144, tied_embeddings=True),
    "qwen3_4b": _qwen3(2560, 36, 32, feed_forward=9728, tied_embeddings=True),
    "qwen3_8b": _qwen3(4096, 36, 32, feed_forward=12288),
    "qwen3_14b": _qwen3(5120, 40, 40, feed_forward=17408),
    "qwen3_32b": _qwen3(5120, 64, 64, feed_forward=25600),
}

# Hub ids of the trained weights of each size. Loading them reads their own config.json,
# not the numbers above.
HUB_IDS = {
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2_360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2_1b7": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama3.2_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5_0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5_1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5_3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5_7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3_0.6b": "Qwen/Qwen3-0.6B",
    "qwen3_1.7b": "Qwen/Qwen3-1.7B",
    "qwen3_4b": "Qwen/Qwen3-4B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "qwen3_14b": "Qwen/Qwen3-14B",
    "qwen3_32b": "Qwen/Qwen3-32B",
}


def sized(name: str, **fields) -> ModelConfig:
    """Make the config of a named size; `fields` replace or add to its numbers.

    Raises:
      ValueError: an unknown name or field, or `tiny` without a `vocab_size`.
    """
    if name not in SIZES:
        raise ValueError(unknown_name_message("model size", name, SIZES))
    try:
        return SIZES[name](**fields)
    except TypeError as error:
        raise ValueError(f"model size {name!r}: {error}".replace("ModelConfig.__init__() ", "")) from None
