"""Tasks from data sets on the Hugging Face hub: any data set by the names of its
fields, well-known ones by a short name.

A repository's own files are read: parquet, JSON lines or a JSON array. If it has none
of these, its parquet copy on the branch `refs/convert/parquet` is read. No code of a
repository is executed. Fetched files stay in the hub's cache (see
`jaxreason.runtime.hub`).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from jaxreason.options import read_text, unknown_name_message
from jaxreason.runtime import hub as hub_
from jaxreason.tasks import splits
from jaxreason.types import Task

CONVERTED = "refs/convert/parquet"  # the hub's own copy of a data set
KINDS = (".parquet", ".jsonl", ".json")  # in order of preference
NOT_DATA = re.compile(r"(.*/)?(dataset_infos?|state|config|metadata|\..*)\.json")


class NoData(ValueError):
    """Error for a repository without a file that can be read."""


def hub(
    id: str,  # owner/name
    question: str = "question",  # field, path or template of the question
    answer: str = "answer",  # field, path or template of the answer
    solution: str | None = None,  # field, path or template of the worked solution, if there is one
    config: str | None = None,  # config of a data set that has several
    split: str = "train",  # split, by the name that the data set gives it
    revision: str | None = None,  # a commit, branch or tag of the data set; None: main
    filter: Mapping[str, Any] | None = None,  # keep rows by field: a value, a tuple of them, or {"min": 1, "max": 3}
    marker: str | None = None,  # text in the answer field; the answer follows its last occurrence
    data: Mapping[str, str] | None = None,  # fields for the verifier: its name of each -> field
    held_out: float = 0.0,  # fraction of train held out as test, for a data set with only train
    limit: int | None = None,  # maximum number of tasks
) -> Sequence[Task]:
    r"""Load tasks from any data set of the hub, `id="owner/name"`.

    A field is given by its name (`answer`), by a path (`reward_model.ground_truth`,
    `messages.0.content`) or by a template (`"{Body} {Question}"`). Rows that lack a
    field are left out and counted.

    With `marker` (`"####"`, `"\\boxed{"`) the answer is the text after its last
    occurrence, up to the matching brace if the marker ends in one; without a `solution`
    the whole field is then the solution. With `held_out` above 0, `split` "test" takes
    this fraction of the questions of `train`, by their hash, and "train" takes the
    rest. The run records the commit that was read.

    Raises:
      FileNotFoundError: the data set is not available; says why.
      ValueError: no such config, split or field; lists the existing ones.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out got {held_out}; allowed: 0 to below 1")
    if held_out and split not in splits.SPLITS:
        raise ValueError(unknown_name_message("split", split, splits.SPLITS))
    _check_filter(filter)
    folder, files = data_folder(id, config, "train" if held_out else split, revision)
    wanted = {"question": question, "answer": answer} | ({} if solution is None else {"solution": solution})
    filter, data = dict(filter or {}), dict(data or {})
    names = [name for spec in (*wanted.values(), *data.values(), *filter) for name in fields_of(spec)]
    prefix = "/".join([id, *([] if config is None else [config]), split])
    tasks: list[Task] = []
    seen, lacking, split_of = 0, Counter(), splits.splitter(held_out)
    for index, row in enumerate(read_rows(folder, files, names)):
        if len(tasks) == limit:
            break
        if not all(_accepts(_at(row, name), wish) for name, wish in filter.items()):
            continue
        seen += 1
        texts = {name: _text(row, spec) or "" for name, spec in wanted.items()}
        if marker is not None:
            texts.setdefault("solution", texts["answer"])
            texts["answer"] = _after(texts["answer"], marker)
        if lost := [name for name in ("question", "answer") if not texts[name]]:
            lacking.update(lost[:1])
        elif not held_out or split_of(texts["question"]) == split:
            extra = {name: _data(_at(row, path)) for name, path in data.items()}
            tasks.append(Task(**texts, id=f"{prefix}/{index}", data=extra))
    for name, count in lacking.items():
        after = f" after {marker!r}" if marker is not None and name == "answer" else ""
        hub_.reading().say(f"{prefix}: {count} of {seen} rows left out, which have no {name} in {wanted[name]!r}{after}")
    if not tasks:
        raise ValueError(f"{prefix} has no tasks: {seen} rows with filter={filter}, {sum(lacking.values())} of them left out")
    return tasks


