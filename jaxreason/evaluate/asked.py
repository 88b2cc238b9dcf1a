"""The request of a command: a checkpoint, suites and settings, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxreason import evaluation
from jaxreason.build.checkpoint import Checkpoint, open_checkpoint
from jaxreason.build.evaluation import make_suite
from jaxreason.build.run import trained_before
from jaxreason.build.sampler import make_filter
from jaxreason.build.suites import read_suites
from jaxreason.draw import TEMPERATURES, is_temperature


class Asked(NamedTuple):
    """The flags of a command, by name; None or empty: not given."""

    checkpoint: str
    step: int | None = None
    suites: str | None = None
    n: int | None = None
    samples: int | None = None
    temperature: Sequence[str] = ()
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    slots: int | None = None
    thinking_tokens: Sequence[str] = ()
    end_of_thinking: str | None = None
    verifier: str | None = None
    tensor: int = 1
    seed: int = 0
    workdir: str | None = None
    recovery: int = 0
    allow_overlap: bool = False


def open_asked(asked: Asked, date: str, say: Callable[[str], None]) -> Checkpoint:
    """Open the checkpoint with the sampler and the verifier that flags set. `date` is
    today's date in a chat template.
    """
    opened = open_checkpoint(
        asked.checkpoint,
        step=asked.step,
        sampler=sampler_fields(asked),
        verifier=verifier_section(asked),
        mesh={"data": -1, "tensor": asked.tensor},
        date=date,
        say=say,
    )
    if asked.end_of_thinking is not None and opened.parts.completer.thinking is None:
        raise ValueError("--end_of_thinking without a budget of thinking; add --thinking_tokens")
    return opened


def sampler_fields(asked: Asked) -> dict[str, Any]:
    """Return the fields of the sampler that flags set."""
    names = ("max_tokens", "max_prompt_tokens", "slots", "end_of_thinking")
    fields = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if asked.thinking_tokens:
        fields["thinking_tokens"] = max(budgets(asked))
    return fields


def verifier_section(asked: Asked) -> dict[str, str] | None:
    return None if asked.verifier is None else {"name": asked.verifier}


def budgets(asked: Asked) -> list[int]:
    """Return the budgets of thinking, the largest first."""
    return sorted({number("thinking_tokens", word, int) for word in asked.thinking_tokens}, reverse=True)


def number(flag: str, word: str, type_: type) -> Any:
    try:
        value = type_(word)
    except ValueError:
        value = None
    if value is None or not (value > 0 if type_ is int else is_temperature(value)):
        raise ValueError(f"--{flag} got {word!r}; allowed: {'whole numbers above 0' if type_ is int else TEMPERATURES}")
    return value


FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Fields of the sampler that change the speed alone, or are in the settings by another
# name.
SPEED = ("slots", "chunk_tokens", "prompts_per_prefill", "prefill_tokens", "prompt_rows", "thinking_tokens", "logp_temperature_1")


def read_settings(asked: Asked, opened: Checkpoint) -> dict[str, Any]:
    """Return everything that decides the numbers besides the params and the seed."""
    own = opened.config.get("evaluate", {})
    temperatures = list(dict.fromkeys(number("temperature", word, float) for word in asked.temperature))
    given = {name: getattr(asked, name) for name in FILTER}
    settings = {
        "suites": read_sections(asked, own.get("suites", {}), bool(temperatures)),
        "temperatures": temperatures or list(own.get("temperatures", ())) or [0.0],
        "n": asked.n or own.get("final_n") or own.get("n") or 200,
        "filter": {name: own.get(name, default) if given[name] is None else given[name] for name, default in FILTER.items()},
        "thinking_tokens": budgets(asked) or [opened.sections["sampler"].get("thinking_tokens")],
        **{name: opened.sections[name] for name in ("model", "text", "sampler", "verifier", "environment")},
    }
    make_filter(**settings["filter"], where="evaluate")  # raises for wrong values
    settings["sampler"] = {k: v for k, v in settings["sampler"].items() if k not in SPEED}
    return settings


def read_sections(asked: Asked, own: dict[str, dict], at_other_temperatures: bool) -> dict[str, dict]:
    """Return the sections of the suites; `own` are those of the run."""
    if asked.suites is None and not own:
        raise ValueError("no --suites given, and the checkpoint is of no run that has some; for example --suites=gsm8k")
    sections = own if asked.suites is None else read_suites(asked.suites, own)
    changes = {"samples": asked.samples, "verifier": verifier_section(asked)}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {"temperatures": None} if at_other_temperatures else {}
    return {name: section | changes for name, section in sections.items()}


def load_suites(asked: Asked, opened: Checkpoint, settings: dict, say: Callable[[str], None]) -> list[evaluation.Suite]:
    """Load the suites, none of which may have questions that the run was trained on."""
    loaded = list(trained_before(str(opened.folder), say)) if opened.step is not None else []
    parts = opened.parts._replace(loaded=loaded)
    made = [make_suite(name, section, parts, settings["n"], asked.allow_overlap) for name, section in settings["suites"].items()]
    for suite in made:
        check_budget(suite, opened, asked, say)
    return made


def check_budget(suite: evaluation.Suite, opened: Checkpoint, asked: Asked, say: Callable[[str], None]) -> None:
    """Raise ValueError for a budget of thinking that leaves no token for an answer. A
    run was trained with its own, of which only a warning is printed.
    """
    completer = evaluation.completer_for(suite, opened.parts.completer)
    if completer.thinking is None:
        return
    budget, end, limit = completer.thinking.tokens, len(completer.thinking.ids), completer.max_tokens
    if budget + end < limit:
        return
    message = (
        f"suite {suite.name!r}: a budget of {budget} thinking tokens and {end} for their forced end leave none of {limit} tokens "
        "for an answer"
    )
    if asked.thinking_tokens:
        raise ValueError(f"{message}; give fewer --thinking_tokens, or more --max_tokens")
    say(f"warning: {message}")
