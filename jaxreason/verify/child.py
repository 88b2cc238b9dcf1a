"""The program of a pool's child process: it answers one question at a time until the
pipe closes.

It is run by its path, so it must not import jaxreason. See `pool`.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import json
import os
import random
import re
import resource
import signal
import sys
from fractions import Fraction
from math import isclose
from multiprocessing.connection import Connection


def math(texts: list[str], keys: list[str]) -> tuple[bool, str | None, str]:
    """Compare texts with keys by math-verify; any text may equal any key.

    Returns (correct, parsed, reason); the caller fills in an empty reason.
    """
    from math_verify import parse, verify

    gold = [parsed for key in keys if (parsed := parse(key if DELIMITER.search(key) else f"${key}$", parsing_timeout=None))]
    if not gold:
        return False, None, "bad key"
    answers = [parsed for text in texts if (parsed := parse(text, parsing_timeout=None))]
    if not answers:
        return False, None, "no answer"
    correct = any(verify(key, answer, timeout_seconds=None) for answer in answers for key in gold)
    shown = [part for part in answers[0] if isinstance(part, str)]  # str() of the other parts may never end
    return correct, shown[-1] if shown else None, ""


DELIMITER = re.compile(r"(?<!\\)\$|\\[(\[]")  # in a key that delimits its own mathematics
# Questions that import math-verify, build its parser's tables and fill its caches,
# which takes about a second.
WARM_UP = ((["$1/2$"], ["0.5"]), ([r"\boxed{x^2+2x+1}"], ["(x+1)^2"]), ([r"\boxed{\sin^2 x+\cos^2 x}"], ["1"]))


def match(pattern: str, text: str) -> bool:
    """Tell whether a pattern occurs in a text; the dot matches newlines too."""
    return re.search(pattern, text, re.DOTALL) is not None


# --- reasoning-gym ---


def gym(what: str, *arguments) -> object:
    """Answer a question about a dataset of reasoning-gym: see `GYM`."""
    return GYM[what](*arguments)


def gym_names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - {"composite"})  # its options are objects, which no config can write


def gym_check(name: str, options: str) -> tuple[list[str], str]:
    """Return the names of a dataset's options, and the error of building it or ""."""
    from reasoning_gym.factory import DATASETS

    names = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    try:
        gym_dataset(name, options, 0)
        return names, ""
    except Exception as error:
        return names, str(error) or type(error).__name__


def gym_entry(name: str, options: str, number: int) -> tuple[str, object, str]:
    """Make item `number` of a dataset; return (error, entry in JSON values, key)."""
    random.seed(number)  # some datasets draw from the global generator
    try:
        dataset = gym_dataset(name, options, 0)
        try:
            entry = dataset[number]
        except IndexError:  # the dataset makes all its items when it is built
            entry = gym_dataset.__wrapped__(name, options, number // BLOCK, size=BLOCK)[number % BLOCK]
        return "", as_json(entry), entry["answer"] if isinstance(entry["answer"], str) else example(dataset, entry)
    except Exception as error:
        return f"{type(error).__name__}: {error}", None, ""


def example(dataset, entry: dict) -> str:
    """Return an example of a right answer to an item that has no key, because many are
    right; "" if the item has none, or one that is not scored as right.
    """
    found = [entry["metadata"][name] for name in EXAMPLES if name in entry["metadata"]]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in found]
    return next((text for text in texts if dataset.score_answer(text, entry) == 1.0), "")


BLOCK = 10  # items
EXAMPLES = ("example_correct_answer", "example_answer", "possible_answer")  # fields of the metadata


@functools.lru_cache(maxsize=64)
def gym_dataset(name: str, options: str, seed: int, **size):
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **json.loads(options), seed=seed, **size)


def gym_score(name: str, options: str, entry: object, answer: str) -> float:
    """Score an answer by the method of the dataset, and by `STRICTER`; an answer that
    the method fails on earns 0.
    """
    left_s, _ = signal.getitimer(signal.ITIMER_PROF)
    dataset, entry, unguarded = gym_dataset(name, options, 0), from_json(entry), builtins.eval
    signal.setitimer(signal.ITIMER_PROF, left_s)  # building the dataset, once per child, takes none of the answer's time
    builtins.eval = guarded_eval
    try:
        score = float(dataset.score_answer(answer, entry))
        return 0.0 if score == 1.0 and name in STRICTER and not STRICTER[name](answer, entry) else score
    except MemoryError:
        raise
    except Exception:
        return 0.0
    finally:
        builtins.eval = unguarded


def same_word(answer: str, entry: dict) -> bool:
    return answer.strip().lower() == str(entry["answer"]).lower()


