"""THE loop: for each phase, evaluate? checkpoint? draw a batch, make a train step, log.

A recipe is a list of phases, each one `Source x Objective x steps`; params flow from one to the next, and the reference policy
of a phase, if its objective wants one, is the params at its start. A run is a folder: `config.json`, `metrics.jsonl`,
`rollouts.jsonl`, `checkpoints/`, `summary.json`. Started again on its folder, a run goes on from its newest checkpoint that is
whole, and ends as if nothing had happened, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreason import compiling, freed, ledger, processes, sharding
from jaxreason import metrics as m
from jaxreason.checkpoint import Checkpoints, Damaged
from jaxreason.environment import VerifierFailed, count_failures, verifier_failed
from jaxreason.evaluate import Result
from jaxreason.learner import compile_token_logp, compile_train_step, split_frozen
from jaxreason.model import Model
from jaxreason.objectives import Objective
from jaxreason.sources import Drawn, Source
from jaxreason.types import Evaluation, Rollout, TrainState
from jaxreason.workdir import free_name


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
    offload_reference: bool = False  # keep it in the host's memory; on the devices only while it is used
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
    provenance: Mapping[str, Any]  # goes into the checkpoints: config, versions, git revision
    sample_devices: int = 1  # of all processes
    watts: float | None = None  # of a device, for the ledger
    rollouts_kept: int = 64  # of each step, in rollouts.jsonl


# What the host's part of a checkpoint must hold, beside what the run was made from.
HOST = {"phase", "phase_step", "source", "waiting", "evaluations", "losses", "wall_s", "saving_s", "skipped", "ledger"}


class Diverged(Exception):
    """Gradients are no longer finite."""


class NotResumable(Exception):
    """There are checkpoints, but none that the run can go on from."""


class Stopped(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


class Interrupted(Stopped):
    """The same, by somebody at the keyboard."""


class Found(NamedTuple):
    """What a run goes on from."""

    step: int  # of the whole run
    host: dict
    state: TrainState
    reference: Any  # params, or None where the phase has none


class History:
    """What a run has found so far. Its `host()` goes into every checkpoint, its `summary()` into the folder."""

    def __init__(self, workdir: Path, description: dict, saved: dict | None = None):
        nothing = {"evaluations": [], "losses": [], "wall_s": 0.0, "saving_s": 0.0, "skipped": 0, "ledger": ledger.empty()}
        saved = saved or nothing
        self.path, self.description = workdir / "summary.json", description
        self.evaluations = [Evaluation(**e) for e in saved["evaluations"]]
        self.losses: list[dict] = saved["losses"]
        self.rollouts: list[Rollout] = []  # of the last evaluation, to be shown
        self.started_s = time.monotonic() - saved["wall_s"]  # unlike that of the day this clock is never set back
        self.skipped = saved["skipped"]  # batches in a row, up to the last that was logged
        self.saving_s = saved["saving_s"]  # that the loop stood still for checkpoints
        self.ledger: dict = ledger.empty() | saved["ledger"]  # an earlier version had fewer kinds of work
        self.failure: str | None = None  # of the last save that failed, if any has
        self.saved: int | None = None  # step of the newest checkpoint when last looked at
        self.verifier_warnings = 0  # said so far

    def host(self) -> dict:
        evaluations = [e._asdict() for e in self.evaluations]
        times = {"wall_s": time.monotonic() - self.started_s, "saving_s": self.saving_s}
        return {"evaluations": evaluations, "losses": self.losses, **times, "skipped": self.skipped, "ledger": self.ledger}

    def summarise(self, step: int, done: bool) -> dict:
        found = {name: value for name, value in self.host().items() if name != "skipped"}
        summary = {"done": done, "steps": step, "saved": self.saved, **found, **self.description}
        m.write_summary(self.path, summary, write=processes.writes())
        return summary


def train(
    run: Run,
    workdir: str | os.PathLike,
    checkpoints: Checkpoints,
    *,
    log_options: dict | None = None,
    stop: Callable[[], str] = lambda: "",
    check_stays: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> dict:
    """Train all phases in `workdir`, from its newest checkpoint if there is one; return the summary that is also written.

    `stop` is asked after every step; "stopped" or "interrupted" ends the run. `check_stays` is called before anything is written,
    and raises if the folder is no longer the one the run began in. `say` tells what was found in it, before the log is open.

    Raises:
      Stopped, Interrupted: `stop` said so; a checkpoint of the last step is there.
      Diverged: gradients were not finite for too long.
      NotResumable: the checkpoints do not fit the run, or none of them is whole.
      VerifierFailed: a verifier fails all the time; `verifier_error.txt` in the folder has the first traceback.
      Unwritable: metrics, rollouts, the summary or the last checkpoint can't be written; what was saved before is whole.
    """
    try:
        return train_all(run, Path(workdir), checkpoints, log_options or {}, stop, check_stays, say)
    except m.Unwritable as error:
        check_stays()  # if the folder is gone, that is the error to show
        checkpoints.wait()  # it may be the newest
        raise m.Unwritable(f"{error}; make room, or make it writable; {goes_on(checkpoints)}") from None
    except VerifierFailed as error:
        checkpoints.wait()
        path = Path(workdir) / "verifier_error.txt"
        with contextlib.suppress(OSError):  # a full disk must not hide the cause
            path.write_text(error.traceback, encoding="utf-8", errors="backslashreplace")
        where = f"the traceback of the first failure is in {path}; {goes_on(checkpoints)}"
        raise VerifierFailed(f"{error}; {where}", error.traceback) from None


def train_all(
    run: Run,
    workdir: Path,
    checkpoints: Checkpoints,
    log_options: dict,
    stop: Callable[[], str],
    check_stays: Callable[[], None],
    say: Callable[[str], None],
) -> dict:
    """What `train` does; what can't be written is named, and not yet how to go on."""
    started_s = time.monotonic()
    found = newest(run, checkpoints, say)
    found_s = time.monotonic() - started_s
    # Up to which step the log has what the checkpoint supposes: metrics that wait in it are not there yet.
    logged = -1 if found is None else found.step - len(found.host["waiting"])
    history = History(workdir, run.description, None if found is None else found.host)
    history.saved = checkpoints.latest()
    writes = processes.writes()
    if writes and found is None:
        begin_logs(workdir, say)
    elif writes:
        cut_logs(run, workdir, found, logged, say)
    total_steps = sum(phase.steps for phase in run.phases)
    resume = {"resume_step": logged}
    log = m.open_log(workdir, total_steps=total_steps, write=writes, **resume, **log_options)
    with log:
        if found is None:
            log.doing("making the params")
            params = run.init()
            warm_up(run, log, history, params)
            evaluate(run, log, history, params, "start", 0, final=True)
        else:
            params = None
            where = f"step {found.step} of {total_steps}, in phase {run.phases[found.host['phase']].name}"
            log.say(f"going on from {where}; read in {found_s:.1f} s")
            there = found.host["versions"]
            differ = [
                f"{name} {there.get(name)}, now {v}" for name, v in run.provenance["versions"].items() if v != there.get(name)
            ]
            if differ:
                log.say(f"warning: the checkpoint was made with {'; '.join(differ)}; what follows may differ in rounding")
        for index in range(0 if found is None else found.host["phase"], len(run.phases)):
            if not run.phases[index].steps:
                continue
            params = train_phase(run, index, params, workdir, checkpoints, log, history, found, stop, check_stays)
            found = None
        log.doing("waiting for the last checkpoint")
        save_started_s = time.monotonic()
        checkpoints.wait()
        history.saving_s += time.monotonic() - save_started_s
        tell_failure(checkpoints, log, history)
        check_stays()
        if total_steps and checkpoints.latest() != total_steps:  # what the run was for is not on disk, so it is not done
            raise m.Unwritable(history.failure or f"there is no checkpoint of step {total_steps}, the last one")
    history.saved = checkpoints.latest()
    summary = history.summarise(total_steps, done=True)
    if writes:
        report(run, history)
    return summary


