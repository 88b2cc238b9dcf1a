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
import numpy as np
import optax

from jaxreason import metrics as m
from jaxreason import sharding
from jaxreason.checkpoint import Checkpoints
from jaxreason.evaluate import Result
from jaxreason.learner import compile_token_logp, compile_train_step
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


class Run(NamedTuple):
    """All that the loop needs, made by `build`."""

    model: Model
    init: Callable[[], Any]  # () -> params, on the mesh
    phases: Sequence[Phase]
    evaluate: Callable[..., Result]  # (params, phase, step, final)
    mesh: jax.sharding.Mesh
    seed: int
    decode: Callable[[Any], str]  # token ids -> text, to show prompts
    rollouts_kept: int = 64  # of each step, in rollouts.jsonl
    description: dict = {}  # goes into the summary  # noqa: RUF012


def train(run: Run, workdir: str | os.PathLike, checkpoints: Checkpoints, *, log_options: dict | None = None) -> dict:
    """Train all phases in `workdir`, from its newest checkpoint if there is one; return the summary that is also written."""
    workdir, started_s = Path(workdir), time.time()
    first = [0, *np.cumsum([phase.steps for phase in run.phases]).tolist()]  # global step at which each phase starts
    evaluations: list[Evaluation] = []
    losses: list[dict] = []
    shown: list[Rollout] = []
    earlier_s, at, phase_start, resumed = 0.0, 0, 0, None
    params = reference = source_state = None

    latest = checkpoints.latest()
    if latest is not None:
        resumed = checkpoints.peek(latest)
        earlier_s, at, phase_start = resumed["wall_s"], resumed["phase"], resumed["phase_step"]
        evaluations, losses = [Evaluation(**e) for e in resumed["evaluations"]], resumed["losses"]
        source_state = resumed["source"]
        m.truncate(workdir / "rollouts.jsonl", latest)
    else:
        (workdir / "rollouts.jsonl").unlink(missing_ok=True)
        params = run.init()

    log = m.open_log(
        workdir,
        total_steps=first[-1],
        resume_step=latest if resumed else -1,
        write=jax.process_index() == 0,
        **(log_options or {}),
    )

    def summarise(done: bool) -> dict:
        summary = {
            "done": done,
            "evaluations": [e._asdict() for e in evaluations],
            "losses": losses,
            "wall_s": earlier_s + time.time() - started_s,
            "steps": first[-1] if done else None,
            **run.description,
        }
        m.write_summary(workdir / "summary.json", summary, write=jax.process_index() == 0)
        return summary

    def evaluate(params, phase: str, step: int, final: bool = False):
        result = run.evaluate(params, phase=phase, step=step, final=final)
        evaluations.extend(result.evaluations)
        losses.extend({"phase": phase, "step": step, "text": name, "nll": nll} for name, nll in result.nll.items())
        shown[:] = result.rollouts
        values = {f"eval/{name}/nll": nll for name, nll in result.nll.items()}
        for e in result.evaluations:
            values[f"eval/{e.suite}/{'greedy' if e.temperature == 0 else f't{e.temperature:g}'}/accuracy"] = e.accuracy
        log.write(step, phase, values)
        return summarise(False)

    with log:
        if resumed:
            log.say(f"going on from step {latest} ({run.phases[at].name} {phase_start}/{run.phases[at].steps})")
        else:
            evaluate(params, "start", 0)
        for index in range(at, len(run.phases)):
            phase = run.phases[index]
            abstract = jax.eval_shape(lambda p=phase: new_state(run.model.init(jax.random.key(0)), p.optimizer))
            placed = sharding.shardings(abstract, run.mesh)
            if resumed:
                specs = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
                state, _ = checkpoints.restore(latest, specs)
                if phase.objective.needs_reference:
                    reference = checkpoints.restore_reference(latest, specs.params)
            else:
                if phase.objective.needs_reference:
                    reference = jax.tree.map(jnp.copy, params)
                state = jax.jit(new_state, static_argnums=1, donate_argnums=0, out_shardings=placed)(params, phase.optimizer)
                source_state, phase_start = phase.source.init(), 0
            params, resumed = None, None  # the state owns them now: donated at each step

            step_fn = compile_train_step(
                run.model, phase.objective, phase.optimizer, microbatches=phase.microbatches, state_shardings=placed
            )
            reference_logp = compile_token_logp(run.model) if phase.objective.needs_reference else None
            phase_key = jax.random.fold_in(jax.random.key(run.seed), index)
            waiting, step_started_s = [], time.perf_counter()

            def flush(phase=phase, index=index):
                """Log the steps that wait: reading a metric waits for the device, so this comes one step late."""
                done = waiting[-1][0]
                values = m.divide(m.merge(*jax.device_get([metrics for _, metrics in waiting])))
                values["perf/tokens_per_s"] = values["train/tokens"] / values["time/step_s"]
                log.write(first[index] + done, phase.name, values, phase_step=done, phase_steps=phase.steps)
                waiting.clear()

            for step in range(phase_start, phase.steps):
                draw_started_s = time.perf_counter()
                source_state, drawn = phase.source.next(source_state, state.params, jax.random.fold_in(phase_key, step))
                batch = sharding.put_rows(drawn.batch, run.mesh)
                if reference_logp is not None:
                    batch = dataclasses.replace(batch, reference_logp_BT=reference_logp(reference, batch))
                if len(waiting) >= phase.log_every:
                    flush()
                learn_started_s = time.perf_counter()
                learned = {}
                for update in range(phase.updates_per_batch):
                    state, new = step_fn(state, batch)
                    learned = m.merge(learned, new) if update else new
                if phase.source.samples:
                    jax.block_until_ready(state)  # the next draw would wait anyway; so the time is booked where it belongs
                now_s = time.perf_counter()
                waiting.append(
                    (
                        step + 1,
                        {
                            **name_learned(learned, sampled=phase.source.samples),
                            "time/draw_s": (learn_started_s - draw_started_s, 1.0),
                            "time/learn_s": (now_s - learn_started_s, 1.0),
                            "time/step_s": (now_s - step_started_s, 1.0),
                            **drawn.metrics,
                        },
                    )
                )
                step_started_s = now_s
                total, last = first[index] + step + 1, step + 1 == phase.steps
                if drawn.rollouts:
                    m.write_rollouts(
                        workdir / "rollouts.jsonl",
                        drawn.rollouts[: run.rollouts_kept],
                        total,
                        phase.name,
                        decode=run.decode,
                        write=jax.process_index() == 0,
                    )
                due = phase.evaluate_every and (step + 1) % phase.evaluate_every == 0
                saved = last or checkpoints.due(total)
                if due or saved:
                    flush()  # before it is saved: a log may not lack a step that a checkpoint has
                if last or due:
                    evaluate(state.params, phase.name, total, final=last)
                    step_started_s = time.perf_counter()
                if saved:
                    host = {
                        "phase": index,
                        "phase_step": step + 1,
                        "source": source_state,
                        "evaluations": [e._asdict() for e in evaluations],
                        "losses": losses,
                        "wall_s": earlier_s + time.time() - started_s,
                    }
                    checkpoints.save(total, state, host, reference if phase.objective.needs_reference else None)
                    step_started_s = time.perf_counter()
            params, reference = state.params, None
    checkpoints.wait()
    summary = summarise(True)
    if jax.process_index() == 0:
        if evaluations:
            m.print_evaluations(evaluations)
        for loss in losses:
            print(f"{loss['text']}: {loss['nll']:.4f} nats a token at step {loss['step']} ({loss['phase']})")
        m.print_rollouts(shown, 3, decode=run.decode)
    return summary


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at the start of a phase."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def name_learned(learned: dict, *, sampled: bool) -> dict:
    """Put the learner's metrics under their names in the log."""
    named = {f"train/{name}": value for name, value in learned.items()}
    gap, kl = named.pop("train/behaviour_gap"), named.pop("train/behaviour_kl")
    if sampled:
        named |= {"rollout/logp_gap": gap, "rollout/kl_sampler_learner": kl}
    return named