# --- files ---


def data_folder(id: str, config: str | None, split: str, revision: str | None = None) -> tuple[Path, list[str]]:
    """Return the local folder of a data set and the names of the files of one config
    and split.
    """
    chosen: list[str] = []

    def choose(names: Sequence[str]) -> list[str]:
        chosen[:] = data_files(id, names, config, split)
        return chosen

    keywords = {"kind": "dataset"}
    branches = [revision] if revision is not None else [None, CONVERTED]
    for branch in branches:  # look in the cache for both before any download
        if (folder := hub_.cached(id, choose, revision=branch, **keywords)) is not None:
            return folder, chosen
    try:
        return hub_.fetch(id, choose, revision=branches[0], **keywords), chosen
    except NoData:
        if revision is not None:
            raise
    return hub_.fetch(id, choose, revision=CONVERTED, **keywords), chosen


def data_files(id: str, names: Iterable[str], config: str | None, split: str) -> list[str]:
    """Choose the files of a split within one folder, that of the config.

    A file belongs to a split by its stem (`train.jsonl`,
    `train-00000-of-00002.parquet`; failing that, `gsm8k_train.jsonl`), or by its folder
    (`train/0000.parquet`).

    Raises:
      NoData: there are no files that can be read.
      ValueError: no such config or split, missing shards, or an ambiguous choice of
        files; lists the existing ones.
    """
    names = [name for name in names if not NOT_DATA.fullmatch(name)]
    files = next((found for kind in KINDS if (found := sorted(n for n in names if n.endswith(kind)))), [])
    if not files:
        raise NoData(f"{id} has no file in {', '.join(KINDS)}; it has: {', '.join(sorted(names)[:12]) or 'none'}")
    if config is not None:
        folders = {_config_of(name) for name in files}
        chosen = config if config != "default" or config in folders else "data" if "data" in folders else "."
        of_config = [name for name in files if _config_of(name) == chosen]
        of_config = of_config or [name for name in files if _config_of(name).rpartition("/")[2] == chosen]
        if not of_config:
            raise ValueError(unknown_name_message(f"config of {id}", config, folders))
        files = of_config
    files = _of_split(id, files, split)
    folders = sorted({_config_of(name) for name in files})
    if len(folders) > 1:
        raise ValueError(f"{id} has several configs; set config to one of: {', '.join(folders)}")
    series = {_series(name) for name in files}
    if len(series) > 1:
        raise ValueError(
            f"{id} has several files of split {split!r}: {', '.join(files[:12])}; download the right one and read it with the "
            "task 'jsonl'"
        )
    _check_shards(id, files)
    return files


WORDS = {"train": ("train",), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}
NUMBERED = re.compile(r"(.*?)(?:(?:^|[-_.])(\d+)(?:-of-(\d+)(?:-[0-9a-f]{16})?)?)?")  # name, index, count of a file's stem


def _parts(name: str) -> tuple[str, str, str]:
    """Split a file's name into its folder, the split that its last folder names ("" if
    none), and its stem.
    """
    path = PurePosixPath(name)
    words = [word for known in WORDS.values() for word in known]
    is_split = path.parent.name in words or path.parent.name.startswith("partial-")  # the hub's name for part of a split
    folder = path.parent.parent if is_split else path.parent
    return str(folder), path.parent.name if is_split else "", path.stem


def _config_of(name: str) -> str:
    return _parts(name)[0]


def _series(name: str) -> str:
    """Return the name that all shards of one table have in common."""
    _, split, stem = _parts(name)
    return f"{split}/{NUMBERED.fullmatch(stem)[1]}"


def _of_split(id: str, files: Sequence[str], split: str) -> list[str]:
    for named in (_named, _told):  # exact names first
        if found := [name for name in files if named(name) & {*WORDS.get(split, ()), split}]:
            return found
    known = {word: name for name, words in WORDS.items() for word in words}
    there = {known.get(word, word) for name in files for word in _named(name) | _told(name)}
    there = {word for word in there if word in WORDS or word.startswith("partial-")}
    if there or split != "train":  # files that name no split count as train
        raise ValueError(unknown_name_message(f"split of {id}", split, there or ["train"]))
    return list(files)