def begin_logs(workdir: Path, say: Callable[[str], None]) -> None:
    """Move aside what a run has logged that ended before its first checkpoint."""
    for path in (workdir / "metrics.jsonl", workdir / "rollouts.jsonl"):
        if path.is_file() and path.stat().st_size:
            aside = free_name(path)
            with m.writing(path):
                path.rename(aside)
            say(f"there is no checkpoint, so the run starts anew; the {path.name} that was there is now {aside}")


def cut_logs(run: Run, workdir: Path, found: Found, logged: int, say: Callable[[str], None]) -> None:
    """Drop the lines after the checkpoint, and say if lines before it are missing."""
    config, begun, stretches = found.host["config"], 0, {"metrics.jsonl": [(0, 0, 1)], "rollouts.jsonl": []}
    for phase in run.phases:  # where each file has lines, and how many steps one is for
        first, last = begun + 1, min(begun := begun + phase.steps, found.step)
        every = max(phase.log_every, config.get(phase.name, {}).get("log_every", 1))  # it may have been another before
        stretches["metrics.jsonl"].append((first, min(last, logged), every))
        if phase.source.samples and run.rollouts_kept and config.get("log", {}).get("rollouts_kept", 1):
            stretches["rollouts.jsonl"].append((first, last, 1))
    dropped = {}
    for name, step in {"metrics.jsonl": logged, "rollouts.jsonl": found.step}.items():
        got = m.truncate(workdir / name, step)
        dropped[name] = got.dropped
        if got.aside is not None:
            say(f"warning: {workdir / name} had lines that are not of a log; they are left out, and {got.aside} has them")
        if missing := m.lacking(got.steps, stretches[name]):
            say(f"warning: {workdir / name} lacks steps {missing}, which are not made again")
    if any(dropped.values()):
        counts = ", ".join(f"{count} of {name}" for name, count in dropped.items())
        say(f"dropped lines of steps that will be made again: {counts}")


