r"""Entry point: evaluate a checkpoint on suites of held-out tasks, or compare two
evaluations of the same tasks.

    python -m jaxreason.evaluate --checkpoint=RUN [--suites=chain,chain_ood]
    python -m jaxreason.evaluate --checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct \
        --suites=gsm8k,svamp=FILE.jsonl --n=200 --samples=8 --temperature=0.7
    python -m jaxreason.evaluate --compare A B

A checkpoint is a run, RUN/checkpoints/STEP, a Hugging Face folder, a hub id or a named
size. A run is evaluated on its own suites with its own prompt, sampler and verifier
unless flags say otherwise, and gets the numbers of an evaluation inside the run. The
results are a folder: `evaluation.json` (accuracies with intervals, curves over the
number of samples, all settings) and `rollouts.jsonl` (every attempt). Attempts are
written as they finish, and the same command continues after a kill.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

FLAGS = flags.FLAGS
INTERRUPTED = 130  # the exit code: 128 + SIGINT
PROGRESS_EVERY_S = 10.0


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "RUN, RUN/checkpoints/STEP, a Hugging Face folder, a hub id or a named size.")
    flags.DEFINE_integer("step", None, "Step of the run's checkpoint. Default: the newest.", lower_bound=0)
    flags.DEFINE_string(
        "suites", None, "Names, gym:DATASET, NAME=FILE.jsonl or NAME={...}, with commas between. Default: those of the run."
    )
    flags.DEFINE_integer("n", None, "Tasks per suite, at most. Default: as at the end of the run, else 200.", lower_bound=1)
    flags.DEFINE_integer("samples", None, "Attempts at each task; at temperature 0 there is one. Default: 1.", lower_bound=1)
    flags.DEFINE_list("temperature", None, "One or more, with commas; 0 is greedy. Default: those of the run, else 0.")
    flags.DEFINE_integer("top_k", None, "Sample from the k likeliest tokens; 0: all.", lower_bound=0)
    flags.DEFINE_float("top_p", None, "Sample from the fewest likeliest tokens with this total probability.")
    flags.DEFINE_float("min_p", None, "Sample from tokens at least this fraction as likely as the likeliest one.")
    flags.DEFINE_integer("max_tokens", None, "Tokens of a completion, at most.", lower_bound=1)
    flags.DEFINE_integer("max_prompt_tokens", None, "Tokens of a prompt, at most; longer ones are left out.", lower_bound=1)
    flags.DEFINE_integer("slots", None, "Completions sampled at the same time.", lower_bound=1)
    flags.DEFINE_list("thinking_tokens", None, "Budgets of thinking, with commas: after so many tokens its end is forced.")
    flags.DEFINE_string("end_of_thinking", None, "The text that is forced. Default: that of the run, else </think>.")
    flags.DEFINE_string("verifier", None, "Judge of all suites: a name or module:maker. Default: that of each suite.")
    flags.DEFINE_integer("tensor", 1, "Devices that split the model.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
    flags.DEFINE_string("workdir", None, "Folder of the results. Default: evaluations/<checkpoint>-<hash of the settings>.")
    flags.DEFINE_integer(
        "recovery", 0, "Correct attempts per series in which a step is corrupted, to continue from.", lower_bound=0
    )
    flags.DEFINE_boolean("allow_overlap", False, "Also evaluate on questions that the run was trained on.")
    flags.DEFINE_boolean("compare", False, "Compare two evaluations or runs, given as two folders.")


def main(argv) -> None:
    # Local imports: `--help` and mistyped flags should not wait for jax.
    from jaxreason.environment import VerifierFailed
    from jaxreason.model.weights import BadWeights
    from jaxreason.runtime.files import Unwritable

    logging.set_verbosity(logging.WARNING)
    try:
        if FLAGS.compare:
            compare(argv[1:])
            return
        if len(argv) > 1:
            raise ValueError(f"got the words {' '.join(argv[1:])!r}; needed: --checkpoint=RUN or a Hugging Face folder")
        if FLAGS.checkpoint is None:
            raise ValueError("no --checkpoint given; allowed: a run, a Hugging Face folder, a hub id or a named size")
        evaluate_checkpoint()
    except VerifierFailed as error:
        print(error.traceback, file=sys.stderr)
        fail(error)
    except (ValueError, OSError, Unwritable, BadWeights) as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)


def compare(folders: list[str]) -> None:
    from jaxreason.look.comparison import compare_folders

    if len(folders) != 2:
        raise ValueError(f"--compare got {len(folders)} folders; needed: python -m jaxreason.evaluate --compare A B")
    print("\n".join(compare_folders(*(Path(os.path.expanduser(folder)) for folder in folders))))


def evaluate_checkpoint() -> None:
    """Make an evaluation, or continue one, and print its table."""
    from jaxreason.build.checkpoint import fingerprint, open_checkpoint
    from jaxreason.runtime import compiling, workdir

    compiling.keep_compiled(None)
    folder = None if FLAGS.workdir is None else Path(os.path.expanduser(FLAGS.workdir))
    earlier = None if folder is None else workdir.json_object(folder / "evaluation.json")
    words = {"step": FLAGS.step, "sampler": sampler_fields(), "mesh": {"data": -1, "tensor": FLAGS.tensor}, "say": say}
    words["verifier"] = None if FLAGS.verifier is None else {"name": FLAGS.verifier}
    words["date"] = (earlier or {}).get("date") or datetime.date.today().isoformat()  # a template may name the day
    opened = open_checkpoint(FLAGS.checkpoint, **words)
    if FLAGS.end_of_thinking is not None and opened.parts.completer.thinking is None:
        raise ValueError("--end_of_thinking without a budget of thinking; add --thinking_tokens")
    sections, settings = read_settings(opened)
    suites = load_suites(opened, sections, settings["n"])
    origin = {"path": str(opened.folder), "step": opened.step, "fingerprint": fingerprint(opened)}
    about = json.loads(json.dumps({"checkpoint": origin, "settings": settings, "seed": FLAGS.seed}, default=list))
    tasks = {suite.name: digest_of(suite, settings["n"]) for suite in suites}
    folder = folder or default_folder(opened, about)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(workdir.lock(folder, say))
        check_same(folder, about, tasks)
        found = run(opened, suites, settings, folder, about | {"date": words["date"], "tasks": tasks})
    print_results(found)
    say(f"written: {folder / 'evaluation.json'}, {folder / 'rollouts.jsonl'}")


def sampler_fields() -> dict[str, Any]:
    """Return the fields of the sampler that flags set."""
    fields = {name: FLAGS[name].value for name in ("max_tokens", "max_prompt_tokens", "slots") if FLAGS[name].value is not None}
    if FLAGS.thinking_tokens:
        fields["thinking_tokens"] = max(budgets())
    if FLAGS.end_of_thinking is not None:
        fields["end_of_thinking"] = FLAGS.end_of_thinking
    return fields


def budgets() -> list[int]:
    """Return the budgets of thinking, the largest first."""
    return sorted({number("thinking_tokens", word, int) for word in FLAGS.thinking_tokens or ()}, reverse=True)


def number(flag: str, word: str, type_: type) -> Any:
    from jaxreason.draw import TEMPERATURES, is_temperature

    try:
        value = type_(word)
    except ValueError:
        value = None
    if value is None or not (value > 0 if type_ is int else is_temperature(value)):
        raise ValueError(f"--{flag} got {word!r}; allowed: {'whole numbers above 0' if type_ is int else TEMPERATURES}")
    return value


def read_settings(opened) -> tuple[dict[str, dict], dict[str, Any]]:
    """Return the sections of the suites, and everything that decides the numbers
    besides the params.
    """
    from jaxreason.build.sampler import make_filter
    from jaxreason.build.suites import read_suites

    own = opened.config.get("evaluate", {})
    if FLAGS.suites is None and not own.get("suites"):
        raise ValueError("no --suites given, and the checkpoint is of no run that has some; for example --suites=gsm8k")
    sections = own["suites"] if FLAGS.suites is None else read_suites(FLAGS.suites, own.get("suites", {}))
    asked = {"samples": FLAGS.samples, "verifier": None if FLAGS.verifier is None else {"name": FLAGS.verifier}}
    sections = {name: section | {k: v for k, v in asked.items() if v is not None} for name, section in sections.items()}
    temperatures = list(dict.fromkeys(number("temperature", word, float) for word in FLAGS.temperature or ()))
    if temperatures:
        sections = {name: section | {"temperatures": None} for name, section in sections.items()}
    settings = {
        "suites": sections,
        "temperatures": temperatures or list(own.get("temperatures", ())) or [0.0],
        "n": FLAGS.n or own.get("final_n") or own.get("n") or 200,
        "filter": {
            name: own.get(name, default) if FLAGS[name].value is None else FLAGS[name].value for name, default in FILTER.items()
        },
        "thinking_tokens": budgets() or [opened.sections["sampler"].get("thinking_tokens")],
        **{name: opened.sections[name] for name in ("model", "text", "sampler")},
    }
    make_filter(**settings["filter"], where="evaluate")  # raises for wrong values
    # They change the speed alone.
    settings["sampler"] = {k: v for k, v in settings["sampler"].items() if k not in SPEED}
    return sections, settings


FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
SPEED = ("slots", "chunk_tokens", "prompts_per_prefill", "prefill_tokens", "prompt_rows", "thinking_tokens", "logp_temperature_1")


def load_suites(opened, sections: dict[str, dict], n: int) -> list:
    from jaxreason.build.evaluation import make_suite
    from jaxreason.build.run import trained_before

    loaded = list(trained_before(str(opened.folder), say)) if opened.step is not None else []
    parts = opened.parts._replace(loaded=loaded)
    return [make_suite(name, section, parts, n, FLAGS.allow_overlap) for name, section in sections.items()]


def default_folder(opened, about: Mapping) -> Path:
    name = re.sub(r"[^\w.=-]+", "_", opened.folder.name)[-60:] + (f"-{opened.step}" if opened.step is not None else "")
    return Path("evaluations") / f"{name}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}"


def digest_of(suite, n: int) -> str:
    """Digest the tasks of a suite with their prompts: a file may change under its
    path, and a template under its name.
    """
    from jaxreason.evaluation import requests

    first = [group[0] for group in requests(suite, n, 0.0)]
    return digest(*(f"{r.task.question}\0{r.task.answer}\0{' '.join(str(int(i)) for i in r.prompt)}" for r in first))


def check_same(folder: Path, about: Mapping, tasks: Mapping[str, str]) -> None:
    """Raise ValueError if a folder holds another evaluation.

    `tasks` are the digests of the suites' tasks; earlier versions wrote none.
    """
    from jaxreason.runtime import workdir

    there = workdir.json_object(folder / "evaluation.json")
    if there is None:
        # Attempts are of unknown settings without their evaluation.json.
        if any((folder / name).exists() for name in ("evaluation.json", "config.json", "rollouts.jsonl")):
            raise ValueError(f"{folder} holds something else; choose another --workdir")
        return
    differ = workdir.differences({k: there.get(k) for k in about}, dict(about))
    if differ:
        raise ValueError(f"{folder} holds another evaluation ({'; '.join(list(differ.values())[:3])}); choose another --workdir")
    changed = [name for name, made in tasks.items() if (there.get("tasks") or tasks).get(name) != made]
    if changed:
        raise ValueError(
            f"{folder} holds an evaluation of other tasks: those of {', '.join(changed)}, or their prompts, have changed since; "
            "choose another --workdir"
        )


# --- attempts ---


class Series(NamedTuple):
    """One suite at one temperature and one budget of thinking."""

    suite: Any
    temperature: float
    thinking_tokens: int | None

    @property
    def name(self) -> str:
        budget = "" if self.thinking_tokens is None else f", {self.thinking_tokens} thinking tokens"
        return f"{self.suite.name}, {'greedy' if self.temperature == 0 else f'T={self.temperature:g}'}{budget}"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that tell its records from those of others."""
        return {"suite": self.suite.name, "temperature": self.temperature, "thinking_tokens": self.thinking_tokens}


