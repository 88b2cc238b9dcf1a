"""Checkpoint files that deviate from the usual: each is read rightly, or refused in a
line that names the file.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import load_config
from safetensors.numpy import load_file, save_file

from jaxreason import text
from jaxreason.build import build
from jaxreason.model import config as configs
from jaxreason.model import weights
from jaxreason.model.config import RopeScaling, from_hf, read_hf, rope_frequencies
from jaxreason.options import read_object

GOLDEN = Path(__file__).parent / "golden"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def folder(tmp_path):
    """Copy a whole checkpoint with a tokenizer and a chat template, for tests to
    spoil.
    """
    made = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "qwen2", made)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(GOLDEN / "chat" / name, made)
    return made


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps(read_object(path) | entries))


def spoil(folder: Path, **tensors) -> None:
    """Replace tensors of a checkpoint; underscores in names stand for dots, because
    `model.norm.weight` cannot be a keyword.
    """
    there = load_file(folder / "model.safetensors")
    save_file(there | tensors, folder / "model.safetensors")


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- RoPE


def rope(**entries):
    found = from_hf(LLAMA | entries)
    return found.rope_theta, found.rope_scaling


def test_rope_parameters_per_kind_of_layer():
    """The nested theta was once lost: 10,000 instead of a million."""
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert rope(rope_parameters=nested) == (1e6, None)
    nested["full_attention"] = LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 32}
    assert rope(rope_parameters=nested) == (5e5, RopeScaling("llama3", 8.0, 32))
    assert rope(rope_parameters={"full_attention": None}, rope_theta=7e4) == (7e4, None)


def test_a_default_kind_beside_rope_scaling_drops_nothing():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope(**both) == (7e4, RopeScaling("linear", 2.0))
    assert rope(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2}) == (1e4, RopeScaling("linear", 2))


def test_the_original_context_beside_rope_parameters_is_read():
    """It precedes the value inside them, as in transformers; without either it is the
    whole context.
    """
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for parameters in (yarn, LLAMA3):
        for place in ("rope_parameters", "rope_scaling"):
            found = rope(**{place: parameters}, original_max_position_embeddings=16)[1]
            assert found.original_max_position == 16
            assert rope(**{place: parameters | {"original_max_position_embeddings": 32}})[1].original_max_position == 32
            assert rope(**{place: parameters})[1].original_max_position == 64
    there = yarn | {"original_max_position_embeddings": 32}
    assert rope(rope_parameters=there, original_max_position_embeddings=16)[1].original_max_position == 16
    # By hand, for frequencies 1, 1e-2: 16 / 2 pi = 2.5 rotations and a fortieth; below
    # 1 is divided, above 4 kept.
    frequency, _ = rope_frequencies(from_hf(LLAMA | {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}))
    keep = (16 / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(frequency, [keep + (1 - keep) / 8, 0.01 / 8], rtol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "has type 'linear' and rope_type 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "RoPE has a factor of 2.0 but no rope_type"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4}}, "RoPE has a factor of 4 but no rope_type"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4}, "rope_scaling": {"factor": 2}}, "factor is 4 in rope_param"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 1e6}}, "rope_theta is 10000.0 in rope_param"),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [2, 2]}},
            "unknown key of rope_scaling in config.json 'mrope_sect",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fats": 4}}, "did you mean 'beta_fast'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor got '2'; allowed: a positive number"),
        ({"rope_scaling": {"type": 5, "factor": 2}}, "unknown rope_type in config.json 5"),
        ({"rope_scaling": "linear"}, "rope_scaling got 'linear'; allowed: null or an object"),
        ({"rope_theta": "1e6"}, "rope_theta got '1e6'; allowed: a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta got inf"),
        ({"rope_theta": True}, "rope_theta got True"),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            "is 1000000.0 and in rope_parameters 10000.0; keep",
        ),
        ({"rope_theta": 1e6, "rope_scaling": {"rope_theta": 1e4}}, "rope_theta is 1000000.0 and in rope_scaling 10000.0; keep"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_theta is 10000.0 and in rope_parameters 1000000.0; keep",
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "partial_rotary_factor is 0.5 and in",
        ),
        ({"partial_rotary_factor": "1"}, "partial_rotary_factor got '1'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}}, "truncate got 'no'; allowed: true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": "1"}}, "mscale got '1'"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": float("inf")}}, "high_freq_factor got inf"),
    ],
)
def test_rope_that_contradicts_itself_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        rope(**entries)


# --------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size got '32'; allowed: a positive whole number"),
        ({"hidden_size": 32.5}, "hidden_size got 32.5"),
        ({"hidden_size": [32]}, r"hidden_size got \[32\]"),
        ({"num_hidden_layers": True}, "num_hidden_layers got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers got 0"),
        ({"num_attention_heads": None}, "num_attention_heads got None"),
        ({"num_key_value_heads": -2}, "num_key_value_heads got -2"),
        ({"head_dim": "8"}, "head_dim got '8'"),
        ({"vocab_size": 1e300}, "vocab_size got 1e"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps got '1e-6'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings got 'false'; allowed: true or false"),
        ({"use_sliding_window": 1}, "use_sliding_window got 1; allowed: true or false"),
        ({"layer_types": "full_attention"}, "layer_types got 'full_attention'"),
        ({"model_type": ["qwen2"]}, "unknown model_type"),
    ],
)
def test_values_of_the_wrong_type_name_the_file(folder, entries, message):
    change(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message) as error:
        weights.load(folder)
    assert one_line(error).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("final_logit_softcapping", (None, 0, 0.0, False), (30.0, True, "30")),
        ("attn_logit_softcapping", (None, 0.0), (50.0,)),
        ("clip_qkv", (None, 0), (8,)),
        ("logits_scaling", (None, 1, 1.0), (8.0, 0, True)),
        ("logit_scale", (None, 1.0), (0.0625,)),
        ("residual_multiplier", (None, 1.0), (0.22,)),
        ("embedding_multiplier", (None, 1.0), (12.0,)),
        ("attention_multiplier", (None, 1.0), (0.0078125,)),
        ("scale_emb", (None, 1), (12,)),
        ("num_experts", (None, 0), (8, 1)),
        ("num_local_experts", (None, 0), (8,)),
        ("n_routed_experts", (None, 0), (64,)),
        ("rotary_pct", (None, 1, 1.0), (0.25,)),
        ("partial_rotary_factor", (None, 1.0), (0.5,)),
        ("rope_interleaved", (None, False), (True,)),
        ("use_sliding_window", (None, False), (True, 1)),
        ("attention_bias", (None, False), (1, "yes", [])),
        ("mlp_bias", (None, False), (True, 1)),
        ("lm_head_bias", (None, False), (True,)),
        ("query_pre_attn_scalar", (None, 4), (8, 144)),
        ("hidden_activation", (None, "silu"), ("gelu_pytorch_tanh",)),
        ("use_parallel_residual", (None, False), (True,)),
        ("alibi", (None, False), (True,)),
        ("quantization_config", (None,), ({"bits": 4}, {})),
    ],
)
def test_unsupported_config_values_are_refused_and_neutral_ones_accepted(family, key, neutral, other):
    base = LLAMA | {"model_type": family, "head_dim": 4}
    for value in neutral:
        assert from_hf(base | {key: value}) == from_hf(base)
    for value in other:
        with pytest.raises(ValueError, match=f"{key} got ") as error:
            from_hf(base | {key: value})
        one_line(error)


def test_qk_norm_is_that_of_the_family():
    for family in ("llama", "qwen2", "qwen3"):
        base = LLAMA | {"model_type": family}
        for key in ("use_qk_norm", "qk_layernorm"):
            from_hf(base | {key: family == "qwen3"})
            with pytest.raises(ValueError, match=f"{key} got "):
                from_hf(base | {key: family != "qwen3"})


SHARED = {"initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16", "attention_dropout": 0.0, "hidden_act": "silu"}
WINDOW = {"sliding_window": 32768, "max_window_layers": 28, "use_sliding_window": False}
PUBLISHED = {  # entries, beyond sizes, of files on the hub
    "llama 3.2": {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 5e5},
    "smollm2": {
        **{"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "rope_theta": 1e5},
        **{"rope_scaling": None, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "attention_bias": False},
    },
    "qwen2.5": {"model_type": "qwen2", "rope_theta": 1e6, **WINDOW},
    "qwen2.5 math": {"model_type": "qwen2", "rope_theta": 1e4, "use_mrope": False, **WINDOW},
    "qwen3": {"model_type": "qwen3", "attention_bias": False, "rope_scaling": None, **WINDOW, "sliding_window": None},
    "transformers 5": {
        **{"model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"},
        **{"layer_types": ["full_attention"], "sliding_window": None, "attention_bias": False},
    },
    "both forms": {"model_type": "llama", "rope_theta": 1e6, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    assert from_hf(LLAMA | SHARED | PUBLISHED[name]).layers == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list"),
        (b"3", "holds a int"),
        (b"{", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"", "is not JSON"),
        (b"[" * 10**5, "nested too deep"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_that_are_no_objects_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_hf(folder) if name == "config.json" else text.load(folder)
    assert str(folder / name) in one_line(error)


@pytest.mark.parametrize(
    "content",
    ["[]", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 3}}', '{"weight_map": {"a": "../a.safetensors"}}', "{}"],
)
def test_an_index_that_is_none_is_named(folder, content):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / weights.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json (holds a list|has no weight_map)") as error:
        weights.load(folder)
    one_line(error)


def test_a_byte_order_mark_is_no_part_of_a_file(folder):
    before = text.load(folder), read_hf(folder), text.load_template(folder)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    after = text.load(folder), read_hf(folder), text.load_template(folder)
    assert after[1:] == before[1:]
    assert after[0][:5] == before[0][:5]


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 10**9, "head_dim": 8}, r"got shape .*; config.json asks for \(96, 1000000000\)"),
        ({"vocab_size": 10**12}, r"config.json asks for \(1000000000000, 32\)"),
        ({"intermediate_size": 10**10}, "config.json asks for"),
        ({"num_hidden_layers": 10**8}, r"lacks tensor model.layers.2.input_layernorm.weight of shape \(32,\) and \d{10} more"),
    ],
)
def test_nothing_is_allocated_for_a_config_that_the_files_do_not_fit(folder, entries, message, monkeypatch):
    change(folder / "config.json", **entries)
    monkeypatch.setattr(np, "empty", None)
    for read in (weights.load, lambda folder: weights.check(folder, read_hf(folder))):
        with pytest.raises(ValueError, match=message) as error:
            read(folder)
        assert str(folder) in one_line(error)


def test_a_run_is_refused_when_it_is_built(folder):
    change(folder / "config.json", num_hidden_layers=10**8)
    config = load_config("tiny", "smoke")
    with config.unlocked():
        config.model = {"name": str(folder), "weights": "pretrained"}
        config.text = {"tokenizer": "byte_level"}
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens"):
        build(config)
    config.text.tokenizer = "characters"
    with pytest.raises(ValueError, match=r"lacks tensor model.layers.2"):
        build(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 2**32 - 2}, r"the params of config.model take [\d,]+ GB.*and there are \d+ GB; allowed: .* smaller width"),
        ({"feed_forward": 2**32 - 2, "width": 2**20}, r"the params of config.model take"),
        ({"vocab_size": 2**32 - 1}, r"vocab_size got 4294967295; allowed: below 2\*\*31"),
        (
            {"layers": 10**8, "width": 2, "feed_forward": 1, "heads": 1, "kv_heads": 1, "head_size": 2},
            r"layers got 100000000; allow",
        ),
    ],
)
def test_a_size_that_fits_no_memory_is_refused_when_the_run_is_built(fields, message, monkeypatch):
    config = load_config("tiny", "smoke")
    with config.unlocked():
        config.model = {**config.model.to_dict(), **fields}
    monkeypatch.setattr("jaxreason.build.run.transformer", None)  # nothing of it is made
    with pytest.raises(ValueError, match=message) as error:
        build(config)
    one_line(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(folder, value, param_dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name].copy()
    tensor[3, 5] = value
    spoil(folder, **{name: tensor})
    with pytest.raises(weights.BadWeights, match=rf"tensor {name} in .*model.safetensors holds NaN or infinity as {param_dtype}"):
        weights.load(folder, param_dtype=param_dtype)


def test_weights_that_overflow_are_named(folder):
    spoil(folder, **{"model.norm.weight": np.full(32, 3.4e38, np.float32)})
    weights.load(folder)
    with pytest.raises(weights.BadWeights, match=r"model.norm.weight in .* holds NaN or infinity as bfloat16"):
        weights.load(folder, param_dtype="bfloat16")


def test_a_tied_head_that_differs_is_refused(folder):
    """It was once dropped silently. Some versions of transformers write an equal one,
    which is accepted.
    """
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    before = weights.load(folder)[0]
    spoil(folder, **{"lm_head.weight": embedding})
    assert weights.load(folder)[0] == before
    other = embedding.copy()
    other[-1, -1] += 1
    spoil(folder, **{"lm_head.weight": other})
    with pytest.raises(weights.BadWeights, match=r"lm_head.weight in .* differs .* tie_word_embeddings: true; set it to false"):
        weights.load(folder)
    change(folder / "config.json", tie_word_embeddings=False)
    config, params = weights.load(folder)
    assert not config.tied_embeddings
    np.testing.assert_array_equal(params["unembed"]["kernel"][:, -1], other[-1].astype(np.float32))


def test_weights_end_a_run_in_a_line(folder, tmp_path, monkeypatch, capsys):
    from jaxreason import main

    spoil(folder, **{"model.norm.weight": np.full(32, np.nan, np.float32)})
    config = load_config("tiny", "smoke")
    with config.unlocked():
        config.model = {"name": str(folder), "weights": "pretrained"}
        config.text = {"tokenizer": "characters"}
    flags = {"WORKDIR": str(tmp_path / "run"), "RESUME": "auto", "ACCEPT_CONFIG_CHANGE": False}
    flags |= {"STOP_AFTER": None, "PROFILE_STEPS": None}
    for name, value in flags.items():
        monkeypatch.setattr(main, name, type("Flag", (), {"value": value}))
    with pytest.raises(SystemExit, match=r"error: tensor model.norm.weight in .* holds NaN"):
        main.run(config)


def test_sizes_are_still_whole_numbers():
    assert configs.sized("tiny", vocab_size=np.int64(32)).vocab_size == 32
    with pytest.raises(ValueError, match=r"width got 64.0; allowed: a positive whole number"):
        configs.sized("tiny", vocab_size=32, width=64.0)
