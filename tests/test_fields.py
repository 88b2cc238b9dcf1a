"""Fields of a config: a command can set each of them, all are checked, and a run of an
earlier version never changes silently.
"""

import ast
import copy
import functools
import json
import math
import re
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict
from runs import ROOT, SMOKE, load_config, main, run_config

from jaxreason import build, optimizer, options
from jaxreason.build import run
from jaxreason.main import config_text
from jaxreason.options import command, fields
from jaxreason.runtime import workdir

CONFIGS = ("countdown", "gsm8k", "pretrain", "sft", "tiny")


def read(name="tiny:smoke", **changes):
    """Return the config of `--config=configs/NAME.py:OPTIONS --config.FIELD=VALUE ...`
    as a dict.
    """
    file, _, arguments = name.partition(":")
    return command.read(f"{ROOT}/configs/{file}.py:{arguments}", {k.replace("__", "."): v for k, v in changes.items()}).to_dict()


def at(tree, path):
    return functools.reduce(lambda branch, name: branch[name], path.split("."), tree)


def leaves(tree):
    """Yield every field of a whole config: its path, its type and the values of its
    section.
    """
    for where, section, values in fields.sections_of(build.layout(tree), tree):
        for name, field in fields.fields_of(section).items():
            yield ".".join([*where.split(".")[1:], name]), field, values


def other(field):
    """Return a value that a field's type allows, and the command-line text that gives
    it.
    """
    for kind in fields.members(field.type):
        if kind in (bool, int, float, str):
            return {bool: (True, "true"), int: (3, "3"), float: (-1e-6, "-1e-6"), str: ("a b", "a b")}[kind]
        if fields.is_sequence(kind):
            inside = fields.items(kind, 2)
            value = tuple({int: 4, float: 0.5, str: "q"}[fields.members(one)[0]] for one in inside)
            return value, str(value)
    return {}, "{}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_can_be_set_from_the_command_line_whether_the_file_has_it_or_not(name):
    tree = read(f"{name}:smoke")
    paths = [(path, field) for path, field, _ in leaves(tree)]
    assert len(paths) > 100
    for path, field in paths:
        if path.endswith("name") and path != "model.name":
            continue  # a name decides which fields there are
        value, text = other(field)
        if path == "version" or isinstance(value, dict):
            continue
        changed = fields.assign(build.layout, copy.deepcopy(tree), {path: text})
        assert at(changed, path) == value, path
        assert type(at(changed, path)) is type(value), path
        if type(None) in fields.members(field.type):
            assert at(fields.assign(build.layout, changed, {path: "None"}), path) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_config_has_every_field_that_no_other_decides_with_its_default(name):
    before = load_config(name, "smoke").to_dict()
    tree = build.complete(before)
    for where, section, values in fields.sections_of(build.layout(tree), tree):
        for field in fields.fields_of(section).values():
            assert field.name in values or field.name in section.decided, f"{where}.{field.name}"
    assert build.complete(tree) == tree
    flat = workdir.flat(tree)
    assert all(flat[key] == value for key, value in workdir.flat(before).items() if not isinstance(value, dict))


def test_every_keyword_of_a_section_is_a_field():
    """The fields are the signatures' keywords, as named in the README and the
    docstrings.
    """
    found = {path for path, *_ in leaves(read())}
    named = "rl.source.dynamic_sampling rl.source.rollouts_per_prompt rl.offload_reference rl.optimizer.name log.watts "
    named += "rl.objective.weigh "
    named += "model.lora model.attention sampler.prompt_rows sampler.cache_dtype text.instruction init_from checkpoint.keep_best "
    named += "evaluate.texts verifier.must_finish prior.source.task.guess sharding.mesh.tensor evaluate.suites.chain.verifier"
    assert set(named.split()) <= found


VALUES = {
    "rl.source.dynamic_sampling": ("3", 3),
    "rl.optimizer.lr": ("1", 1.0),
    "rl.optimizer.clip_norm": ("None", None),
    "rl.optimizer.adam_lr": ("-1e-6", -1e-6),
    "rl.source.task.ops": ("2,4", (2, 4)),
    "rl.source.task.seed": ("7", 7),
    "rl.source.pack": ("false", False),
    "text.template.enable_thinking": ("false", False),
    "model.lora.rank": ("4", 4),
    "model.lora.targets": ("q,o", ("q", "o")),
    "model.rope_scaling.kind": ("linear", "linear"),
    "model.width": ("128", 128),
    "evaluate.temperatures": ("(0.7,)", (0.7,)),
    "evaluate.suites.chain.verifier.name": ("exact", "exact"),
    "evaluate.suites.more.name": ("sorting", "sorting"),
    "evaluate.suites.more.length": ("4", 4),
    "sampler.stop_strings": ("('a', ';')", ("a", ";")),
    "log.watts": ("65", 65.0),
    "log.tracker": ("tensorboard,wandb", "tensorboard,wandb"),
    "init_from": ("runs/other", "runs/other"),
    "seed": ("-0", 0),
    "text.system": ("None", "None"),
}


