"""Build the evaluation of held-out tasks and texts, and the options of the log."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason import batching, data, evaluation, sharding, verify
from jaxreason import objectives as objectives_
from jaxreason.build.environments import make_environment
from jaxreason.build.sampler import make_filter
from jaxreason.build.tasks import (
    Parts,
    check_keys,
    check_positive,
    drop_long_prompts,
    encode_documents,
    equivalence_of,
    in_distribution,
    judge,
    load_held_out,
)
from jaxreason.draw import TEMPERATURES, Filter, is_temperature
from jaxreason.logp import compile_token_logp
from jaxreason.options import call_with_section
from jaxreason.recovery import judge_with
from jaxreason.runtime import ledger, trackers
from jaxreason.tasks import behaviour


def make_evaluate(
    *,
    parts: Parts,
    suites: dict,  # held-out tasks to attempt: name -> section of a task
    texts: dict | None = None,  # held-out documents to score: name -> task, length and rows
    temperatures: Sequence[float] = (0.0, 1.0),  # each suite is attempted once per temperature; 0 is greedy
    n: int = 200,  # tasks per suite
    final_n: int | None = None,  # tasks per suite at the start of the run and the end of a phase; None: n
    top_k: int = 0,  # sample from the k likeliest tokens; 0: all
    top_p: float = 1.0,  # sample from the fewest likeliest tokens with this total probability
    min_p: float = 0.0,  # sample from tokens at least this fraction as likely as the likeliest one
    allow_overlap: bool = False,  # also evaluate on questions that a source trains on
) -> tuple[Callable, Filter | None]:
    """Return `evaluate(params, phase, step, final)` and its token filter.

    The filter is None without suites. `evaluate` attempts n tasks of each suite, or
    `final_n` if `final`.

    The section of a suite is that of its tasks, with the fields of `attempted`. The
    section of a text has its documents (`task`), the `length` of its windows and their
    number (`rows`). If sources read the same files, sources get the train split and
    suites the test split, unless their sections name one; files that no source reads
    are held out whole. A suite may not have questions that a source trains on, unless
    `allow_overlap`.
    """
    completer = parts.completer
    filter = make_filter(top_k, top_p, min_p, "config.evaluate")
    if suites and not temperatures:
        raise ValueError("config.evaluate.temperatures is empty; allowed: one or more, 0 is greedy")
    check_positive("config.evaluate", n=n, final_n=n if final_n is None else final_n)
    check_temperatures("config.evaluate.temperatures", temperatures)
    most = max(n, final_n or n)
    made = [make_suite(name, section, parts, most, allow_overlap) for name, section in suites.items()]

    made_texts = [
        call_with_section(
            held_out_text, section, f"config.evaluate.texts.{name}", name=name, parts=parts, allow_overlap=allow_overlap
        )
        for name, section in (texts or {}).items()
    ]
    mesh, config = parts.meshes.learn, parts.model.config
    reading_flops = ledger.reading(config, [batch for text in made_texts for batch in text.batches])
    compiled = compile_token_logp(parts.model, mesh=mesh)

    def token_logp(params, batch):
        return compiled(params, sharding.put_rows(batch, mesh))

    def evaluate(params, *, phase: str, step: int, final: bool):
        nll = evaluation.score(token_logp, params, made_texts)
        evaluations, rollouts = evaluation.evaluate(
            completer,
            params,
            made,
            temperatures=temperatures,
            n=final_n if final and final_n else n,
            seed=0,
            phase=phase,
            step=step,
            filter=filter,
        )
        work = ledger.sampling(config, rollouts)
        work["flops"] += reading_flops
        learned = [task for name, task in parts.trained.items() if name.partition(".")[0] == phase]
        trained = [name for name, section in suites.items() if any(in_distribution(section, task) for task in learned)]
        return evaluation.Result(evaluations, rollouts, nll, work, trained)

    return evaluate, filter if suites else None


def attempted(
    *,
    verifier: dict | None = None,  # verifier of this suite; None: that of the config
    environment: dict | None = None,  # environment of this suite, such as {"name": "single_turn"}; None: that of the config
    samples: int = 1,  # attempts at each task; temperature 0 makes one
    temperatures: Sequence[float] | None = None,  # of this suite; None: those of `evaluate`
    max_tokens: int | None = None,  # tokens of a completion, at most; None: sampler.max_tokens
    instruction: str | None = None,  # text of the prompt, with {question}; None: text.instruction
):
    """Declare the fields that a suite has besides those of its tasks."""


def make_suite(name: str, section: dict, parts: Parts, n: int, allow_overlap: bool) -> evaluation.Suite:
    """Load the tasks of a suite, at least n if there are so many, with their prompts
    and their judge.

    Raises:
      ValueError: a wrong field, or tasks that can't be attempted or judged.
    """
    where, what = f"config.evaluate.suites.{name}", f"suite {name!r}"
    own = {field: section.get(field) for field in inspect.signature(attempted).parameters}
    task = {field: value for field, value in section.items() if field not in own}
    check_types(where, own)
    completer, samples = parts.completer, 1 if own["samples"] is None else own["samples"]
    check_positive(where, samples=samples, max_tokens=1 if own["max_tokens"] is None else own["max_tokens"])
    if own["max_tokens"] is not None and own["max_tokens"] > completer.max_tokens:
        raise ValueError(
            f"{where}.max_tokens got {own['max_tokens']}; allowed: up to sampler.max_tokens={completer.max_tokens}; raise that"
        )
    if own["temperatures"] is not None:
        check_temperatures(f"{where}.temperatures", own["temperatures"])
    if own["temperatures"] is not None and not own["temperatures"]:
        raise ValueError(f"{where}.temperatures is empty; allowed: one or more, 0 is greedy, or None")
    items = load_held_out(task, parts, what, allow_overlap, size=n)
    verifier = parts.verifier if own["verifier"] is None else own["verifier"]
    words = {} if own["instruction"] is None else {"instruction": own["instruction"]}
    section = parts.environment if own["environment"] is None else own["environment"]
    try:
        made = make_environment(section, verifier, items, parts, **words)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    longest_prompt = completer.sampler.length - completer.max_tokens
    prompted = drop_long_prompts(items, made.format.prompt, longest_prompt, what, parts.say)
    items = [task for task, _ in prompted]
    if made.asks_verifier:
        check_keys(items, verifier, what, parts.say)
    # Answers within a text are judged one by one, unless each takes a child process.
    judges_parts = made.asks_verifier and not verify.uses_children(verifier)
    correct = judge_with(judge(verifier, items)) if judges_parts else None
    return evaluation.Suite(
        name,
        prompted,
        made.environment,
        samples=samples,
        temperatures=own["temperatures"],
        max_tokens=own["max_tokens"],
        same=equivalence_of(verifier),
        parser=behaviour.of_task((task["of"] if task["name"] == "twins" else task)["name"], correct),
    )


def check_types(where: str, own: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of `attempted` of a wrong type: a section on the
    command line may hold any value.
    """

    def number(value: Any, *types: type) -> bool:
        return isinstance(value, types) and not isinstance(value, bool)

    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        "verifier": (lambda v: isinstance(v, Mapping), "a section, such as {'name': 'exact'}"),
        "environment": (lambda v: isinstance(v, Mapping), "a section, such as {'name': 'single_turn'}"),
        "samples": (lambda v: number(v, int), "a whole number, 1 or more"),
        "temperatures": (
            lambda v: isinstance(v, (list, tuple)) and all(number(t, int, float) for t in v),
            "a list of numbers, such as (0.0, 1.0)",
        ),
        "max_tokens": (lambda v: number(v, int), "a whole number, 1 or more"),
        "instruction": (lambda v: isinstance(v, str), "a text with {question}"),
    }
    for field, value in own.items():
        fits, words = allowed[field]
        if value is not None and not fits(value):
            raise ValueError(f"{where}.{field} got {value!r}; allowed: {words}, or None")


