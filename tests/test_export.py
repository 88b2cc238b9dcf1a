"""Trained params: exported and read again they are the same model, and a run begins
with the params that its config names.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from compare import assert_equal, logits
from runs import ROOT, load_config, main, run_config

import jaxreason
from jaxreason import text
from jaxreason.build import build
from jaxreason.export import export
from jaxreason.main import config_text
from jaxreason.model import ModelConfig, transformer, weights
from jaxreason.runtime import checkpoint, warm_start
from jaxreason.tasks.procedural import ALPHABET
from jaxreason.types import Task

GOLDEN = Path(__file__).parent / "golden"
LORA = {"rank": 2, "alpha": 6.0, "targets": ("q", "down")}


def small(**fields):
    """Make the smoke form of `tiny` with one phase of four steps, a checkpoint after
    every second step, and no evaluation.
    """
    config = load_config("tiny", "smoke", **{"checkpoint.every_steps": 2} | fields)
    config.phases, config.evaluate.suites = ("prior",), {}
    config.prior.optimizer.lr = 0.02
    return config


def with_model(config, **fields):
    with config.unlocked():
        config.model.update(fields)
    return config


def trained(folder: Path, config) -> Path:
    """Make a run folder as `main` leaves it."""
    run_config(config, folder)
    (folder / "config.json").write_text(config_text(config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run four steps of `tiny` from random weights on eight devices."""
    return trained(tmp_path_factory.mktemp("run"), small())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Run the same with adapters on a base in bfloat16."""
    config = with_model(small(), lora=LORA | {"base_dtype": "bfloat16"})
    return trained(tmp_path_factory.mktemp("adapted"), config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("exported") / "new"
    export(str(run), str(folder))
    return folder


def saved(folder: Path, step: int | None = None):
    """Return the model of a run and its params at a step, read without `origin`."""
    import ml_collections

    config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
    model = build(config).model
    opened = checkpoint.open_checkpoints(folder / "checkpoints", read_only=True)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params = opened.restore_params(step or opened.latest(), wanted)
    opened.close()
    return model, params


def started(config, **kwargs):
    """Build the run of a config; return it, its first state, and its lines about
    init_from.
    """
    said = []
    made = build(config, say=said.append, **kwargs)
    return made, made.init(), [line for line in said if line.startswith("init_from")]


TOKENS = np.random.default_rng(0).integers(0, 32, (2, 24))

# -------------------------------------------------------------------------------------------------------------- export


def test_an_export_is_the_same_model_and_the_same_text(run, exported):
    model, params = saved(run)
    config, loaded = weights.load(exported)
    assert_equal(loaded, params)
    np.testing.assert_array_equal(logits(config, loaded, TOKENS), logits(model.config, params, TOKENS))

    ours, theirs = text.characters(ALPHABET), text.load(exported)
    assert theirs[:4] == ours[:4]  # the number of tokens, bos, eos and pad
    for words in ("7+5*3-2:7+5=2*3=6-2=4;A4.", "any <eos> []()", " ", ""):
        words = "".join(c for c in words if c in ALPHABET)
        assert theirs.encode(words + "<eos>") == ours.encode(words + "<eos>")
        assert theirs.encode(words, special=False) == ours.encode(words, special=False)
    drawn = np.random.default_rng(1).integers(0, 40, 200)  # eight of them are no tokens
    assert theirs.decode(drawn) == ours.decode(drawn)
    assert theirs.decode(drawn, skip_special=True) == ours.decode(drawn, skip_special=True)
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("7x5")

    reader = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert reader.encode("7+5:").ids == text.plain(ours).prompt(Task("7+5:", "12"))
    for name in ("config.json", "generation_config.json"):
        ids = {k: v for k, v in json.loads((exported / name).read_text()).items() if k.endswith("token_id")}
        assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "tokenizer",
    [text.byte_level(), text.characters("ab\n\\ é.*中"), text.characters("ab", vocab_size=64)],
    ids=["bytes", "odd", "padded"],
)
def test_a_tokenizer_of_ours_is_read_as_it_was(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    again = text.load(tmp_path)
    text.check_same(again, tokenizer)
    assert (again.bos_id, again.eos_ids, again.pad_id, dict(again.special)) == (1, (2,), 0, dict(tokenizer.special))
    known = "".join(tokenizer.decode([i]) for i in range(3, again.vocab_size) if tokenizer.vocab_size < 200)
    for words in (known[::-1] or "Zwölf\tgroße 数学 <pad>\r\n\x00 \U0001f600 \ud800", "ab<bos>ab<eos>", "a" * 3000):
        for special in (True, False):
            if special or tokenizer.vocab_size > 200 or "<" not in words:
                assert again.encode(words, special=special) == tokenizer.encode(words, special=special)
    drawn = [int(i) for i in np.random.default_rng(0).integers(0, tokenizer.vocab_size, 500)]
    assert again.decode(drawn) == tokenizer.decode(drawn)
    ended = [2, *(i for i in drawn if i > 2), 2]  # inside, bytes around a token that is skipped would be read as one
    assert again.decode(ended, skip_special=True) == tokenizer.decode(ended, skip_special=True)


def test_an_older_step_and_another_type(run, tmp_path):
    export(str(run), str(tmp_path / "two"), step=2, dtype="bfloat16")
    _, loaded = weights.load(tmp_path / "two", param_dtype="bfloat16")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, params = saved(run, 2)
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved(run)[1])))


@pytest.mark.slow
def test_adapters_are_merged(adapted, tmp_path):
    export(str(adapted), str(tmp_path))
    model, params = saved(adapted)
    assert params["frozen"]["embed"]["embedding"].dtype == jnp.bfloat16
    merged = jax.tree.map(lambda x: x.astype(jnp.float32), model.merge(params))
    config, loaded = weights.load(tmp_path)
    assert config.lora is None
    assert_equal(loaded, merged)  # in float32, or the learned part would be rounded away
    plain = jax.tree.map(lambda x: x.astype(jnp.float32), params["frozen"])
    assert np.abs(logits(config, loaded, TOKENS) - logits(config, plain, TOKENS)).max() > 0.01
    np.testing.assert_allclose(logits(config, loaded, TOKENS), logits(model.config, params, TOKENS), atol=1e-4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Write a Hugging Face folder with a tokenizer, two eos tokens and a chat template,
    and a run that begins with it.
    """
    folder = tmp_path_factory.mktemp("pretrained")
    shape = ModelConfig(text.load(GOLDEN / "chat").vocab_size, 32, 2, 4, 2, 8, 64, tied_embeddings=True)
    params = transformer(shape).init(jax.random.key(0))
    weights.save(folder / "model", shape, params, tokenizer_folder=GOLDEN / "chat", max_position_embeddings=512)
    config = with_model(small(), name=str(folder / "model"), weights="pretrained")
    del config.model["layers"]
    config.text = {"tokenizer": "pretrained", "format": "chat", "instruction": "{question} Think."}
    return folder / "model", trained(folder / "run", config)


