"""THE loop: for each phase, evaluate? checkpoint? draw a batch, make a train step, log.

A recipe is a list of phases, each one `Source x Objective x steps`; params flow from one to the next, and the reference policy
of a phase, if its objective wants one, is the params at its start. A run is a folder: `config.json`, `metrics.jsonl`,
`rollouts.jsonl`, `checkpoints/`, `summary.json`. Started again on its folder, a run goes on from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreason import metrics as m
from jaxreason import processes, sharding
from jaxreason.checkpoint import Checkpoints
from jaxreason.evaluate import Result
from jaxreason.learner import compile_token_logp, compile_train_step, split_frozen
from jaxreason.model import Model
from jaxreason.objectives import Objective
from jaxreason.sources import Source
from jaxreason.types import Evaluation, Rollout, TrainState


class Phase(NamedTuple):
    """One stretch of training."""

    name: str
    source: Source
    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int  # batches drawn
    microbatches: int = 1
    updates_per_batch: int = 1
    evaluate_every: int = 0  # steps; 0: at the end of the phase only
    log_every: int = 1  # steps that a line of metrics sums up
    max_skipped: int = 5  # batches in a row without a finite gradient, after which the run stops


class Run(NamedTuple):
    """All that the loop needs, made by `build`."""

    model: Model
    init: Callable[[], Any]  # () -> params, on the mesh
    phases: Sequence[Phase]
    evaluate: Callable[..., Result]  # (params, phase, step, final)
    warm_up: Callable[[Any], None] | None  # (params): compile the sampler, if anything samples
    mesh: jax.sharding.Mesh
    seed: int
    decode: Callable[[Any], str]  # token ids -> text, to show prompts
    description: dict  # goes into the summary: the config, the number of parameters
    rollouts_kept: int = 64  # of each step, in rollouts.jsonl


class Diverged(Exception):
    """Gradients are no longer finite."""


class History:
    """What a run has found so far. Its `host()` goes into every checkpoint, its `summary()` into the folder."""

    def __init__(self, workdir: Path, description: dict, saved: dict | None = None):
        saved = saved or {"evaluations": [], "losses": [], "wall_s": 0.0}
        self.path, self.description = workdir / "summary.json", description
        self.evaluations = [Evaluation(**e) for e in saved["evaluations"]]
        self.losses: list[dict] = saved["losses"]
        self.rollouts: list[Rollout] = []  # of the last evaluation, to be shown
        self.started_s = time.time() - saved["wall_s"]
        self.skipped = 0  # batches in a row, up to the last that was logged

    def host(self) -> dict:
        evaluations = [e._asdict() for e in self.evaluations]
        return {"evaluations": evaluations, "losses": self.losses, "wall_s": time.time() - self.started_s}

    def summarise(self, step: int, done: bool) -> dict:
        summary = {"done": done, "steps": step, **self.host(), **self.description}
        m.write_summary(self.path, summary, write=processes.writes())
        return summary


def train(run: Run, workdir: str | os.PathLike, checkpoints: Checkpoints, *, log_options: dict | None = None) -> dict:
    """Train all phases in `workdir`, from its newest checkpoint if there is one; return the summary that is also written."""
    workdir = Path(workdir)
    latest = checkpoints.latest()
    saved = None if latest is None else checkpoints.peek(latest)
    history = History(workdir, run.description, saved)
    writes = processes.writes()
    if writes:
        m.truncate(workdir / "rollouts.jsonl", -1 if saved is None else latest)
    total_steps = sum(phase.steps for phase in run.phases)
    log = m.open_log(
        workdir, total_steps=total_steps, resume_step=-1 if saved is None else latest, write=writes, **(log_options or {})
    )
    with log:
        if saved is None:
            params = run.init()
            warm_up(run, log, params)
            evaluate(run, log, history, params, "start", 0, final=True)
        else:
            params = None
            log.say(f"going on from step {latest} of {total_steps}, in phase {run.phases[saved['phase']].name}")
        for index in range(0 if saved is None else saved["phase"], len(run.phases)):
            params = train_phase(run, index, params, workdir, checkpoints, log, history, saved)
            saved = None
    checkpoints.wait()
    summary = history.summarise(total_steps, done=True)
    if writes:
        report(run, history)
    return summary


def train_phase(
    run: Run, index: int, params, workdir: Path, checkpoints: Checkpoints, log: m.RunLog, history: History, saved: dict | None
):
    """Train one phase, from `params` (donated), or from the newest checkpoint if `saved` is its host state; return the params."""
    phase = run.phases[index]
    before = sum(earlier.steps for earlier in run.phases[:index])  # global step at which the phase starts
    key = jax.random.fold_in(jax.random.key(run.seed), index)
    needs_reference = phase.objective.needs_reference
    writes = processes.writes()
    abstract = jax.eval_shape(lambda: new_state(run.model.init(key), phase.optimizer))
    placed = sharding.shardings(abstract, run.mesh)
    reference = None
    if saved is None:
        source_state, start = phase.source.init(), 0
        reference = jax.tree.map(jnp.copy, params) if needs_reference else None
        state = jax.jit(new_state, static_argnums=1, donate_argnums=0, out_shardings=placed)(params, phase.optimizer)
    else:
        source_state, start = saved["source"], saved["phase_step"]
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
        state, _ = checkpoints.restore(before + start, wanted)
        reference = checkpoints.restore_reference(before + start, wanted.params) if needs_reference else None
        warm_up(run, log, state.params)

    step_fn = compile_train_step(
        run.model, phase.objective, phase.optimizer, microbatches=phase.microbatches, state_shardings=placed
    )
    reference_logp = compile_token_logp(run.model, phase.microbatches, run.mesh)
    waiting: list[dict] = []  # metrics of steps that are not logged yet

    for step in range(start + 1, phase.steps + 1):
        started_s = time.perf_counter()
        source_state, drawn = phase.source.next(source_state, state.params, key)
        batch = sharding.put_rows(drawn.batch, run.mesh)
        if needs_reference:
            batch = dataclasses.replace(batch, reference_logp_BT=reference_logp(reference, batch))
        if len(waiting) >= phase.log_every:  # one step late, since reading a metric waits for the device
            write_metrics(log, history, phase, before, step - 1, waiting)
        learn_started_s = time.perf_counter()
        learned = {}
        for _ in range(phase.updates_per_batch):
            state, new = step_fn(state, batch)
            learned = m.merge(learned, new)
        if phase.source.samples:
            jax.block_until_ready(state)  # the next draw would wait anyway: so the time is booked where it was spent
        ended_s = time.perf_counter()
        times = {"time/learn_s": (ended_s - learn_started_s, 1.0), "time/step_s": (ended_s - started_s, 1.0)}
        waiting.append(name_learned(learned, sampled=phase.source.samples) | drawn.metrics | times)
        kept = drawn.rollouts[: run.rollouts_kept]
        m.write_rollouts(workdir / "rollouts.jsonl", kept, before + step, phase.name, decode=run.decode, write=writes)

        last = step == phase.steps
        save_now = last or checkpoints.due(before + step)
        evaluate_now = last or (phase.evaluate_every and step % phase.evaluate_every == 0)
        if save_now or evaluate_now:
            write_metrics(log, history, phase, before, step, waiting)  # a log may not lack a step that a checkpoint has
        if evaluate_now:
            evaluate(run, log, history, state.params, phase.name, before + step, final=last)
        if save_now:
            host = {"phase": index, "phase_step": step, "source": phase.source.save(source_state), **history.host()}
            checkpoints.save(before + step, state, host, reference)
    return state.params


def warm_up(run: Run, log: m.RunLog, params) -> None:
    """Compile the sampler before it is needed: nothing is compiled in the middle of a run."""
    if run.warm_up is None:
        return
    started_s = time.perf_counter()
    log.say("compiling the sampler ...")
    run.warm_up(params)
    log.say(f"compiled the sampler in {time.perf_counter() - started_s:.0f} s")


def write_metrics(log: m.RunLog, history: History, phase: Phase, before: int, step: int, waiting: list[dict]) -> None:
    """Log the sum of the metrics that wait, under the last of their steps.

    Raises:
      Diverged: too many batches in a row were skipped.
    """
    steps = jax.device_get(waiting)
    values = m.divide(m.merge(*steps))
    values["perf/tokens_per_s"] = values["train/tokens"] / values["time/step_s"]
    log.write(before + step, phase.name, values, phase_step=step, phase_steps=phase.steps)
    waiting.clear()
    for learned in steps:
        skipped, updates = learned["train/skipped"]
        history.skipped = history.skipped + 1 if skipped == updates else 0
        if history.skipped >= phase.max_skipped:
            raise Diverged(
                f"the gradient was not finite for {history.skipped} batches in a row, up to step {before + step} (phase "
                f"{phase.name}); none of them was learned from. Lower {phase.name}.optimizer.lr, or look at the last rollouts; "
                "the newest checkpoint is kept"
            )


def evaluate(run: Run, log: m.RunLog, history: History, params, phase: str, step: int, *, final: bool) -> None:
    """Evaluate, log, and write the summary so far; `final` uses the full number of tasks."""
    result = run.evaluate(params, phase=phase, step=step, final=final)
    history.evaluations += result.evaluations
    history.losses += [{"phase": phase, "step": step, "text": name, "nll": nll} for name, nll in result.nll.items()]
    history.rollouts = result.rollouts
    values = {f"eval/{name}/nll": nll for name, nll in result.nll.items()}
    for e in result.evaluations:
        mode = "greedy" if e.temperature == 0 else f"t{e.temperature:g}"
        values[f"eval/{e.suite}/{mode}/accuracy"] = e.accuracy
    log.write(step, phase, values)
    history.summarise(step, done=False)


def report(run: Run, history: History) -> None:
    """Print what a person wants to see at the end: before and after, and three rollouts in full."""
    if history.evaluations:
        m.print_evaluations(history.evaluations)
    for loss in history.losses:
        print(f"{loss['text']}: {loss['nll']:.4f} nats a token at step {loss['step']} ({loss['phase']})")
    m.print_rollouts(history.rollouts, 3, decode=run.decode)


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at the start of a phase."""
    return TrainState(params, optimizer.init(split_frozen(params)[0]), jnp.int32(0))


def name_learned(learned: dict, *, sampled: bool) -> dict:
    """Put the learner's metrics under their names in the log."""
    named = {f"train/{name}": value for name, value in learned.items()}
    gap, kl = named.pop("train/behaviour_gap"), named.pop("train/behaviour_kl")
    if sampled:
        named |= {"rollout/logp_gap": gap, "rollout/kl_sampler_learner": kl}
    return named
