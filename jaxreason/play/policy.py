"""A person in the place of the model: the prompt and the observations are what the
model would read, and the environment answers what the person writes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreason import sharding
from jaxreason.build.environments import Made, make_environment
from jaxreason.build.evaluation import attempted
from jaxreason.build.layout import settle
from jaxreason.build.model import read_model_and_text, reword
from jaxreason.build.tasks import Parts, load_tasks, parts_of
from jaxreason.environment import Environment, Playing, Step, Turn, end_of_turn
from jaxreason.options import unknown_name_message
from jaxreason.runtime.terminal import visible
from jaxreason.text import Format, Tokenizer
from jaxreason.types import Task, Verdict

HELP = "write what the model would write; a line ends its turn, unless it ends in \\; /problem [N], /quit"


class Game(NamedTuple):
    """Tasks, environment and text format for a person who plays the model."""

    tasks: Sequence[Task]
    environment: Environment
    format: Format
    tokenizer: Tokenizer
    max_tokens: int  # of a completion


def open_game(config: dict, suite: str | None) -> Game:
    """Make the game of a config: the tasks and the environment of its first source of
    rollouts, or of a suite.

    Raises:
      ValueError: an error in the config, or no such suite.
    """
    config = settle(config)
    described = read_model_and_text(config["model"], config["text"])
    parts = Parts(
        seed=config["seed"],
        model=None,
        tokenizer=described.tokenizer,
        format=described.format,
        completer=None,
        verifier=config["verifier"],
        meshes=sharding.Meshes(None, None),
        devices=1,
        say=print,
        reword=functools.partial(reword, config["text"], described.folder),
        loaded=[],
        environments=[],
        environment=config.get("environment"),
    )
    tasks, made = of_suite(config, suite, parts) if suite is not None else of_source(config, parts)
    return Game(tasks, made.environment, made.format, described.tokenizer, config["sampler"]["max_tokens"])


def of_source(config: dict, parts: Parts) -> tuple[Sequence[Task], Made]:
    for phase in config["phases"]:
        sampling = [
            part for part in parts_of(config[phase]["source"]).values() if part.get("name") in ("rollouts", "kept_rollouts")
        ]
        for source in sampling:
            tasks = load_tasks(source["task"], seed=parts.seed)
            return tasks, make_environment(parts.environment, parts.verifier, tasks, parts)
    raise ValueError(f"no phase of the config samples rollouts; give --suite, one of: {', '.join(config['evaluate']['suites'])}")


def of_suite(config: dict, suite: str, parts: Parts) -> tuple[Sequence[Task], Made]:
    suites = config["evaluate"]["suites"]
    if suite not in suites:
        raise ValueError(unknown_name_message("suite", suite, suites))
    own: Mapping[str, Any] = {name: suites[suite].get(name) for name in inspect.signature(attempted).parameters}
    task = {name: value for name, value in suites[suite].items() if name not in own}
    tasks = load_tasks(task, split="test", size=1000)
    words = {} if own["instruction"] is None else {"instruction": own["instruction"]}
    section = parts.environment if own["environment"] is None else own["environment"]
    return tasks, make_environment(section, own["verifier"] or parts.verifier, tasks, parts, **words)


def play(game: Game, lines: Iterator[str], say: Callable[[str], None]) -> None:
    """Play problems until the lines end.

    `/problem N` takes problem N, `/problem` the next one; after a verdict the next one
    comes by itself.
    """
    number, asked = 0, True
    while asked:
        task = game.tasks[number]
        asked = False
        say(f"--- problem {number}; the model reads:\n{shown(game, game.format.prompt(task))}")
        for command in attempt(game, task, lines, say):
            if command == "/quit":
                return
            word, _, value = command.partition(" ")
            wanted = value.strip() or str(number + 1)
            if word != "/problem" or not wanted.isdecimal() or int(wanted) >= len(game.tasks):
                say(f"error: got {command!r}; {HELP}; there are problems 0 to {len(game.tasks) - 1}")
                continue
            number, asked = int(wanted), True
            break
        else:
            number, asked = (number + 1) % len(game.tasks), True


def attempt(game: Game, task: Task, lines: Iterator[str], say: Callable[[str], None]) -> Iterator[str]:
    """Play one problem to its verdict; yield the commands among the lines.

    A generator that is not resumed closes the environment, as a verdict does.
    """
    playing, used = Playing(game.environment, task, game.format.observe), 0
    try:
        while (text := read_turn(lines)) is not None:
            if text.startswith("/"):
                yield text
                continue
            text, stop = cut(game.environment, text)
            try:
                written = game.tokenizer.encode(text, special=False, continues=True)
            except ValueError as error:
                say(f"error: the model can't write this: {error}")
                continue
            used += len(written) + (stop == "eos")
            step, ids = playing.answer(Turn(text, stop, used >= game.max_tokens))
            if step.verdict is not None:
                say(told(step.verdict, task, step))
                return
            used += len(ids)
            say(f"it reads: {shown(game, ids)}")
        yield "/quit"
    finally:
        playing.close()


def read_turn(lines: Iterator[str]) -> str | None:
    """Read the text of a turn; None at the end of the input."""
    parts: list[str] = []
    for line in lines:
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(parts)
    return None


def cut(environment: Environment, text: str) -> tuple[str, str]:
    """Cut a text at the first stop of an environment; return it and why it ended."""
    end = end_of_turn(environment.stops, text)
    return (text, "eos") if end is None else (text[:end], "stop")


def shown(game: Game, ids: Sequence[int]) -> str:
    return visible(game.tokenizer.decode([int(i) for i in ids], continues=True))


def told(verdict: Verdict, task: Task, step: Step) -> str:
    """Describe a verdict in one line."""
    measures = "".join(f", {name} {value:g}" for name, value in verdict.measures.items())
    right = "right" if verdict.correct else "wrong"
    parsed = "no answer found" if verdict.parsed is None else f"answered {verdict.parsed}"
    failure = f"\n{step.failure}" if step.failure else ""
    said = f"{right}: {parsed}{task.expected}; reward {verdict.reward:g}, {verdict.reason}{measures}"
    return visible(said + failure)