def newest(run: Run, checkpoints: Checkpoints, say: Callable[[str], None]) -> Found | None:
    """Restore the newest checkpoint that is whole. Damaged ones are set aside, and said."""
    steps = checkpoints.steps()
    for step in steps:
        try:
            host = checkpoints.peek(step)
            if missing := HOST - host.keys():
                lacks = ", ".join(sorted(missing))
                raise ValueError(f"checkpoint {step} lacks {lacks}: another version made it; choose another --workdir")
            if host["phase"] >= len(run.phases):
                had, has = host["phase"] + 1, len(run.phases)
                raise ValueError(f"checkpoint {step} is of phase {had}, and the config has {has}; choose another --workdir")
            phase = run.phases[host["phase"]]
            abstract, placed = shape_of(run, phase)
            wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
            state, _ = checkpoints.restore(step, wanted)
            needed = phase.objective.needs_reference
            return Found(step, host, state, checkpoints.restore_reference(step, wanted.params) if needed else None)
        except Damaged as error:
            say(f"{error}; set aside")
            checkpoints.set_aside(step)
        except ValueError as error:
            raise NotResumable(str(error)) from None
    if steps:
        raise NotResumable(
            "none of the checkpoints is whole, so there is nothing to go on from; choose another --workdir, or start "
            "anew with --resume=never, which moves all that is there aside"
        )
    return None


def shape_of(run: Run, phase: Phase) -> tuple[TrainState, TrainState]:
    """The shapes and the shardings of a phase's state."""
    abstract = jax.eval_shape(lambda: new_state(run.model.init(jax.random.key(0)), phase.optimizer))
    return abstract, sharding.shardings(abstract, run.mesh)


