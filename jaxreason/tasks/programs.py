r"""Programming problems with tests, for the verifier `code`: your own JSON-lines file,
MBPP and HumanEval.

A line of a file is an object in one of three layouts, told apart by their fields:

    own        question, tests; hidden_tests, setup, entry_point, solution if there are
               any: {"question": "Write f, which doubles.", "tests": ["assert f(2)==4"]}
    MBPP       text (or prompt), test_list; code, challenge_test_list, test_setup_code
               (or test_setup_list, test_imports)
    HumanEval  prompt, test, entry_point; canonical_solution

What a test may be is in `jaxreason.verify.code`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxreason.options import unknown_name_message
from jaxreason.tasks import hub as hub_
from jaxreason.tasks import splits
from jaxreason.tasks.jsonl import read_rows
from jaxreason.types import Task

SHOWN = "Your code should pass these tests:"  # Austin et al. 2021 prompt MBPP so
OWN = ("question", "tests", "hidden_tests", "setup", "entry_point", "solution")
MBPP = {"text": (), "test_list": (), "code": "", "challenge_test_list": (), "test_setup_code": ""}
HUMANEVAL = ("prompt", "test", "entry_point", "canonical_solution")


def programs(
    path: str,  # the JSON-lines file
    visible: int | None = None,  # tests that pay, at most; the others become hidden ones; None: all of `tests` pay
    split: str | None = None,  # train or test, by the question's hash; None: all
    held_out: float = 0.1,  # fraction of the questions that are test
    limit: int | None = None,  # maximum number of tasks
) -> Sequence[Task]:
    """Load programming problems with tests from a file, in a layout of this module.

    Use them with the verifier `code`. `solution` is for imitation and for checking the
    tests; a task has no other answer. Where the file has no hidden tests, `visible=1`
    pays for the first test and only reports the others.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a bad line (named as file:line), a missing field, or no tasks.
    """
    if split not in (None, *splits.SPLITS):
        raise ValueError(unknown_name_message("split of task 'programs'", split, splits.SPLITS))
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise FileNotFoundError(f"task 'programs': no file {str(file)!r}")
    made, split_of = [], splits.splitter(held_out)
    for number, row in read_rows(file):
        if limit is not None and len(made) >= limit:
            break
        task = task_of(row, f"{file}:{number}", f"{file.stem}/{number}", visible)
        if split is None or split_of(task.question) == split:
            made.append(task)
    if not made:
        raise ValueError(f"{file} has no tasks{'' if split is None else f' in split {split!r}'}")
    return made


def mbpp(
    split: str = "train",  # split, by the name that the data set gives it
    limit: int | None = None,  # maximum number of tasks
    revision: str | None = None,  # a commit, branch or tag of the data set; None: main
    visible: int | None = None,  # tests that pay and are shown, at most; the others become hidden ones; None: all
) -> Sequence[Task]:
    """Load MBPP, short Python problems with three tests each (Austin et al., 2021,
    arXiv 2108.07732).

    `google-research-datasets/mbpp`, CC BY 4.0: 374 for training, 500 for testing, 90
    for validation. The question shows the tests that pay, which name the function.
    """
    return from_hub("google-research-datasets/mbpp", "full", split, revision, MBPP, limit, visible)


def humaneval(
    limit: int | None = None,  # maximum number of tasks
    revision: str | None = None,  # a commit, branch or tag of the data set; None: main
) -> Sequence[Task]:
    """Load HumanEval, 164 Python functions to complete (Chen et al., 2021, arXiv
    2107.03374), for evaluation.

    `openai/openai_humaneval`, MIT. The answer must be the whole function with its
    imports, not only the body, since the verifier runs what the model wrote and nothing
    else.
    """
    return from_hub("openai/openai_humaneval", None, "test", revision, HUMANEVAL, limit, None)


def from_hub(
    id: str, config: str | None, split: str, revision: str | None, names: Iterable[str], limit: int | None, visible: int | None
) -> Sequence[Task]:
    folder, files = hub_.data_folder(id, config, split, revision)
    made: list[Task] = []
    for index, row in enumerate(hub_.read_rows(folder, files, list(names))):
        if len(made) == limit:
            break
        made.append(task_of(row, f"{id}, row {index} of {split!r}", f"{id}/{split}/{index}", visible))
    if not made:
        raise ValueError(f"{id} has no tasks in split {split!r}")
    return made


# --- layouts ---


def task_of(row: Mapping[str, Any], where: str, id: str, visible: int | None = None) -> Task:
    """Make the task of a row.

    Raises:
      ValueError: it has none of the layouts, a field of a wrong type, no question or no
        test.
    """
    if visible is not None and visible < 1:
        raise ValueError(f"visible got {visible}; allowed: None (all tests pay), or 1 or more")
    layout = next((make for marks, make in LAYOUTS if set(marks) <= row.keys()), None)
    if layout is None:
        needed = "; or ".join(" and ".join(marks) for marks, _ in LAYOUTS)
        raise ValueError(f"{where}: got the fields {', '.join(map(str, row))}; needed: {needed}")
    question, solution, data = layout(row, where, visible)
    if not question.strip():
        raise ValueError(f"{where}: the question is empty; allowed: some text, or leave the line out")
    return Task(question, "", solution, id, {name: value for name, value in data.items() if value})


def own(row: Mapping[str, Any], where: str, visible: int | None) -> tuple[str, str, dict]:
    if unknown := [name for name in row if name not in OWN and str(name).startswith(("test", "hidden", "set", "entry"))]:
        raise ValueError(f"{where}: {unknown_name_message('field', unknown[0], OWN)}")  # a test that is lost in silence
    paid, hidden = parted(tests(row, "tests", where), visible)
    words = {name: text(row, name, where) for name in ("setup", "entry_point")}
    data = {"tests": paid, "hidden_tests": hidden + tests(row, "hidden_tests", where), **words}
    return text(row, "question", where), text(row, "solution", where), data


def of_mbpp(row: Mapping[str, Any], where: str, visible: int | None) -> tuple[str, str, dict]:
    paid, hidden = parted(tests(row, "test_list", where), visible)
    described = text(row, "text" if "text" in row else "prompt", where)
    hidden += tests(row, "challenge_test_list", where)
    setup = [text(row, "test_setup_code", where), *tests(row, "test_imports", where), *tests(row, "test_setup_list", where)]
    data = {"tests": paid, "hidden_tests": hidden, "setup": "\n".join(line for line in setup if line)}
    question = "\n".join([described.strip(), SHOWN, *map(str, paid)]) if described.strip() else ""
    return question, text(row, "code", where), data


def of_humaneval(row: Mapping[str, Any], where: str, visible: int | None) -> tuple[str, str, dict]:
    prompt, entry_point = text(row, "prompt", where), text(row, "entry_point", where)
    # Functions and imports before the one to complete: some tests use them.
    setup = prompt[: max(0, prompt.rfind(f"def {entry_point}("))]
    data = {"tests": (text(row, "test", where),), "setup": setup.strip(), "entry_point": entry_point}
    body = text(row, "canonical_solution", where)
    return prompt, prompt + body if body else "", data


LAYOUTS = (
    (("question", "tests"), own),
    (("text", "test_list"), of_mbpp),
    (("prompt", "test_list"), of_mbpp),
    (("prompt", "test", "entry_point"), of_humaneval),
)


def parted(found: tuple, visible: int | None) -> tuple[tuple, tuple]:
    """Part tests into those that pay and those that are hidden."""
    return found[:visible], () if visible is None else found[visible:]


def text(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that is a text; "" if it is missing or null."""
    value = row.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: field {name!r} got {value!r:.80}; allowed: a text")
    return value or ""


def tests(row: Mapping[str, Any], name: str, where: str) -> tuple:
    """Return a field that is a list of tests; () if it is missing or null.

    Raises:
      ValueError: it is no list of texts and objects, or the list of the tests that pay
        is empty.
    """
    value = row.get(name)
    value = () if value is None else value
    if not isinstance(value, list | tuple) or not all(isinstance(one, str | dict) for one in value):
        raise ValueError(f"{where}: field {name!r} got {value!r:.80}; allowed: a list of tests, as texts or objects")
    if not value and name in ("tests", "test_list"):
        raise ValueError(f"{where}: field {name!r} is empty; allowed: one test or more, or leave the line out")
    return tuple(value)