@pytest.mark.parametrize("path", VALUES)
def test_words_become_values_of_the_fields_type(path):
    text, value = VALUES[path]
    more = {"evaluate.suites.more.name": "sorting"} if "more.length" in path else {}
    more |= {"rl.optimizer.name": "muon"} if path.endswith("adam_lr") else {}
    tree = command.read(f"{ROOT}/configs/tiny.py:smoke", {path: text, **more}).to_dict()
    assert at(tree, path) == value
    assert type(at(tree, path)) is type(value)


def test_a_nested_section_is_begun_completed_and_taken_away():
    tree = read(model__lora__rank="4")
    assert tree["model"]["lora"] == {"rank": 4, "alpha": 16.0, "targets": ("q", "v"), "base_dtype": None}
    assert read(model__lora="{'rank': 2}")["model"]["lora"]["alpha"] == 16.0
    assert fields.assign(build.layout, tree, {"model.lora": "None"})["model"]["lora"] is None
    assert "width" not in fields.assign(build.layout, read(model__width="128"), {"model.width": "None"})["model"]


def test_a_text_is_begun_by_any_field_and_a_suite_by_its_name():
    words = {"evaluate.texts.a.length": "8", "evaluate.texts.a.task.name": "corpus", "evaluate.texts.a.task.path": "x.txt"}
    for some in (words, dict(reversed(words.items()))):
        found = command.read(f"{ROOT}/configs/tiny.py:smoke", some).to_dict()["evaluate"]["texts"]["a"]
        assert (found["length"], found["rows"], found["task"]["path"]) == (8, 64, "x.txt")
    with pytest.raises(ValueError, match=r"unknown field of config.evaluate.texts.a 'lenth' \(did you mean 'length'\?\)"):
        read(evaluate__texts__a__lenth="8")
    with pytest.raises(ValueError, match=r"unknown entry .* 'a'; one of: chain, chain_ood; .* --config.evaluate.suites.a.name="):
        read(evaluate__suites__a__ops="3")


@pytest.mark.parametrize("text", ["{1: {'name': 'chain'}}", "{'a': {'name': 'chain', 'ops': {2: 3}}}", "{None: {}}"])
def test_a_section_whose_names_are_no_text_is_one_line(text):
    with pytest.raises(ValueError, match=r"config.evaluate.suites got .*; allowed: a section, with strings as names"):
        read(evaluate__suites=text)
    with pytest.raises(ValueError, match=r"config.evaluate got .*\(dict\); allowed: a section, with strings as names"):
        fields.check(build.layout({}), {"evaluate": {"suites": ast.literal_eval(text)}})


def test_names_on_the_command_line_bring_their_own_fields():
    tree = read(rl__objective__clip_low="0.3", rl__objective__name="grpo", verifier="{'name': 'math'}", verifier__timeout_s="9")
    assert tree["rl"]["objective"]["clip_low"] == 0.3
    assert tree["verifier"]["timeout_s"] == 9.0
    assert read(rl__objective__name="dapo")["rl"]["objective"]["clip_high"] == 0.28
    with pytest.raises(ValueError, match=r"unknown field of config.rl.objective 'clip_low'"):
        read(rl__objective__clip_low="0.3")


