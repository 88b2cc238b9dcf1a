r"""Entry point: talk to a checkpoint in the terminal, or give it problems of a suite.

    python -m jaxreason.play --checkpoint=RUN
    python -m jaxreason.play --checkpoint=Qwen/Qwen2.5-0.5B-Instruct \
        --suite=gsm8k --samples=4

What you write is a question; the answer is shown as it is sampled. A chat model keeps
the conversation until /new. Several samples are shown side by side, with verdicts if
the question is of a suite. Commands:

    /problem [N]       give it the next problem of the suite, or number N
    /temperature T     0 is greedy
    /samples N         answers to each question
    /new               forget the conversation
    /quit              or Ctrl-D; Ctrl-C stops an answer
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

FLAGS = flags.FLAGS
HELP = "commands: /problem [N], /temperature T, /samples N, /new, /quit; Ctrl-C stops an answer"
MOST_SAMPLES = 8
CHUNK_TOKENS = 4  # between two looks at an answer


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "RUN, RUN/checkpoints/STEP, a Hugging Face folder, a hub id or a named size.")
    flags.DEFINE_integer("step", None, "Step of the run's checkpoint. Default: the newest.", lower_bound=0)
    flags.DEFINE_string(
        "suite", None, "Suite of problems: a name, gym:DATASET, NAME=FILE.jsonl or NAME={...}. Default: the first of the run."
    )
    flags.DEFINE_float("temperature", 0.7, "Temperature; 0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("samples", 1, "Answers to each question.", lower_bound=1, upper_bound=MOST_SAMPLES)
    flags.DEFINE_integer("max_tokens", None, "Tokens of an answer, at most.", lower_bound=1)
    flags.DEFINE_integer("max_prompt_tokens", None, "Tokens of the conversation, at most.", lower_bound=1)
    flags.DEFINE_string("system", None, "System message of the chat. Default: that of the run, else none.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)


class Talk:
    """A conversation with a model."""

    def __init__(self, parts, weights, suite, *, temperature: float, samples: int, system: str, seed: int):
        self.parts, self.weights, self.suite = parts, weights, suite
        self.temperature, self.samples, self.system, self.seed = temperature, samples, system, seed
        self.messages: list = []
        self.asked = 0  # questions so far; each has its own noise
        self.problem = -1  # of the suite, the last that was given

    def prompt(self, question: str) -> list[int]:
        """Return the ids of a question behind the conversation so far."""
        from jaxreason.types import Message, Task

        if self.parts.format.conversation is None:
            return self.parts.format.prompt(Task(question, ""))
        system = [Message("system", self.system)] if self.system else []
        return self.parts.format.conversation([*system, *self.messages, Message("user", question)])

    def ask(self, question: str, show: Callable[[list[str]], None]) -> list:
        """Answer a question that the user wrote."""
        from jaxreason.environment import single_turn
        from jaxreason.types import Message, Task, Verdict

        unjudged = single_turn(lambda text, task: Verdict(0.0, False, None, "not judged"))
        rollouts = self.sample(Task(question, ""), self.prompt(question), unjudged, show)
        if self.parts.format.conversation is not None:
            self.messages += [Message("user", question), Message("assistant", rollouts[0].text)]
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
    return f"{'right' if r.verdict.correct else 'wrong'}: {answer}, expected {r.task.answer}; {said}"


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


def open_talk() -> Talk:
    """Open the checkpoint and the suite that the flags name."""
    from jaxreason.build.checkpoint import open_checkpoint
    from jaxreason.build.evaluation import make_suite
    from jaxreason.build.suites import read_suites
    from jaxreason.draw import TEMPERATURES, is_temperature
    from jaxreason.runtime import compiling

    if FLAGS.checkpoint is None:
        raise ValueError("no --checkpoint given; allowed: a run, a Hugging Face folder, a hub id or a named size")
    if not is_temperature(FLAGS.temperature):  # nan passes the bound of the flag
        raise ValueError(f"--temperature got {FLAGS.temperature}; allowed: {TEMPERATURES}")
    compiling.keep_compiled(None)
    sampler = {name: FLAGS[name].value for name in ("max_tokens", "max_prompt_tokens") if FLAGS[name].value is not None}
    sampler |= {"slots": max(4, FLAGS.samples), "chunk_tokens": CHUNK_TOKENS, "prompts_per_prefill": 1, "prompt_rows": 0}
    opened = open_checkpoint(FLAGS.checkpoint, step=FLAGS.step, sampler=sampler, mesh={"data": 1}, say=print)
    if FLAGS.system and opened.parts.format.conversation is None:
        raise ValueError(f"--system with {opened.folder}, whose prompt has no messages; allowed: with a chat model")
    own = opened.config.get("evaluate", {}).get("suites", {})
    sections = own if FLAGS.suite is None else read_suites(FLAGS.suite, own)
    suite = None
    for name, section in list(sections.items())[:1]:
        suite = make_suite(name, section, opened.parts, 200, allow_overlap=True)
    print(f"loading {opened.folder} ...", flush=True)
    weights = opened.parts.completer.sampler.prepare(opened.load())
    system = opened.sections["text"].get("system") or "" if FLAGS.system is None else FLAGS.system
    words = {"temperature": FLAGS.temperature, "samples": FLAGS.samples, "seed": FLAGS.seed}
    return Talk(opened.parts, weights, suite, system=system, **words)


def lines(prompt: str):
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


def main(argv) -> None:
    from jaxreason.environment import VerifierFailed

    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"got the words {' '.join(argv[1:])!r}; write your question after the start")
        talk = open_talk()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{HELP}; the first answer compiles the sampler", flush=True)
    for line in lines("> "):
        if not line:
            continue
        try:
            if not respond(talk, line):
                return
        except (ValueError, VerifierFailed) as error:
            print(f"error: {' '.join(str(error).split())}", flush=True)
        except KeyboardInterrupt:
            print("\nstopped", flush=True)


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    define_flags()
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