def no_nan(answer: str, entry: dict) -> bool:
    return "nan" not in answer.lower()


def close_fraction(answer: str, entry: dict) -> bool:
    one, other = (float(Fraction(text.replace(",", ""))) for text in (answer, entry["answer"]))
    return isclose(one, other, rel_tol=1e-3)


def same_numbers(answer: str, entry: dict) -> bool:
    return sorted(map(int, re.findall(r"[0-9]+", answer))) == sorted(entry["metadata"]["numbers"])


# Scores of reasoning-gym 0.1.25 that give 1 to wrong answers, which a policy would find
# and exploit: to any text; to nan; to 0, as most keys are below the tolerance of 1e-4;
# to any four numbers that make 24.
STRICTER = {
    "game_of_life_halting": same_word,
    "complex_arithmetic": no_nan,
    "coin_flip": close_fraction,
    "puzzle24": same_numbers,
}
GYM = {"names": gym_names, "check": gym_check, "entry": gym_entry, "score": gym_score}


def as_json(value: object) -> object:
    """Write an entry in JSON values that `from_json` reads, with tuples and keys that
    are no strings, because some scores compare tuples. Rare other types become text.
    """
    if isinstance(value, dict):
        if value.keys() == {TUPLE} or value.keys() == {PAIRS} or not all(isinstance(key, str) for key in value):
            return {PAIRS: [[as_json(key), as_json(item)] for key, item in value.items()]}
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, tuple):
        return {TUPLE: [as_json(item) for item in value]}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def from_json(value: object) -> object:
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE}:
        return tuple(map(from_json, value[TUPLE]))
    if value.keys() == {PAIRS}:
        return {from_json(key): from_json(item) for key, item in value[PAIRS]}
    return {key: from_json(item) for key, item in value.items()}


TUPLE, PAIRS = "(tuple)", "(pairs)"


# --- text that a model wrote and a score evaluates ---


def guarded_eval(source, names=None, local_names=None):
    """Evaluate literals, arithmetic and elementary functions of sympy; refuse the rest.

    Scores of reasoning-gym call `eval` or sympy's `parse_expr` (which calls `eval`) on
    the answer, so a model's text could run any code, or change the score of the next.

    Raises:
      ValueError: the source has an attribute, an index, a lambda, or another name.
    """
    names, local_names = names or {}, local_names or {}
    tree = ast.parse(source.strip(), mode="eval")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, EVALUATED):
            raise ValueError(f"{type(node).__name__} is not evaluated")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            raise ValueError("only a name is called")
        if isinstance(node, ast.Name) and not may_name(local_names.get(node.id, names.get(node.id)), node.id, id(node) in called):
            raise ValueError(f"{node.id} is not evaluated")
    return EVAL(compile(tree, "answer", "eval"), {"__builtins__": {}, **names}, local_names)


def may_name(value: object, name: str, called: bool) -> bool:
    from sympy import Basic

    if not called:
        return isinstance(value, Basic)
    return name in FUNCTIONS or (isinstance(value, type) and issubclass(value, Basic))


EVAL = builtins.eval
EVALUATED = (
    *(ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Load, ast.Name, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)
FUNCTIONS = ("sqrt", "cbrt", "root", "abs")  # of sympy or Python, that are no class of sympy


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook, a second guard: refuse to write files, start programs or open
    connections.
    """
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")


REFUSED = (
    *("subprocess.", "socket.", "shutil.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
)

KINDS = {"math": math, "match": match, "gym": gym}


def prepare(kind: str) -> None:
    """Do the imports and slow first steps of a kind, which no question should wait
    for.
    """
    if kind == "math":
        for question in WARM_UP:
            math(*question)
    if kind == "gym":
        sys.dont_write_bytecode = True  # the hook would refuse it
        gym_names()
        sys.addaudithook(refuse)


def answer(serve, question: list) -> tuple[str, object]:
    """Answer a question; return (failure, answer)."""
    try:
        return "", serve(*question)
    except MemoryError:
        return "out of memory", None
    except Exception:
        return "crashed", None


def main(fd: str, kind: str, timeout_s: str, memory_mb: str) -> None:
    pipe, serve = Connection(int(fd)), KINDS[kind]
    limit = int(memory_mb) << 20
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        prepare(kind)
    except Exception as error:
        pipe.send_bytes(f"{type(error).__name__}: {error}".encode(errors="replace"))
        return
    pipe.send_bytes(b"")
    while True:
        try:
            question = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        # The timer counts this process's CPU time, so the load of the machine does not
        # matter. The signal's default action ends the process even inside C code, and
        # even if the parent is gone.
        signal.setitimer(signal.ITIMER_PROF, float(timeout_s))
        reply = json.dumps(answer(serve, question)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
