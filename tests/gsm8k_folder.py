"""A miniature GSM8K in the folder layout of TensorFlow Datasets, for tests without the
real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_gsm8k(folder: Path, rows_by_split: Mapping[str, Iterable[tuple[str, str]]]) -> Path:
    """Write (question, answer) rows, answers as the data set has them (`... #### 18`);
    return the data_dir to load from.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in ("question", "answer", "annotation", "short_answer")}
    )
    target = Path(folder) / "gsm8k" / "1.0.0"
    target.mkdir(parents=True)
    splits = []
    for split, rows in rows_by_split.items():
        writer = ArrayRecordWriter(str(target / f"gsm8k-{split}.array_record-00000-of-00001"), "group_size:1")
        records = []
        for question, answer in rows:
            annotation, _, short = answer.partition("#### ")
            row = {"question": question, "answer": answer, "annotation": annotation, "short_answer": short}
            records.append(features.serialize_example(features.encode_example(row)))
            writer.write(records[-1])
        writer.close()
        splits.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"name": "gsm8k", "version": "1.0.0", "fileFormat": "array_record", "moduleName": "gsm8k_folder", "splits": splits}
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "features.json").write_text(json.dumps(features.to_json()))
    return Path(folder)
