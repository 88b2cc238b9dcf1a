"""A conversation with a model in the terminal: answers as they are sampled, problems of
a suite, and the commands.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HELP = "commands: /problem [N], /temperature T, /samples N, /new, /quit; Ctrl-C stops an answer"


class Talk:
    """A conversation with a model. `own` has the environment and the format of the
    questions that the user writes.
    """

    def __init__(self, parts, weights, suite, own, *, temperature: float, samples: int, system: str, seed: int):
        self.parts, self.weights, self.suite, self.own = parts, weights, suite, own
        self.temperature, self.samples, self.system, self.seed = temperature, samples, system, seed
        self.messages: list = []
        self.asked = 0  # questions so far; each has its own noise
        self.problem = -1  # of the suite, the last that was given

    def prompt(self, question: str) -> list[int]:
        """Return the ids of a question behind the conversation so far."""
        from jaxreason.types import Message, Task

        if self.own.format.conversation is None:
            return self.own.format.prompt(Task(question, ""))
        system = [Message("system", self.system)] if self.system else []
        return self.own.format.conversation([*system, *self.messages, Message("user", question)])

    def ask(self, question: str, show: Callable[[list[str]], None]) -> list:
        """Answer a question that the user wrote. What the model wrote after the last
        result of a tool stays in the conversation.
        """
        from jaxreason.types import Message, Task

        rollouts = self.sample(Task(question, ""), self.prompt(question), self.own.environment, show)
        if self.own.format.conversation is not None:
            self.messages += [Message("user", question), Message("assistant", rollouts[0].verdict.parsed)]
        return rollouts

    def give(self, number: int | None, show: Callable[[list[str]], None], tell: Callable[[str], None]) -> list:
        """Give a problem of the suite, outside the conversation.

        Raises:
          ValueError: there is no suite, or no such problem.
        """
        if self.suite is None:
            raise ValueError("there is no suite; start with --suite=gsm8k, for example")
        number = self.problem + 1 if number is None else number
        if not 0 <= number < len(self.suite.tasks):
            raise ValueError(f"no problem {number}; {self.suite.name} has 0 to {len(self.suite.tasks) - 1}")
        self.problem = number
        task, prompt = self.suite.tasks[self.problem]
        tell(f"{self.suite.name}, problem {self.problem}: {task.question}")
        return self.sample(task, [int(i) for i in prompt], self.suite.environment, show)

    def sample(self, task, prompt: Sequence[int], environment, show: Callable[[list[str]], None]) -> list:
        """Sample answers; `show` gets the texts so far after every few tokens.

        Raises:
          ValueError: the prompt is too long.
        """
        import jax

        from jaxreason.draw import ALL
        from jaxreason.environment import Threads
        from jaxreason.rollout import SAMPLING_LOCK, THREADS, Collection, Request, check

        completer = self.parts.completer
        requests = [Request(task, 0, attempt, prompt) for attempt in range(self.samples)]
        check(completer, requests)
        key = jax.random.fold_in(jax.random.key(self.seed), self.asked)
        self.asked += 1
        with SAMPLING_LOCK, contextlib.closing(Threads(THREADS)) as threads:
            made = Collection(completer, self.weights, requests, environment, threads, key, self.temperature, ALL)
            with contextlib.closing(made):
                while made.goes_on():
                    made.hear()
                    made.fill()
                    made.decode()
                    show(texts_so_far(made))
        return made.rollouts


def texts_so_far(made) -> list[str]:
    """Return the text of each answer, also of those that are still being sampled."""
    import numpy as np

    from jaxreason.rollout import text_of

    texts = ["" if r is None else r.text for r in made.rollouts]
    running = made.running()
    tokens_ST = np.asarray(made.slots.tokens_ST) if running else None
    for a in running:
        texts[a.index] = text_of(made.completer, tokens_ST[a.slot, len(a.request.prompt) : a.length])
    for a in made.asked.values():
        texts[a.index] = a.rollout.text
    return texts


# --- the terminal ---


class Screen:
    """Shows answers while they are sampled: one as a stream, several side by side on a
    terminal.
    """

    def __init__(self, several: bool):
        from rich.console import Console
        from rich.live import Live

        self.several, self.console, self.printed = several, Console(highlight=False), ""
        self.live = Live(console=self.console, refresh_per_second=8) if several and self.console.is_terminal else None

    def __enter__(self) -> Screen:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, texts: list[str]) -> None:
        if self.live is not None:
            self.live.update(side_by_side([(text, "") for text in texts]))
        elif not self.several:
            self.stream(texts[0])

    def stream(self, text: str) -> None:
        """Print what is new of a text. A character of which bytes are missing waits."""
        from jaxreason.runtime.terminal import visible

        text = text.rstrip("\ufffd")
        if text.startswith(self.printed):
            print(visible(text[len(self.printed) :]), end="", flush=True)
            self.printed = text

    def end(self, rollouts: list, judged: bool) -> None:
        """Show the answers as they ended, with their verdicts."""
        from jaxreason.runtime.terminal import visible

        ends = [ending(r, judged) for r in rollouts]
        if self.several:
            answers = side_by_side([(r.text, end) for r, end in zip(rollouts, ends, strict=True)])
            self.live.update(answers) if self.live is not None else self.console.print(answers)
        else:
            self.stream(rollouts[0].text)
            print(f"\n[{visible(ends[0])}]", flush=True)


def ending(r, judged: bool) -> str:
    """Say how an answer ended, and what its verdict is."""
    said = f"{len(r.tokens)} tokens" + (", cut off" if r.stop == "limit" else "")
    if not judged:
        return said
    answer = "no answer found" if r.verdict.parsed is None else f"answered {r.verdict.parsed}"
    return f"{'right' if r.verdict.correct else 'wrong'}: {answer}{r.task.expected}; {said}"


def side_by_side(answers: list[tuple[str, str]]):
    """Return a table of texts, each with its ending."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from jaxreason.runtime.terminal import visible

    table = Table(box=box.SIMPLE, show_header=False, expand=True)
    for _ in answers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(visible(text)) for text, _ in answers))
    table.add_row(*(Text(visible(end), style="bold") for _, end in answers))
    return table