def _named(name: str) -> set[str]:
    """Return the split that a file's folder names, else its whole stem without its
    number.
    """
    _, split, stem = _parts(name)
    return {split or NUMBERED.fullmatch(stem)[1]}


def _told(name: str) -> set[str]:
    """Return the words of a file's stem, unless they name several splits."""
    _, split, stem = _parts(name)
    words = set() if split else set(re.split(r"[-_.]", stem))
    return words if sum(not words.isdisjoint(known) for known in WORDS.values()) <= 1 else set()


def _check_shards(id: str, files: Sequence[str]) -> None:
    """Check that each shard of a table exists exactly once."""
    found = [NUMBERED.fullmatch(_parts(name)[2]) for name in files]
    if counts := sorted({match[3] for match in found if match[3]}):
        indices = sorted(int(match[2]) for match in found if match[2])
        if len(counts) > 1 or len(indices) != len(files) or len(set(indices)) != len(indices):
            raise ValueError(f"{id} has shards of several tables: {', '.join(files[:12])}; read another revision of it")
        first = 0 if int(counts[0]) not in indices else 1  # data sets count from 0; some tools from 1
        wanted, width = range(first, first + int(counts[0])), len(found[0][2])
    elif all(match[2] and not match[1] for match in found):  # 0000.parquet
        indices = sorted(int(match[2]) for match in found)
        wanted, width = range(min(indices[0], 1), indices[-1] + 1), len(found[0][2])
    else:
        return
    lacking = len(wanted) - len({*indices}.intersection(wanted))
    if lacking:
        first_lacking = next(i for i in wanted if i not in indices)
        stem = NUMBERED.fullmatch(_parts(files[0])[2])
        lost = files[0][: len(files[0]) - len(PurePosixPath(files[0]).name)]
        lost += PurePosixPath(files[0]).name.replace(stem[2], f"{first_lacking:0{width}d}", 1)
        more = f" and {lacking - 1} more" if lacking > 1 else ""
        raise ValueError(f"{id} lacks the shard {lost}{more}; download it whole, or read another revision of it")


