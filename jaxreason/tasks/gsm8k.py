"""GSM8K, grade-school word problems (Cobbe et al., 2021, arXiv 2110.14168; MIT), from
TensorFlow Datasets or from the Hugging Face hub.

A prepared `gsm8k/1.0.0` folder of array_record files is read without TensorFlow and
without network. Without such a folder, `openai/gsm8k` is read from the hub or its local
cache. Rows, order and ids are the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from hashlib import md5
from pathlib import Path

from jaxreason.options import unknown_name_message
from jaxreason.runtime import hub
from jaxreason.tasks.hub import data_folder, read_rows
from jaxreason.types import Task

HUB_ID = "openai/gsm8k"
PREPARE = "pip install tensorflow && tfds build gsm8k --file_format=array_record"
ANNOTATION = re.compile(r"<<[^<>]*>>")  # the data set's calculator calls: $<<3*5=15>>15
RESULT = re.compile(r"(?<==)[^<>=]*>>")  # the part of a call that the calculator writes


def gsm8k(
    split: str = "train",  # train or test
    limit: int | None = None,  # maximum number of tasks
    data_dir: str | None = None,  # folder with gsm8k/1.0.0; None: TFDS_DATA_DIR, else ~/tensorflow_datasets, else the hub
    annotations: bool = False,  # keep the calculator calls of the solutions
    revision: str | None = None,  # a commit of openai/gsm8k to read from the hub
) -> Sequence[Task]:
    """Load GSM8K. The solution ends in `#### answer`; `annotations` keeps its
    calculator calls, and lists their results in `data["forced"]`, so that imitation
    does not train on what the calculator writes (dialect `angles`).

    `data_dir` is the folder that holds `gsm8k/1.0.0`; by default the environment's
    TFDS_DATA_DIR, else `~/tensorflow_datasets`, else the hub. `revision`, a commit of
    `openai/gsm8k`, forces the hub.

    Raises:
      FileNotFoundError: the data set is neither prepared here nor available from the
        hub.
      ValueError: an unknown split, or a prepared format without random access.
    """
    root = Path(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    folders = sorted(root.glob("gsm8k/*/dataset_info.json"))
    if folders and revision is None:
        rows = _prepared(folders[-1].parent, split, limit)
    else:
        try:
            if data_dir is not None and revision is None:
                raise FileNotFoundError(f"no gsm8k/1.0.0 in {root}")
            rows = _downloaded(split, revision, root)
        except FileNotFoundError as error:
            why = str(error) if data_dir is not None else f"no gsm8k/1.0.0 in {root}, and {error}"
            raise FileNotFoundError(
                f"{why}. For GSM8K set TFDS_DATA_DIR (or data_dir) to the folder that has it, or prepare it once with network: "
                f"`{PREPARE}`, or use the task 'jsonl' with path=train.jsonl of its authors and marker='####'"
            ) from None
    return [_task(*row, f"gsm8k/{split}/{i}", annotations) for i, row in enumerate(rows[:limit])]


def _prepared(folder: Path, split: str, limit: int | None) -> Sequence[tuple[str, str]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))  # reads only this folder; data_source("gsm8k") may ask GCS
    if split not in builder.info.splits:
        raise ValueError(unknown_name_message("split of task 'gsm8k'", split, builder.info.splits))
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f"{folder} is not in array_record format; prepare it with `{PREPARE}`") from None
    some = (rows[i] for i in range(len(rows) if limit is None else min(limit, len(rows))))
    return [(row["question"].decode(), row["answer"].decode()) for row in some]


def _downloaded(split: str, revision: str | None, root: Path) -> Sequence[tuple[str, str]]:
    if split not in ("train", "test"):
        raise ValueError(unknown_name_message("split of task 'gsm8k'", split, ("train", "test")))
    folder, files = data_folder(HUB_ID, "main", split, revision)
    why = "as revision says" if revision is not None else f"no prepared TFDS folder in {root}"
    hub.reading().say(f"gsm8k: {why}, reading {HUB_ID}@{folder.name} from the hub")
    rows = [(row["question"], row["answer"]) for row in read_rows(folder, files, ("question", "answer"))]
    return [rows[i] for i in tfds_order(split, len(rows))]


def tfds_order(split: str, count: int) -> list[int]:
    """Return the order in which TensorFlow Datasets stores `count` rows that its
    builder numbered from 0: sorted by the hash of split and number.
    """
    return sorted(range(count), key=lambda i: md5(f"{split}{i}".encode(), usedforsecurity=False).digest())


def _task(question: str, answer: str, id: str, annotations: bool) -> Task:
    worked, _, answer = answer.rpartition("####")
    if not annotations:
        worked = ANNOTATION.sub("", worked)
    answer = answer.strip().replace(",", "")
    solution = f"{worked.strip()}\n#### {answer}"
    data = {"forced": tuple(match.span() for match in RESULT.finditer(solution))} if annotations else {}
    return Task(question.strip(), answer, solution, id, data)