@pytest.mark.parametrize(
    ("changes", "gone", "said"),
    [
        # `weigh` replaces a part of the algorithm, so GRPO with rloo's is no GRPO.
        ({"rl.objective.name": "grpo"}, ["rl.objective.weigh"], "dropped weigh='per_token', .* for 'rloo'; .*weigh=..."),
        ({"rl.objective.name": "rloo"}, [], ""),
        ({"rl.objective.name": "grpo", "rl.objective.weigh": "token_sum"}, [], ""),
        (
            {"verifier.name": "number"},
            ["verifier.marker"],
            r"config.verifier.name=number: dropped marker=';A', .* for 'exact'; 'number' has no such field$",
        ),
        ({"rl.source.task.name": "countdown"}, ["rl.source.task.ops"], r"dropped ops=\(2, 5\)"),
        ({"evaluate.suites.chain.name": "sorting"}, ["evaluate.suites.chain.ops"], "dropped ops=5"),
        ({"model.name": "qwen3_0.6b"}, ["model.layers"], r"dropped layers=1, .*model.layers=1$"),
        ({"rl.optimizer.name": "lion"}, [], ""),
    ],
)
def test_a_new_name_drops_what_the_file_gives_for_the_old_one_and_says_so(changes, gone, said, quick_build):
    lines = []
    file = f"{ROOT}/configs/tiny.py:smoke"
    before = workdir.flat(command.load(file))
    tree = command.read(file, changes, lines.append).to_dict()
    assert re.search(said, "".join(lines))
    assert len(lines) == bool(said)
    after = workdir.flat(tree)
    for path, value in before.items():
        if path in gone:
            assert after.get(path) is None
        elif path not in changes:
            assert after[path] == value
    assert all(after[path] == value for path, value in changes.items())
    build.build(ConfigDict(tree), say=[].append)


def test_fields_whose_default_is_another_under_the_new_name_are_dropped(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"""
from jaxreason.options import command
def get_config(arg=''):
    config = command.load({f"{ROOT}/configs/tiny.py:smoke"!r})
    config["rl"]["objective"] = dict(name="dapo", clip_low=0.1, clip_high=0.3, kl_coefficient=0.5)
    return config
"""
    )
    lines = []
    made = command.read(f"{tmp_path}/mine.py", {"rl.objective.name": "grpo"}, lines.append).to_dict()["rl"]["objective"]
    assert (made["clip_low"], made["clip_high"], made["kl_coefficient"]) == (0.1, 0.2, 0.5)
    assert re.search(r"dropped clip_high=0\.3, given by the config file for 'dapo'; .*clip_high=", lines[0])
    assert lines[0].endswith("'grpo' has its own default; to keep the file's value, add --config.rl.objective.clip_high=0.3")


def test_what_a_new_name_drops_can_be_kept_by_pasting_the_message():
    """The marker of tiny.py has a character of the shell."""
    said = []
    command.read(SMOKE, {"verifier.name": "countdown"}, said.append)
    command.read(SMOKE, {"verifier.name": "number"}, said.append)
    assert said[0].endswith("to keep the file's value, add '--config.verifier.marker=;A'")
    assert said[1].endswith("dropped marker=';A', given by the config file for 'exact'; 'number' has no such field")


def test_an_option_of_the_file_that_is_given_as_a_field_is_recognised():
    with pytest.raises(
        ValueError, match=r"unknown field of config 'task'; .*; 'task' is an option of the file: --config=FILE:task="
    ):
        command.read(SMOKE, {"task.name": "countdown"})
    with pytest.raises(ValueError, match=r"phases, prior, rl, sampler, seed, sharding, text, verifier, version$"):
        command.read(SMOKE, {"tusk.name": "countdown"})


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_an_optimizer_is_swept_by_its_name_alone_and_what_it_does_not_read_is_said(name, quick_build):
    said = []
    tree = read(prior__optimizer__name=name)
    assert tree["prior"]["optimizer"]["weight_decay"] == 0.01
    build.build(ConfigDict(tree), say=said.append)
    warned = [line.split("=")[0].rpartition(".")[2] for line in said if line.startswith("warning: config.prior.optimizer.")]
    readers = optimizer.READ_BY
    assert warned == [field for field in ("b2", "weight_decay") if name not in readers[field]]
    for field in warned:
        assert any(f"--config.prior.optimizer.{field}=0." in line for line in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl.optimizer.name": "adam", "rl.optimizer.weight_decay": "0.1"}, "weight_decay got 0.1, but adam does not .*=0.0"),
        ({"rl.optimizer.name": "sgd", "rl.optimizer.b1": "0.8"}, "b1 got 0.8, but sgd does not read it; .*b1=0.9"),
        ({"rl.optimizer.name": "adafactor", "rl.optimizer.eps": "1e-6"}, "eps got 1e-06, but adafactor .*; else --config.rl.opt"),
        ({"rl.objective.kl_estimator": "k1"}, "kl_estimator got 'k1', but kl_coefficient is 0, so nothing reads it; set both"),
        ({"rl.optimizer.muon_scale": "width"}, "muon_scale got 'width', but adamw does not read it; allowed with: muon"),
        (
            {"rl.optimizer.schedule_kind": "constant", "rl.optimizer.final_fraction": "0.2"},
            "a constant schedule does not read it",
        ),
    ],
)
def test_a_field_of_the_command_that_nothing_reads_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        command.read(f"{ROOT}/configs/tiny.py:smoke", changes)
    assert "\n" not in str(caught.value)