def read_rows(folder: Path, files: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield rows with the fields `names` (paths, which start with the name of a
    column).

    Raises:
      ValueError: a file is damaged, or lacks a field; lists its fields.
    """
    columns = dict.fromkeys(name.split(".")[0] for name in names)
    for file in files:
        yield from (_parquet if file.endswith(".parquet") else _json)(folder / file, list(columns))


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    import pyarrow.parquet as parquet  # imported here: it takes a third of a second

    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole parquet file ({' '.join(str(error).split())[:120]}); remove it and try again"
        ) from None
    for column in columns:
        _check_field(column, file.schema_arrow.names, path)
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _json(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    text = read_text(path)
    try:
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is neither a JSON array nor JSON lines: {error}") from None
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path} has a row that is a JSON {type(row).__name__}; allowed: objects")
    there = dict.fromkeys(name for row in rows for name in row)
    for column in columns:
        _check_field(column, there, path)
    yield from rows


def _check_field(name: str, there: Iterable[str], path: Path) -> None:
    if name not in there:
        raise ValueError(f"{path.name}: {unknown_name_message('field', name, there)}")


# --- fields ---


def fields_of(spec: str) -> list[str]:
    """List the fields that a name, a path or a template refers to."""
    return [name for _, name, _, _ in string.Formatter().parse(spec) if name is not None] if "{" in spec else [spec]


def _at(row: Any, path: str) -> Any:
    """Return the value at a path of a row; None if there is none."""
    for part in path.split("."):
        if isinstance(row, Mapping):
            row = row.get(part)
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _text(row: dict, spec: str) -> str | None:
    """Return a field, or a filled template, as text; None if a field is missing."""
    if "{" not in spec:
        return _plain(_at(row, spec))
    parts = []
    for literal, name, _, _ in string.Formatter().parse(spec):
        value = "" if name is None else _plain(_at(row, name))
        if value is None:
            return None
        parts.append(literal + value)
    return "".join(parts).strip()


def _plain(value: Any) -> str | None:
    """Convert a value to text: whole numbers lose their decimals (145.0 -> "145"),
    lists become "3, 4".
    """
    if isinstance(value, list):
        texts = [_plain(item) for item in value]
        return None if None in texts else ", ".join(texts)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (isinstance(value, float) and not isfinite(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _data(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


BOUNDS = ("min", "max")


def _check_filter(filter: Any) -> None:
    """Check the values of `filter`.

    Raises:
      ValueError: a value that is neither plain, nor a tuple of plain values, nor
        bounds.
    """
    if not isinstance(filter, Mapping | None):
        raise ValueError(f"filter got {filter!r}; allowed: a mapping of fields, such as {{'level': 5}}")
    for field, wish in (filter or {}).items():
        if not isinstance(field, str) or not field:
            raise ValueError(f"filter got the field {field!r}; allowed: names of fields")
        if not isinstance(wish, Mapping):
            for value in wish if isinstance(wish, tuple | list) else (wish,):
                if not isinstance(value, str | int | float | None):
                    raise ValueError(f"filter of {field!r} got {value!r}; allowed: a text, a number, a tuple of them, or bounds")
            continue
        for bound, value in wish.items():
            if bound not in BOUNDS:
                raise ValueError(unknown_name_message(f"bound in filter of {field!r}", bound, BOUNDS))
            if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
                raise ValueError(f"filter of {field!r} got {bound}={value!r}; allowed: numbers")
        if not wish or wish.get("min", -inf) > wish.get("max", inf):
            raise ValueError(f"filter of {field!r} got {dict(wish)}; allowed: min, max or both, min not above max")


def _accepts(value: Any, wish: Any) -> bool:
    if isinstance(wish, Mapping):
        low, high = wish.get("min", -inf), wish.get("max", inf)
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    return value in wish if isinstance(wish, tuple | list) else value == wish


def _after(text: str, marker: str) -> str:
    """Return the text after the last marker, up to the matching brace if the marker
    ends in an open one; empty if the marker or the brace is missing.
    """
    _, found, rest = text.rpartition(marker)
    if not found or not marker.endswith("{"):
        return rest.strip() if found else ""
    depth = 1
    for at, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return rest[:at].strip()
    return ""


# --- well-known ones ---


def svamp(split: str = "test", limit: int | None = None, revision: str | None = None) -> Sequence[Task]:
    """Load SVAMP, one-step word problems with varied wording (Patel et al., 2021, arXiv
    2103.07191).

    `ChilleD/SVAMP`, MIT: 700 for training, 300 for testing; answers are numbers.
    """
    return hub("ChilleD/SVAMP", "{Body} {Question}", "Answer", split=split, limit=limit, revision=revision)


def asdiv(limit: int | None = None, revision: str | None = None) -> Sequence[Task]:
    """Load ASDiv, 2,305 school word problems (Miao et al., 2020, arXiv 2106.15772), for
    evaluation.

    `EleutherAI/asdiv`, CC BY-NC 4.0; answers are numbers with their unit in
    parentheses, as `9 (apples)`.
    """
    return hub("EleutherAI/asdiv", "{body} {question}", split="validation", limit=limit, revision=revision)


def math(
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    levels: Sequence[int] | None = None,  # levels of difficulty, 1 to 5; None: all
) -> Sequence[Task]:
    """Load MATH, competition problems with worked solutions (Hendrycks et al., 2021,
    arXiv 2103.03874).

    `nlile/hendrycks-MATH-benchmark`, MIT: 12,000 for training and, for testing, the 500
    of MATH-500 (Lightman et al., 2023, arXiv 2305.20050). `levels` of difficulty are 1
    to 5; None for all.
    """
    filter = None if levels is None else {"level": tuple(levels)}
    keywords = {"split": split, "limit": limit, "revision": revision, "filter": filter}
    return hub("nlile/hendrycks-MATH-benchmark", "problem", "answer", "solution", **keywords)


def math500(limit: int | None = None, revision: str | None = None) -> Sequence[Task]:
    """Load MATH-500, the held-out part of MATH (Lightman et al., 2023, arXiv
    2305.20050), for evaluation.

    `HuggingFaceH4/MATH-500`; MATH itself is MIT.
    """
    return hub("HuggingFaceH4/MATH-500", "problem", "answer", "solution", split="test", limit=limit, revision=revision)


def aime24(limit: int | None = None, revision: str | None = None) -> Sequence[Task]:
    """Load the 30 problems of AIME 2024 (Mathematical Association of America), for
    evaluation; answers are 0 to 999.

    `HuggingFaceH4/aime_2024`, which names no licence.
    """
    return hub("HuggingFaceH4/aime_2024", "problem", "answer", "solution", split="train", limit=limit, revision=revision)


def aime25(limit: int | None = None, revision: str | None = None) -> Sequence[Task]:
    """Load the 30 problems of AIME 2025 (Mathematical Association of America), for
    evaluation; answers are 0 to 999.

    `math-ai/aime25`, Apache 2.0.
    """
    return hub("math-ai/aime25", "problem", "answer", split="test", limit=limit, revision=revision)


def amc23(limit: int | None = None, revision: str | None = None) -> Sequence[Task]:
    """Load 40 problems of AMC 12, 2023 (Mathematical Association of America), for
    evaluation; answers are numbers.

    `math-ai/amc23`, which names no licence.
    """
    return hub("math-ai/amc23", "question", "answer", split="test", limit=limit, revision=revision)


def deepscaler(
    split: str = "train", limit: int | None = None, revision: str | None = None, held_out: float = 0.01
) -> Sequence[Task]:
    """Load DeepScaleR's 40,000 problems of AIME, AMC, Omni-MATH and Still (Luo et al.,
    2025).

    `agentica-org/DeepScaleR-Preview-Dataset`, MIT. It has only `train`; a fraction
    `held_out` of it becomes `test` here.
    """
    keywords = {"split": split, "limit": limit, "revision": revision, "held_out": held_out}
    return hub("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer", "solution", **keywords)


def dapo_math_17k(
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    held_out: float = 0.01,
    language: str = "en",  # en, cn or all
) -> Sequence[Task]:
    """Load DAPO-Math-17k, problems with whole numbers as answers (Yu et al., 2025,
    arXiv 2503.14476).

    `open-r1/DAPO-Math-17k-Processed`, Apache 2.0: each problem once and without the
    instruction that the original wraps it in; `language` "en" (14,116), "cn" or "all".
    It has only `train`; a fraction `held_out` of it becomes `test` here.
    """
    keywords = {"split": split, "limit": limit, "revision": revision, "held_out": held_out, "config": language}
    return hub("open-r1/DAPO-Math-17k-Processed", "prompt", "solution", **keywords)


def big_math(
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    held_out: float = 0.002,
    solve_rate: tuple[float, float] | None = None,  # lowest and highest solve rate of Llama-3.1-8B
) -> Sequence[Task]:
    """Load Big-Math, 250,000 problems for RL (Albalak et al., 2025, arXiv 2502.17387).

    `SynthLabsAI/Big-Math-RL-Verified`, Apache 2.0 and gated: accept its terms there,
    then log in. `solve_rate` keeps problems that Llama-3.1-8B solves in this fraction
    of attempts, lowest and highest. It has only `train`; a fraction `held_out` of it
    becomes `test` here.
    """
    keywords = {"split": split, "limit": limit, "revision": revision, "held_out": held_out}
    if solve_rate is not None:
        keywords["filter"] = {"llama8b_solve_rate": {"min": solve_rate[0], "max": solve_rate[1]}}
    return hub("SynthLabsAI/Big-Math-RL-Verified", "problem", "answer", **keywords)


def countdown_3to4(
    split: str = "train", limit: int | None = None, revision: str | None = None, held_out: float = 0.002
) -> Sequence[Task]:
    """Load 490,000 countdown problems of three or four numbers (TinyZero: Pan et al.,
    2025), for the verifier `countdown`.

    `Jiayi-Pan/Countdown-Tasks-3to4`, which names no licence. It has only `train`; a
    fraction `held_out` of it becomes `test` here. It has no solutions; `Task.answer` is
    the target.
    """
    asked = "Using the numbers {nums}, each of them once, and + - * / and parentheses, write an expression that equals {target}."
    keywords = {"split": split, "limit": limit, "revision": revision, "held_out": held_out}
    return hub("Jiayi-Pan/Countdown-Tasks-3to4", asked, "target", data={"numbers": "nums", "target": "target"}, **keywords)
