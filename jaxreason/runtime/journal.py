"""Everything a run records while it trains: log, ledger, rollouts, evaluations, summary
and checkpoints.

The loop in `train.py` calls a method of `Journal` at each event. The journal itself
times the steps and keeps metrics that are not yet written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxreason import metrics as m
from jaxreason import teacher
from jaxreason.environment import VerifierFailed, count_failures, verifier_failed
from jaxreason.learner import MISMATCH, MISMATCH_BY_DEPTH, name_metrics
from jaxreason.runtime import compiling, energy, files, ledger, peak, processes, resume, terminal
from jaxreason.runtime import log as run_log
from jaxreason.runtime.alarms import Alarms, Traits
from jaxreason.runtime.checkpoint import Checkpoints
from jaxreason.runtime.energy import Meter
from jaxreason.runtime.peak import Peak
from jaxreason.runtime.profile import FOLDER, Trace
from jaxreason.runtime.resume import Found, Progress
from jaxreason.sources import NextBatch
from jaxreason.types import Evaluation, Rollout

VERIFIER_WARNINGS = 5  # shown; further ones are only counted


class Diverged(Exception):
    """The gradients, the updates or the params are no longer finite."""


class Journal:
    """The records of one run. `run` is a `train.Run`."""

    def __init__(
        self,
        run,
        workdir: Path,
        checkpoints: Checkpoints,
        log: run_log.RunLog,
        progress: Progress,
        check_stays: Callable[[], None],
        meter: Meter,
    ):
        self.run, self.workdir, self.checkpoints, self.log, self.meter = run, workdir, checkpoints, log, meter
        self.peak: Peak | None = None  # peak rates of a device, if known
        self.trace = Trace(workdir / FOLDER, run.profile_steps, log.say)
        self.alarms = Alarms(**progress.alarms)
        self.source_told = meter.source  # of joules, when last told
        self.mismatch: dict[str, float] = {}  # disagreement of sampler and learner when last logged
        self.progress, self.check_stays = progress, check_stays
        self.started_s = time.monotonic() - progress.wall_s  # unlike wall-clock time, this clock is never set back
        self.saved = checkpoints.latest()  # step of the newest checkpoint when last looked at
        self.failure: str | None = None  # message of the last failed save
        self.rollouts: list[Rollout] = []  # of the last evaluation, for `report`
        self.trained: Sequence[Rollout] = ()  # of the last update: metrics are logged when the next batch is drawn
        self.phase = self.before = self.step = None  # current phase, steps of earlier phases, step in the phase

    def tell_found(self, found: Found) -> None:
        """Say from where the run continues."""
        steps, phase = sum(phase.steps for phase in self.run.phases), self.run.phases[found.host["phase"]]
        self.log.say(f"going on from step {found.step} of {steps}, in phase {phase.name}; read in {found.read_s:.1f} s")
        self.trace.resume(found.step)
        if differ := resume.changed_versions(found, self.run.provenance):
            self.log.say(f"warning: the checkpoint was made with {'; '.join(differ)}; what follows may differ in rounding")

    def tell_sources(self) -> None:
        """Say once if joules are not metered; look up or measure the peak rates."""
        if not self.meter.counts:
            estimated = self.meter.source == "watts"
            how = "estimated from config.log.watts" if estimated else "not counted (config.log.watts estimates them)"
            self.log.say(f"joules are {how}; there is no counter: {self.meter.reason}")
        if processes.writes():
            self.peak = peak.find(self.run.mesh.local_devices[0], self.run.model.config.dtype, self.run.measures_machine)

    # --- a phase and its steps ---

    def begin_phase(self, index: int, start: int) -> None:
        self.progress.phase, self.phase = index, self.run.phases[index]
        self.before = sum(earlier.steps for earlier in self.run.phases[:index])
        self.step = self.start = start

    def begin_step(self) -> None:
        """Start the clock of the next step."""
        self.step += 1
        self.trace.begin_step(self.before + self.step)
        self.started = Clock()
        self.meter.lap()
        if self.step == self.start + 1:
            self.log.doing(f"{self.phase.name} {self.start}/{self.phase.steps}  drawing the first batch")

    def drew(self, drawn: NextBatch, source_state: dict) -> None:
        """Record that a batch was drawn."""
        self.drawn, self.progress.source = drawn, source_state
        self.warn_of_verifier(drawn.rollouts, f"step {self.before + self.step}")
        self.drawn_at, self.draw_j = Clock(), self.meter.lap()
        if self.step == self.start + 1:
            self.log.doing(f"{self.phase.name} {self.start}/{self.phase.steps}  compiling the train step, and making the first")

        self.trace.enter("step")

    def write_if_due(self) -> None:
        """Log the metrics of the previous steps if enough have accumulated. Reading a
        metric waits for the device, so metrics are logged one step late.
        """
        self.check_stays()
        if len(self.progress.waiting) >= self.phase.log_every:
            self.write_metrics(self.step - 1)

    def learned(self, metrics: dict) -> None:
        """Record an update: its metrics, times, cost and rollouts."""
        self.trace.leave()
        # Step times exclude compilation, so that rates and the remaining time are
        # right.
        step_s, compile_s = self.started.passed()
        learn_s, learn_compile_s = self.drawn_at.passed()
        times = {"time/learn_s": (learn_s, 1.0), "time/step_s": (step_s, 1.0), "time/compile_s": (compile_s, 1.0)}
        self.book_step(step_s, learn_s, draw_compile_s=compile_s - learn_compile_s, learn_compile_s=learn_compile_s)
        named = name_metrics(metrics, sampled=self.phase.source.samples)
        self.progress.waiting.append(named | self.drawn.metrics | times)
        self.last_update, self.trained = metrics, self.drawn.rollouts
        self.check_stays()
        kept = files.whole_groups(self.drawn.rollouts, self.run.rollouts_kept)
        files.write_rollouts(
            self.workdir / "rollouts.jsonl",
            kept,
            self.before + self.step,
            self.phase.name,
            decode=self.run.decode,
            pieces=self.run.token_pieces,
            advantages=self.drawn.advantages[: len(kept)],
            write=processes.writes(),
        )

        if self.trace.end_step(self.before + self.step, metrics):
            self.log.say(f"trace of the steps {self.trace.steps[0]} to {self.trace.steps[1]}: {self.trace.folder}")

    def write_metrics(self, step: int) -> None:
        """Log the merged metrics of all unlogged steps, under the last of these steps.

        Raises:
          Diverged: too many batches in a row were skipped.
        """
        steps, phase, progress = plain(self.progress.waiting), self.phase, self.progress
        merged = m.merge(*steps)
        unreached = [name for name, (_, count) in merged.items() if name.startswith(MISMATCH_BY_DEPTH) and not count]
        values = m.divide({name: pair for name, pair in merged.items() if name not in unreached})
        self.mismatch = {name: value for name, value in values.items() if name.startswith(MISMATCH)} or self.mismatch
        values["perf/tokens_per_s"] = values["train/tokens"] / values["time/step_s"]
        if "time/verify_s" in values:  # the time that a step waited for verdicts, which other slots' decoding hides
            values["time/verify_share"] = values["time/verify_s"] / values["time/step_s"]
        self.log.write(self.before + step, phase.name, values, phase_step=step, phase_steps=phase.steps)
        self.warn(self.before + step, phase.name, values)
        if self.trained:
            lengths, rewards = zip(*((len(r.tokens), r.verdict.reward) for r in self.trained), strict=True)
            self.log.write_more(self.before + step, histograms={"rollout/lengths": lengths, "rollout/rewards": rewards})
        progress.waiting = []
        for learned in steps:
            skipped, updates = learned["train/skipped"]
            progress.skipped = progress.skipped + 1 if skipped == updates else 0
            if progress.skipped >= phase.max_skipped:
                raise Diverged(
                    f"the gradient or the update was not finite for {progress.skipped} batches in a row, up to step "
                    f"{self.before + step} (phase {phase.name}); such updates were skipped. Lower {phase.name}.optimizer.lr, "
                    "or look at the last rollouts; the newest checkpoint is kept"
                )

    # --- the ledger ---

    def book_step(self, step_s: float, learn_s: float, *, draw_compile_s: float, learn_compile_s: float) -> None:
        """Add a step to the ledger: its batch was drawn in the first lap of the meter
        and learned from in the second.
        """
        config, phase, devices = self.run.model.config, self.phase, self.run.mesh.size
        updates, objective = phase.updates_per_batch, phase.objective
        learned = ledger.learning(config, self.drawn.batch, updates=updates, passes=objective.passes - objective.refers)
        if objective.refers:
            times = updates if phase.reference == "current" else 1
            learned["flops"] += times * ledger.referring((teacher.model_of(phase) or self.run.model).config, self.drawn.batch)
        learn_j = self.meter.lap()
        if not phase.source.samples:
            compile_s = draw_compile_s + learn_compile_s
            self.book(self.draw_j + learn_j, {"learn": step_s * devices, "compile": compile_s * devices}, {"learn": learned})
            return
        sampled = self.sampling(self.drawn.rollouts)
        sample_s = self.drawn.metrics["time/sample_s"][0] + self.drawn.metrics["time/verify_s"][0]
        drawing = {"sample": sample_s * self.run.sample_devices, "compile": draw_compile_s * devices}
        learning = {"learn": learn_s * devices, "compile": learn_compile_s * devices}
        if self.run.samples_apart:  # both at the same time, and the meter does not see which device is whose
            both = drawing | learning | {"compile": drawing["compile"] + learning["compile"]}
            self.book(self.draw_j + learn_j, both, {"sample": sampled, "learn": learned})
        else:
            self.book(self.draw_j, drawing, {"sample": sampled})
            self.book(learn_j, learning, {"learn": learned})

    def sampling(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Count tokens, FLOPs and bytes of sampling."""
        return ledger.sampling(self.run.model.config, rollouts) | self.decoding(rollouts)

    def decoding(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        return {} if self.run.decoding is None else {"bytes": ledger.decode_bytes(self.run.decoding, rollouts)}

    def book(self, lap_j: float, device_s: dict[str, float], work: dict[str, dict]) -> None:
        """Add kinds of work that were done in one lap of the meter to the ledger.
        Compilation has device-seconds alone.
        """
        source, progress = self.meter.source, self.progress
        if source != self.source_told:
            self.source_told = source
            self.log.say(f"warning: joules are metered no longer, because a counter failed: {self.meter.reason}")
        progress.joules_from += [source] * (source not in progress.joules_from)
        joules = self.meter.divide(lap_j, device_s)
        for kind, amount in device_s.items():
            used = work.get(kind, {"tokens": 0, "flops": 0})
            progress.ledger = ledger.add(progress.ledger, kind, **used, device_s=amount, joules=joules[kind])

    # --- evaluations and reports ---

    def warm_up(self, params) -> None:
        """Compile the sampler in advance, so that nothing compiles in the middle of a
        run.
        """
        if self.run.warm_up is None:
            return
        started_s = time.perf_counter()
        self.log.say("compiling the sampler ...")
        self.log.doing("compiling the sampler")
        self.meter.lap()
        self.run.warm_up(params)
        took_s = time.perf_counter() - started_s
        self.book(self.meter.lap(), {"compile": took_s * self.run.sample_devices}, {})  # the whole time: two threads compile
        self.log.say(f"compiled the sampler in {took_s:.0f} s")

    def evaluate(self, params, final: bool) -> None:
        """Evaluate after the current step."""
        self.write_metrics(self.step)
        self.evaluate_at(params, self.phase.name, self.before + self.step, final=final)

    def evaluate_at(self, params, phase: str, step: int, *, final: bool) -> None:
        """Evaluate, log the results, and write the summary so far. `final` uses the
        full number of tasks.
        """
        started, progress = Clock(), self.progress
        self.log.doing(f"{phase}, step {step}: evaluating")
        self.meter.lap()
        result = self.run.evaluate(params, phase=phase, step=step, final=final)
        seconds, compile_s = started.passed()
        device_s = {"evaluate": seconds * self.run.sample_devices, "compile": compile_s * self.run.sample_devices}
        self.book(self.meter.lap(), device_s, {"evaluate": result.work | self.decoding(result.rollouts)})
        progress.evaluations += [e._asdict() for e in result.evaluations]
        progress.losses += [{"phase": phase, "step": step, "text": name, "nll": nll} for name, nll in result.nll.items()]
        self.rollouts = result.rollouts
        self.warn_of_verifier(result.rollouts, f"evaluation at step {step}")
        values = {f"eval/{name}/nll": nll for name, nll in result.nll.items()}
        failures = count_failures(r.verdict for r in result.rollouts)
        if result.rollouts:
            values |= {f"eval/{name}": count / len(result.rollouts) for name, count in failures.items()}
        for e in result.evaluations:
            mode = mode_of(e)
            measured = {"accuracy": e.accuracy} | {name: e.measures[name] for name in e.measures if name not in failures}
            values |= {f"eval/{e.suite}/{mode}/{name}": value for name, value in measured.items()}
        self.keep_evaluated(result, phase, step)
        self.warn(step, phase, values, result.trained)
        self.log.write(step, phase, values | ledger.named(progress.ledger))
        self.summarise(step, done=False)

    def warn(self, step: int, phase: str, values: dict[str, float], trained: Sequence[str] = ()) -> None:
        """Give the warnings that a line of metrics is a reason for. `trained` are the
        suites whose tasks are like those that the phase trains on.
        """
        traits = Traits(trained=trained)
        if self.phase is not None:
            stale = self.phase.source.lag + self.phase.source.replay > 0 or self.phase.updates_per_batch > 1
            traits = traits._replace(needs_group=self.phase.objective.needs_group, stale=stale)
        for warning in self.alarms.hear(step, phase, values, traits):
            self.progress.warnings.append(warning._asdict())
            self.log.say(f"warning: step {step}: {warning.text}")

    def keep_evaluated(self, result, phase: str, step: int) -> None:
        """Write the first rollouts of each evaluation to `rollouts.jsonl`."""
        first = 0
        texts: dict[str, str] = {}
        for e in result.evaluations:
            kept = files.whole_groups(result.rollouts[first : first + e.n * e.samples], self.run.rollouts_kept)
            first += e.n * e.samples
            words = {"decode": self.run.decode, "pieces": self.run.token_pieces, "write": processes.writes(), "suite": e.suite}
            files.write_rollouts(self.workdir / "rollouts.jsonl", kept, step, phase, **words)
            texts |= {f"eval/{e.suite}/{mode_of(e)}/{i}": text_sample(r) for i, r in enumerate(kept[:SAMPLES])}
        self.log.write_more(step, texts=texts)

    def warn_of_verifier(self, rollouts: Sequence[Rollout], when: str) -> None:
        """Warn about verifier failures, at most `VERIFIER_WARNINGS` times."""
        failed = [r for r in rollouts if verifier_failed(r.verdict)]
        if not failed or self.progress.verifier_warnings >= VERIFIER_WARNINGS:
            return
        self.progress.verifier_warnings += 1
        first = f"the first at task {failed[0].task.id!r}: {failed[0].verdict.reason}"
        last = "; from now on such failures are only counted" if self.progress.verifier_warnings == VERIFIER_WARNINGS else ""
        self.log.say(
            f"warning: {when}: {len(failed)} of {len(rollouts)} attempts earn 0 because their verifier failed; {first}{last}"
        )

    def host(self) -> dict:
        """Return the progress so far, in the form that a checkpoint stores."""
        self.progress.wall_s = time.monotonic() - self.started_s
        self.progress.alarms = dataclasses.asdict(self.alarms)
        return {name: getattr(self.progress, name) for name in Progress.names()}

    def summarise(self, step: int, done: bool) -> dict:
        """Write `summary.json` and return it."""
        if done:
            self.saved = self.checkpoints.latest()
        told = ("evaluations", "losses", "wall_s", "saving_s", "ledger", "warnings")
        found = {name: value for name, value in self.host().items() if name in told}
        summary = {"done": done, "steps": step, "saved": self.saved, **found, **self.costs(), **self.run.description}
        files.write_summary(self.workdir / "summary.json", summary, write=processes.writes())
        return summary

    def costs(self) -> dict:
        """Return what the ledger's numbers are made of and what was got for them."""
        used, sources = self.progress.ledger, self.progress.joules_from
        source = "mixed" if len(sources) > 1 else next(iter(sources), None)
        return {
            "joules_from": source,
            "peak": None if self.peak is None else self.peak._asdict(),
            "utilisation": ledger.utilisation(used, self.peak),
            "per_correct_answer_gained": ledger.per_correct_answer(used, self.progress.evaluations, source is not None),
        }

    def report(self) -> None:
        """Print the final report: accuracies before and after, the cost, and three
        rollouts in full.
        """
        if not processes.writes():
            return
        if self.progress.evaluations:
            terminal.print_evaluations([Evaluation(**e) for e in self.progress.evaluations])
        for loss in self.progress.losses:
            print(f"{loss['text']}: {loss['nll']:.4f} nats a token at step {loss['step']} ({loss['phase']})")
        for line in [*terminal.mismatch(self.mismatch), *ledger.report({"ledger": self.progress.ledger, **self.costs()})]:
            print(line)
        last = [r for r in self.rollouts if r.temperature == self.rollouts[-1].temperature]
        terminal.print_rollouts(last, 3, decode=self.run.decode)

    # --- checkpoints ---

    def save_due(self) -> bool:
        return self.checkpoints.due(self.before + self.step)

    def save(self, state, reference) -> None:
        """Save a checkpoint of the current step. A failed save is reported, and
        training continues.
        """
        step = self.before + self.step
        check_finite(state.params, self.last_update, step)
        self.check_stays()
        with self.saving():
            if gone := self.checkpoints.gone():
                steps = ", ".join(map(str, gone))
                self.log.say(f"warning: somebody has removed the checkpoints of steps {steps}; the run continues")
            if self.saved is None and self.checkpoints.latest() is not None:  # tells a later start that there were checkpoints
                self.saved = self.checkpoints.latest()
                self.summarise(step, done=False)
            self.progress.waiting, self.progress.phase_step = plain(self.progress.waiting), self.step
            host = self.host() | {"source": self.phase.source.save(self.progress.source)}
            self.checkpoints.save(step, state, host | self.run.provenance, reference)
        self.warn_of_failed_save()

    def wait(self) -> None:
        """Wait until the last save has completed or failed."""
        self.checkpoints.wait()
        self.warn_of_failed_save()

    def finish(self, steps: int) -> None:
        """Wait for the last checkpoint.

        Raises:
          Unwritable: the last checkpoint is not on disk, so the run does not count as
            done.
        """
        self.log.doing("waiting for the last checkpoint")
        with self.saving():
            self.checkpoints.wait()
        self.warn_of_failed_save()
        self.check_stays()
        if steps and self.checkpoints.latest() != steps:
            raise files.Unwritable(self.failure or f"there is no checkpoint of step {steps}, the last one")
        self.log.doing("")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Add the time spent in this block to `saving_s`, the time that the loop waits
        for saves.
        """
        started_s = time.monotonic()
        yield
        self.progress.saving_s += time.monotonic() - started_s

    def warn_of_failed_save(self) -> None:
        if failure := self.checkpoints.failure():
            self.failure = failure
            self.log.say(f"warning: {failure}; make room, or make it writable, before the next save")


@dataclasses.dataclass
class Clock:
    """A point in time, with the compilation time before it."""

    at_s: float = dataclasses.field(default_factory=time.perf_counter)
    compiling_s: float = dataclasses.field(default_factory=compiling.seconds)

    def passed(self) -> tuple[float, float]:
        """Return the seconds since then without compilation, and those of
        compilation.
        """
        compile_s = compiling.seconds() - self.compiling_s
        return time.perf_counter() - self.at_s - compile_s, compile_s


SAMPLES = 3  # texts of a suite at a temperature, per evaluation, that trackers get


def mode_of(e: Evaluation) -> str:
    """Name the temperature of an evaluation, as metrics do."""
    return "greedy" if e.temperature == 0 else f"t{e.temperature:g}"


def text_sample(r: Rollout) -> str:
    """Return a question, its answer and the verdict, for a tracker."""
    judged = f"{'correct' if r.verdict.correct else 'wrong'}: {r.verdict.parsed}{r.task.expected}"
    return f"{r.task.question}\n\n{r.text}\n\n{judged}"


@contextlib.contextmanager
def open_journal(
    run,
    workdir: Path,
    checkpoints: Checkpoints,
    found: Found | None,
    *,
    log_options: dict,
    check_stays: Callable[[], None],
    say: Callable[[str], None],
) -> Iterator[Journal]:
    """Open the log of a run, after cutting it back to the checkpoint `found`."""
    writes = processes.writes()
    if writes and found is None:
        resume.begin_logs(workdir, say)
    elif writes:
        resume.cut_logs(run, workdir, found, say)
    total_steps = sum(phase.steps for phase in run.phases)
    logged = -1 if found is None else found.logged
    progress = Progress() if found is None else Progress.read(found.host)
    log_options = {"config": run.provenance.get("config"), **log_options}
    log = run_log.open_log(workdir, total_steps=total_steps, write=writes, resume_step=logged, **log_options)
    with log, contextlib.closing(energy.open_meter(run.watts)) as meter:
        journal = Journal(run, workdir, checkpoints, log, progress, check_stays, meter)
        journal.tell_sources()
        if found is None:
            log.write_more(0, texts={"config": json.dumps(run.provenance.get("config"), indent=2, default=str)})
        with contextlib.closing(journal.trace):
            yield journal


@contextlib.contextmanager
def told_how_to_continue(workdir: Path, checkpoints: Checkpoints, check_stays: Callable[[], None]) -> Iterator[None]:
    """Add to an error that ends the run the step from which the same command
    continues.
    """
    try:
        yield
    except files.Unwritable as error:
        check_stays()  # if the folder is gone, that is the error to show
        checkpoints.wait()  # a save in progress may become the newest checkpoint
        raise files.Unwritable(f"{error}; make room, or make it writable; {continues(checkpoints)}") from None
    except VerifierFailed as error:
        checkpoints.wait()
        path = workdir / "verifier_error.txt"
        with contextlib.suppress(OSError):  # a full disk must not hide the cause
            path.write_text(error.traceback, encoding="utf-8", errors="backslashreplace")
        where = f"the traceback of the first failure is in {path}; {continues(checkpoints)}"
        raise VerifierFailed(f"{error}; {where}", error.traceback) from None


def continues(checkpoints: Checkpoints) -> str:
    """Say from which step the same command continues."""
    latest = checkpoints.latest()
    return f"the same command continues from {'the start' if latest is None else f'step {latest}'}"


def check_finite(params, learned: dict, step: int) -> None:
    """Raise Diverged if the params to be saved are not finite.

    The params are checked only if the last update was skipped: any update that is not
    skipped is finite.
    """
    skipped, updates = learned["skipped"]
    if skipped < updates or all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params)):
        return
    raise Diverged(
        f"the params are not finite at step {step}, so they are not saved; look at the weights that the run began with"
    )


def plain(metrics: list[dict]) -> list[dict]:
    """Convert metrics to plain floats, so that their sums are the same before and after
    a checkpoint.
    """
    return [{name: [float(x) for x in pair] for name, pair in step.items()} for step in jax.device_get(metrics)]
