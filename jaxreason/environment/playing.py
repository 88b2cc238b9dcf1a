"""An environment in one rollout: whatever it does, a turn is answered and it is closed.

A reset, a step or a close that raises costs its rollout the reward and is counted, as a
verifier's error is. So does an answer that breaks the contract, such as a reward that
is not finite or an observation that can't be encoded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxreason.environment.interface import Environment, Step, Turn, VerifierFailed
from jaxreason.environment.verdicts import VERIFIER_ERROR, checked, failed, told, traceback_of
from jaxreason.types import Message, Task

Observe = Callable[[str | Sequence[Message], bool], list[int]]  # (observation, whether eos ended the turn) -> ids


class Playing:
    """State of an environment in one rollout.

    The environment is reset at the first turn, in the thread that answers it: a slow
    reset delays neither sampling nor other rollouts, and has the deadline of a step.
    """

    def __init__(self, environment: Environment, task: Task, observe: Observe):
        self.environment, self.task, self.observe = environment, task, observe
        self.lock, self.is_reset, self.is_closed, self.state = threading.Lock(), False, False, None

    def answer(self, turn: Turn) -> tuple[Step, list[int]]:
        """Return the environment's step, and the ids of its observation.

        It is closed if the step has a verdict.

        Raises:
          KeyboardInterrupt, VerifierFailed: the environment raised it.
        """
        ids: list[int] = []
        try:
            if not self.is_reset:
                self.keep(self.environment.reset(self.task))
            state, step = self.environment.step(self.state, turn)
            self.keep(state)
            step = checked_step(step)
            if step.observation is not None:
                ids = self.observe(step.observation, turn.stop == "eos")
        except (KeyboardInterrupt, VerifierFailed):
            raise
        except BaseException as error:  # sys.exit must not end the run in silence
            verdict = failed(VERIFIER_ERROR, self.environment.name, told(error))
            step, ids = Step(verdict=verdict, failure=traceback_of(error)), []
        if step.verdict is not None and (failure := self.close()) and not step.failure:
            step = step._replace(failure=failure)
        return step, ids

    def keep(self, state: Any) -> None:
        """Keep a state; close it if the rollout has ended while it was made."""
        with self.lock:
            self.state, self.is_reset, ended = state, True, self.is_closed
        if ended:
            self.environment.close(state)

    def close(self) -> str:
        """Close the environment unless it is closed; return the traceback of an
        error.
        """
        with self.lock:
            closes, self.is_closed = self.is_reset and not self.is_closed, True
        try:
            if closes:
                self.environment.close(self.state)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return traceback_of(error)
        return ""


def checked_step(step: Any) -> Step:
    """Return a step whose verdict has plain Python values.

    Raises:
      TypeError, ValueError: not a Step with either a verdict or an observation, or
        these are wrong.
    """
    if not isinstance(step, Step) or (step.verdict is None) == (step.observation is None):
        raise TypeError(f"gave {step!r:.80}; allowed: a Step with either a verdict or an observation")
    if step.verdict is not None:
        return step._replace(verdict=checked(step.verdict))
    said = step.observation
    if not isinstance(said, str) and not (isinstance(said, Sequence) and said and all(map(is_message, said))):
        raise TypeError(f"gave the observation {said!r:.80}; allowed: a text, or a list of Message(role, content)")
    return step


def is_message(value: Any) -> bool:
    return isinstance(value, Message) and isinstance(value.role, str) and isinstance(value.content, str)
