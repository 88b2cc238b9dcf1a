"""The nouns of jaxreason, one word per idea, and the legend of shape letters.

A *task* is a problem. A *rollout* is one attempt at it; the attempts at one task are
its *group*. A *verdict* says whether an answer is right and what it earns. A *batch* is
what one train step consumes, whatever the paradigm.

Shape letters, used as suffixes (`tokens_BT`) and in einsums:
    B rows  T tokens in a row  P problems  G rollouts per problem  R rollouts  S slots
    C cache length  L layers  D width  N query heads  K key/value heads  H head size
    F feed-forward  V vocabulary
Where slots share prompts: R rows of prompts  M slots that continue one  D devices
    Q queries that share a key head

Position t of every `_BT` array is about token t, given the tokens before it: all arrays
align, and column 0 is unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str


@dataclass(frozen=True)
class Task:
    """One problem with a checkable answer."""

    question: str
    answer: str
    solution: str = ""  # worked solution that ends in the answer; imitation trains on it
    id: str = ""  # unique in its data set
    data: Mapping[str, Any] = field(default_factory=dict)  # further inputs of the verifier

    @property
    def expected(self) -> str:
        """End a line that tells a verdict; empty for a task without an answer, which
        tests decide.
        """
        return f", expected {self.answer}" if self.answer else ""


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one answer."""

    reward: float
    correct: bool
    parsed: str | None = None  # the answer as it was understood; None if none was found
    reason: str = ""
    measures: Mapping[str, float] = field(
        default_factory=dict
    )  # further numbers, such as {"tool_calls": 2}; their means are logged, so a name may not be that of another metric
    # Of a rollout with several attempts: for each the number of tokens that were
    # sampled up to its end, and its own reward. () for one attempt.
    attempts: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One attempt at one task. `tokens`, `logp` and `sampled` are about the completion
    and have one entry per token.
    """

    task: Task
    problem: int  # position of the task in the stream of its source
    attempt: int  # 0..G-1
    prompt: np.ndarray  # int32 token ids
    tokens: np.ndarray  # int32 token ids, with the end-of-sequence token if one was sampled
    logp: np.ndarray  # float32, natural log, under the distribution sampled from; 0 for forced tokens
    sampled: np.ndarray  # bool; False for tokens that were forced (tool output)
    stop: str  # "eos", "limit" or "stop" (the text ends with one of the completer's stop strings)
    text: str  # the completion decoded, without the end-of-sequence token
    verdict: Verdict | None  # None until the rollout is judged
    temperature: float = 1.0
    logp_temperature_1: np.ndarray | None = None  # float32, like `logp` under the model's own softmax; None unless asked for
    author: str = ""  # a letter per token: m the model, t an observation (a tool), f forced (the end of thinking); "": all m or f


class Prompted(NamedTuple):
    """A task with its prompt."""

    task: Task
    prompt: np.ndarray  # int32 token ids


@dataclass(frozen=True)
class Group:
    """The attempts at one task, in order. They share its prompt."""

    attempts: tuple[Rollout, ...]

    @property
    def task(self) -> Task:
        return self.attempts[0].task

    @property
    def problem(self) -> int:
        return self.attempts[0].problem

    @property
    def prompt(self) -> np.ndarray:
        return self.attempts[0].prompt


def _registered(cls):
    """Make a class a frozen dataclass and a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@_registered
class Hinted:
    """Rows that a teacher reads in the place of a batch's: prompts with hints, each
    followed by the completion that the batch has. U columns, fixed by the batch's T.
    """

    tokens_BU: jax.Array  # int32
    position_BU: jax.Array  # int32, from 0 in each segment
    segment_BU: jax.Array  # int32, 0 is padding
    column_BT: jax.Array  # int32, column of the batch's token t in the same row here; 0: it is not here


@_registered
class Batch:
    """Input of one train step. The loss is `sum(weight_BT * token_loss_BT)`: every
    normalisation is in the weights.
    """

    tokens_BT: jax.Array  # int32
    position_BT: jax.Array  # int32, from 0 in each segment; where it does not rise by 1, a branch begins (`attention.causal`)
    segment_BT: jax.Array  # int32, 0 is padding; attention never crosses a segment
    weight_BT: jax.Array  # float32, 0 where a token is not trained on
    advantage_BT: jax.Array  # float32
    behaviour_logp_BT: jax.Array  # float32, log-prob under the policy that sampled the token
    temperature_BT: jax.Array  # float32, sampling temperature of the token; the learner computes its log-prob at the same one
    # int32, the rollout that a token belongs to, numbered from 1 over the whole batch;
    # a rollout never crosses rows. Prompts of rollouts and padding have 0.
    rollout_BT: jax.Array
    reference_logp_BT: jax.Array | None = None  # float32; None where no objective asks for a reference policy
    # [B, T, width of the reference]: its hidden states that predict token t; None where
    # no divergence over the vocabulary is asked for.
    reference_hidden_BTD: jax.Array | None = None
    hinted: Hinted | None = None  # None: the reference policy reads the same rows
    value_BT: jax.Array | None = None  # float32, by the critic before the update; None without a critic
    return_BT: jax.Array | None = None  # float32, what the critic learns; None without a critic
    entropy_BT: jax.Array | None = None  # float32, nats, of the policy before the update; None unless a selection asks for it
    chosen_BT: jax.Array | None = None  # bool, tokens that a selection chose; None without one
    control: Any = None  # that of the train state, while the objective's functions see the batch
    # bool, whether a token is trained by plain negative log-likelihood, times its
    # advantage, whatever the objective's token loss: no policy of ours sampled it. None
    # where no part of a mix asks for it.
    imitated_BT: jax.Array | None = None


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class TrainState:
    """State that a train step updates.

    As a pytree it has no `control` where that is None, so that checkpoints of states
    without one have the same tree in every version.
    """

    params: Any  # its subtree "frozen", if there is one, is never updated
    opt_state: Any
    step: jax.Array  # int32, updates done in this phase
    control: Any = None  # state of the objective, by name (`objectives.controls`); None for an objective without

    def tree_flatten_with_keys(self):
        names = ("params", "opt_state", "step") + (("control",) if self.control is not None else ())
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(**dict(zip(names, children, strict=True)))


class Outputs(NamedTuple):
    """Outputs of the model that an objective sees."""

    logp_BT: jax.Array  # of token t given the tokens before it, at the batch's temperature; 0 in column 0
    entropy_BT: jax.Array  # of the distribution of token t, nats
    value_BT: jax.Array | None = None  # of the tokens before token t; None without a value head
    divergence_BT: jax.Array | None = None  # of the distribution of token t from the reference's, nats; None unless asked for


class Evaluation(NamedTuple):
    """Accuracy of one suite at one temperature, with a 95 % interval: Wilson's, or one
    clustered by task if each task has several samples.
    """

    phase: str
    step: int
    suite: str
    accuracy: float
    low: float
    high: float
    n: int  # tasks
    temperature: float
    verdicts: str = ""  # a letter per attempt, those at one task together: 1 is correct, 0 is not; for paired tests
    samples: int = 1  # attempts at each task
    measures: Mapping[str, float] = {}  # see `evaluation.measure` and `tasks.behaviour.rates`


Tasks = Sequence[Task]  # random access: `len(tasks)`, `tasks[i]`