class Attempts:
    """The attempts of an evaluation, in `rollouts.jsonl`: written as they finish, and
    in order at the end.
    """

    def __init__(self, path: Path):
        from jaxreason.runtime.files import truncate

        self.path = path
        truncate(path, sys.maxsize)  # a killed process may have left half a line
        self.outcomes: dict[tuple, Any] = {}
        for record in self.read():
            self.remember(record)

    def read(self) -> Iterator[dict]:
        if self.path.exists():
            with self.path.open(encoding="ascii") as lines:
                yield from (record for record in map(json.loads, lines) if record.keys() >= NEEDED)

    def of(self, one: Series) -> list[dict]:
        """The records of a series, by problem and attempt."""
        found = [record for record in self.read() if key_of(record)[:3] == tuple(one.fields.values())]
        return sorted(found, key=lambda record: (record["problem"], record["attempt"]))

    def remember(self, record: dict) -> None:
        from jaxreason.evaluation import outcome_of

        self.outcomes[key_of(record)] = outcome_of(record)

    def add(self, record: dict) -> None:
        from jaxreason.runtime.files import json_line, writing

        with writing(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(json_line(record))
        self.remember(record)

    def sort(self, order: dict[tuple, int]) -> None:
        """Write all attempts again, by series, problem and attempt."""
        from jaxreason.runtime.files import json_line, replacing, writing

        records = sorted(self.read(), key=lambda r: (order.get(key_of(r)[:3], len(order)), r["problem"], r["attempt"]))
        with writing(self.path), replacing(self.path) as file:
            file.writelines(map(json_line, records))


KEYS = ("suite", "temperature", "thinking_tokens", "problem", "attempt")
NEEDED = {*KEYS, "text", "correct", "parsed", "reason", "reward", "stop", "length", "logp_sum"}


def key_of(record: Mapping) -> tuple:
    return tuple(record[name] for name in KEYS)


def run(opened, suites: list, settings: dict, folder: Path, about: dict) -> dict:
    """Make all attempts that are missing, and write `evaluation.json`."""
    from jaxreason.runtime.files import write_summary

    series = [
        Series(suite, temperature, budget)
        for suite in suites
        for temperature in (settings["temperatures"] if suite.temperatures is None else suite.temperatures)
        for budget in settings["thinking_tokens"]
    ]
    attempts, earlier = Attempts(folder / "rollouts.jsonl"), recovered_before(folder)
    about |= described()
    write_summary(folder / "evaluation.json", {"done": False} | about)
    weights = None
    for one in series:
        wanted = requests_left(one, settings, attempts)
        if wanted and weights is None:
            say(f"loading {opened.folder}")
            weights = opened.parts.completer.sampler.prepare(opened.load())
            say("compiling the sampler")
        if wanted:
            make_attempts(opened, one, wanted, settings, attempts, weights)
    attempts.sort({tuple(one.fields.values()): i for i, one in enumerate(series)})
    evaluations = [summarise(one, settings, attempts, opened) for one in series]
    for one, evaluation in zip(series, evaluations, strict=True):
        if FLAGS.recovery:
            weights = opened.parts.completer.sampler.prepare(opened.load()) if weights is None else weights
            evaluation["recovery"] = recover(opened, one, settings, attempts, weights)
        elif tuple(one.fields.values()) in earlier:
            evaluation["recovery"] = earlier[tuple(one.fields.values())]
    found = {"done": True} | about | {"evaluations": evaluations}
    write_summary(folder / "evaluation.json", found)
    return found


def recovered_before(folder: Path) -> dict[tuple, dict]:
    """Return the recovery that a finished evaluation measured, by series: the command
    without --recovery keeps it.
    """
    from jaxreason.runtime.workdir import json_object

    there = (json_object(folder / "evaluation.json") or {}).get("evaluations", ())
    return {tuple(e[name] for name in KEYS[:3]): e["recovery"] for e in there if "recovery" in e}


def described() -> dict[str, Any]:
    import jax

    from jaxreason.build.run import versions

    devices = jax.devices()
    return versions() | {"device": f"{len(devices)} x {devices[0].device_kind}"}


def requests_left(one: Series, settings: dict, attempts: Attempts) -> list:
    """List the attempts that are not recorded yet.

    An attempt under a larger budget that ended within this one is the same under this
    one, so it is copied.
    """
    from jaxreason.evaluation import requests

    every = [request for group in requests(one.suite, settings["n"], one.temperature) for request in group]
    every = [r for r in every if (*one.fields.values(), r.problem, r.attempt) not in attempts.outcomes]
    same = set()
    for record in attempts.read() if every and one.thinking_tokens is not None else ():
        larger = record["thinking_tokens"] is not None and record["thinking_tokens"] > one.thinking_tokens
        alike = record["suite"] == one.suite.name and record["temperature"] == one.temperature
        name = (record["problem"], record["attempt"])
        if larger and alike and record["length"] <= one.thinking_tokens and name not in same:
            same.add(name)
            if (*one.fields.values(), *name) not in attempts.outcomes:
                attempts.add(record | one.fields)
    return [r for r in every if (r.problem, r.attempt) not in same]


def make_attempts(opened, one: Series, wanted: list, settings: dict, attempts: Attempts, weights) -> None:
    """Make attempts of a series, and record each as soon as it is judged."""
    from jaxreason import evaluation
    from jaxreason.build.sampler import make_filter
    from jaxreason.runtime.files import rollout_record

    completer, decode = completer_of(opened, one), opened.parts.tokenizer.decode

    def judged(rollout) -> None:
        record = rollout_record(rollout, lambda ids: decode([int(i) for i in ids]))
        attempts.add({"step": opened.step or 0, "phase": "evaluate"} | record | one.fields)
        shown.count(rollout)

    keywords = {"temperature": one.temperature, "seed": FLAGS.seed, "filter": make_filter(**settings["filter"], where="evaluate")}
    shown = Progress(one.name, len(wanted), opened.parts.completer.sampler.slots)
    evaluation.attempt(completer, weights, one.suite, [[r] for r in wanted], judged=judged, **keywords)
    shown.end()


def summarise(one: Series, settings: dict, attempts: Attempts, opened) -> dict[str, Any]:
    """Return the entry of a series in `evaluation.json`."""
    from jaxreason import estimators, evaluation
    from jaxreason.tasks import behaviour

    wanted = evaluation.requests(one.suite, settings["n"], one.temperature)
    outcomes_NK = [[attempts.outcomes[(*one.fields.values(), r.problem, r.attempt)] for r in group] for group in wanted]
    found = evaluation.summarise(outcomes_NK, one.suite, one.temperature, phase="evaluate", step=opened.step or 0)._asdict()
    rollouts = [rollout_of(r, one.suite.tasks[r["problem"]].task, ()) for r in attempts.of(one)]
    found["measures"] |= behaviour.summarise(rollouts, one.suite.parser)
    found["thinking_tokens"] = one.thinking_tokens
    found["questions"] = [digest(group[0].task.question, group[0].task.answer) for group in wanted]
    found["prompts"] = [digest(opened.parts.tokenizer.decode([int(i) for i in group[0].prompt])) for group in wanted]
    if found["samples"] > 1:
        found["curves"] = evaluation.curves(outcomes_NK, one.suite.same)
        share_N, right_N = evaluation.majorities(outcomes_NK, one.suite.same)
        found["calibration"] = estimators.calibration(share_N, right_N)._asdict()
    return found


def recover(opened, one: Series, settings: dict, attempts: Attempts, weights) -> dict[str, float]:
    """Corrupt a step of correct attempts and let the model continue: see
    `recovery`.
    """
    import jax

    from jaxreason.build.sampler import make_filter
    from jaxreason.recovery import recovery

    tokenizer, rollouts = opened.parts.tokenizer, []
    for record in attempts.of(one):
        task, prompt = one.suite.tasks[record["problem"]]
        rollouts.append(rollout_of(record, task, prompt))
    say(f"{one.name}: corrupting steps")
    encode = functools.partial(tokenizer.encode, continues=True)
    words = {"key": jax.random.key(FLAGS.seed), "temperature": one.temperature, "most": FLAGS.recovery}
    words["filter"] = make_filter(**settings["filter"], where="evaluate")
    completer = completer_of(opened, one)
    return recovery(completer, weights, rollouts, one.suite.environment, encode, one.suite.parser, **words).measures()


def rollout_of(record: Mapping, task, prompt):
    """Return a recorded attempt as a rollout, without its tokens."""
    import numpy as np

    from jaxreason.types import Rollout, Verdict

    none = np.zeros(0, np.float32)
    verdict = Verdict(record["reward"], record["correct"], record["parsed"], record["reason"])
    words = {"tokens": none.astype(np.int32), "logp": none, "sampled": none.astype(bool), "stop": record["stop"]}
    words |= {"text": record["text"], "verdict": verdict, "temperature": record["temperature"]}
    return Rollout(task, record["problem"], record["attempt"], prompt, **words)


def completer_of(opened, one: Series):
    """Return the sampler with the budget of thinking of a series."""
    completer = opened.parts.completer
    if one.thinking_tokens is None:
        return completer
    return completer._replace(thinking=completer.thinking._replace(tokens=one.thinking_tokens))


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:10]