def respond(talk: Talk, line: str) -> bool:
    """Do what a line asks for; False if it ends the conversation.

    Raises:
      ValueError: an unknown command or a wrong value.
    """
    from jaxreason.draw import is_temperature

    word, _, value = line.partition(" ")
    if word == "/quit":
        return False
    if word in ("/help", "/"):
        print(HELP)
    elif word == "/new":
        talk.messages.clear()
        print("the conversation is forgotten")
    elif word == "/temperature":
        talk.temperature = read("temperature", value, float, is_temperature)
    elif word == "/samples":
        most = talk.parts.completer.sampler.slots
        talk.samples = read("samples", value, int, lambda n: 1 <= n <= most)
    elif line.startswith("/") and word != "/problem":
        raise ValueError(f"unknown command {word!r}; {HELP}")
    else:
        answer(talk, line, word, value)
    return True


def answer(talk: Talk, line: str, word: str, value: str) -> None:
    with Screen(talk.samples > 1) as screen:
        if word == "/problem":
            number = read("problem", value, int, lambda n: n >= 0) if value.strip() else None
            rollouts = talk.give(number, screen.show, lambda said: print(said, flush=True))
        else:
            rollouts = talk.ask(line, screen.show)
        screen.end(rollouts, judged=word == "/problem")


def read(name: str, word: str, type_: type, allowed: Callable[[Any], bool]) -> Any:
    try:
        value = type_(word)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise ValueError(f"/{name} got {word!r}; {HELP}")
    return value


def lines(prompt: str) -> Iterator[str]:
    """Yield what the user writes, until the end of the input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold any bytes
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history)
    while True:
        try:
            yield input(prompt if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
