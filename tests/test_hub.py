"""The hub: files fetched, kept, checked and reported, by the real client and a stand-in
server on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import hub_server
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from gsm8k_folder import write_gsm8k
from hub_server import Hub, commit_of, repositories_in
from runs import ROOT, load_config, read_lines

from jaxreason import tasks
from jaxreason.build import build
from jaxreason.model import weights
from jaxreason.runtime import hub, workdir
from jaxreason.tasks import hub as hub_tasks

GOLDEN = Path(__file__).parent / "golden"
ROWS = [(f"Tom has {n} pens and buys {m}. How many?", f"He has <<{n}+{m}>>.\n#### {n + m}") for n in range(4) for m in range(6)]
SPLITS = {"train": ROWS[8:], "test": ROWS[:8]}


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def as_gsm8k(rows) -> list[dict]:
    return [{"question": question, "answer": answer} for question, answer in rows]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Make folders for the stand-in: a model with unneeded files, in one file and in
    shards, and small data sets.
    """
    import jax

    from jaxreason import text
    from jaxreason.model import ModelConfig, transformer

    root = tmp_path_factory.mktemp("hub")
    shape = ModelConfig(text.load(GOLDEN / "chat").vocab_size, 16, 2, 2, 1, 8, 32, tied_embeddings=True)
    params = transformer(shape).init(jax.random.key(0))
    weights.save(root / "org/tiny", shape, params, tokenizer_folder=GOLDEN / "chat")
    weights.save(root / "org/shards", shape, params, tokenizer_folder=GOLDEN / "chat", max_shard_bytes=10_000)
    for name in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/model.safetensors", "consolidated.safetensors"):
        (root / "org/tiny" / name).parent.mkdir(exist_ok=True)
        (root / "org/tiny" / name).write_bytes(b"not needed" * 100)
    (root / "org/pickled").mkdir()
    (root / "org/pickled/config.json").write_text("{}")
    (root / "org/pickled/pytorch_model.bin").write_bytes(b"x")
    gsm8k = root / "datasets/openai/gsm8k"
    for split, rows in SPLITS.items():
        write_parquet(gsm8k / f"main/{split}-00000-of-00001.parquet", as_gsm8k(rows))
        write_parquet(gsm8k / f"socratic/{split}-00000-of-00001.parquet", as_gsm8k(rows[::-1]))
    (gsm8k / "README.md").write_text("A copy.")
    return root


@pytest.fixture
def served(root, tmp_path, monkeypatch):
    """Serve `root` to this process's client, with an empty cache, nobody logged in, and
    no waits.
    """
    constants = huggingface_hub.constants
    server = Hub(repositories_in(root))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.waits = waits
    yield server
    server.close()


def refuse(ending: str, status: int, times: int = 10**6, **headers):
    """Make a fault: answer `times` requests for paths with this ending with a
    status.
    """
    left = [times]

    def fault(method, path, asked):
        if not path.endswith(ending) or not left[0]:
            return None
        left[0] -= 1
        return status, {name.replace("_", "-"): value for name, value in headers.items()}

    return fault


def damage(ending: str, change, times: int = 10**6, status: int | None = None):
    """Make a fault: change the content of paths with this ending, `times` times; with
    status 206 the new length is announced.
    """
    left = [times]

    def fault(method, path, asked):
        if method != "GET" or not path.endswith(ending) or not left[0]:
            return None
        left[0] -= 1
        return status, change

    return fault


# --- fetching and caching ---


def test_weights_are_fetched_once_and_only_the_files_that_are_needed(served, root, capsys):
    folder = weights.resolve("org/tiny")
    assert folder.name == commit_of(root / "org/tiny")
    fetched = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert set(fetched) == {"config.json", "model.safetensors", *(weights.TOKENIZER_FILES)} & set(fetched)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(fetched)
    assert served.asked("GET", ".safetensors") == [f"/org/tiny/resolve/{folder.name}/model.safetensors"]
    said = capsys.readouterr()
    assert re.fullmatch(rf"downloading org/tiny@{folder.name}: {len(fetched)} files, 0\.\d MB, to \S+\n", said.out)
    assert said.err == ""  # no bar where there is no terminal
    served.requests.clear()
    assert weights.resolve("org/tiny") == folder
    assert served.requests == []
    assert weights.load(folder)[0].width == 16