def test_the_text_of_a_pretrained_model_is_exported(pretrained, tmp_path):
    folder, run = pretrained
    shutil.copytree(folder, tmp_path / "out")
    export(str(run), str(tmp_path / "out"), overwrite=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (GOLDEN / "chat" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 512
    assert text.load(tmp_path / "out").eos_ids == text.load(folder).eos_ids == (2, 0)
    model, params = saved(run)
    config, loaded = weights.load(tmp_path / "out")
    assert_equal(loaded, params)
    assert config == ModelConfig(**vars(model.config) | {"scan_layers": False})
    assert (weights.load(folder)[1]["embed"]["embedding"] != loaded["embed"]["embedding"]).any()
    # And back: the next run takes its shape and text from the folder that it was made
    # of, its params from the export.
    config = load_run_config(run)
    config.init_from = str(tmp_path / "out")
    _, begun, said = started(config)
    assert_equal(begun, params)
    assert said == [f"init_from: params of {tmp_path / 'out'}"]


def load_run_config(run: Path):
    import ml_collections

    return ml_collections.ConfigDict(json.loads((run / "config.json").read_text()))


def test_impossible_exports_are_refused_in_one_line(run, exported, pretrained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.json", tmp_path / "empty")
    folder, chat_run = pretrained
    for arguments, fields, message in (
        ((run, tmp_path / "full"), {}, r"full is not empty; choose another folder, or add --overwrite"),
        ((run, tmp_path / "full" / "notes"), {}, r"notes is a file; choose a folder"),
        ((run, run), {"overwrite": True}, r"holds a run"),
        ((chat_run, folder), {"overwrite": True}, r"or the model that this run began with"),
        ((run, tmp_path / "new"), {"step": 3}, r"has no checkpoint of step 3; it has: 2, 4"),
        ((tmp_path / "empty", tmp_path / "new"), {}, r"empty has no complete checkpoint yet"),
        ((tmp_path / "nowhere", tmp_path / "new"), {}, r"no folder .*nowhere"),
        ((tmp_path / "full", tmp_path / "new"), {}, r"is neither a run .* nor a Hugging Face folder"),
        ((exported, tmp_path / "new"), {}, r"is a Hugging Face folder already"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            export(*map(str, arguments), **fields)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.process
def test_the_command(run, exported, tmp_path):
    def command(*arguments):
        words = [sys.executable, "-m", "jaxreason.export", *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)

    got = command(run, tmp_path / "out", "--step=4")
    assert got.returncode == 0, got.stderr
    assert got.stdout == f"{tmp_path / 'out'}: the params of step 4 of {run}, float32\n"
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    for arguments, words in (
        ((run,), "needed: python -m jaxreason.export RUN OUT"),
        ((run, "x", "--dtype=int8"), "float32|bfloat16"),
    ):
        got = command(*arguments)
        assert got.returncode != 0
        assert len(got.stderr.strip().splitlines()) == 1, got.stderr
        assert words in got.stderr


# ----------------------------------------------------------------------------------------------------------- init_from


def test_the_front_door_loads_a_run(run, adapted):
    """It uses the text section of the run's config; adapters stay separate, or are
    merged where the caller asks for none.
    """
    policy = jaxreason.load(run, max_prompt_tokens=24, max_tokens=4)
    assert_equal(policy.params, saved(run)[1])
    assert len(jaxreason.sample(policy, ["1+1:"], n=2)[0].attempts) == 2
    assert "lora" in jaxreason.load(adapted / "checkpoints" / "2", max_tokens=4).params
    assert "lora" not in jaxreason.load(adapted, max_tokens=4, model={"lora": None}).params


@pytest.mark.parametrize(
    ("path", "step"), [("{run}", 4), ("{run}/checkpoints/2", 2), ("{exported}", 4)], ids=["run", "checkpoint", "folder"]
)
@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "eight"])
def test_a_run_begins_with_the_params_that_it_is_told(run, exported, path, step, mesh):
    path = path.format(run=run, exported=exported)
    made, params, said = started(small(init_from=path, **{f"sharding.mesh.{axis}": n for axis, n in mesh.items()}))
    assert_equal(params, saved(run, step)[1])
    assert {x.sharding.mesh for x in jax.tree.leaves(params)} == {made.mesh}
    kernel = params["layers"]["attention"]["q"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // (4 if len(mesh) > 1 else 1)}
    assert said == [f"init_from: params of {exported if path == str(exported) else f'step {step} of {run}'}"]


def test_a_whole_run_begins_there(run, tmp_path):
    """The learning rate is too small to move a float, so the first checkpoint has the
    initial params.
    """
    config = small(init_from=str(run), **{"prior.steps": 1, "prior.optimizer.warmup_steps": 0})
    config.prior.optimizer.lr = 1e-30
    trained(tmp_path, config)
    assert_equal(saved(tmp_path)[1], saved(run)[1])


@pytest.mark.slow
@pytest.mark.process
def test_a_run_that_goes_on_keeps_its_own(run, tmp_path):
    config = small(init_from=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"config.init_from got '.*gone': no folder .*gone"):
        build(config)
    made = build(config, resumes=True)
    assert made.init is not None

    shutil.copytree(run, tmp_path / "begun")
    command = ["--config=configs/tiny.py:smoke", f"--workdir={tmp_path / 'mine'}", f"--config.init_from={tmp_path / 'begun'}"]
    command += ["--config.phases=('prior',)", "--config.prior.steps=2", "--config.evaluate.n=1", "--config.evaluate.final_n=1"]
    code, out, err = main(*command)
    assert code == 0, err
    assert f"init_from: params of step 4 of {tmp_path / 'begun'}" in out
    shutil.rmtree(tmp_path / "begun")
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    (tmp_path / "mine" / "summary.json").write_text(json.dumps(summary | {"done": False}))
    code, out, err = main(*command)
    assert code == 0, err
    assert "init_from: params" not in out
    assert "going on from step 2" in err


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@pytest.mark.slow
def test_with_and_without_adapters(run, adapted):
    _, plain = saved(run)
    model, params = saved(adapted)

    _, begun, (said,) = started(small(init_from=str(adapted)))
    assert said.endswith(f"of {adapted}, its adapters merged")
    assert_equal(begun, cast(model.merge(params), jnp.float32))

    _, begun, (said,) = started(with_model(small(init_from=str(adapted)), param_dtype="bfloat16"))
    assert_equal(begun, cast(model.merge(params), jnp.bfloat16))

    fresh = build(with_model(small(), lora=LORA)).init()
    for base_dtype in ("bfloat16", None):
        config = with_model(small(init_from=str(run)), lora=LORA | {"base_dtype": base_dtype})
        _, begun, (said,) = started(config)
        assert said.endswith(f"of {run}, under new adapters")
        assert_equal(begun, {"frozen": cast(plain, base_dtype or jnp.float32), "lora": fresh["lora"]})

    _, begun, (said,) = started(with_model(small(init_from=str(adapted)), lora=LORA | {"base_dtype": "bfloat16"}))
    assert said.endswith(str(adapted))
    assert_equal(begun, params)
    assert {str(x.dtype) for x in jax.tree.leaves(begun["frozen"])} == {"bfloat16"}
    assert np.abs(begun["lora"]["attention"]["q"]["b"]["kernel"]).max() > 0.01


@pytest.fixture(scope="module")
def valued(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("valued"), with_model(small(), value_head=True))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_value_head_comes_along_goes_or_is_new(run, valued, exported, lora):
    fresh = build(with_model(small(), value_head=True, lora=lora)).init()["value"]
    _, params = saved(valued)
    _, begun, (said,) = started(with_model(small(init_from=str(valued)), value_head=True, lora=lora))
    assert_equal(begun["value"], params["value"])
    assert "value head" not in said
    assert_equal(begun["frozen"] if lora else begun, {k: v for k, v in params.items() if k != "value" or lora is None})

    _, begun, (said,) = started(with_model(small(init_from=str(valued)), lora=lora))
    assert said.endswith("its value head left out")
    assert "value" not in begun
    for path in (run, exported):
        _, begun, (said,) = started(with_model(small(init_from=str(path)), value_head=True, lora=lora))
        assert said.endswith("a new value head")
        assert_equal(begun["value"], fresh)
        assert_equal(begun["frozen"]["embed"] if lora else begun["embed"], saved(run)[1]["embed"])


def test_params_that_do_not_fit_are_one_line(run, exported, adapted, tmp_path):
    def edited(name, change):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    other_alphabet = edited("alphabet", lambda c: c["text"].update(alphabet=ALPHABET[1:] + ALPHABET[0]))
    lying = edited("lying", lambda c: c["model"].update(layers=2))
    no_weights = tmp_path / "no_weights"
    shutil.copytree(exported, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(exported, tmp_path / "unfit")
    misfit = json.loads((exported / "config.json").read_text()) | {"tie_word_embeddings": False, "num_key_value_heads": 4}
    (tmp_path / "unfit" / "config.json").write_text(json.dumps(misfit))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")

    for path, fields, message in (
        (run, {"layers": 3}, r"layers is 1 there and 3 here; set config.model to the model there"),
        (run, {"vocab_size": 64}, r"vocab_size is 32 there and 64 here"),
        (exported, {"feed_forward": 96}, r"feed_forward is 192 there and 96 here"),
        (exported, {"rope_theta": 5e5}, r"rope_theta is 10000.0 there and 500000.0 here"),
        (run, {"tied_embeddings": True}, r"tied_embeddings is False there and True here"),
        (adapted, {"lora": LORA | {"rank": 4}}, r"rank 2, alpha 6.0 and targets down, q, here they have 4, 6.0 and down, q"),
        (other_alphabet, {}, r"its tokenizer is another one: token 3 is '1' there and '0' here"),
        (lying, {"layers": 2}, r"state at step 4 of .* does not fit: params.layers.* is \[1, .*\] there and \[2, .*\] here"),
        (no_weights, {}, r"has neither model.safetensors nor"),
        (tmp_path / "unfit", {"kv_heads": 4}, r"k_proj.weight in .* got shape \(32, 64\); config.json asks for \(64, 64\)"),
        (tmp_path / "half", {}, r"config.json is not JSON"),
        (run / "checkpoints" / "3", {}, r"has no checkpoint of step 3; it has: 2, 4"),
        (run / "checkpoints", {}, r"is neither a run .* nor a Hugging Face folder"),
        (tmp_path / "nowhere" / "checkpoints" / "7", {}, r"no folder .*nowhere"),
    ):
        with pytest.raises(ValueError, match=r"^config.init_from got '" + str(path) + r"': .*" + message) as error:
            build(with_model(small(init_from=str(path)), **fields))
        assert "\n" not in str(error.value)
    for nothing in (None, ""):
        config = small()
        config.init_from = nothing
        assert build(config).init is not None
    config.phases = ("init_from",)
    with pytest.raises(ValueError, match="unknown phase 'init_from'"):
        build(config)


def test_a_folder_without_a_tokenizer_is_taken_at_its_word(run, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    _, begun, _ = started(small(init_from=str(tmp_path / "bare")))
    assert_equal(begun, saved(run)[1])


def test_every_config_has_the_field():
    for name, options in (("tiny", "smoke"), ("countdown", "smoke"), ("pretrain", "smoke"), ("sft", "smoke"), ("gsm8k", "smoke")):
        assert load_config(name, options, init_from="runs/other").init_from == "runs/other"


def test_all_read_the_step_that_process_0_found(monkeypatch, run):
    """A run in progress may write another checkpoint between the looks of two
    processes.
    """
    found = warm_start.find(run)
    monkeypatch.setattr(warm_start.processes, "gather", lambda step: [2, step])
    config = build(small()).model.config
    asked = {}
    monkeypatch.setattr(warm_start, "restore", lambda found, *rest: asked.update(step=found.step))
    warm_start.load(found, config, config, None, functools.partial(dict))
    assert (found.step, asked["step"]) == (4, 2)
