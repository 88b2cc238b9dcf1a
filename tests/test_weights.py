"""Configs and weights against transformers: tests/golden/make_golden.py wrote small
random checkpoints and their logits.
"""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_equal, leaves, logits
from safetensors.numpy import load_file, save_file

from jaxreason.model import config as configs
from jaxreason.model import transformer, weights
from jaxreason.model.config import ModelConfig, RopeScaling, count_parameters, from_hf, rope_frequencies, sized, to_hf

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ["llama", "llama_linear", "llama_yarn", "qwen2", "qwen3"]


@pytest.fixture
def checkpoint(tmp_path):
    """Make a copy of a golden checkpoint to spoil, and a function that rewrites its
    tensors.
    """
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "qwen3", folder)

    def edit(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return folder, edit


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(name):
    config, params = weights.load(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert np.abs(logits(config, params, expected["tokens"]) - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", {"rope_theta": 10000.0}),
        ("llama", {"rope_scaling": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("llama_yarn", {"rope_scaling": RopeScaling("linear", 4.0)}),
        ("llama_yarn", {"rope_scaling": RopeScaling("yarn", 4.0, 16, attention_factor=1.0)}),
        ("qwen2", {"rope_theta": 10000.0}),
        ("qwen3", {"norm_eps": 1e-2}),
    ],
)
def test_a_wrong_number_shows_in_the_golden_logits(name, wrong):
    """Check that the test above would catch these: each has been a bug in some
    loader.
    """
    config, params = weights.load(GOLDEN / name, **wrong)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert np.abs(logits(config, params, expected["tokens"]) - expected["logits"]).max() > 1e-2


@pytest.mark.parametrize("case", json.loads((GOLDEN / "rope.json").read_text()), ids=lambda c: c["config"]["model_type"])
def test_rope_frequencies_are_those_of_transformers(case):
    frequency, factor = rope_frequencies(from_hf(case["config"]))
    assert frequency.dtype == np.float32
    np.testing.assert_allclose(frequency, case["frequency"], rtol=2e-6)
    assert factor == pytest.approx(case["factor"], rel=1e-9)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_config_json_round_trips(family):
    config = from_hf(json.loads((GOLDEN / family / "config.json").read_text()))
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


# ------------------------------------------------------------------------------------------------------------- config


def test_both_forms_of_rope_are_read():
    common = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 8, "max_position_embeddings": 64}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = from_hf(common | {"rope_theta": 7e4, "rope_scaling": {"rope_type": "llama3"} | llama3})
    new = from_hf(common | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e4} | llama3})
    assert old == new
    assert old.rope_theta == 7e4
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 32)
    assert from_hf(common | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope_scaling.kind == "linear"
    yarn = from_hf(common | {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16, "factor": None}})
    assert yarn.rope_scaling.factor == 4.0  # as transformers derives it
    plain = from_hf(common)
    assert (plain.rope_theta, plain.rope_scaling, plain.kv_heads, plain.head_size) == (10000.0, None, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "unknown model_type 'gpt2'"),
        ({"use_sliding_window": True}, "use_sliding_window got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types got"),
        ({"attention_bias": True}, "attention_bias got True"),
        ({"hidden_act": "gelu"}, "hidden_act got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "unknown rope_type in config.json 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "unknown rope_type in config.json 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor got 0.5"),
    ],
)
def test_models_that_the_block_cannot_compute_are_refused(change, message):
    c = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        from_hf(c | change)


