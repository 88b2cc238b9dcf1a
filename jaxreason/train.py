"""The training loop: draw a batch, make a train step, log; evaluate and save when due.

A recipe is a list of phases, each one `Source x Objective x steps`. Each phase starts
from the params of the one before. These are also its reference policy, if it has one
and names no other (`teacher`). A run is a folder: started again, it continues bit for
bit from its newest complete checkpoint (`runtime.resume`). `runtime.journal` writes all
records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxreason import metrics as m
from jaxreason import sharding, teacher
from jaxreason.evaluation import Result
from jaxreason.learner import compile_completion, compile_references, compile_train_step, new_state, state_shapes
from jaxreason.model import Model
from jaxreason.objectives import Objective
from jaxreason.runtime import memory, resume
from jaxreason.runtime.checkpoint import Checkpoints
from jaxreason.runtime.journal import Diverged, Journal, continues, open_journal, told_how_to_continue
from jaxreason.runtime.ledger import Decoding
from jaxreason.runtime.resume import Found, NotResumable
from jaxreason.sources import Source

__all__ = ["Diverged", "Interrupted", "NotResumable", "Phase", "Run", "Stopped", "train"]


class Phase(NamedTuple):
    """One stretch of training."""

    name: str
    source: Source
    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int  # batches to draw
    microbatches: int = 1
    updates_per_batch: int = 1
    evaluate_every: int = 0  # steps between evaluations; 0: only at the end of the phase
    log_every: int = 1  # steps per line of metrics
    offload_reference: bool = False  # keep the reference params in host memory while they are not used
    max_skipped: int = 5  # stop the run after this many consecutive batches without a finite update
    reference: str | teacher.Teacher = "start"  # the reference policy: the params at the start, "current" ones, or a teacher


class Run(NamedTuple):
    """Everything that the loop needs, made by `build`."""

    model: Model
    init: Callable[[], Any]  # () -> params, on the mesh
    phases: Sequence[Phase]
    evaluate: Callable[..., Result]  # (params, phase, step, final)
    warm_up: Callable[[Any], None] | None  # (params) -> None, compiles the sampler; None: nothing samples
    mesh: jax.sharding.Mesh
    seed: int
    decode: Callable[[Any], str]  # token ids -> text, to show prompts
    description: dict  # for the summary: config and number of parameters
    provenance: Mapping[str, Any]  # for the checkpoints: config, versions, git revision
    sample_devices: int = 1  # sampling devices of all processes
    watts: float | None = None  # watts per device, for the ledger if there is no counter
    measures_machine: bool = False  # measure the peak rates that utilisation is told against
    decoding: Decoding | None = None  # how the sampler reads memory, for the ledger
    samples_apart: bool = False  # sampling has devices of its own
    rollouts_kept: int = 64  # rollouts written to rollouts.jsonl per step, at most; whole groups, one at least
    token_pieces: Callable[[Any], list[str]] | None = None  # token ids -> texts, to write with rollouts; None: not written
    log_options: Mapping[str, Any] = {}  # for `runtime.log.open_log`
    report: bool = True  # write report.html at the end
    profile_steps: tuple[int, int] | None = None  # first and last step of a trace (see `runtime.profile`)
    open_checkpoints: Callable[..., Checkpoints] | None = None  # (folder)


class Stopped(Exception):
    """The run was asked to stop, and has saved a checkpoint to continue from."""


class Interrupted(Stopped):
    """The same, from the keyboard."""


def train(
    run: Run,
    workdir: str | os.PathLike,
    checkpoints: Checkpoints,
    *,
    log_options: Mapping[str, Any] = {},
    stop: Callable[[], str] = lambda: "",
    stop_after: str | None = None,
    check_stays: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> dict:
    """Train all phases in `workdir`, from its newest checkpoint if there is one.

    `stop` is called after every step; if it returns "stopped" or "interrupted" the run
    ends. The run also ends after the phase `stop_after`, if another follows.
    `check_stays` is called before anything is written, and raises if the folder was
    moved or removed. `say` prints messages before the log is open. Return the summary.

    Raises:
      Stopped, Interrupted: `stop` asked for it; the last step has a checkpoint.
      Diverged: gradients were not finite for too long.
      NotResumable: the checkpoints do not fit the run, or none of them is complete.
      VerifierFailed: a verifier fails all the time; see `verifier_error.txt`.
      Unwritable, NoTracker: a file or the last checkpoint can't be written; no tracker.
    """
    workdir, steps = Path(workdir), sum(phase.steps for phase in run.phases)
    with told_how_to_continue(workdir, checkpoints, check_stays):
        found = resume.find_newest(run, checkpoints, say)
        with open_journal(run, workdir, checkpoints, found, log_options=log_options, check_stays=check_stays, say=say) as journal:
            params = first_params(run, journal) if found is None else journal.tell_found(found)
            for index in range(0 if found is None else found.host["phase"], len(run.phases)):
                if run.phases[index].steps:
                    params, found = train_phase(run, index, params, journal, found, stop), None
                    if run.phases[index].name == stop_after and index + 1 < len(run.phases):
                        end(journal, "stopped")
            journal.finish(steps)
        summary = journal.summarise(steps, done=True)
    journal.report()
    return summary


def train_phase(run: Run, index: int, params, journal: Journal, found: Found | None, stop: Callable[[], str]):
    """Train one phase from `params` (donated) or its checkpoint; return the params."""
    phase, key = run.phases[index], jax.random.fold_in(jax.random.key(run.seed), index)
    placed = state_shapes(run.model, phase.optimizer, run.mesh, phase.objective.controls)[1]
    state, reference, source_state, start = begin_phase(phase, placed, params, found)
    if found is not None:
        journal.warm_up(state.params)
    made, other = (run.model, phase.objective), {"microbatches": phase.microbatches, "teacher": teacher.model_of(phase)}
    step_fn = compile_train_step(*made, phase.optimizer, state_shardings=placed, **other)
    complete, refer = (make(*made, mesh=run.mesh, **other) for make in (compile_completion, compile_references))
    journal.begin_phase(index, start)
    for step in range(start + 1, phase.steps + 1):
        journal.begin_step()
        source_state, drawn = phase.source.next(source_state, state.params, key)
        if phase.source.samples:
            memory.trim_soon()  # the sampler's weights and caches are freed
        journal.drew(drawn, source_state)
        batch = sharding.put_rows(drawn.batch, run.mesh)
        used = teacher.in_use(phase, reference, state.params)
        batch, head = complete(batch, state.params, used, state.control), teacher.head_for_step(phase, run.model, used)
        del used  # an offloaded reference leaves the devices
        journal.write_if_due()
        learned = {}
        for update in range(phase.updates_per_batch):
            if update and phase.reference == "current":
                batch = refer(batch, state.params)
            state, metrics = step_fn(state, batch, *head)
            learned = m.merge(learned, metrics)
        if phase.source.samples:
            jax.block_until_ready(state)  # book this time under the update; the next draw would wait anyway
        journal.learned(learned)

        last, stopping = step == phase.steps, stop()
        if last or (phase.evaluate_every and step % phase.evaluate_every == 0):
            journal.evaluate(state.params, final=last)
        if last or stopping or journal.save_due():
            journal.save(state, teacher.in_use(phase, reference, None) if teacher.is_saved(phase) else None)
        if stopping:
            end(journal, stopping)
    return state.params


def begin_phase(phase: Phase, placed, params, found: Found | None) -> tuple:
    """Return a phase's state, in the shardings `placed`, its reference params, source
    state and steps done.
    """
    reference = teacher.begin(phase, params, None if found is None else found.reference)
    if found is not None:
        return found.state, reference, found.host["source"], found.host["phase_step"]
    begin = jax.jit(new_state, static_argnums=(1, 2), donate_argnums=0, out_shardings=placed)
    return begin(params, phase.optimizer, phase.objective.controls), reference, phase.source.init(), 0


def first_params(run: Run, journal: Journal):
    """Make the params of a new run and evaluate them."""
    journal.log.doing("making the params")
    params = run.init()
    journal.warm_up(params)
    journal.evaluate_at(params, "start", 0, final=True)
    return params


def end(journal: Journal, stopping: str) -> None:
    """Wait until the last checkpoint is on disk, then raise Stopped or Interrupted."""
    journal.wait()
    continuation = continues(journal.checkpoints)
    if stopping == "interrupted":
        raise Interrupted(f"interrupted; {continuation}")
    raise Stopped(f"stopped after step {journal.before + journal.step}; {continuation}")
