"""Environment in which the model writes once and is judged."""

from __future__ import annotations

from collections.abc import Callable

from jaxreason.environment.interface import Environment, Failures, Step
from jaxreason.environment.verdicts import VERIFIER_ERROR, checked, failed, told, traceback_of
from jaxreason.types import Verdict
from jaxreason.verify.combine import takes_tokens, with_tokens


def single_turn(
    verify: Callable[..., Verdict],
    must_finish: bool = False,
    deadline_s: float | None = 60.0,
    name: str = "",
) -> Environment:
    """Make an environment in which the model writes once and is judged by
    `verify(text, task)`, or `verify(text, task, tokens)` if it has such an argument.

    A verifier that fails costs its attempt a wrong verdict, not the run. It fails if it
    raises (`sys.exit` too), returns anything but a Verdict with a finite reward, or
    takes more than `deadline_s` seconds. Use None for a verifier that enforces its own
    limit. A late verifier keeps running in its thread, which Python can't end. The
    deadline can't interrupt C code that holds the interpreter lock, such as a regular
    expression that backtracks forever (verifier `format` runs those in a child
    process).

    With `must_finish` an attempt that was cut off at its limit is wrong. Otherwise a
    verifier that falls back on the last number of a text would reward the number at
    which the cut happened. A verifier that takes the number of tokens is then asked
    about an empty text, so that a penalty for the length remains.

    Raises:
      ValueError: the deadline is not above 0.
    """
    if deadline_s is not None and not deadline_s > 0:
        raise ValueError(f"verifier.deadline_s got {deadline_s}; allowed: seconds above 0, or None for no deadline")

    counted, shapes = with_tokens(verify), takes_tokens(verify)

    def judge(task, turn):
        if not (must_finish and turn.stop == "limit"):
            return checked(counted(turn.text, task, turn.tokens))
        found = checked(counted("", task, turn.tokens)) if shapes else Verdict(0.0, False)
        return Verdict(min(0.0, found.reward), False, None, "cut off", found.measures)

    def step(task, turn):
        try:
            return task, Step(verdict=judge(task, turn))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit in a verifier must not end the run in silence
            return task, Step(verdict=failed(VERIFIER_ERROR, name, told(error)), failure=traceback_of(error))

    return Environment(lambda task: task, step, one_turn=True, deadline_s=deadline_s, failures=Failures(name), name=name)
