"""Configs describe themselves: `--describe`, `--list`, and the entry points that list
their choices.
"""

import subprocess
import sys

import pytest
from runs import ROOT, load_config, main

from jaxreason import build, objectives, optimizer, tasks, verify
from jaxreason.main import describe, list_families, with_values
from jaxreason.options import OFFERED, fields

SMOKE = "configs/tiny.py:smoke"


def whole(name="tiny", options="smoke"):
    return build.complete(load_config(name, options).to_dict())


FAMILIES = {
    "tasks": (tasks.TASKS, lambda name: build.section_of_task({"name": name})),
    "verifiers": (verify.VERIFIERS, lambda name: build.section_of_verifier({"name": name})),
    "objectives": (objectives.OBJECTIVES, lambda name: build.section_of_objective({"name": name})),
    "sources": (build.SOURCES, lambda name: build.section_of_source({"name": name})),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_family_has_a_line_and_a_type(family):
    members, section_of = FAMILIES[family]
    for name in members:
        for field in fields.fields_of(section_of(name)).values():
            assert field.help, f"{name}: give the line of {field.name!r} in the signature a comment"
            assert field.type is not fields.Any, f"{name}: annotate {field.name!r}"


@pytest.mark.parametrize("name", ["tiny", "gsm8k", "pretrain"])
def test_every_field_of_a_config_has_a_line_and_a_type(name):
    tree = whole(name)
    tree["model"]["lora"] = {}
    tree["model"]["rope_scaling"] = {"kind": "yarn", "factor": 4.0}
    for where, section, _ in fields.sections_of(build.layout(tree), tree):
        for field in fields.fields_of(section).values():
            assert field.help, f"give the line of {where}.{field.name} in the signature a comment"
            assert field.type is not fields.Any, f"annotate {where}.{field.name}"


def test_describe_shows_value_default_type_and_line():
    (heading, *lines) = describe(whole(), "rl.optimizer")
    assert heading == "config.rl.optimizer"
    row = next(line for line in lines if line.split()[0] == "clip_norm")
    assert " ".join(row.split()) == "clip_norm 1.0 default 1.0 float or None largest gradient norm; None: any"
    assert next(line for line in lines if " lr " in line).split()[:4] == ["lr", "0.0003", "needed", "float"]
    (_, line) = describe(whole(), "config.rl.source.lag")
    assert "updates between the params that sample and those that learn" in line


def test_describe_shows_sections_in_a_section_and_what_others_decide():
    lines = describe(whole(), "rl.source")
    assert [line for line in lines if line.startswith("config.")] == ["config.rl.source", "config.rl.source.task"]
    seed = next(line for line in lines if line.split()[:1] == ["seed"])
    assert "default that of the run" in seed


def test_describe_shows_the_options_of_the_file():
    OFFERED.clear()
    lines = describe(whole("countdown"), "")
    assert "  task=chain|inverse_chain|countdown  default 'chain'" in lines
    assert "  smoke=bool  default False" in lines


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("rl.optimiser", "unknown field of config.rl 'optimiser' (did you mean 'optimizer'?)"),
        ("rl.optimizer.lrr", "unknown field of config.rl.optimizer 'lrr' (did you mean 'lr'?)"),
        ("verifyer", "unknown section of the config 'verifyer' (did you mean 'verifier'?)"),
    ],
)
def test_an_unknown_section_is_one_line(section, words):
    with pytest.raises(ValueError) as caught:
        describe(whole(), section)
    assert str(caught.value).startswith(words)


def test_list_names_every_member():
    lines = list_families("")
    for members, _ in FAMILIES.values():
        for name in members:
            assert any(line.split()[:1] == [name] for line in lines)
    for family in ("models", "optimizers", "environments", "tokenizers", "formats", "advantages", "weightings", "kl_estimators"):
        assert f"{family}:" in lines
    described = {
        "advantages": objectives.ADVANTAGES,
        "weightings": objectives.WEIGHTINGS,
        "kl_estimators": objectives.KL_ESTIMATORS,
        "optimizers": optimizer.OPTIMIZERS,
    }
    for family, members in described.items():
        for name in members:
            (line,) = [line for line in list_families(family) if line.split()[:1] == [name]]
            assert len(line.split()) > 3, name
    assert [line for line in list_families("verifiers") if line.endswith(":")] == ["verifiers:"]
    with pytest.raises(ValueError, match=r"unknown family 'verifier' \(did you mean 'verifiers'\?\)"):
        list_families("verifier")


def test_describe_and_list_take_a_word_or_none():
    assert with_values(["--describe"]) == ["--describe="]
    assert with_values(["--describe", "rl", "--list", "--x"]) == ["--describe=rl", "--list=", "--x"]


def test_the_command_describes_and_ends():
    code, out, err = main(f"--config={SMOKE}", "--config.rl.objective.name=dapo", "--describe", "rl.objective")
    assert code == 0, err
    assert out.splitlines()[0] == "config.rl.objective"
    assert "clip_high " in out


def help_of(*words):
    """Return the output of `--help`; absl ends with 1."""
    return subprocess.run([sys.executable, "-m", *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120).stdout


def python_m(*words):
    got = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    return got.stdout


@pytest.mark.parametrize("word", ["--list", "--describe"])
def test_a_reader_who_stops_reading_is_no_error(word):
    command = [sys.executable, "-m", "jaxreason.main", f"--config={SMOKE}", word]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `| head` does
        said = process.stderr.read()
    assert (process.returncode, "roken pipe" in said) == (0, False), said


def test_the_package_says_what_there_is_to_run():
    out = python_m("jaxreason")
    for door in ("main", "export", "plan", "bench"):
        assert f"python -m jaxreason.{door}" in out


def test_bench_help_says_what_each_measures():
    from jaxreason.bench.__main__ import BENCHMARKS

    out = python_m("jaxreason.bench", "--help")
    for name in BENCHMARKS:
        assert f"  {name}" in out


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("sampler", ("config", "prompts", "questions")),
        ("learner", ("config", "prompts", "kl")),
        ("step", ("config", "prompts", "kl")),
        ("lookup", ("config", "rollouts", "guesses")),
        ("cache", ("layers", "slots")),
        ("sandbox", ("backend", "repeats")),
    ],
)
def test_help_of_a_benchmark_says_what_it_measures_and_lists_its_flags(name, names):
    out = help_of("jaxreason.bench", name)
    assert out.startswith(("Measure", "Test", "Time"))
    for flag in names:
        assert f"  --{flag}: " in out
    assert " --v: " not in out  # of absl's logging, as others of --helpfull


@pytest.mark.process
@pytest.mark.parametrize("module", ["report", "look.curves", "verify.audit", "view", "export", "generate"])
def test_an_unknown_flag_is_one_line(module):
    words = [sys.executable, "-m", f"jaxreason.{module}", "--nonesuch=1"]
    got = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (got.returncode, got.stdout) == (1, "")
    assert got.stderr == "error: Unknown command line flag 'nonesuch'\n"


@pytest.mark.process
@pytest.mark.parametrize("module", ["main", "plan", "sweep", "play", "launch"])
def test_help_lists_the_config(module):
    assert "  --config: " in help_of(f"jaxreason.{module}")


def test_sentences_of_the_list_are_whole():
    lines = list_families("")
    assert any("(Shao et al. 2024, arXiv 2402.03300, eq. 3)" in line for line in lines)
    ends = (" al", "(", ",", " for", " of", " the")
    assert not [line for line in lines if line.endswith(ends) or line.count("(") != line.count(")")]