def check_temperatures(where: str, temperatures: Sequence[float]) -> None:
    if wrong := [t for t in temperatures if not is_temperature(t)]:
        raise ValueError(f"{where} got {wrong[0]}; allowed: {TEMPERATURES}")
    # Compare temperatures as the metrics print them, so that each has its own metric.
    if twice := [t for i, t in enumerate(temperatures) if f"{t:g}" in [f"{other:g}" for other in temperatures[:i]]]:
        raise ValueError(f"{where} has {twice[0]:g} twice; allowed: each once")


def held_out_text(
    *,
    name: str,
    parts: Parts,
    allow_overlap: bool,
    task: dict,  # the documents
    length: int,  # tokens per window
    rows: int = 64,  # windows to score, at most
) -> evaluation.Text:
    """Make batches of the first `rows` windows of held-out documents.

    A batch has up to eight rows per device; windows that do not fill a batch are
    dropped.
    """
    check_positive(f"config.evaluate.texts.{name}", rows=rows, length=length)
    windows = data.token_windows(
        encode_documents(load_held_out(task, parts, f"text {name!r}", allow_overlap), parts, task), length
    )[:rows]
    each = min(8 * parts.devices, len(windows) // parts.devices * parts.devices)
    if not each:
        raise ValueError(
            f"config.evaluate.texts.{name}: {len(windows)} windows of {length} tokens; give more text or shorter windows"
        )
    whole = range(0, len(windows) // each * each, each)
    return evaluation.Text(name, [batching.from_windows(windows[i : i + each], objectives_.lm()) for i in whole])


def make_log(
    *,
    rollouts_kept: int = 64,  # rollouts written per step, and per evaluation of a suite, at most: in whole groups, one at least
    rollout_tokens: bool = False,  # also write the text, log-prob and author of each of their tokens
    watts: float | None = None,  # power of a busy device, for the joules in the ledger where no counter can be read
    measure_machine: bool = False,  # measure the peak rates that utilisation is told against, instead of a table of chips
    tracker: str | Sequence[str] = "tensorboard",  # tensorboard, wandb, trackio, several joined by commas, or none
    live: bool = True,  # show progress: a table on a terminal, else plain lines
    report: bool = True,  # write report.html at the end of the run
) -> dict:
    """Return the fields of a `Run` that configure its log, and `rollout_tokens`.

    Raises:
      ValueError: a value that is not allowed, or a tracker that is not installed.
    """
    if rollouts_kept < 0:
        raise ValueError(f"config.log.rollouts_kept got {rollouts_kept}; allowed: 0 (none) or more of each step")
    if watts is not None and not watts > 0:
        raise ValueError(f"config.log.watts got {watts}; allowed: None, or the watts of a busy device, above 0")
    names = trackers.read_names(tracker)
    trackers.check_installed(names)
    options = {"tracker": names, "live": live}
    kept = {"rollouts_kept": rollouts_kept, "watts": watts, "measures_machine": measure_machine}
    return {**kept, "log_options": options, "report": report, "rollout_tokens": rollout_tokens}
