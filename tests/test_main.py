"""The command: bad input is one clear line before anything is compiled, help is quick,
and a real run finishes and resumes.
"""

import json
import subprocess
import sys

import pytest
from runs import ROOT, load_config, main, maths

SMOKE = "configs/tiny.py:smoke"


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"--config={SMOKE.replace('smoke', 'smoek')}"], ["config option 'smoek'", "did you mean 'smoke'", "prior, reward"]),
        (["--config=configs/tiny.py:task=chian"], ["'chian'", "did you mean 'chain'", "countdown"]),
        (["--config=configs/nope.py"], ["no config file 'configs/nope.py'"]),
        ([], ["no --config given"]),
        ([f"--config={SMOKE}", "--config.rl.stepz=3"], ["field of config.rl 'stepz'", "did you mean 'steps'"]),
        ([f"--config={SMOKE}", "--config.rl.steps=three"], ["config.rl.steps", "three"]),
        ([f"--config={SMOKE}", "--wrkdir=x"], ["wrkdir", "workdir"]),
        ([f"--config={SMOKE}", "loose"], ["loose"]),
    ],
)
def test_a_mistyped_command_is_one_line(arguments, words):
    code, _, err = main(*arguments)
    assert code != 0
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def changed(changes):
    config = load_config("tiny", "smoke")
    with config.unlocked():
        for path, value in changes.items():
            *sections, last = path.split(".")
            at = config
            for section in sections:
                at = at[section]
            at[last] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl.stepz": 3}, r"unknown field of config.rl 'stepz' \(did you mean 'steps'\?\)"),
        ({"rl.source.task.name": "chian"}, r"unknown task 'chian' \(did you mean 'chain'\?\); one of: .*calculator"),
        ({"rl.source.task.opz": 3}, r"unknown field of task 'chain' 'opz' \(did you mean 'ops'\?\)"),
        ({"rl.source.name": "rollout"}, r"unknown source 'rollout' \(did you mean 'rollouts'\?\)"),
        ({"rl.objective.name": "grop"}, r"unknown objective 'grop' \(did you mean 'grpo'\?\); one of: cispo, dapo"),
        ({"rl.objective.clip": 0.1}, r"unknown field of objective 'rloo' 'clip'"),
        ({"rl.optimizer.name": "adm"}, r"unknown optimizer 'adm'"),
        ({"rl.optimizer.warmup_steps": 99}, r"warmup_steps got 99; allowed: 0 to the 2 steps"),
        ({"verifier.name": "exakt"}, r"unknown verifier 'exakt' \(did you mean 'exact'\?\)"),
        ({"model.name": "tinny"}, r"unknown model 'tinny' \(did you mean 'tiny'\?\)"),
        ({"model.widht": 3}, r"unknown field of config.model 'widht' \(did you mean 'width'\?\)"),
        ({"model.heads": 3}, r"heads got 3; allowed: a multiple of kv_heads"),
        ({"model.vocab_size": 8}, r"the tokenizer has 32 tokens and the model vocab_size=8"),
        ({"text.tokenizer": "characterz"}, r"unknown tokenizer 'characterz'"),
        ({"text.format": "chat"}, r"no chat template; choose plain"),
        ({"text.alphabet": "0123456789"}, r"is not in the alphabet"),
        ({"rl.source.group": 1}, r"compares the attempts at a problem, but there is 1 of each"),
        ({"rl.offload_reference": True}, r"config.rl.offload_reference got True, but the objective has no reference policy"),
        ({"rl.source.dynamic_sampling": 0}, r"source.dynamic_sampling got 0; allowed: 1 \(off\), or more for an objective"),
        ({"log.watts": -1.0}, r"config.log.watts got -1.0; allowed: None, or the watts of a busy device, above 0"),
        ({"rl.source.problems": 3}, r"24 rows a batch, which do not divide over 8 devices x 2 micro-batches"),
        (
            {"rl.source.problems": 32, "rl.source.rollouts_per_prompt": 1, "rl.microbatches": 7},
            r"256 rows a batch, .* 7 micro-batches; microbatches may be 1, 2, 4, 8, 16, 32, or None to choose; or change rows",
        ),
        ({"rl.microbatches": 0}, r"config.rl.microbatches got 0; allowed: 1 or more, or None to choose"),
        ({"rl.source.rollouts_per_prompt": 3}, r"source.rollouts_per_prompt got 3; allowed: a divisor of group=8, or None"),
        ({"rl.source.rollouts_per_prompt": 4}, r"8 rows a batch, which do not divide over 8 devices x 2 micro-batches"),
        ({"rl.source.temperature": 0.0}, r"source.temperature got 0.0; allowed: finite, above 0"),
        ({"rl.source.reward": "rnd"}, r"unknown reward 'rnd'"),
        ({"rl.source.max_tokens": 1000}, r"source.max_tokens got 1000; allowed: 1 to sampler.max_tokens=32"),
        ({"rl.source.top_p": 0.8}, r"top_p=0.8, min_p=0.0; allowed in training: 0, 1 and 0. .* importance ratio would be biased"),
        ({"rl.source.top_k": 5}, r"allowed in training"),
        ({"rl.source.min_p": 0.1}, r"allowed in training"),
        ({"evaluate.top_p": 0.0}, r"config.evaluate got top_k=0, top_p=0.0, min_p=0.0; allowed: top_k 0"),
        ({"sampler.cache_dtype": "int4"}, r"unknown config.sampler.cache_dtype 'int4'"),
        ({"sampler.stop_strings": "ab"}, r"config.sampler.stop_strings got 'ab' \(str\); allowed: a tuple of str"),
        ({"sampler.thinking_tokens": 0}, r"thinking_tokens=0, .* allowed: 1 or more"),
        ({"sampler.prefill_tokens": 0}, r"config.sampler.prefill_tokens got 0; allowed: 1 or more"),
        ({"prior.objective.name": "grpo"}, r"config.prior: objective 'grpo' compares the attempts"),
        ({"prior.source.task.demonstrations": "none"}, r"no worked solutions"),
        ({"sampler.max_prompt_tokens": 4}, r"all 64 prompts of task 'chain' are longer than sampler.max_prompt_tokens=4"),
        ({"sampler.slots": 12}, r"12 slots, which do not divide over 8 devices"),
        ({"phases": ("prior", "lr")}, r"unknown phase 'lr'"),
        ({"phases": ()}, r"config.phases got \(\)"),
        ({"rl": {}}, r"config.rl needs source=..., as each of config.phases; got {}"),
        ({"rl": {"steps": 3}}, r"config.rl needs source=..., as each of config.phases; got {'steps': 3}"),
        ({"checkpoint.keep_best": "nope"}, r"unknown suite in config.checkpoint.keep_best 'nope'; one of: chain, chain_ood"),
        ({"text.date": "13"}, r"text.date got '13'; allowed: YYYY-MM-DD, or None"),
        ({"text.date": "2026-01-31"}, r"text.format is 'plain', which reads no text.date; choose chat"),
        ({"extra": 1}, r"unknown field of the config 'extra'"),
        ({"model.attention": "flash"}, r"unknown attention 'flash'.*one of: cudnn, splash, xla"),
        ({"model.attention": "splash"}, r"attention='splash' got devices of platform 'cpu'; allowed: 'tpu'"),
        ({"sharding.mesh.data": 3}, r"mesh got"),
        ({"sharding.mesh.fsdp": 16}, r"mesh got"),
        (
            {"sharding.mesh.tensor": 8, "sharding.mesh.data": 1},
            r"attention/k/kernel has size \d in axis 2, which does not divide over tensor=8",
        ),
    ],
)
def test_a_bad_config_is_one_line(changes, message):
    from jaxreason.build import build

    with pytest.raises(ValueError, match=message) as caught:
        build(changed(changes))
    assert "\n" not in str(caught.value)