def test_bad_numbers_are_refused():
    good = sized("tiny", vocab_size=32)
    for change, message in [
        ({"heads": 3}, "heads got 3; allowed: a multiple of kv_heads"),
        ({"layers": 0}, "layers got 0; allowed: a positive whole number"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"head_size": 15}, "even"),
        ({"rope_scaling": {"kind": "linear"}}, "RopeScaling"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **change)
    with pytest.raises(ValueError, match="unknown rope scaling 'dynamic'"):
        RopeScaling("dynamic", 2.0)
    with pytest.raises(ValueError, match=r"unknown model size 'qwen3_8'.*did you mean 'qwen3_8b'"):
        sized("qwen3_8")
    with pytest.raises(ValueError, match=r"'tiny': .*vocab_size"):
        sized("tiny")
    with pytest.raises(ValueError, match="unknown field of ModelConfig 'widht'"):
        from_hf(json.loads((GOLDEN / "qwen3" / "config.json").read_text()), widht=3)
    with pytest.raises(ValueError, match="qkv_bias and qk_norm"):
        to_hf(dataclasses.replace(good, qkv_bias=True, qk_norm=True))


PUBLISHED_PARAMETERS = {
    "tiny": 152_000,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1b7": 1_711_376_384,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "llama3.1_8b": 8_030_261_248,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", configs.SIZES)
def test_named_sizes_have_the_published_number_of_parameters(name):
    config = sized(name, **({"vocab_size": 32} if name == "tiny" else {}))
    assert count_parameters(config) == PUBLISHED_PARAMETERS[name]
    assert configs.HUB_IDS.keys() == configs.SIZES.keys() - {"tiny"}
    assert hash(config) == hash(dataclasses.replace(config))  # so that it can be a static argument of jit


@pytest.mark.parametrize("switch", ["qkv_bias", "qk_norm", "tied_embeddings"])
def test_the_table_is_the_tree_that_the_model_makes(switch):
    config = sized("tiny", vocab_size=32, **{switch: True})
    made = {name: x.shape for name, x in leaves(jax.eval_shape(transformer(config).init, jax.random.key(0))).items()}
    rows = {".".join(r.path): ((config.layers, *r.ours) if r.stacked else r.ours) for r in weights.table(config)}
    assert rows == made
    assert sum(np.prod(s) for s in rows.values()) == count_parameters(config)


# ----------------------------------------------------------------------------------------------------- load and save


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_export_and_load_give_the_same_model(tmp_path, name, max_shard_bytes):
    config, params = weights.load(GOLDEN / name)
    rng = np.random.default_rng(0)  # trained since: float32 values that bfloat16 does not have
    params = jax.tree.map(lambda x: np.asarray(x) + 1e-3 * rng.normal(size=x.shape).astype(np.float32), params)
    weights.save(tmp_path, config, params, max_shard_bytes=max_shard_bytes, eos_token_id=[2, 0])
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)
    again, loaded = weights.load(tmp_path)
    assert again == config
    assert_equal(params, loaded)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [2, 0]}


def test_an_untouched_checkpoint_is_exported_bit_for_bit(tmp_path):
    config, params = weights.load(GOLDEN / "qwen2", param_dtype="bfloat16")
    weights.save(tmp_path, config, params, tokenizer_folder=GOLDEN / "chat")
    theirs, ours = load_file(GOLDEN / "qwen2" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name].view(np.uint16), ours[name].view(np.uint16), err_msg=name)
    assert (tmp_path / "tokenizer.json").read_bytes() == (GOLDEN / "chat" / "tokenizer.json").read_bytes()


def test_a_smaller_export_replaces_a_sharded_one(tmp_path):
    config, params = weights.load(GOLDEN / "qwen3")
    weights.save(tmp_path, config, params, max_shard_bytes=20_000)
    params = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    weights.save(tmp_path, config, params)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    weights.save(tmp_path, config, params, max_shard_bytes=20_000)
    assert_equal(params, weights.load(tmp_path)[1])