def test_set_fields_reach_the_run():
    """A field reaches the objects that the run is built of, not only the config."""
    run = build.build(
        ConfigDict(read(model__lora__rank="4", model__width="32", rl__max_skipped="2", log__watts="65")), say=[].append
    )
    assert run.model.config.lora.rank == 4
    assert run.model.config.width == 32
    assert (run.phases[1].max_skipped, run.watts) == (2, 65.0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("rl.optimizer.lr", "1e-3", r"config\.rl\.optimizer\.lr got '1e-3' \(str\); allowed: float"),
        ("rl.steps", "10", r"config\.rl\.steps got '10' \(str\); allowed: int"),
        ("rl.steps", True, r"config\.rl\.steps got True \(bool\); allowed: int"),
        ("rl.steps", 2.0, r"config\.rl\.steps got 2\.0 \(float\); allowed: int"),
        ("rl.steps", 2**70, r"config\.rl\.steps got 1180591620717411303424 \(int\); allowed: int, below 2\*\*32"),
        ("rl.optimizer.lr", math.nan, r"lr got nan \(float\); allowed: float, finite"),
        ("verifier", "exact", r"config\.verifier got 'exact' \(str\); allowed: a section"),
        ("rl.source.task", ["chain"], r"config\.rl\.source\.task got \['chain'\] \(list\); allowed: a section"),
        ("evaluate.suites.chain", 3, r"config\.evaluate\.suites\.chain got 3 \(int\); allowed: a section"),
        ("rl.source.task.ops", (1, 2, 3), r"ops got \(1, 2, 3\) \(tuple\); allowed: int or \(int, int\)"),
        ("model.lora", 3, r"config\.model\.lora got 3 \(int\); allowed: a section or None"),
        ("phases", (1,), r"config\.phases got \(1,\); allowed: a tuple of names"),
        ("rl.optimizer.b2", 2.0, r"b2 got 2\.0; allowed: 0 to below 1"),
        ("rl.optimizer.weight_decay", -0.1, r"weight_decay got -0\.1; allowed: 0 or more"),
        ("rl.optimizer.clip_norm", 0.0, r"clip_norm got 0\.0; allowed: None, or above 0"),
        ("rl.objective.kl_coefficient", -1.0, r"kl_coefficient got -1\.0; allowed: 0 or more"),
        ("prior.source.task.slip", 1.5, r"slip got 1\.5; allowed: 0 to 1"),
        ("rl.source.group", 2**21, r"source\.group got 2097152; allowed: 1 to 1,048,576"),
        ("rl.source.task.ops", 10**6, r"ops got 1000000; allowed: a whole number from 1 to 10,000"),
        ("rl.source.task.size", 2**31, r"size=2147483648, .*allowed: size from 1 to 100,000,000"),
        ("sharding.sampling_tensor", 0, r"sampling_tensor got 0; allowed: 1 or more"),
        ("rl.steps", -1, r"config\.rl\.steps got -1; allowed: 0 \(evaluate only\) or more"),
        ("version", 7, r"config\.version got 7; allowed: 2"),
    ],
)
def test_types_and_ranges_are_checked_by_the_fields_full_name(path, value, words):
    tree = load_config("tiny", "smoke").to_dict()
    *sections, last = path.split(".")
    (functools.reduce(dict.__getitem__, sections, tree))[last] = value
    with pytest.raises(ValueError, match=words) as caught:
        build.build(ConfigDict(tree), say=[].append)
    assert "\n" not in str(caught.value)


@pytest.fixture
def quick_build(monkeypatch):
    """Run `build` without tracing and without looking up versions: a hundredth of its
    time.
    """
    monkeypatch.setattr(run, "transformer", functools.cache(run.transformer))
    monkeypatch.setattr(run.sharding, "shardings", lambda *_: None)
    monkeypatch.setattr(run, "versions", dict)
    return lambda tree: build.build(ConfigDict(tree), say=[].append)