def train_phase(
    run: Run,
    index: int,
    params,
    workdir: Path,
    checkpoints: Checkpoints,
    log: m.RunLog,
    history: History,
    found: Found | None,
    stop: Callable[[], str],
    check_stays: Callable[[], None],
):
    """Train one phase, from `params` (donated) or from where it was found; return the params."""
    phase = run.phases[index]
    before = sum(earlier.steps for earlier in run.phases[:index])  # global step at which the phase starts
    key = jax.random.fold_in(jax.random.key(run.seed), index)
    needs_reference = phase.objective.needs_reference
    writes = processes.writes()
    _, placed = shape_of(run, phase)
    if found is None:
        source_state, start = phase.source.init(), 0
        reference = jax.tree.map(jnp.copy, params) if needs_reference else None
        state = jax.jit(new_state, static_argnums=1, donate_argnums=0, out_shardings=placed)(params, phase.optimizer)
    else:
        source_state, start = found.host["source"], found.host["phase_step"]
        state, reference = found.state, found.reference
        warm_up(run, log, history, state.params)

    if needs_reference and phase.offload_reference:
        reference = sharding.keep_in(reference, "pinned_host")

    def on_devices(reference):
        return sharding.keep_in(reference, "device") if needs_reference and phase.offload_reference else reference

    step_fn = compile_train_step(
        run.model, phase.objective, phase.optimizer, microbatches=phase.microbatches, state_shardings=placed
    )
    reference_logp = compile_token_logp(run.model, phase.microbatches, run.mesh)
    waiting: list[dict] = [] if found is None else found.host["waiting"]  # metrics of steps that are not logged yet

    for step in range(start + 1, phase.steps + 1):
        started_s, started_compiling_s = time.perf_counter(), compiling.seconds()
        if step == start + 1:
            log.doing(f"{phase.name} {start}/{phase.steps}  drawing the first batch")
        source_state, drawn = phase.source.next(source_state, state.params, key)
        tell_verifier(log, history, drawn.rollouts, f"step {before + step}")
        if phase.source.samples:
            freed.trim()  # the sampler's weights and caches are gone
        drawn_s, drawn_compiling_s = time.perf_counter(), compiling.seconds()
        if step == start + 1:
            log.doing(f"{phase.name} {start}/{phase.steps}  compiling the train step, and making the first")
        batch = sharding.put_rows(drawn.batch, run.mesh)
        if needs_reference:
            batch = dataclasses.replace(batch, reference_logp_BT=reference_logp(on_devices(reference), batch))
        check_stays()
        if len(waiting) >= phase.log_every:  # one step late, since reading a metric waits for the device
            write_metrics(log, history, phase, before, step - 1, waiting)
        learned = {}
        for _ in range(phase.updates_per_batch):
            state, new = step_fn(state, batch)
            learned = m.merge(learned, new)
        if phase.source.samples:
            jax.block_until_ready(state)  # the next draw would wait anyway: so the time is booked where it was spent
        ended_s, compiling_s = time.perf_counter(), compiling.seconds()
        # Compilation is no step's: rates and the time that is left are of steps without it.
        compile_s = compiling_s - started_compiling_s
        learn_s = ended_s - drawn_s - (compiling_s - drawn_compiling_s)
        step_s = ended_s - started_s - compile_s
        times = {"time/learn_s": (learn_s, 1.0), "time/step_s": (step_s, 1.0), "time/compile_s": (compile_s, 1.0)}
        enter(history, run, phase, drawn, learn_s=learn_s if phase.source.samples else step_s)
        enter_compiling(history, run, compile_s, run.mesh.size)
        waiting.append(name_learned(learned, sampled=phase.source.samples) | drawn.metrics | times)
        kept = drawn.rollouts[: run.rollouts_kept]
        check_stays()
        m.write_rollouts(workdir / "rollouts.jsonl", kept, before + step, phase.name, decode=run.decode, write=writes)

        last = step == phase.steps
        stopping = stop()
        save_now = last or stopping or checkpoints.due(before + step)
        evaluate_now = last or (phase.evaluate_every and step % phase.evaluate_every == 0)
        if evaluate_now:
            write_metrics(log, history, phase, before, step, waiting)
            evaluate(run, log, history, state.params, phase.name, before + step, final=last)
        if save_now:
            check_finite(state.params, learned, before + step)
            waiting = plain(waiting)
            check_stays()
            save_started_s = time.monotonic()
            if gone := checkpoints.gone():
                log.say(f"warning: somebody has removed the checkpoints of steps {', '.join(map(str, gone))}; the run continues")
            if history.saved is None and checkpoints.latest() is not None:  # without it a next start could not know of any
                history.saved = checkpoints.latest()
                history.summarise(before + step, done=False)
            host = {"phase": index, "phase_step": step, "source": phase.source.save(source_state), "waiting": waiting}
            checkpoints.save(before + step, state, host | history.host() | run.provenance, on_devices(reference))
            history.saving_s += time.monotonic() - save_started_s
            tell_failure(checkpoints, log, history)
        if stopping:
            checkpoints.wait()
            tell_failure(checkpoints, log, history)
            if stopping == "interrupted":
                raise Interrupted(f"interrupted; {goes_on(checkpoints)}")
            raise Stopped(f"stopped after step {before + step}; {goes_on(checkpoints)}")
    return state.params