def test_dtypes():
    config, params = weights.load(GOLDEN / "qwen3", dtype="bfloat16", param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    expected = np.load(GOLDEN / "qwen3" / "expected.npz")
    difference = np.abs(logits(config, params, expected["tokens"]) - expected["logits"])
    assert 1e-4 < np.median(difference) < 0.1  # 8 bits of mantissa


def test_sharded_loading_places_and_keeps_every_value():
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    config, params = weights.load(GOLDEN / "qwen3")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    one = weights.load(GOLDEN / "qwen3", sharding=everywhere)[1]
    assert_equal(params, one)
    tree = jax.tree.map(lambda _: everywhere, params)
    tree["embed"]["embedding"] = split
    placed = weights.load(GOLDEN / "qwen3", sharding=tree)[1]
    assert_equal(params, placed)
    assert placed["embed"]["embedding"].sharding == split
    assert placed["layers"]["mlp"]["up"]["kernel"].sharding == everywhere
    assert config == weights.load(GOLDEN / "qwen3", sharding=tree)[0]


def test_value_head_comes_from_init_and_is_not_exported(tmp_path):
    config, params = weights.load(GOLDEN / "qwen3", value_head=True)
    assert config.value_head
    assert "value" not in params
    init = params | {"value": {"kernel": jnp.arange(32.0)}}
    params = weights.load(GOLDEN / "qwen3", value_head=True, init=init)[1]
    assert leaves(params).keys() == leaves(init).keys()
    np.testing.assert_array_equal(params["value"]["kernel"], init["value"]["kernel"])
    weights.save(tmp_path, config, params)
    assert_equal({k: v for k, v in params.items() if k != "value"}, weights.load(tmp_path)[1])


def test_host_memory_of_loading_is_below_one_copy(tmp_path):
    """Only one stacked array and one tensor may be on the host at a time (device arrays
    are not counted here).
    """
    config = ModelConfig(vocab_size=64, width=256, layers=16, heads=4, kv_heads=4, head_size=64, feed_forward=256)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(transformer(config).init, jax.random.key(0)))
    weights.save(tmp_path, config, params)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    del params
    tracemalloc.start()
    loaded = weights.load(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert leaves(loaded)["layers.mlp.up.kernel"].nbytes < peak < 0.8 * total


# ------------------------------------------------------------------------------------------------ weights that do not fit


def test_a_missing_tensor_is_named(checkpoint):
    folder, edit = checkpoint
    edit(lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"))
    with pytest.raises(ValueError, match=r"lacks tensor model.layers.1.self_attn.q_norm.weight of shape \(16,\)"):
        weights.load(folder)


def test_an_extra_tensor_is_named(checkpoint):
    folder, edit = checkpoint
    edit(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}))
    with pytest.raises(ValueError, match=r"has tensor model.layers.0.self_attn.q_proj.bias, which this config has no place for"):
        weights.load(folder)


def test_more_layers_than_the_config_says_are_extra(checkpoint):
    folder, _ = checkpoint
    c = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(c))
    with pytest.raises(ValueError, match=r"has tensor model.layers.1.input_layernorm.weight and \d+ more"):
        weights.load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(checkpoint):
    folder, edit = checkpoint
    # The transposed tensor has as many numbers: only a check of the shape finds it.
    edit(lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((32, 48), np.float32)}))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight .* got shape \(32, 48\); .* \(48, 32\)"):
        weights.load(folder)
    config, params = weights.load(GOLDEN / "qwen3")
    params["final_norm"]["scale"] = jnp.ones(31)
    with pytest.raises(ValueError, match=r"params final_norm.scale got shape \(31,\); the config asks for \(32,\)"):
        weights.save(folder, config, params)


def test_quantised_tensors_are_refused(checkpoint):
    folder, edit = checkpoint
    edit(lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}))
    with pytest.raises(ValueError, match="got dtype I8"):
        weights.load(folder)


def test_harmless_extras_are_ignored(tmp_path):
    shutil.copytree(GOLDEN / "qwen2", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"]}  # stored although tied
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert_equal(weights.load(GOLDEN / "qwen2")[1], weights.load(tmp_path)[1])


def test_a_truncated_file_is_named(checkpoint):
    folder, _ = checkpoint
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        weights.load(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        weights.load(folder)


def test_an_incomplete_folder_is_named(tmp_path):
    config, params = weights.load(GOLDEN / "qwen3")
    weights.save(tmp_path, config, params, max_shard_bytes=20_000)
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*model-00002-of-.*incomplete"):
        weights.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        weights.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        weights.load(tmp_path)
