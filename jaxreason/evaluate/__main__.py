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
written as they finish, and the same command continues after a kill; sums over another
composition of slots may round differently, so that a text may differ where two tokens
are nearly equally likely.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from pathlib import Path

from absl import app, flags, logging

from jaxreason.options import command

FLAGS = flags.FLAGS
INTERRUPTED = 130  # the exit code: 128 + SIGINT


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
        with command.while_read():
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
    from jaxreason.evaluate.asked import Asked
    from jaxreason.look.comparison import compare_folders

    if given := [f"--{name}" for name in Asked._fields if FLAGS[name].present]:
        raise ValueError(
            f"--compare got {', '.join(given)} too; allowed: two folders alone, whose evaluations have their settings"
        )
    if len(folders) != 2:
        raise ValueError(f"--compare got {len(folders)} folders; needed: python -m jaxreason.evaluate --compare A B")
    print("\n".join(compare_folders(*(Path(os.path.expanduser(folder)) for folder in folders))))


def evaluate_checkpoint() -> None:
    """Make an evaluation, or continue one, and print its table."""
    from jaxreason.evaluate import identity
    from jaxreason.evaluate.asked import Asked, load_suites, open_asked, read_settings
    from jaxreason.evaluate.series import run
    from jaxreason.evaluate.table import print_results, say
    from jaxreason.runtime import compiling, workdir

    compiling.keep_compiled(None)
    asked = Asked(**{name: value for name in Asked._fields if (value := FLAGS[name].value) is not None})
    today = datetime.date.today().isoformat()  # a chat template may name the day
    opened = open_asked(asked, today, say)
    settings = read_settings(asked, opened)
    about = identity.identity(opened, settings, asked.seed)
    folder = identity.default_folder(opened, about) if asked.workdir is None else Path(os.path.expanduser(asked.workdir))
    date = (workdir.json_object(folder / "evaluation.json") or {}).get("date", today)
    if date != today and (settings["text"].get("date") == today):
        say(f"the date in prompts is {date}, the day on which this evaluation began")
        opened = open_asked(asked, date, say)
        about["settings"]["text"]["date"] = date
    suites = load_suites(asked, opened, settings, say)
    if (asked.samples or 1) > 1 and not any(
        any(settings["temperatures"] if s.temperatures is None else s.temperatures) for s in suites
    ):
        say(f"note: --samples={asked.samples} makes one attempt per task at temperature 0; for several, add --temperature=1")
    tasks = identity.digest_tasks(suites, settings["n"])
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir got {str(folder)!r}, which is a file; allowed: a folder, new or of the same evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(workdir.lock(folder, say))
        identity.check_same(folder, about, tasks)
        about |= {"date": date, "tasks": tasks}
        found = run(opened, suites, settings, folder, about, seed=asked.seed, recoveries=asked.recovery, say=say)
    print_results(found)
    say(f"written: {folder / 'evaluation.json'}, {folder / 'rollouts.jsonl'}")


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