def check_finite(params, learned: dict, step: int) -> None:
    """Raise Diverged if params that are about to be saved are not finite.

    They are looked at only where the last update was skipped: one that was made is finite.
    """
    skipped, updates = learned["skipped"]
    if skipped < updates or all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params)):
        return
    raise Diverged(
        f"the params are not finite at step {step}, so they are not saved; look at the weights that the run began with"
    )


def enter(history: History, run: Run, phase: Phase, drawn: Drawn, learn_s: float) -> None:
    """Enter a step in the ledger."""
    config, devices = run.model.config, {"sample": run.sample_devices, "learn": run.mesh.size}
    work = ledger.learning(config, drawn.batch, updates=phase.updates_per_batch, reference=phase.objective.needs_reference)
    used, seconds = {"learn": work}, {"learn": learn_s}
    if phase.source.samples:
        used["sample"] = ledger.sampling(config, drawn.rollouts)
        seconds["sample"] = drawn.metrics["time/sample_s"][0] + drawn.metrics["time/verify_s"][0]
    for kind, amounts in used.items():
        device_s = seconds[kind] * devices[kind]
        history.ledger = ledger.add(history.ledger, kind, **amounts, device_s=device_s, watts=run.watts)


def enter_compiling(history: History, run: Run, compile_s: float, devices: int) -> None:
    """Enter in the ledger that devices waited for a compilation."""
    history.ledger = ledger.add(history.ledger, "compile", tokens=0, flops=0, device_s=compile_s * devices, watts=run.watts)


def tell_failure(checkpoints: Checkpoints, log: m.RunLog, history: History) -> None:
    """Say if a save has failed: training goes on to the next."""
    if failure := checkpoints.failure():
        history.failure = failure
        log.say(f"warning: {failure}; make room, or make it writable, before the next save")


VERIFIER_WARNINGS = 5  # said; more are only counted


def tell_verifier(log: m.RunLog, history: History, rollouts: Sequence[Rollout], when: str) -> None:
    """Say if a verifier has failed, for the first few times."""
    failed = [r for r in rollouts if verifier_failed(r.verdict)]
    if not failed or history.verifier_warnings >= VERIFIER_WARNINGS:
        return
    history.verifier_warnings += 1
    first = f"the first at task {failed[0].task.id!r}: {failed[0].verdict.reason}"
    last = "; from now on such failures are only counted" if history.verifier_warnings == VERIFIER_WARNINGS else ""
    log.say(f"warning: {when}: {len(failed)} of {len(rollouts)} attempts earn 0 because their verifier failed; {first}{last}")


def goes_on(checkpoints: Checkpoints) -> str:
    latest = checkpoints.latest()
    return f"the same command continues from {'the start' if latest is None else f'step {latest}'}"


