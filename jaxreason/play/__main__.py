r"""Entry point: talk to a checkpoint in the terminal, give it problems of a suite, or
be the model yourself.

    python -m jaxreason.play --checkpoint=RUN
    python -m jaxreason.play --checkpoint=Qwen/Qwen2.5-0.5B-Instruct \
        --suite=gsm8k --samples=4
    python -m jaxreason.play --config=configs/tools.py

What you write is a question; the answer is shown as it is sampled, and the tools of the
run, if it has any, answer its calls. A chat model keeps the conversation until /new.
Several samples are shown side by side, with verdicts if the question is of a suite.
Commands:

    /problem [N]       give it the next problem of the suite, or number N
    /temperature T     0 is greedy
    /samples N         answers to each question
    /new               forget the conversation
    /quit              or Ctrl-D; Ctrl-C stops an answer

With `--config` you write what the model would write: you see the prompt that it would
see, your text goes to the environment of the config, and you read its tools' results
and its verdict. It shows whether an environment does what its author meant, before a
model is trained in it. No model is loaded.
"""

from __future__ import annotations

import sys

from absl import app, flags, logging

from jaxreason.options import command
from jaxreason.play.talk import HELP, Talk, lines, respond

FLAGS = flags.FLAGS
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


def open_talk() -> Talk:
    """Open the checkpoint and the suite that the flags name."""
    from jaxreason.build.checkpoint import open_checkpoint
    from jaxreason.build.environments import make_unjudged
    from jaxreason.build.evaluation import make_suite
    from jaxreason.build.suites import read_suites
    from jaxreason.draw import TEMPERATURES, is_temperature
    from jaxreason.runtime import compiling

    if FLAGS.checkpoint is None:
        raise ValueError(
            "no --checkpoint given; allowed: a run, a Hugging Face folder, a hub id or a named size; or --config, to write in "
            "the place of the model"
        )
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
    own_questions = make_unjudged(opened.config.get("environment"), opened.parts)
    print(f"loading {opened.folder} ...", flush=True)
    weights = opened.parts.completer.sampler.prepare(opened.load())
    system = opened.sections["text"].get("system") or "" if FLAGS.system is None else FLAGS.system
    words = {"temperature": FLAGS.temperature, "samples": FLAGS.samples, "seed": FLAGS.seed}
    return Talk(opened.parts, weights, suite, own_questions, system=system, **words)


def main(argv) -> None:
    from jaxreason.environment import VerifierFailed

    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"got the words {' '.join(argv[1:])!r}; write your question after the start")
        if CONFIG.value is not None:
            return play_policy()
        talk = open_talk()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{HELP}; the first answer compiles the sampler", flush=True)
    for line in lines("> "):
        if not line:
            continue
        try:
            if not respond(talk, line):
                return None
        except (ValueError, VerifierFailed) as error:
            print(f"error: {' '.join(str(error).split())}", flush=True)
        except KeyboardInterrupt:
            print("\nstopped", flush=True)
    return None


def play_policy() -> None:
    """Let a person write in the place of the model, in the environment of a config."""
    from jaxreason.play import policy

    if FLAGS.checkpoint is not None:
        raise ValueError("got --checkpoint and --config; allowed: one of them, to talk to a model or to be it")
    game = policy.open_game(CONFIG.value.to_dict(), FLAGS.suite)
    print(policy.HELP, flush=True)
    policy.play(game, lines("> "), lambda said: print(said, flush=True))


if __name__ == "__main__":
    CONFIG = command.define("Config file and options: write in the place of the model, in its environment.")
    define_flags()
    try:
        app.run(main, flags_parser=command.parse_or_exit)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
