"""Progress and results of an evaluation on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from jaxreason.runtime.terminal import duration, visible
from jaxreason.types import Rollout

PROGRESS_EVERY_S = 10.0


def say(line: str) -> None:
    print(line, flush=True)


def series_name(suite: str, temperature: float, thinking_tokens: int | None) -> str:
    budget = "" if thinking_tokens is None else f", {thinking_tokens} thinking tokens"
    return f"{suite}, {'greedy' if temperature == 0 else f'T={temperature:g}'}{budget}"


class Progress:
    """Shows how many of the attempts of a series are made."""

    def __init__(self, name: str, total: int, slots: int):
        self.name, self.total, self.made, self.correct, self.tokens = name, total, 0, 0, 0
        # Compilation is over, and attempts end at a steady pace, once every slot has
        # been filled anew.
        self.first = min(slots, max(1, total // 2))
        self.live, self.begun_s, self.printed_s = sys.stderr.isatty(), 0.0, 0.0

    def count(self, rollout: Rollout) -> None:
        self.made, self.correct = self.made + 1, self.correct + bool(rollout.verdict.correct)
        now_s = time.monotonic()
        if self.made <= self.first:
            self.begun_s = self.printed_s = now_s
            return
        self.tokens += len(rollout.tokens)
        if now_s - self.printed_s < (0.2 if self.live else PROGRESS_EVERY_S) and self.made < self.total:
            return
        self.printed_s, took_s = now_s, max(1e-9, now_s - self.begun_s)
        left = duration(took_s / (self.made - self.first) * (self.total - self.made))
        line = f"{visible(self.name)}: {self.made} of {self.total} attempts, {self.correct / self.made:.3f} correct, "
        # Attempts that end in one chunk of tokens tell no rate.
        line += f"{self.tokens / took_s:,.0f} tokens/s, about {left} left" if took_s >= 1 else f"{left} left"
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print(file=sys.stderr)


SHOWN = ("step_accuracy", "attempts", "retries", "self_checks", "check_accuracy", "wrong_then_right", "right_then_wrong")


def print_results(found: Mapping) -> None:
    """Print a paragraph per series: accuracy, other uses of the samples, lengths."""
    for e in found["evaluations"]:
        m, k = e["measures"], e["samples"]
        name = series_name(e["suite"], e["temperature"], e["thinking_tokens"])
        say(visible(f"{name}: {e['accuracy']:.3f} [{e['low']:.3f}, {e['high']:.3f}] of {e['n']} task{'s' * (e['n'] != 1)}"))
        if k > 1:
            uses = ", ".join(f"{name} {m[name]:.3f}" for name in (f"pass@{k}", f"pass^{k}", f"majority@{k}", f"best_logp@{k}"))
            say(f"  {k} samples each: {uses}")
            if 0 < e["accuracy"] < 1:  # else there is no variance to share
                share = f"{m['sampling_share']:.0%} of the variance of the accuracy is from sampling"
                say(f"  {share}, which more samples per task would remove; only more tasks remove the rest")
        lengths = f"{m['length']:.0f} tokens (nine of ten: up to {m['length_p90']:.0f})"
        say(f"  {lengths}, {m['cut_off']:.1%} cut off, {m['answered']:.1%} with an answer")
        counted = [name for name in SHOWN if name in m]
        if counted:
            say("  " + ", ".join(f"{name.replace('_', ' ')} {m[name]:.3g}" for name in counted))
        r = {name.removeprefix("recovery_"): value for name, value in e.get("recovery", {}).items()}
        if r and not r["tried"]:
            say(
                f"  no step was corrupted: {r['without_step']:.0f} tasks have a correct attempt without a step, "
                f"{r['too_long']:.0f} one that is too long to continue, the others none"
            )
        elif r:
            say(
                f"  after a corrupted step {r['recovered']:.3f} [{r['recovered_low']:.3f}, {r['recovered_high']:.3f}] of "
                f"{r['tried']:.0f} end right, uncorrupted {r['control']:.3f}; {r['noticed']:.3f} notice it"
            )
        if failed := sum(m[name] for name in ("verifier_errors", "verifier_timeouts", "bad_keys")):
            say(f"  warning: {failed:.1%} of the attempts could not be judged, and count as wrong")
