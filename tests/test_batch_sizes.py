"""Sizes of batches, and the number of micro-batches that is chosen for a machine."""

import dataclasses

import pytest
from runs import load_config

from jaxreason import build, platforms
from jaxreason.build import batches
from jaxreason.model import ModelConfig
from jaxreason.platforms import PLATFORMS

SHAPE = ModelConfig(vocab_size=128, layers=4, width=128, heads=4, kv_heads=2, head_size=32, feed_forward=512)
LIMITS = build.Attempts(completion=128, prompt=32)
CORPUS = {"name": "corpus", "rows": 64, "length": 160}
MACHINES = {  # cache by level -> bytes that are counted on
    "Zen 5": ({1: "48K", 2: "1024K", 3: "32768K"}, 2**25),
    "Zen 3": ({1: "32K", 2: "512K", 3: "32M"}, 2**24),
    "many cores": ({2: "2048K", 3: "504M"}, 2**26),
    "no third level": ({1: "64K", 2: "12M"}, 12 * 2**20),
    "nothing told": ({}, 2**24),
    "a size of 0": ({2: "1024K", 3: "0K"}, 2**20),
    "empty files": ({2: "", 3: ""}, 2**24),
    "no number": ({2: "512K", 3: "<unknown>"}, 2**19),
    "a size without a unit": ({3: "33554432"}, 2**25),
}


def choose(monkeypatch, sources=(CORPUS,), shape=SHAPE, devices=1, platform="cpu", cache=2**25):
    monkeypatch.setattr(batches, "cache_bytes", lambda: cache)
    return build.choose_microbatches(sources, shape, LIMITS, devices, PLATFORMS[platform])


@pytest.mark.parametrize("machine", MACHINES)
def test_the_cache_is_read_from_the_machine(monkeypatch, tmp_path, machine):
    levels, expected = MACHINES[machine]
    for level, size in levels.items():
        for kind in ("Data", "Instruction") if level == 1 else ("Unified",):
            folder = tmp_path / f"index{level}{kind}"
            folder.mkdir()
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(platforms, "CACHES", tmp_path)
    assert platforms.cache_bytes.__wrapped__() == expected


def test_a_cache_without_a_readable_file_is_passed_over(monkeypatch, tmp_path):
    for index, files in enumerate([{"level": "3"}, {"size": "64K"}, {"level": "", "size": "1M"}, {"level": "2", "size": "256K"}]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    (tmp_path / "index9" / "level").mkdir(parents=True)
    (tmp_path / "index8" / "size").mkdir(parents=True)
    (tmp_path / "index8" / "level").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(platforms, "CACHES", tmp_path)
    assert platforms.cache_bytes.__wrapped__() == 2**18


def test_processes_of_one_run_count_on_the_same_cache(monkeypatch):
    monkeypatch.setattr(platforms.jax, "process_count", lambda: 2)
    assert platforms.cache_bytes.__wrapped__() == platforms.UNKNOWN_CACHE_BYTES


def test_smaller_caches_and_wider_models_get_smaller_microbatches(monkeypatch):
    by_cache = [choose(monkeypatch, cache=cache) for cache in (2**23, 2**25, 2**27)]
    assert by_cache == sorted(by_cache, reverse=True)
    assert len(set(by_cache)) == 3
    assert choose(monkeypatch) in (16, 32)  # measured: 0.84 and 0.82 s a step, 1.19 s in one (bench/README.md)


def test_a_model_that_no_cache_holds_is_not_read_for_a_few_tokens(monkeypatch):
    smollm2 = dataclasses.replace(
        SHAPE, vocab_size=49152, layers=30, width=576, heads=9, kv_heads=3, head_size=64, feed_forward=1536
    )
    assert choose(monkeypatch, [CORPUS | {"rows": 2, "length": 323}], smollm2) == 1
    assert choose(monkeypatch, [CORPUS | {"rows": 256, "length": 323}], smollm2) in (32, 64)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    "source",
    [
        CORPUS,
        {"name": "demonstrations", "rows": 48, "max_tokens": 100},
        {"name": "rollouts", "problems": 24, "group": 8},
        {"name": "rollouts", "problems": 24, "group": 8, "max_tokens": 9, "rollouts_per_prompt": 2},
        {"name": "kept_rollouts", "problems": 24, "group": 8},
    ],
)
def test_the_number_divides_the_rows_of_each_device(monkeypatch, source, platform, devices):
    found = choose(monkeypatch, [source], platform=platform, devices=devices, cache=2**20)
    size = build.batch_size(source, SHAPE, LIMITS, devices * found)
    assert found >= 1
    assert size.rows % (devices * found) == 0
    assert size == build.batch_size(source, SHAPE, LIMITS, devices)  # no attempts lose their common prompt for it


def test_accelerators_get_as_many_tokens_as_their_row_says(monkeypatch):
    assert choose(monkeypatch, [CORPUS | {"rows": 64, "length": 1024}], platform="tpu") == 8
    assert choose(monkeypatch, [CORPUS | {"rows": 64, "length": 1024}], platform="tpu", devices=8) == 1


def test_a_run_records_the_numbers_that_were_chosen(monkeypatch, capsys):
    monkeypatch.setattr(batches, "cache_bytes", lambda: 2**16)
    made = build.build(load_config("tiny", "smoke", **{"rl.microbatches": 1, "sharding.mesh.data": 1}))
    chosen = {phase.name: phase.microbatches for phase in made.phases}
    assert chosen["prior"] > chosen["rl"] == 1
    assert made.description["environment"]["microbatches"] == chosen
    assert f"prior: microbatches={chosen['prior']}, chosen for this machine" in capsys.readouterr().out


def test_parts_of_a_mix_divide_alike(monkeypatch):
    parts = [CORPUS | {"rows": 48}, {"name": "rollouts", "problems": 4, "group": 4, "rollouts_per_prompt": 1}]
    found = choose(monkeypatch, parts, cache=2**18)
    assert 48 % found == 16 % found == 0
    assert found == 16


@pytest.mark.parametrize(
    "source",
    [
        *[{"name": "mine:maker", "rows": 64}, {"name": "corpus"}, CORPUS | {"rows": 7}, CORPUS | {"rows": -8}],
        *[CORPUS | {"length": -160}, {"name": "demonstrations", "rows": 8, "max_tokens": -100}],
        {"name": "rollouts", "problems": 8, "group": 4, "rollouts_per_prompt": 3},
        {"name": "rollouts", "problems": 8, "group": -4},
        *[{"name": name, "problems": 8, "group": 2, "max_tokens": -100} for name in ("rollouts", "kept_rollouts")],
    ],
)
def test_a_source_that_does_not_say_its_size_is_not_cut(monkeypatch, source):
    assert choose(monkeypatch, [CORPUS, source], devices=2) == 1


def test_no_source_at_all_is_one_batch(monkeypatch):
    assert choose(monkeypatch, []) == 1


@pytest.mark.parametrize("number", [1, 2, 16, 36, 97, 360])
def test_divisors(number):
    assert batches.divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