def warm_up(run: Run, log: m.RunLog, history: History, params) -> None:
    """Compile the sampler before it is needed: nothing is compiled in the middle of a run."""
    if run.warm_up is None:
        return
    started_s = time.perf_counter()
    log.say("compiling the sampler ...")
    log.doing("compiling the sampler")
    run.warm_up(params)
    took_s = time.perf_counter() - started_s
    enter_compiling(history, run, took_s, run.sample_devices)  # all of it: two threads compile
    log.say(f"compiled the sampler in {took_s:.0f} s")


def write_metrics(log: m.RunLog, history: History, phase: Phase, before: int, step: int, waiting: list[dict]) -> None:
    """Log the sum of the metrics that wait, under the last of their steps.

    Raises:
      Diverged: too many batches in a row were skipped.
    """
    steps = plain(waiting)
    values = m.divide(m.merge(*steps))
    values["perf/tokens_per_s"] = values["train/tokens"] / values["time/step_s"]
    log.write(before + step, phase.name, values, phase_step=step, phase_steps=phase.steps)
    waiting.clear()
    for learned in steps:
        skipped, updates = learned["train/skipped"]
        history.skipped = history.skipped + 1 if skipped == updates else 0
        if history.skipped >= phase.max_skipped:
            raise Diverged(
                f"the gradient or the update was not finite for {history.skipped} batches in a row, up to step "
                f"{before + step} (phase {phase.name}); such updates were skipped. Lower {phase.name}.optimizer.lr, "
                "or look at the last rollouts; the newest checkpoint is kept"
            )


def plain(metrics: list[dict]) -> list[dict]:
    """Metrics as JSON has them: a sum of these is the same before and after a checkpoint."""
    return [{name: [float(x) for x in pair] for name, pair in step.items()} for step in jax.device_get(metrics)]


def evaluate(run: Run, log: m.RunLog, history: History, params, phase: str, step: int, *, final: bool) -> None:
    """Evaluate, log, and write the summary so far; `final` uses the full number of tasks."""
    started_s, compiling_s = time.perf_counter(), compiling.seconds()
    log.doing(f"{phase}, step {step}: evaluating")
    result = run.evaluate(params, phase=phase, step=step, final=final)
    compile_s = compiling.seconds() - compiling_s
    enter_compiling(history, run, compile_s, run.sample_devices)
    device_s = (time.perf_counter() - started_s - compile_s) * run.sample_devices
    history.ledger = ledger.add(history.ledger, "evaluate", **result.work, device_s=device_s, watts=run.watts)
    history.evaluations += result.evaluations
    history.losses += [{"phase": phase, "step": step, "text": name, "nll": nll} for name, nll in result.nll.items()]
    history.rollouts = result.rollouts
    tell_verifier(log, history, result.rollouts, f"evaluation at step {step}")
    values = {f"eval/{name}/nll": nll for name, nll in result.nll.items()}
    if result.rollouts:
        failures = count_failures(r.verdict for r in result.rollouts)
        values |= {f"eval/{name}": count / len(result.rollouts) for name, count in failures.items()}
    for e in result.evaluations:
        mode = "greedy" if e.temperature == 0 else f"t{e.temperature:g}"
        values[f"eval/{e.suite}/{mode}/accuracy"] = e.accuracy
    log.write(step, phase, values | ledger.named(history.ledger))
    history.summarise(step, done=False)


def report(run: Run, history: History) -> None:
    """Print what a person wants to see at the end: before and after, and three rollouts in full."""
    if history.evaluations:
        m.print_evaluations(history.evaluations)
    for loss in history.losses:
        print(f"{loss['text']}: {loss['nll']:.4f} nats a token at step {loss['step']} ({loss['phase']})")
    for kind, used in history.ledger.items():
        energy = f", {used['joules']:,.0f} J at {run.watts:g} W a device" if run.watts else ""
        work = "" if kind == "compile" else f"{used['tokens']:,.0f} tokens, {used['flops']:.3g} FLOPs, "
        print(f"{kind}: {work}{used['device_s']:,.0f} device seconds{energy}")
    last = [r for r in history.rollouts if r.temperature == history.rollouts[-1].temperature]
    m.print_rollouts(last, 3, decode=run.decode)


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
