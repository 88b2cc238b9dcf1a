r"""Entry point: write the right attempts of a checkpoint to a data set that a new model
can be trained on.

    python -m jaxreason.generate --checkpoint=RUN --attempts=4 --out=FOLDER
    python -m jaxreason.generate --checkpoint=HuggingFaceTB/SmolLM2-135M-Instruct \
        --task="{'name': 'gsm8k', 'limit': 500}" --verifier=number --out=FOLDER

A config reads it as `{"name": "generated", "path": FOLDER}`, in a source of
demonstrations or of a corpus: the solutions are the texts that the model wrote. FOLDER
has `tasks.jsonl` (question, answer, solution, and where each is from), `about.json`
(checkpoint, settings, counts) and `attempts.jsonl` (all attempts, wrong ones too).
Attempts are written as they finish, and the same command continues after a kill.

Right attempts that are not written: those cut off at their limit, since a demonstration
ends its turn; and those with tokens that no text gives, such as special ones.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

from jaxreason.options import command

FLAGS = flags.FLAGS
INTERRUPTED = 130  # the exit code: 128 + SIGINT


class Asked(NamedTuple):
    """The flags of a command, by name."""

    checkpoint: str
    out: str
    step: int | None = None
    task: str | None = None
    n: int = 1000
    attempts: int = 4
    per_problem: int = 1
    temperature: float = 1.0
    max_tokens: int | None = None
    verifier: str | None = None
    slots: int | None = None
    seed: int = 0


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "RUN, RUN/checkpoints/STEP, a Hugging Face folder, a hub id or a named size.")
    flags.DEFINE_string("out", None, "Folder of the data set, new or of the same command.")
    flags.DEFINE_integer("step", None, "Step of the run's checkpoint. Default: the newest.", lower_bound=0)
    flags.DEFINE_string("task", None, "Training tasks: NAME or {...}, a section. Default: those of the run's last source.")
    flags.DEFINE_integer("n", 1000, "Tasks to attempt, at most.", lower_bound=1)
    flags.DEFINE_integer("attempts", 4, "Attempts at each task.", lower_bound=1)
    flags.DEFINE_integer("per_problem", 1, "Right attempts to write per task, at most; equal texts count once.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "Sampling temperature; 0 is greedy, with one attempt at each task.")
    flags.DEFINE_integer(
        "max_tokens", None, "Tokens of a completion, at most. Default: sampler.max_tokens of the run.", lower_bound=1
    )
    flags.DEFINE_string("verifier", None, "Judge: a name or module:maker. Default: that of the run.")
    flags.DEFINE_integer("slots", None, "Completions sampled at the same time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)


def main(argv) -> None:
    # Local imports: `--help` and mistyped flags should not wait for jax.
    from jaxreason.environment import VerifierFailed
    from jaxreason.model.weights import BadWeights
    from jaxreason.runtime.files import Unwritable

    logging.set_verbosity(logging.WARNING)
    try:
        with command.while_read():
            if len(argv) > 1:
                raise ValueError(f"got the words {' '.join(argv[1:])!r}; needed: --checkpoint=RUN --out=FOLDER")
            for name, meant in (("checkpoint", "a run, a Hugging Face folder, a hub id"), ("out", "the folder of the data set")):
                if FLAGS[name].value is None:
                    raise ValueError(f"no --{name} given; needed: {meant}")
            generate(Asked(**{name: FLAGS[name].value for name in Asked._fields}))
    except VerifierFailed as error:
        print(error.traceback, file=sys.stderr)
        fail(error)
    except (ValueError, OSError, Unwritable, BadWeights) as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)


def generate(asked: Asked, say: Callable[[str], None] = lambda line: print(line, flush=True)) -> dict[str, Any]:
    """Make the attempts that are missing, and write `tasks.jsonl` and `about.json`;
    return the latter.

    Raises:
      ValueError, FileNotFoundError: something that was asked for is impossible.
    """
    from jaxreason.build.checkpoint import open_checkpoint
    from jaxreason.draw import TEMPERATURES, is_temperature
    from jaxreason.runtime import compiling, workdir

    if not is_temperature(asked.temperature):
        raise ValueError(f"--temperature got {asked.temperature}; allowed: {TEMPERATURES}")
    compiling.keep_compiled(None)
    date = datetime.date.today().isoformat()
    fields = {name: value for name in ("max_tokens", "slots") if (value := getattr(asked, name)) is not None}
    judge = None if asked.verifier is None else {"name": asked.verifier}
    opened = open_checkpoint(asked.checkpoint, step=asked.step, sampler=fields, verifier=judge, date=date, say=say)
    section = task_section(asked.task, opened.config)
    suite, format = make_suite(opened, section, asked)
    about = identity(opened, section, suite, asked)
    folder = Path(os.path.expanduser(asked.out))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out got {str(folder)!r}, which is a file; allowed: a folder, new or of the same command")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(workdir.lock(folder, say, "--out"))
        check_same(folder, about)
        about |= {"date": (workdir.json_object(folder / "about.json") or {}).get("date", date)}
        return make_and_write(folder, about, opened, suite, format, asked, say)


def task_section(asked: str | None, config: Mapping) -> dict[str, Any]:
    """Return the section of the tasks to attempt.

    Raises:
      ValueError: it can't be read, is of the test split, or the checkpoint has none.
    """
    from jaxreason.build.tasks import trained_tasks
    from jaxreason.tasks import TASKS

    if asked is None:
        trained = list(trained_tasks(dict(config)).values()) if config else []
        if not trained:
            raise ValueError("no --task given, and the checkpoint is of no run with tasks; for example --task=gsm8k")
        return dict(trained[-1])
    try:
        section = ast.literal_eval(asked) if asked.lstrip().startswith("{") else {"name": asked}
        if not isinstance(section, dict) or not isinstance(section.get("name"), str):
            raise ValueError("no section with a name")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        known = ", ".join(TASKS)
        raise ValueError(f"--task got {asked!r:.80}; allowed: {{'name': ...}} or a name: {known}") from None
    if section.get("split") == "test":
        raise ValueError("--task got the split 'test', which suites are made of; allowed: 'train', or no split")
    return section


def make_suite(opened, section: Mapping, asked: Asked) -> tuple:
    """Load the tasks with their prompts and their judge; also return the format."""
    from jaxreason.build.environments import make_environment
    from jaxreason.build.tasks import check_keys, drop_long_prompts, load_tasks
    from jaxreason.evaluation import Suite

    parts, completer = opened.parts, opened.parts.completer
    items = load_tasks(dict(section), seed=opened.config.get("seed", 0), size=asked.n)
    if len(items) and isinstance(items[0], str):
        raise ValueError(f"--task got {section['name']!r}, which has texts; allowed: tasks with a question")
    items = [items[i] for i in range(min(asked.n, len(items)))]
    made = make_environment(parts.environment, parts.verifier, items, parts)
    what = f"task {section['name']!r}"
    prompted = drop_long_prompts(items, made.format.prompt, completer.sampler.length - completer.max_tokens, what, parts.say)
    if made.asks_verifier:
        check_keys([task for task, _ in prompted], parts.verifier, what, parts.say)
    return Suite("generate", prompted, made.environment, samples=asked.attempts), made.format


def identity(opened, section: Mapping, suite, asked: Asked) -> dict[str, Any]:
    """Return everything that decides the attempts, as JSON types."""
    from jaxreason.build.checkpoint import fingerprint

    digest = hashlib.sha256(json.dumps(opened.config, sort_keys=True, default=list).encode()).hexdigest()[:16]
    questions = hashlib.sha256("\0".join(f"{t.question}\0{t.answer}" for t, _ in suite.tasks).encode(errors="surrogatepass"))
    checkpoint = {"path": str(opened.folder), "step": opened.step, "fingerprint": fingerprint(opened), "config": digest}
    settings = {name: getattr(asked, name) for name in ("n", "attempts", "temperature", "seed")}
    settings |= {"task": dict(section), "questions": questions.hexdigest()[:16]}
    settings |= {"max_tokens": opened.parts.completer.max_tokens, "verifier": opened.sections["verifier"]}
    settings["environment"] = opened.sections["environment"]
    return json.loads(json.dumps({"checkpoint": checkpoint, "settings": settings}, default=list))


def check_same(folder: Path, about: Mapping) -> None:
    """Raise ValueError if a folder holds another data set."""
    from jaxreason.runtime import workdir

    there = workdir.json_object(folder / "about.json")
    if there is None and any(path.name != "lock" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds something else; choose another --out")
    if there is not None and (differ := workdir.differences({name: there.get(name) for name in about}, dict(about))):
        raise ValueError(f"{folder} holds another data set ({'; '.join(list(differ.values())[:3])}); choose another --out")


def make_and_write(folder: Path, about: dict, opened, suite, format, asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the attempts that are missing, then write what is kept of all."""
    from jaxreason import evaluation
    from jaxreason.runtime.files import json_line, replacing, rollout_record, truncate, write_summary, writing

    path, decode = folder / "attempts.jsonl", opened.parts.tokenizer.decode
    truncate(path, sys.maxsize)  # a killed process may have left half a line
    wanted = [request for group in evaluation.requests(suite, asked.n, asked.temperature) for request in group]
    records = {(r["problem"], r["attempt"]): r for r in read(path)}
    missing = [request for request in wanted if (request.problem, request.attempt) not in records]
    if missing:
        write_summary(folder / "about.json", {"done": False, **about})
        say(f"{len(missing):,} attempts at {len(suite.tasks):,} tasks" + f", {len(records):,} are recorded" * bool(records))

        def judged(rollout) -> None:
            record = rollout_record(rollout, lambda ids: decode([int(i) for i in ids]))
            record |= written_as(rollout, format, opened.parts.completer) | {"step": opened.step or 0}
            with writing(path), path.open("a", encoding="ascii") as file:
                file.write(json_line(record))
            records[rollout.problem, rollout.attempt] = record

        weights = opened.parts.completer.sampler.prepare(opened.load())
        options = {"temperature": asked.temperature, "seed": asked.seed, "judged": judged}
        evaluation.attempt(opened.parts.completer, weights, suite, [[request] for request in missing], **options)
    ordered = [records[request.problem, request.attempt] for request in wanted]
    kept = list(keep(ordered, asked.per_problem))
    origin = {**about["checkpoint"], "date": about["date"], "seed": asked.seed}
    with writing(folder / "tasks.jsonl"), replacing(folder / "tasks.jsonl") as file:
        for record in kept:
            file.write(json_line(task_record(record, suite.tasks[record["problem"]].task, origin)))
    counts = count(ordered, kept, len(suite.tasks))
    write_summary(folder / "about.json", {"done": True, **about, "per_problem": asked.per_problem, "counts": counts})
    say(f"kept {counts['kept']:,} of {counts['attempts']:,} attempts, at {counts['tasks_kept']:,} of {counts['tasks']:,} tasks")
    if lost := counts["right_lost"]:
        say(f"{lost:,} right attempts are not kept: a demonstration in the run's own format would show another text")
    if not kept:
        say("warning: no attempt is kept, so there is nothing to train on; look at attempts.jsonl")
    say(f"written: {folder / 'tasks.jsonl'}")
    return {**about, "counts": counts}