def test_prompts_that_are_too_long_are_dropped_and_counted():
    from jaxreason.build import build

    said = []
    shorter = {"sampler.max_prompt_tokens": 12, "evaluate.suites": {"chain": {"name": "chain", "ops": 2}}}
    build(changed(shorter), say=said.append)
    dropped = [line for line in said if line.startswith("task 'chain': dropped")]
    assert len(dropped) == 1
    assert "of 64 tasks with prompts over 12 tokens" in dropped[0]


@pytest.mark.parametrize("family", ["jsonl", "corpus"])
def test_an_empty_data_set_is_refused(tmp_path, family):
    from jaxreason.build import build

    (tmp_path / "nothing").write_text("")
    section = {"name": family, "path": str(tmp_path / "nothing")}
    where = "rl.source.task" if family == "jsonl" else "prior.source.task"
    with pytest.raises(ValueError, match="nothing"):
        build(changed({where: section}))


def test_a_folder_without_config_is_refused(tmp_path):
    from jaxreason.build import build

    with pytest.raises(ValueError, match=r"has no config\.json; pass the folder of a Hugging Face checkpoint"):
        build(changed({"model": {"name": str(tmp_path), "weights": "pretrained"}}))


@pytest.mark.process
def test_help_does_not_import_jax():
    code, out, _ = main("--help")
    assert code in (0, 1)  # absl exits with 1
    assert "--workdir" in out
    probe = "import sys, jaxreason.main; print([m for m in ('jax', 'flax', 'orbax', 'grain') if m in sys.modules])"
    got = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"