def refused(build, tree):
    """Return the error message about a config, or nothing if it is built; let other
    errors through.
    """
    try:
        build(tree)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def test_nonsense_in_any_field_is_one_line_or_means_something(quick_build):
    """Every field of tiny gets values of all kinds: no traceback, nothing compiled."""
    tree = read()
    tree["prior"]["source"]["task"]["size"] = 60
    seen = set()
    counts = {"refused": 0, "taken": 0}
    for path, field, values in list(leaves(tree)):
        name = path.rsplit(".", 1)[-1]
        if (field, name in values) in seen:
            continue
        seen.add((field, name in values))
        for value in ("nonsense", [1, "a"], {"a": 1}, None, True, -1, math.nan, 2**70):
            changed = copy.deepcopy(tree)
            functools.reduce(dict.__getitem__, path.split(".")[:-1], changed)[name] = value
            refusal = refused(quick_build, changed)
            assert "\n" not in refusal, (path, value)
            counts["refused" if refusal else "taken"] += 1
    assert counts["refused"] > 600
    assert counts["taken"] < 0.15 * counts["refused"]


def test_zero_steps_are_an_evaluation(tmp_path):
    changes = {"prior.steps": 0, "rl.steps": 0, "evaluate.n": 2, "evaluate.final_n": 2, "evaluate.temperatures": (0.0,)}
    summary = run_config(load_config("tiny", "smoke", **changes, **{"sharding.mesh.data": 1}), tmp_path)
    assert summary["done"]
    assert summary["steps"] == 0
    assert {(e["phase"], e["step"]) for e in summary["evaluations"]} == {("start", 0)}
    assert workdir.is_done(tmp_path)


# --- run folders of earlier versions ---


UNCORRECTED = {"rl.objective.correct": "none"}  # as rloo was before it had a correction by default


def folder(tmp_path, **changes):
    """Make a run folder with a config.json as the version before wrote it: only the
    fields of the config file.
    """
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "config.json").write_text(config_text(load_config("tiny", "smoke", **changes)))
    return tmp_path


def check(folder, said=None, **changes):
    tree = command.read(f"{ROOT}/configs/tiny.py:smoke", changes)
    how = {"resume": "auto", "accept_config_change": False, "say": [].append if said is None else said.append}
    workdir.check(folder, config_text(tree), read=build.from_earlier, **how)


def test_a_run_of_an_earlier_version_continues_with_defaults_which_is_said_once(tmp_path):
    said = []
    check(folder(tmp_path), said=said, **UNCORRECTED)
    (line,) = said
    assert "config.json is of an earlier version: " in line
    assert "fields take their defaults: " in line
    said.clear()
    (tmp_path / "config.json").write_text(config_text(command.read(f"{ROOT}/configs/tiny.py:smoke", {})))
    check(tmp_path, said=said)
    assert said == []


def test_a_new_field_that_is_not_at_its_default_is_a_change(tmp_path):
    with pytest.raises(ValueError, match=r"another config \(rl\.source\.dynamic_sampling: 1 there, 3 here\)"):
        check(folder(tmp_path), **{"rl.source.dynamic_sampling": "3"} | UNCORRECTED)


def test_a_field_that_is_gone_or_renamed_is_refused_by_name(tmp_path, monkeypatch):
    there = json.loads((folder(tmp_path) / "config.json").read_text())
    there["rl"]["source"]["old_field"] = 3
    (tmp_path / "config.json").write_text(json.dumps(there))
    with pytest.raises(
        ValueError, match=r"config\.json: .*config\.rl\.source\.old_field, which this version does not have"
    ) as caught:
        check(tmp_path)
    assert "choose another --workdir" in str(caught.value)
    monkeypatch.setitem(options.RENAMED, "config.*.source.old_field", "dynamic_sampling")
    with pytest.raises(ValueError, match=r"'old_field' of config\.rl\.source is called 'dynamic_sampling' now"):
        check(tmp_path)
    with pytest.raises(ValueError, match=r"'old_field' of config\.rl\.source is called 'dynamic_sampling' now"):
        command.read(f"{ROOT}/configs/tiny.py:smoke", {"rl.source.old_field": "3"})


