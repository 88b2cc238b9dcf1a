"""Environments by name: they answer a model's text with a verdict or an observation.

An environment takes and returns text, not tokens, and its state is used once.
`Environment(reset, step)`: `reset(task) -> state`; `step(state, turn) -> (state,
Step)`. A step either ends the rollout with a verdict or continues it with an
observation, which the rollout loop appends as forced tokens.

`single_turn` judges what the model writes. `with_tools` and `retry` wrap another
environment, as `with_kl` wraps an objective: they answer some of its turns themselves.
A verifier that fails costs its attempt the reward and is counted. It stops the run only
if it fails all the time: see `Failures`.
"""

from jaxreason.environment.interface import IN_A_ROW, STUCK, Environment, Failures, Step, Stop, Turn, VerifierFailed, stack
from jaxreason.environment.openenv import openenv
from jaxreason.environment.retry import retry
from jaxreason.environment.single_turn import single_turn
from jaxreason.environment.threads import Threads, late
from jaxreason.environment.tool_use import with_tools
from jaxreason.environment.verdicts import (
    COUNTED,
    VERIFIER_ERROR,
    VERIFIER_TIMEOUT,
    checked,
    count_failures,
    failed,
    measured,
    told,
    traceback_of,
    verifier_failed,
)

WRAPPERS = {"with_tools": with_tools, "retry": retry}  # make an environment from another one
ENVIRONMENTS = {"single_turn": single_turn, "openenv": openenv, **WRAPPERS}

__all__ = [
    "COUNTED",
    "ENVIRONMENTS",
    "IN_A_ROW",
    "STUCK",
    "VERIFIER_ERROR",
    "VERIFIER_TIMEOUT",
    "WRAPPERS",
    "Environment",
    "Failures",
    "Step",
    "Stop",
    "Threads",
    "Turn",
    "VerifierFailed",
    "checked",
    "count_failures",
    "failed",
    "late",
    "measured",
    "openenv",
    "retry",
    "single_turn",
    "stack",
    "told",
    "traceback_of",
    "verifier_failed",
    "with_tools",
]