@pytest.mark.process
def test_the_command_runs_refuses_another_config_and_finishes_once(tmp_path):
    config = ROOT / SMOKE.partition(":")[0]
    command = [f"--config={config}:smoke", "--config.phases=('prior',)", f"--compilation_cache={tmp_path / 'compiled'}"]
    code, out, err = main(*command, cwd=tmp_path, XLA_FLAGS="")  # compiled as for a user
    assert code == 0, err
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("tiny-smoke-")
    assert f"workdir: runs/{workdir.name}" in out
    assert "after prior" in out  # the table
    assert "compiled the sampler in" in err
    (machine,) = (tmp_path / "compiled").iterdir()
    assert any("decode" in path.name for path in machine.iterdir())
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["done"]
    assert summary["environment"]["devices"].endswith("cpu")
    assert f"written:\n  runs/{workdir.name}/report.html\n" in out
    assert (workdir / "report.html").is_file()

    code, _, err = main(*command, "--config.seed=1", f"--workdir={workdir}")
    assert code != 0
    assert err.startswith("error: ")
    assert "is finished, of another config (seed: 0 there, 1 here)" in err
    code, _, err = main(*command, f"--workdir={workdir}")
    assert code != 0
    assert "is finished; choose another --workdir" in err
    code, _, err = main(*command, "--config.prior.steps=9", "--accept_config_change", f"--workdir={workdir}")
    assert code != 0
    assert "is finished, of another config (prior.steps: 4 there, 9 here)" in err


def test_the_last_lines_of_a_run_are_a_path_or_a_command_each(tmp_path):
    from jaxreason.main import what_next

    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "summary.json").touch()
    lines = what_next(folder, "configs/tiny.py:smoke", {"model.width": "32", "init_from": "x"})
    assert lines == [
        "written:",
        f"  {folder}/summary.json",
        "to talk to it:",
        f"  python -m jaxreason.play --checkpoint='{folder}'",
        "to evaluate it with several samples:",
        f"  python -m jaxreason.evaluate --checkpoint='{folder}' --samples=8 --temperature=1",
        "to export the weights:",
        f"  python -m jaxreason.export '{folder}' '{folder}-export'",
        "to begin another run with them:",
        f"  python -m jaxreason.main --config=configs/tiny.py:smoke --config.model.width=32 --config.init_from='{folder}'",
    ]
    (folder / "rollouts.jsonl").touch()
    assert f"  python -m jaxreason.view '{folder}'" in what_next(folder, "configs/tiny.py", {})


@pytest.mark.process
def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = main(f"--config={SMOKE}", f"--workdir={tmp_path / 'file' / 'run'}")
    assert code != 0
    assert len(err.strip().splitlines()) == 1, err
    assert "can't write" in err


@pytest.mark.slow
@pytest.mark.process
def test_a_run_stopped_after_a_phase_ends_as_one_that_was_not(tmp_path):
    config = f"--config={ROOT / SMOKE}"
    code, out, err = main(config, f"--workdir={tmp_path / 'two'}", "--stop_after=prior", "--code_when_stopped=75")
    assert code == 75, err
    assert "stopped after step 4; the same command continues from step 4" in out
    assert not json.loads((tmp_path / "two" / "summary.json").read_text())["done"]
    for folder in ("two", "one"):
        code, _, err = main(config, f"--workdir={tmp_path / folder}")
        assert code == 0, err
    assert maths(tmp_path / "two") == maths(tmp_path / "one")
    code, _, err = main(config, f"--workdir={tmp_path / 'three'}", "--stop_after=priro")
    assert code != 0
    assert err.splitlines()[-1] == "error: unknown phase in --stop_after 'priro' (did you mean 'prior'?); one of: prior, rl"