@pytest.mark.parametrize("version", [0, 1])
def test_a_default_that_has_changed_since_is_no_silent_change(tmp_path, version):
    """In version 0 rloo averaged over each attempt's tokens: such a run continues with
    the old meaning or is refused.
    """
    there = build.complete(load_config("tiny", "smoke").to_dict())
    there["rl"]["objective"] = {"name": "rloo"} if version == 0 else {**there["rl"]["objective"], "weigh": None}
    there["rl"]["objective"] |= {} if version == 0 else {"correct": "none"}
    there = {key: value for key, value in there.items() if key != "version"} | ({"version": version} if version else {})
    (tmp_path / "config.json").write_text(json.dumps(there, default=list))
    if version == 0:
        with pytest.raises(ValueError, match=r"rl\.objective\.weigh: per_sequence there, None here"):
            check(tmp_path, **{"rl.objective.weigh": "None"} | UNCORRECTED)
        check(tmp_path, **{"rl.objective.weigh": "per_sequence"} | UNCORRECTED)
    else:
        check(tmp_path, **{"rl.objective.weigh": "None"} | UNCORRECTED)


@pytest.mark.parametrize("recorded", [{}, {"correct": "none"}])
def test_a_run_of_before_the_default_correction_continues_without_it(tmp_path, recorded):
    """Only objectives without a ratio are corrected now: all others continue as they
    are.
    """
    there = build.complete(load_config("tiny", "smoke").to_dict()) | {"version": 1}
    for name in ("rloo", "grpo"):
        own = {k: v for k, v in there["rl"]["objective"].items() if k != "correct"} | {"name": name, "weigh": None}
        there["rl"]["objective"] = own | recorded
        (tmp_path / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
        (tmp_path / "config.json").write_text(json.dumps(there, default=list))
        asked = {"rl.objective.name": name, "rl.objective.weigh": "None"}
        if name == "rloo":
            with pytest.raises(ValueError, match=r"rl\.objective\.correct: none there, None here"):
                check(tmp_path, **asked)
            asked["rl.objective.correct"] = "none"
        check(tmp_path, **asked)


def test_a_run_of_a_later_version_is_refused(tmp_path):
    there = json.loads((folder(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(there | {"version": 99}))
    with pytest.raises(ValueError, match=r"is of version 99, made by a later jaxreason"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config=configs/tiny.py:x"], "unknown config option 'x'; one of: prior, reward, smoke, task"),
        (["--config", "configs/tiny.py", "--config.nope=1"], "unknown field of config 'nope'"),
        (["--config=configs/tiny.py", "--config=configs/sft.py"], "--config is given 2 times"),
        (["--config=configs"], "--config got the folder 'configs'"),
        (["--config="], "no config file ''"),
        (["--config.rl.steps=3"], "--config.rl.steps is given and no --config=FILE"),
        (["--config=configs/tiny.py:smoke", "--config.rl=3"], "config.rl got '3'; allowed: a section"),
        (["--config=configs/tiny.py:smoke", "--config.rl.steps.x=3"], "config.rl.steps got the field 'x'; it has none"),
        (["--config=configs/tiny.py:smoke", "--config.evaluate.suites.chian.ops=3"], "did you mean 'chain'?"),
        (["--config=configs/tiny.py:smoke", "--config.evaluate=None"], "config.evaluate got 'None'"),
    ],
)
def test_wrong_words_of_a_command_are_one_line(words, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "FLAGS", flags.FlagValues())
    flags.DEFINE_string("config", None, "", flag_values=command.FLAGS)
    with pytest.raises(ValueError) as caught:
        command.parse(["main", *words])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


NULL_BYTE = "SyntaxError" if sys.version_info >= (3, 11, 4) else "ValueError"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def get_config(arg=''):\n    return 1 / 0\n", "FILE:2: ZeroDivisionError: division by zero"),
        ("def get_config(arg='')\n", "FILE:1: SyntaxError: expected ':'"),
        ("import no_such_module\n", "FILE:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n", "FILE has no function get_config(arg='')"),
        ("def get_config(arg=''):\n    return 3\n", "get_config of FILE returned int; allowed: a ConfigDict"),
        ("def get_config():\n    return 3\n", "FILE: TypeError: get_config() takes 0 positional arguments"),
        ("\0", f"FILE: {NULL_BYTE}: source code string cannot contain null bytes"),
    ],
)
def test_a_config_file_that_fails_is_one_line_with_its_place(tmp_path, source, said):
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=r".") as caught:
        command.read(f"{file}:smoke", {})
    assert str(caught.value).startswith(said.replace("FILE", str(file)))


def test_the_command_says_so_in_one_line(tmp_path):
    code, _, err = main("--config", "configs/tiny.py:smoke", "--config.rl.steps=2", "--config.rl.source.lag", "-1x")
    assert code != 0
    assert err.strip() == "error: config.rl.source.lag got '-1x'; allowed: int"
