r"""The answer is mathematics: math-verify compares it with the key by computer algebra, in killable processes.

Understands LaTeX in `\boxed{}` or dollars, and plain expressions: sets, intervals, matrices, roots, equations.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from jaxreason.types import Task, Verdict
from jaxreason.verify import pool
from jaxreason.verify.exact import verdict


def math(
    timeout_s: float = 5.0,  # for one answer, after which its child is killed
    processes: int = 2,  # children, at most
    memory_mb: int = 2048,  # of address space of each
    max_chars: int = 10_000,  # that are read, from the end
) -> Callable[[str, Task], Verdict]:
    """Compare the last `max_chars` of the text with `task.answer` (or any of `task.data["answers"]`), both as mathematics.

    At most `processes` children are started, on first use, each with `memory_mb` of address space; one that takes more
    than `timeout_s` is killed. Reasons: right, wrong, no answer, bad key, timeout, crashed, out of memory.

    Raises:
      ValueError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier 'math' needs math-verify; pip install 'jaxreason[math]'")
    children = pool.shared("math", processes, timeout_s, memory_mb)

    def verify(text: str, task: Task) -> Verdict:
        keys = [str(key) for key in (task.answer, *task.data.get("answers", ()))]
        try:
            correct, parsed, reason = children.ask(text[-max_chars:], keys)
        except pool.Failed as failure:
            return Verdict(0.0, False, None, str(failure))
        return verdict(correct, parsed, reason)

    return verify