def test_a_download_that_ended_early_gets_only_what_is_missing(served, monkeypatch):
    names = [path.rpartition("/")[2] for path in files_fetched(served, "org/shards")]
    assert names[0] == "config.json"
    assert names[-1].endswith(".safetensors")  # weights last
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    served.fault = refuse(names[-1], 503)
    with pytest.raises(FileNotFoundError, match=r"answered 503; give the same command again later"):
        weights.resolve("org/shards")
    assert hub.cached("org/shards", lambda found: weights.needed_files("org/shards", found)) is None
    served.fault = lambda *_: None
    assert [path.rpartition("/")[2] for path in files_fetched(served, "org/shards")] == names[-1:]
    (weights.resolve("org/shards") / names[-2]).unlink()  # somebody removed it from the cache
    assert [path.rpartition("/")[2] for path in files_fetched(served, "org/shards")] == []  # it is still among the client's blobs


def files_fetched(served, id: str) -> list[str]:
    served.requests.clear()
    weights.resolve(id)
    return [path for path in served.asked("GET") if "/resolve/" in path]


def test_a_connection_that_breaks_off_resumes_where_it_was(served, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # size of its write buffer; usually 10 MB
    breaks = damage("model.safetensors", lambda content: content[:5000], times=1)
    ranges = []

    def fault(method, path, headers):
        if path.endswith("model.safetensors") and method == "GET":
            ranges.append(headers.get("Range"))
        return breaks(method, path, headers)

    served.fault = fault
    folder = weights.resolve("org/tiny")
    assert ranges == [None, "bytes=5000-"]
    assert weights.load(folder)[0].width == 16


def test_a_file_with_another_content_is_refused_and_removed(served):
    flip = lambda content: content[:-1] + bytes([content[-1] ^ 1])  # noqa: E731
    for file in ("tokenizer.json", "model.safetensors"):  # known by git's own hash, and by sha256
        served.fault = damage(f"/{file}", flip)
        with pytest.raises(ValueError, match=rf"{file} of org/tiny came with hash .* was removed; give the same command again"):
            weights.resolve("org/tiny")
    served.fault = lambda *_: None
    assert weights.load(weights.resolve("org/tiny"))[0].width == 16


def test_offline_what_is_in_the_cache_is_used(served, root, monkeypatch):
    folder = weights.resolve("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    served.close()
    assert weights.resolve("org/tiny") == folder
    with pytest.raises(
        FileNotFoundError, match=r"HF_HUB_OFFLINE is set .*; unset it, or pass a folder .*; or run `hf download"
    ) as error:
        weights.resolve("org/shards")
    assert "\n" not in str(error.value)


def test_a_cache_that_another_program_filled_is_used_if_it_is_whole(served, monkeypatch):
    huggingface_hub.snapshot_download("org/shards", max_workers=1)
    served.requests.clear()
    folder = weights.resolve("org/shards")
    assert served.requests == []
    next(folder.glob("model-00002-*")).unlink()
    assert len(served.requests) == 0
    weights.resolve("org/shards")
    assert served.requests


def test_a_revision_pins(served, root, tmp_path, monkeypatch):
    copy = shutil.copytree(root / "org/tiny", tmp_path / "copy")
    served.repositories["org/tiny"] = copy
    old = weights.resolve("org/tiny")
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    new = commit_of(copy)
    assert weights.resolve("org/tiny") == old  # the cache first
    assert weights.resolve("org/tiny", revision=old.name) == old
    assert weights.resolve("org/tiny", revision=new).name == new
    assert weights.resolve("org/tiny") == old
    with hub.noting({"org/tiny": new}, say=lambda line: None) as noted:
        assert weights.resolve("org/tiny").name == new
    assert noted == {"org/tiny": new}
    with hub.noting(say=lambda line: None) as noted:  # two splits, and the branch moves between them
        tasks.load("gsm8k", split="train")
        served.repositories["datasets/openai/gsm8k"] = shutil.copytree(root / "datasets/openai/gsm8k", tmp_path / "moved")
        served.repositories["datasets/openai/gsm8k-old"] = root / "datasets/openai/gsm8k"
        monkeypatch.setitem(hub_server.BRANCHES, "old", "-old")
        (tmp_path / "moved/README.md").write_text("Another.")
        tasks.load("gsm8k", split="test")
    assert noted == {"datasets/openai/gsm8k": commit_of(root / "datasets/openai/gsm8k")}
    with pytest.raises(FileNotFoundError, match=r"it has no such revision; .*/org/tiny/commits/main"):
        weights.resolve("org/tiny", revision="v9")
    with pytest.raises(ValueError, match=r"revision got 'v9' with the folder .*; allowed: None"):
        weights.resolve(copy, revision="v9")


# --- faults ---


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refuse("config.json", 403, X_Error_Code="GatedRepo"), r"it is gated: ask for access at http\S+/org/tiny, then log in"),
        (refuse("/org/tiny", 404, X_Error_Code="RepoNotFound"), r"there is no http\S+/org/tiny, or it is private"),
        (refuse("/org/tiny", 401), r"there is no http\S+/org/tiny, or it is private; correct the name, or log in"),
        (refuse("/org/tiny", 403), r"refused the token in use here \(403\); make one .*settings/tokens"),
        (refuse("/org/tiny", 429), r"asks for fewer requests \(429\); log in"),
        (refuse("/org/tiny", 503), r"it answered 503; give the same command again later, or pass a folder"),
        (refuse("config.json", 503), r"it answered 503"),
        (refuse("config.json", 429, Retry_After="1"), r"\(429\)"),
        (refuse("/org/tiny", 200), r"Expecting value"),  # the login page of a hotel
        (damage("model.safetensors", lambda content: content[:100]), r"peer closed"),
        (damage("model.safetensors", lambda content: content[:100], status=206), r"broke off before a file was whole"),
    ],
)
def test_faults_of_the_hub_are_one_line_and_a_second_try_works(served, fault, words):
    served.fault = fault
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        weights.resolve("org/tiny")
    assert re.search(rf"org/tiny.*({words})", str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    served.fault = lambda *_: None
    assert weights.load(weights.resolve("org/tiny"))[0].width == 16


def test_a_hub_that_asks_to_wait_is_asked_again(served, capsys):
    served.fault = refuse("/org/tiny", 429, times=2, Retry_After="7")
    weights.resolve("org/tiny")
    assert served.waits[:2] == [7, 7]
    assert "org/tiny: the hub answered 429; trying again in 7 s" in capsys.readouterr().out
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    served.fault = refuse("tokenizer.json", 503, times=2)  # by the client
    weights.resolve("org/tiny")
    said = capsys.readouterr()
    assert "org/tiny: Retrying in" in said.out
    assert said.err == ""


def test_a_server_that_is_slow_is_waited_for_and_given_up_in_the_end(served, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    ended, slow = threading.Event(), [1]

    def fault(method, path, headers):
        if path.endswith("model.safetensors") and method == "GET" and slow[0]:
            slow[0] -= 1
            ended.wait(1.0)

    served.fault = fault
    weights.resolve("org/tiny")
    assert "Trying to resume" in capsys.readouterr().out
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    slow[0] = 10**6
    with pytest.raises(FileNotFoundError, match=r"cannot get 'org/tiny' from the hub: .*timed out") as error:
        weights.resolve("org/tiny")
    assert "\n" not in str(error.value)
    ended.set()


def test_a_token_is_sent_and_a_gated_model_names_its_account(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    tokens = []
    served.fault = lambda method, path, headers: tokens.append(headers.get("Authorization"))
    weights.resolve("org/tiny")
    assert set(tokens) == {"Bearer hf_" + "x" * 34}
    served.fault = refuse("config.json", 403, X_Error_Code="GatedRepo")
    with pytest.raises(FileNotFoundError, match=r"ask for access at .*/org/shards, with the account of the token"):
        weights.resolve("org/shards")


def test_a_repository_without_safetensors_is_refused_before_a_download(served):
    with pytest.raises(ValueError, match=r"org/pickled lacks .*model\.safetensors.*it has: config.json, pytorch_model.bin"):
        weights.resolve("org/pickled")
    assert not [path for path in served.asked("GET") if "/resolve/" in path]
    with pytest.raises(FileNotFoundError, match=r"no folder './nowhere'"):
        weights.resolve("./nowhere")


def test_no_server_and_a_full_disk_are_one_line(served, monkeypatch):
    served.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(FileNotFoundError, match=r"\(http://127.0.0.1:\d+\); pass a folder that holds it; or run") as error:
            weights.resolve("org/tiny")
    assert "\n" not in str(error.value)
    full = OSError(28, "No space left on device", "/cache/x")
    assert hub.explain(full, "a/b", "model").startswith(
        "can't write to /cache/x: No space left on device; make room, or set HF_HOME"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"sha": "../../../../escaped"},
        {"sha": "/tmp/escaped"},
        {"sha": "A" * 40},
        {"sha": ""},
        {"sha": None},
        *({"siblings": [{"rfilename": name}]} for name in ("../x.json", "/x.json", "a/../../x", "a\\x", "a//x", "a\nb", ".", "")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("id", ["org/tiny", "openai/gsm8k"])
def test_names_that_leave_the_cache_are_refused(served, tmp_path, id, changes):
    served.changes = changes
    with pytest.raises(ValueError, match=r"names the commit|lists a file") as error:
        weights.resolve(id) if id == "org/tiny" else tasks.load("hub", id=id, config="main")
    assert "\n" not in str(error.value)
    assert id in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [b"{", b"{}", b'"main"', b"[1]", b'["../x"]', b"\xff", b"[" * 10**5])
def test_a_damaged_note_of_the_cache_is_named_and_written_anew(served, monkeypatch, capsys, content):
    folder = weights.resolve("org/tiny")
    note = folder.parent.parent / "jaxreason" / f"{folder.name}.json"
    whole = note.read_bytes()
    note.write_bytes(content)
    capsys.readouterr()
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
            weights.resolve("org/tiny")
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"{note} is damaged: it holds no list of file names; asking the hub for them"
    assert weights.resolve("org/tiny") == folder
    assert note.read_bytes() == whole


@pytest.mark.parametrize("content", [b"../../x", b"main", b"\xff\xfe", b"0" * 39])
def test_a_damaged_branch_of_the_cache_is_named_and_written_anew(served, capsys, content):
    folder = weights.resolve("org/tiny")
    branch = folder.parent.parent / "refs/main"
    branch.write_bytes(content)
    capsys.readouterr()
    assert weights.resolve("org/tiny") == folder
    assert capsys.readouterr().out.startswith(f"{branch} is damaged: got ")
    assert branch.read_text() == folder.name


# --- data ---


def test_gsm8k_of_the_hub_is_that_of_the_prepared_folder(served, root, tmp_path, monkeypatch, capsys):
    """TensorFlow Datasets orders rows by its own hash; its hasher is the oracle
    here.
    """
    from tensorflow_datasets.core.hashing import Hasher

    prepared = {}
    for split, rows in SPLITS.items():
        hasher = Hasher(split)
        prepared[split] = [rows[i] for i in sorted(range(len(rows)), key=hasher.hash_key)]
    assert prepared["train"] != SPLITS["train"]
    data_dir = str(write_gsm8k(tmp_path / "tfds", prepared))
    for split in prepared:
        for options in ({}, {"limit": 3}, {"annotations": True}):
            assert tasks.load("gsm8k", split=split, **options) == tasks.load("gsm8k", split=split, data_dir=data_dir, **options)
    commit = commit_of(root / "datasets/openai/gsm8k")
    line = f"gsm8k: no prepared TFDS folder in {tmp_path}/home/tensorflow_datasets, reading openai/gsm8k@{commit} from the hub"
    assert line in capsys.readouterr().out
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert len(tasks.load("gsm8k")) == len(SPLITS["train"])
    capsys.readouterr()
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    served.requests.clear()
    tasks.load("gsm8k")
    assert (served.requests, capsys.readouterr().out) == ([], "")
    tasks.load("gsm8k", revision=commit)
    assert f"as revision says, reading openai/gsm8k@{commit}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="split of task 'gsm8k' 'validation'; one of: test, train"):
        tasks.load("gsm8k", split="validation", revision=commit)


def test_gsm8k_neither_prepared_nor_to_be_had_says_both(served, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"no gsm8k/1.0.0 in .*HF_HUB_OFFLINE.*TFDS_DATA_DIR.*tfds build gsm8k.*jsonl"
    ) as error:
        tasks.load("gsm8k")
    assert "\n" not in str(error.value)


def add(served, tmp_path, id: str, **files) -> str:
    """Serve a data set of these files: rows for parquet, text for others."""
    folder = tmp_path / id.replace("/", "-")
    for name, content in files.items():
        if isinstance(content, list):
            write_parquet(folder / f"{name}.parquet", content)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    served.repositories[f"datasets/{id}"] = folder
    return id


def test_any_data_set_by_the_names_of_its_fields(served, tmp_path, capsys):
    rows = [
        {"prompt": [{"content": "1+1?"}], "reward": {"truth": 2.0}, "level": "Level 5", "rate": 0.5},
        {"prompt": [{"content": "2+2?"}], "reward": {"truth": 4.0}, "level": "Level 1", "rate": 0.1},
        {"prompt": [{"content": "none?"}], "reward": {"truth": None}, "level": "Level 5", "rate": None},
    ]
    id = add(served, tmp_path, "some/set", **{"data/train-00000-of-00001": rows})
    how = {"id": id, "question": "prompt.0.content", "answer": "reward.truth"}
    made = tasks.load("hub", **how)
    assert [(t.question, t.answer, t.id) for t in made] == [("1+1?", "2", f"{id}/train/0"), ("2+2?", "4", f"{id}/train/1")]
    assert "some/set/train: 1 of 3 rows left out, which have no answer in 'reward.truth'" in capsys.readouterr().out
    for filter, kept in (
        ({"level": ("Level 5",)}, 1),
        ({"level": "Level 1"}, 1),
        ({"rate": {"min": 0.1, "max": 0.4}}, 1),
        ({}, 2),
    ):
        assert len(tasks.load("hub", **how, filter=filter)) == kept
    assert len(tasks.load("hub", **how, limit=1)) == 1
    asked = tasks.load("hub", **how | {"question": "{level}: {prompt.0.content} {{}}"})[0].question
    assert asked == "Level 5: 1+1? {}"
    with pytest.raises(
        ValueError, match=r"train-00000-of-00001.parquet: unknown field 'promt' \(did you mean 'prompt'\?\); one of: level"
    ):
        tasks.load("hub", **how | {"question": "promt.0.content"})
    with pytest.raises(ValueError, match=r"unknown split of some/set 'test'; one of: train"):
        tasks.load("hub", **how, split="test")
    with pytest.raises(ValueError, match=r"some/set/train has no tasks: 0 rows with filter="):
        tasks.load("hub", **how, filter={"level": "Level 9"})


@pytest.mark.parametrize(
    ("solution", "marker", "answer"),
    [
        (r"So $\boxed{1}$, no: $\boxed{\frac{1}{2}}$.", r"\boxed{", r"\frac{1}{2}"),
        ("One.\n#### 7", "####", "7"),
        ("none", "####", None),
        (r"cut \boxed{\frac{1}", r"\boxed{", None),
    ],
)
def test_the_answer_is_what_follows_the_last_marker(served, tmp_path, solution, marker, answer):
    rows = [{"question": "q", "answer": solution}, {"question": "r", "answer": f"{marker}3" + "}" * marker.endswith("{")}]
    id = add(served, tmp_path, "some/marked", **{"train": rows})
    made = tasks.load("hub", id=id, marker=marker)
    assert [t.answer for t in made] == ([answer] if answer else []) + ["3"]
    assert made[0].solution == (solution if answer else rows[1]["answer"])


def test_files_are_chosen_by_config_split_and_kind(served, tmp_path):
    q = [{"question": "q", "answer": "1"}]
    lines = "".join(json.dumps(row) + "\n" for row in q * 2)
    arranged = {
        "a/json": {"test.jsonl": lines, "dataset_infos.json": "{}"},
        "a/array": {"deep.json": json.dumps(q * 2, indent=1)},
        "a/dirs": {"en/train-00000-of-00002": q, "en/train-00001-of-00002": q, "cn/train-00000-of-00001": q},
        "a/script": {"script.py": "raise SystemExit"},
        "a/script-converted": {"default/validation/0000": q, "default/validation/0001": q},
    }
    for id, files in arranged.items():
        add(served, tmp_path, id, **files)
    assert len(tasks.load("hub", id="a/json", split="test")) == 2
    assert len(tasks.load("hub", id="a/array")) == 2  # no split is named: train
    assert len(tasks.load("hub", id="a/dirs", config="en")) == 2
    with pytest.raises(ValueError, match=r"a/dirs has several configs; set config to one of: cn, en"):
        tasks.load("hub", id="a/dirs")
    with pytest.raises(ValueError, match=r"unknown config of a/dirs 'fr'; one of: cn, en"):
        tasks.load("hub", id="a/dirs", config="fr")
    with hub.noting(say=lambda line: None) as noted:
        assert len(tasks.load("hub", id="a/script", split="validation")) == 2
    assert noted == {"datasets/a/script": commit_of(served.repositories["datasets/a/script-converted"])}
    served.requests.clear()
    assert len(tasks.load("hub", id="a/script", split="validation")) == 2
    assert served.requests == []
    with pytest.raises(ValueError, match=r"unknown split of a/script 'train'; one of: validation"):
        tasks.load("hub", id="a/script")


Q = [{"question": "q", "answer": "1"}]
OTHER = [{"question": "other", "answer": "2"}]


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ({"main/train": Q, "main-old/train": OTHER}, {"config": "main"}),
        ({"main/train": Q, "old/main/train": OTHER}, {"config": "main"}),
        ({"data/en/train": Q, "data/cn/train": OTHER}, {"config": "en"}),
        ({"data/train": Q, "train-data/test": OTHER}, {}),
        ({"train/0000": Q, "test/0000": OTHER}, {}),
        ({"main/train/0000": Q, "main/test/0000": OTHER}, {"config": "main"}),
        ({"train": Q, "train_old": OTHER}, {}),
        ({"train-00000-of-00001-b42a775f407cee45": Q, "test-00000-of-00001-b42a775f407cee45": OTHER}, {}),
        ({"gsm8k_train": Q, "gsm8k_test": OTHER}, {}),
        ({"train": Q, "old/train": OTHER}, {"config": "default"}),
        ({"data/train": Q, "old/train": OTHER}, {"config": "default"}),
    ],
)
def test_a_config_is_its_folder_and_a_split_its_stem(served, tmp_path, files, options):
    id = add(served, tmp_path, "some/set", **files)
    assert [task.question for task in tasks.load("hub", id=id, **options)] == ["q"]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"data/train": Q, "old/train": OTHER}, {}, r"several configs; set config to one of: data, old$"),
        ({"a/main/train": Q, "b/main/train": OTHER}, {"config": "main"}, r"several configs; .* one of: a/main, b/main$"),
        ({"main-old/train": OTHER}, {"config": "main"}, r"unknown config of some/set 'main'.*one of: main-old$"),
        ({"train_a": Q, "train_b": OTHER}, {}, r"several files of split 'train': train_a.parquet, train_b.parquet; "),
        ({"a": Q, "b": OTHER}, {}, r"several files of split 'train': a.parquet, b.parquet; "),
        ({"train-set/test": Q}, {}, r"unknown split of some/set 'train'; one of: test$"),
        ({"main/partial-train/0000": Q}, {}, r"unknown split of some/set 'train'.*one of: partial-train$"),
        ({"train-00000-of-00002": Q}, {}, r"lacks the shard train-00001-of-00002.parquet;"),
        ({"d/train-00001-of-00002": Q}, {}, r"lacks the shard d/train-00000-of-00002.parquet;"),
        ({"train-00000-of-00009": Q}, {}, r"lacks the shard train-00001-of-00009.parquet and 7 more;"),
        ({"train/0000": Q, "train/0002": Q}, {}, r"lacks the shard train/0001.parquet;"),
        ({"train-00000-of-00001": Q, "train-00000-of-00002": Q, "train-00001-of-00002": Q}, {}, "shards of several tables: "),
        ({"train-00000-of-00001-b42a775f407cee45": Q, "train-00000-of-00001-b42a775f407cee46": Q}, {}, "shards of several"),
        ({"train": Q, "train-00000-of-00001": Q}, {}, "shards of several tables: "),
    ],
)
def test_files_that_may_not_be_those_that_are_meant_are_refused(served, tmp_path, files, options, message):
    id = add(served, tmp_path, "some/set", **files)
    with pytest.raises(ValueError, match=message) as error:
        tasks.load("hub", id=id, **options)
    assert "\n" not in str(error.value)
    assert not [path for path in served.asked("GET") if "/resolve/" in path]


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"x": {"mim": 1}}, r"unknown bound in filter of 'x' 'mim' \(did you mean 'min'\?\); one of: max, min"),
        ({"x": {"min": "a"}}, r"filter of 'x' got min='a'; allowed: numbers"),
        ({"x": {"min": None}}, r"filter of 'x' got min=None"),
        ({"x": {"max": True}}, r"filter of 'x' got max=True"),
        ({"x": {"max": float("nan")}}, r"filter of 'x' got max=nan"),
        ({"x": {"min": 2, "max": 1}}, r"filter of 'x' got \{'min': 2, 'max': 1\}; allowed: .* min not above max"),
        ({"x": {}}, r"filter of 'x' got \{\}; allowed: min, max or both"),
        ({"x": ({"min": 1},)}, r"filter of 'x' got \{'min': 1\}; allowed: a text, a number"),
        ({"x": {1, 2}}, r"filter of 'x' got \{1, 2\}; allowed: a text"),
        ({3: 1}, r"filter got the field 3; allowed: names"),
        ("x", r"filter got 'x'; allowed: a mapping"),
    ],
)
def test_a_filter_that_means_nothing_is_refused_before_a_download(served, filter, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.load("hub", id="openai/gsm8k", config="main", filter=filter)
    assert "\n" not in str(error.value)
    assert served.requests == []


def test_a_part_is_held_out_where_there_is_no_test_split(served, tmp_path):
    id = add(served, tmp_path, "some/train", **{"train": [{"question": f"q{i}", "answer": str(i)} for i in range(300)]})
    train, test = (tasks.load("hub", id=id, split=split, held_out=0.2) for split in ("train", "test"))
    assert len(train) + len(test) == 300
    assert 30 < len(test) < 90
    assert not {t.question for t in train} & {t.question for t in test}


def test_a_damaged_file_is_named(served, tmp_path):
    for name, content, words in (
        ("train.parquet", "no parquet", r"train.parquet is not a whole parquet file"),
        ("train.jsonl", '{"question": 1}\n{oops\n', r"train.jsonl is neither a JSON array nor JSON lines"),
        ("train.jsonl", '{"question": "caf\u00e9"}'.encode("latin-1"), r"train.jsonl is not UTF-8"),
        ("train.json", "[1]", r"train.json has a row that is a JSON int"),
    ):
        id = add(served, tmp_path, f"bad/{name.replace('.', '-')}{type(content).__name__}", **{name: content})
        with pytest.raises(ValueError, match=words) as error:
            tasks.load("hub", id=id)
        assert "\n" not in str(error.value)


MATH = {"problem": "p", "answer": "1", "solution": r"\boxed{1}"}
# What each short name reads: files as its repository has them, and the first task.
SHORT = {
    "svamp": ("ChilleD/SVAMP", "test.json", {"Body": "B. ", "Question": "Q?", "Answer": 145.0}, "B. Q?", "145"),
    "asdiv": ("EleutherAI/asdiv", "asdiv/validation-0", {"body": "B.", "question": "Q?", "answer": "9 (a)"}, "B. Q?", "9 (a)"),
    "math": ("nlile/hendrycks-MATH-benchmark", "data/train-0", MATH | {"level": 5}, "p", "1"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl", MATH, "p", "1"),
    "aime24": ("HuggingFaceH4/aime_2024", "data/train-0", MATH, "p", "1"),
    "aime25": ("math-ai/aime25", "test.jsonl", {"problem": "p", "answer": "070", "id": "0"}, "p", "070"),
    "amc23": ("math-ai/amc23", "test-0", {"question": "p", "answer": 27.0}, "p", "27"),
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json", MATH | {"solution": ""}, "p", "1"),
    "dapo_math_17k": ("open-r1/DAPO-Math-17k-Processed", "en/train-0", {"prompt": "p", "solution": "34"}, "p", "34"),
    "big_math": ("SynthLabsAI/Big-Math-RL-Verified", "data/train-0", MATH | {"llama8b_solve_rate": 0.5}, "p", "1"),
    "countdown_3to4": ("Jiayi-Pan/Countdown-Tasks-3to4", "data/train-0", {"target": 98, "nums": [44, 19, 35]}, None, "98"),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_reads_its_data_set(served, tmp_path, name):
    id, file, row, question, answer = SHORT[name]
    add(
        served,
        tmp_path,
        id,
        **{file: [row] if file.endswith("-0") else json.dumps([row]) if file[-5:] == ".json" else json.dumps(row)},
    )
    (task,) = tasks.load(name)
    assert (task.answer, task.id) == (answer, task.id)
    assert question in (None, task.question)
    assert re.search(r"licence|MIT|Apache|CC BY", tasks.TASKS[name].__doc__)
    assert id in tasks.TASKS[name].__doc__
    if name == "countdown_3to4":
        from jaxreason.verify import make

        assert task.data == {"numbers": (44, 19, 35), "target": 98}
        assert make("countdown")("A44+19+35", task).correct
    if name == "math":
        assert len(tasks.load("math", levels=(4, 5))) == 1
    if name == "big_math":
        with pytest.raises(ValueError, match="no tasks"):
            tasks.load("big_math", solve_rate=(0.6, 1.0))


PROGRAM = {
    "entry_point": "f",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1",
}
PROGRAMS = {
    "mbpp": (
        "google-research-datasets/mbpp",
        "full/train-0",
        {"text": "t", "code": "c", "test_list": ["assert f() == 1"], "test_setup_code": "", "challenge_test_list": []},
        {"tests": ("assert f() == 1",)},
    ),
    "humaneval": (
        "openai/openai_humaneval",
        "openai_humaneval/test-0",
        {"prompt": "def f():\n", **PROGRAM},
        {"tests": (PROGRAM["test"],), "entry_point": "f"},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_short_name_of_programs_reads_its_data_set(served, tmp_path, name):
    id, file, row, data = PROGRAMS[name]
    add(served, tmp_path, id, **{file: [row]})
    (task,) = tasks.load(name)
    assert task.data == data
    assert id in tasks.TASKS[name].__doc__
    assert re.search("MIT|CC BY", tasks.TASKS[name].__doc__)


def test_each_short_name_is_tried():
    assert set(SHORT) == {name for name, maker in tasks.TASKS.items() if maker.__module__ == hub_tasks.__name__} - {"hub"}


# --- the command ---


@pytest.fixture
def command(root, tmp_path):
    """Make `command(*options, **environment) -> Popen`: a run from an empty home, with
    a stand-in that a test may change.
    """
    server = Hub(repositories_in(root))
    started = []

    def start(*options, **environment):
        kept = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("JAX_")}
        empty = {"HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "PYTHONPATH": str(ROOT)}
        empty["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles faster
        (tmp_path / "home").mkdir(exist_ok=True)
        line = [sys.executable, "-m", "jaxreason.main", "--config=configs/gsm8k.py:model=org/tiny,smoke", *options]
        line.append(f"--workdir={tmp_path / 'run'}")
        how = {"cwd": ROOT, "env": kept | empty | environment, "text": True}
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how))
        return started[-1]

    start.hub = server
    yield start
    server.close()
    for process in started:
        process.kill()
        with contextlib.suppress(ValueError):
            process.communicate()


@pytest.mark.slow
@pytest.mark.process
def test_from_an_empty_home_one_command_reaches_the_first_step_and_ends(command, root, tmp_path):
    out, err = command().communicate(timeout=300)
    assert "Traceback" not in err
    commits = {name: commit_of(root / name) for name in ("org/tiny", "datasets/openai/gsm8k")}
    for line in (
        f"downloading org/tiny@{commits['org/tiny']}",
        "gsm8k: no prepared TFDS folder in",
        "downloading datasets/openai/gsm8k@",
    ):
        assert line in out, out + err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["done"], summary["steps"]) == (True, 2)
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "train/loss" in line] == [1, 2]
    assert json.loads((tmp_path / "run/config.json").read_text())["revisions"] == commits
    host = json.loads(next((tmp_path / "run/checkpoints").glob("2/host/metadata")).read_text())
    assert host["host"]["revisions"] == commits


def test_a_run_continues_at_the_commits_it_was_begun_with(served, root, tmp_path, monkeypatch):
    """The hub's branch has moved and the cache is new: the run still reads its first
    commits, unless told otherwise.
    """
    config = load_config("gsm8k", "model=org/tiny,smoke", **{"sharding.mesh.data": 1})
    begun = build(config, say=lambda line: None).provenance["revisions"]
    assert set(begun) == {"org/tiny", "datasets/openai/gsm8k"}
    (tmp_path / "config.json").write_text(json.dumps({"revisions": begun}))
    assert workdir.revisions(tmp_path) == begun
    moved = shutil.copytree(root / "datasets/openai/gsm8k", tmp_path / "moved")
    write_parquet(moved / "main/train-00000-of-00001.parquet", as_gsm8k(ROWS[:7:-1]))
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    served.repositories["datasets/openai/gsm8k"] = moved
    with pytest.raises(FileNotFoundError, match=r"openai/gsm8k.* no such revision"):  # it is gone, and not in this cache
        build(config, revisions=begun, say=lambda line: None)
    served.repositories["datasets/openai/gsm8k-old"] = root / "datasets/openai/gsm8k"
    monkeypatch.setitem(hub_server.BRANCHES, "old", "-old")
    assert build(config, revisions=begun, say=lambda line: None).provenance["revisions"] == begun
    assert build(config, say=lambda line: None).provenance["revisions"]["datasets/openai/gsm8k"] == commit_of(moved)


@pytest.mark.process
def test_the_command_keeps_to_the_commits_of_its_folder(command, root, tmp_path):
    from jaxreason.main import config_text

    config = json.loads(config_text(load_config("gsm8k", "model=org/tiny,smoke")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"revisions": {"org/tiny": "0" * 40}}))
    _, err = command().communicate(timeout=300)
    (line,) = err.strip().splitlines()
    assert re.fullmatch(r"error: .*'org/tiny'.* no such revision; .* begun with commit 0+: --accept_config_change .*", line)
    process = command("--accept_config_change")
    said = next(line for line in process.stdout if line.startswith("config changed"))
    assert said.strip() == f"config changed: revisions.org/tiny: {'0' * 40} there, {commit_of(root / 'org/tiny')} here"


@pytest.mark.process
def test_wrong_answers_of_the_hub_end_the_command_in_one_line(command):
    command.hub.fault = refuse("config.json", 403, X_Error_Code="GatedRepo")
    process = command()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = err.strip().splitlines()
    assert re.fullmatch(
        r"error: cannot get 'org/tiny' from the hub: it is gated: ask for access at http\S+/org/tiny, then log in .*", line
    )


@pytest.mark.process
def test_ctrl_c_during_a_download_is_one_line_and_the_next_try_continues(command, tmp_path):
    def slow(method, path, headers):
        if path.endswith("model.safetensors") and method == "GET":
            process.send_signal(signal.SIGINT)
            time.sleep(1)

    command.hub.fault = slow
    process = command()
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    cache = tmp_path / "home/.cache/huggingface/hub/models--org--tiny"
    assert any(cache.glob("snapshots/*/tokenizer.json"))
    assert not any(cache.glob("snapshots/*/model.safetensors"))