def read(path: Path) -> Iterator[dict]:
    if path.exists():
        with path.open(encoding="ascii") as lines:
            yield from (record for record in map(json.loads, lines) if "written" in record)


def written_as(rollout, format, completer) -> dict[str, Any]:
    """Tell how a demonstration of a rollout's text is tokenised: "exact", the same
    tokens; "text", other tokens of the same text; "lost", not at all. Also return the
    spans of the text that the model did not sample.
    """
    import numpy as np

    from jaxreason.rollout import text_of
    from jaxreason.types import Task

    tokens, sampled = rollout.tokens, rollout.sampled
    ended = len(tokens) and int(tokens[-1]) in completer.eos_ids
    tokens, sampled = (tokens[:-1], sampled[:-1]) if ended else (tokens, sampled)
    forced, at = [], 0
    for is_sampled, run in itertools.groupby(range(len(tokens)), lambda i: bool(sampled[i])):
        text = completer.decode(tokens[np.array([*run])].tolist())
        forced += [] if is_sampled else [[at, at + len(text)]]
        at += len(text)
    try:
        task = Task(rollout.task.question, rollout.task.answer, rollout.text, data={"forced": forced})
        ids, _ = format.demonstration(task)
    except ValueError:  # a character that the tokenizer lacks, or a text that a template does not show as it is
        return {"written": "lost", "forced": forced}
    ids = ids[len(rollout.prompt) : -1] if ids[: len(rollout.prompt)] == rollout.prompt.tolist() else None
    if ids == tokens.tolist():
        return {"written": "exact", "forced": forced}
    same = ids is not None and at == len(rollout.text) and text_of(completer, np.array(ids, np.int32)) == rollout.text
    return {"written": "text" if same else "lost", "forced": forced}


