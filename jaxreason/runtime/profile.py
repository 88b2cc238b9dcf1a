"""A trace of some steps of a run, for xprof and Perfetto (`jax.profiler`).

Its host rows have the regions sample, verify, batch and step; the device rows of
accelerators the programs. Tracing slows a run down, so a few steps in the middle of a
phase are what to look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax

FOLDER = "profile"  # in the folder of the run


def parse_steps(text: str, total: int) -> tuple[int, int]:
    """Read FIRST:LAST, steps of the whole run, both included; or one step.

    Raises:
      ValueError: something else, or steps that the run does not have.
    """
    found = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= total:
        raise ValueError(f"--profile_steps got {text!r}; allowed: FIRST:LAST within 1:{total}, as 10:12")
    return first, last


class Trace:
    """Traces the steps of a run from the first to the last; None: no step.

    A trace that fails (a full disk, another trace of the process) is given up with one
    warning through `say`, and the run continues.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, say: Callable[[str], None]):
        self.folder, self.steps, self.say, self.open = folder, steps, say, False
        self.region: jax.profiler.TraceAnnotation | None = None

    def resume(self, step: int) -> None:
        """Warn if the run continues from a step behind those to trace."""
        if self.steps is not None and step >= self.steps[1]:
            self.say(
                f"warning: nothing is traced: the run continues after step {step}, and --profile_steps ends at {self.steps[1]}"
            )

    def begin_step(self, step: int) -> None:
        if self.steps is not None and not self.open and self.steps[0] <= step <= self.steps[1]:
            # JAX converts a trace for Perfetto only where it is alone in its folder.
            alone = jax.process_count() == 1
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(self.folder), create_perfetto_trace=alone)
                self.open = True
            except Exception as error:  # whatever a profiler raises: a trace must not end a run
                self.give_up(error)

    def enter(self, region: str) -> None:
        """Begin a named region of this thread, which lasts until `leave`."""
        if self.open:
            self.region = jax.profiler.TraceAnnotation(region)
            self.region.__enter__()

    def leave(self) -> None:
        if self.region is not None:
            self.region.__exit__(None, None, None)
            self.region = None

    def end_step(self, step: int, metrics) -> bool:
        """End the trace after its last step, whose `metrics` are waited for; return
        whether it ended.
        """
        if not self.open or step < self.steps[1]:
            return False
        jax.block_until_ready(metrics)
        self.close()
        return self.steps is not None

    def close(self) -> None:
        """End the trace, of a run that is stopped within these steps too."""
        self.leave()
        if self.open:
            self.open = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.steps = None
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        self.say(f"warning: can't write a trace to {self.folder}: {why}; the run continues without it")