# --- the terminal ---


class Progress:
    """Shows how many of the attempts of a series are made."""

    def __init__(self, name: str, total: int, slots: int):
        self.name, self.total, self.made, self.correct, self.tokens = name, total, 0, 0, 0
        # Compilation is over, and attempts end at a steady pace, once every slot has
        # been filled anew.
        self.first = min(slots, max(1, total // 2))
        self.live, self.begun_s, self.printed_s = sys.stderr.isatty(), 0.0, 0.0

    def count(self, rollout) -> None:
        from jaxreason.runtime.terminal import duration

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
        line = f"{self.name}: {self.made} of {self.total} attempts, {self.correct / self.made:.3f} correct, "
        line += f"{self.tokens / took_s:,.0f} tokens/s, about {left} left"
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print(file=sys.stderr)


SHOWN = ("step_accuracy", "attempts", "retries", "self_checks", "check_accuracy", "wrong_then_right", "right_then_wrong")


def print_results(found: Mapping) -> None:
    """Print a paragraph per series: accuracy, other uses of the samples, lengths."""
    from jaxreason.runtime.terminal import visible

    for e in found["evaluations"]:
        m, k = e["measures"], e["samples"]
        budget = "" if e["thinking_tokens"] is None else f", {e['thinking_tokens']} thinking tokens"
        mode = "greedy" if e["temperature"] == 0 else f"T={e['temperature']:g}"
        say(visible(f"{e['suite']}, {mode}{budget}: {e['accuracy']:.3f} [{e['low']:.3f}, {e['high']:.3f}] of {e['n']} tasks"))
        if k > 1:
            uses = ", ".join(f"{name} {m[name]:.3f}" for name in (f"pass@{k}", f"pass^{k}", f"majority@{k}", f"best_logp@{k}"))
            say(f"  {k} samples each: {uses}; {m['sampling_share']:.0%} of the variance of the accuracy is from sampling,")
            say("  which more samples per task would remove; only more tasks remove the rest")
        lengths = f"{m['length']:.0f} tokens (nine of ten: up to {m['length_p90']:.0f})"
        say(f"  {lengths}, {m['cut_off']:.1%} cut off, {m['answered']:.1%} with an answer")
        counted = [name for name in SHOWN if name in m]
        if counted:
            say("  " + ", ".join(f"{name.replace('_', ' ')} {m[name]:.3g}" for name in counted))
        if e.get("recovery", {}).get("recovery_tried"):
            r = {name.removeprefix("recovery_"): value for name, value in e["recovery"].items()}
            say(
                f"  after a corrupted step {r['recovered']:.3f} [{r['recovered_low']:.3f}, {r['recovered_high']:.3f}] of "
                f"{r['tried']:.0f} end right, uncorrupted {r['control']:.3f}; {r['noticed']:.3f} notice it"
            )
        if failed := sum(m[name] for name in ("verifier_errors", "verifier_timeouts", "bad_keys")):
            say(f"  warning: {failed:.1%} of the attempts could not be judged, and count as wrong")


def say(line: str) -> None:
    print(line, flush=True)


def fail(error: Exception) -> None:
    """Exit with an error in one line, without a traceback."""
    sys.exit(f"error: {' '.join(str(error).split())}")


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        fail(error)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
