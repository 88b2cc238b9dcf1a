"""The program of a pool's child process: it answers one question at a time until the
pipe closes.

It is run by its path, so it must not import jaxreason. See `pool`.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
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


KINDS = {"math": math, "match": match}


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
        for question in WARM_UP if kind == "math" else ():
            math(*question)
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
