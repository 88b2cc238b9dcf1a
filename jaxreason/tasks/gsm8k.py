"""GSM8K, grade school word problems (Cobbe et al., 2021, arXiv 2110.14168), read with TensorFlow Datasets.

Reads the prepared `gsm8k/1.0.0` folder of array_record files: random access, no TensorFlow, and the network is never tried.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxreason.options import unknown
from jaxreason.types import Task

PREPARE = "pip install tensorflow && tfds build gsm8k --file_format=array_record"
ANNOTATION = re.compile(r"<<[^<>]*>>")  # the data set's calculator calls: $<<3*5=15>>15


def gsm8k(
    split: str = "train",  # train or test
    limit: int | None = None,  # tasks, at most
    data_dir: str | None = None,  # that holds gsm8k/1.0.0; None: TFDS_DATA_DIR, else ~/tensorflow_datasets
    annotations: bool = False,  # keep the calculator calls of the solutions
) -> Sequence[Task]:
    """Load GSM8K. The solution ends in `#### answer`; `annotations` keeps its calculator calls.

    `data_dir` holds `gsm8k/1.0.0`; by default the environment's TFDS_DATA_DIR, else `~/tensorflow_datasets`.

    Raises:
      FileNotFoundError: there is no prepared data set.
      ValueError: an unknown split, or a format without random access.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folders = sorted(root.glob("gsm8k/*/dataset_info.json"))
    if not folders:
        raise FileNotFoundError(
            f"no gsm8k/1.0.0 in {root}; set TFDS_DATA_DIR (or data_dir) to the folder that has it, or prepare it once with "
            f"network: `{PREPARE}`, or use the task 'jsonl' with path=train.jsonl of its authors and marker='####'"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folders[-1].parent))  # reads only this folder; data_source("gsm8k") may ask GCS
    if split not in builder.info.splits:
        raise ValueError(unknown("split of task 'gsm8k'", split, builder.info.splits))
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(f"{folders[-1].parent} is not in array_record format; prepare it with `{PREPARE}`") from None
    count = len(rows) if limit is None else min(limit, len(rows))
    return [_task(rows[i], f"gsm8k/{split}/{i}", annotations) for i in range(count)]


def _task(row: dict, id: str, annotations: bool) -> Task:
    worked, _, answer = row["answer"].decode().rpartition("####")
    if not annotations:
        worked = ANNOTATION.sub("", worked)
    answer = answer.strip().replace(",", "")
    return Task(row["question"].decode().strip(), answer, f"{worked.strip()}\n#### {answer}", id)