def keep(records: Sequence[Mapping], per_problem: int) -> Iterator[Mapping]:
    """Yield the right attempts that a demonstration can show, of equal texts the first,
    at most `per_problem` at each task.
    """
    from jaxreason.sources import Keep, choose

    for _, group in itertools.groupby(records, lambda record: record["problem"]):
        shown = [r for r in group if r["stop"] != "limit" and r["written"] != "lost" and r["text"]]
        chosen = choose([r["correct"] for r in shown], [r["text"] for r in shown], Keep(per_problem=per_problem))
        yield from (shown[i] for i in chosen)


def task_record(record: Mapping, task, origin: Mapping) -> dict[str, Any]:
    """Return a line of `tasks.jsonl`."""
    verdict = {name: record[name] for name in ("correct", "reward", "parsed", "reason")}
    made = {name: record[name] for name in ("attempt", "temperature", "stop", "length", "prompt", "written")}
    return {
        "question": task.question,
        "answer": task.answer,
        "solution": record["text"],
        "task": task.id,
        "forced": record["forced"],
        "data": {name: value for name, value in task.data.items() if name != "forced" and is_plain(value)},
        "verdict": verdict,
        "made": {**made, **origin},
    }


def is_plain(value: Any) -> bool:
    """Tell whether a value can be written as JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def count(records: Sequence[Mapping], kept: Sequence[Mapping], tasks: int) -> dict[str, int]:
    right = [r for r in records if r["correct"]]
    written = Counter(r["written"] for r in right)
    return {
        "tasks": tasks,
        "tasks_kept": len({r["problem"] for r in kept}),
        "attempts": len(records),
        "right": len(right),
        "right_cut_off": sum(r["stop"] == "limit" for r in right),
        "right_lost": written["lost"],
        "kept": len(kept),
        "kept_with_other_tokens": sum(r["written"] == "text" for r in kept),
    }


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
