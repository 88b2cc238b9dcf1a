"""Entry point: `python -m jaxreason.main --config=configs/tiny.py [--workdir=runs/mine]
[--config.rl.steps=10]`.

It reads flags, checks the config and the folder, builds the run and trains it. The same
command continues a run that was stopped: without `--workdir` the folder is named after
the config, its options and a hash of all its fields.

`--describe` prints all fields of a config with their types, defaults and meanings
(`--describe=rl.optimizer` those of a section), and `--list` the names of tasks,
verifiers, objectives and so on.

On several hosts the same command runs on each, with a `--workdir` that all of them
share. Cloud TPU, Slurm and Open MPI tell each process its number; elsewhere pass
`--coordinator_address=HOST:PORT --num_processes=2 --process_id=0` and so on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from absl import app, flags, logging

from jaxreason.options import OFFERED, command, unknown_name_message
from jaxreason.runtime import workdir as folders
from jaxreason.runtime.bucket import is_url
from jaxreason.runtime.workdir import config_text

CONFIG = command.define("Config file and options, as configs/tiny.py:task=countdown,smoke; --config.rl.steps=10 changes a field.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, also gs://BUCKET/FOLDER; a run in it is continued. Default: runs/<config>-<hash of its fields>.",
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder of compiled programs, for a quick second start. Default: ~/.cache/jaxreason; '' for none."
)

RESUME = flags.DEFINE_enum(
    "resume",
    "auto",
    folders.RESUME,
    "Continue a run in the folder: auto (if there is one), must, or never (move the old run aside).",
)
ACCEPT_CONFIG_CHANGE = flags.DEFINE_bool(
    "accept_config_change", False, "Continue a run with a config other than the one it began with."
)
STOP_AFTER = flags.DEFINE_string(
    "stop_after", None, "Stop after this phase, with a checkpoint; the same command without this flag continues."
)
CODE_WHEN_STOPPED = flags.DEFINE_integer(
    "code_when_stopped", 0, "Exit code of a run that ends early, with a checkpoint: after SIGTERM or before maintenance.", 0, 255
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, steps of the whole run to trace for xprof and Perfetto, into <workdir>/profile."
)
DESCRIBE = flags.DEFINE_string("describe", None, "Print the fields of the config or a section such as rl.optimizer, and exit.")
LIST = flags.DEFINE_string("list", None, "Print the names of all families or one such as verifiers, and exit.")
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, if there are several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    "heartbeat_timeout_s", 100, "Seconds without a heartbeat after which a process is dead, which ends all.", lower_bound=1
)


INTERRUPTED = 130  # the exit code: 128 + SIGINT


def default_workdir(config_flag: str, text: str) -> Path:
    """Return the first folder named after this config that holds no finished run.

    It is either new or holds an unfinished run of the same config.
    """
    path, _, options = config_flag.partition(":")
    stem = Path(path).stem + ("-" + re.sub(r"[^\w.=-]+", "_", options)[-60:] if options else "")
    stem = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    for number in itertools.count(1):
        folder = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not folders.is_done(folder):
            return folder


def fail(error: Exception) -> None:
    """Exit with an error in one line, without a traceback."""
    words = error.args[0] if error.args else error
    if isinstance(error, OSError) and error.filename is not None:
        words = f"{error.filename}: {error.strerror}"  # its first argument is an error number
    elif isinstance(error, OSError):
        words = error.strerror or error
    message = " ".join(str(words).split())
    sys.exit(f"error: {message}")


def parse_flags(argv):
    """Parse flags; for `--describe` or `--list` print the answer and exit."""
    argv = [argv[0], *with_values(argv[1:])]
    try:
        rest = command.parse(argv)
        if LIST.value is not None:
            show(list_families(LIST.value))
        if CONFIG.value is None:
            raise ValueError("no --config given; for example --config=configs/tiny.py")
        if DESCRIBE.value is not None:
            show(describe(CONFIG.value.to_dict(), DESCRIBE.value))
        return rest
    except (flags.Error, ValueError, OSError) as error:
        fail(error)


def with_values(words: list[str]) -> list[str]:
    """Join `--describe` and `--list` with the next argument, unless that is a flag."""
    words, found = list(words), []
    while words:
        word = words.pop(0)
        if re.fullmatch("--?(describe|list)", word):
            word += "=" + (words.pop(0) if words and not words[0].startswith("-") else "")
        found.append(word)
    return found


def show(lines: list[str]) -> None:
    with command.while_read():
        print("\n".join(lines))
    sys.exit(0)


def describe(config: dict, section: str) -> list[str]:
    """Return the lines about a section of a config.

    Without a section they are about the whole config and the options of its file.
    """
    from jaxreason import build
    from jaxreason.options import fields

    lines = fields.describe(build.layout(config), config, section)
    if section:
        return lines
    choices = {name: "|".join(map(str, allowed)) for name, (_, allowed) in OFFERED.items() if allowed is not None}
    options = [f"  {n}={choices.get(n, type(d).__name__)}  default {d!r}" for n, (d, _) in OFFERED.items()]
    return ["options, after a colon: --config=FILE:NAME=VALUE,NAME=VALUE", *(options or ["  none"]), "", *lines]


def list_families(wanted: str) -> list[str]:
    """Return one line per member of the wanted family; "" means all families."""
    from jaxreason import build

    families = build.families()
    if wanted and wanted not in families:
        raise ValueError(unknown_name_message("family", wanted, families))
    lines = []
    for family, members in families.items():
        if wanted in ("", family):
            width = max(map(len, members))
            lines += ["", f"{family}:", *(f"  {name.ljust(width)}  {what}".rstrip() for name, what in members.items())]
    return lines[1:]


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)  # jax logs missing backends at INFO
    if len(argv) > 1:
        fail(ValueError(f"got the words {' '.join(argv[1:])!r}; options of a config follow a colon: configs/tiny.py:smoke"))
    # Local import: `--help` and mistyped flags should not wait for jax.
    import jax

    from jaxreason.runtime import compiling, processes

    compiling.keep_compiled(COMPILATION_CACHE.value)
    try:
        processes.join(
            coordinator_address=COORDINATOR_ADDRESS.value,
            num_processes=NUM_PROCESSES.value,
            process_id=PROCESS_ID.value,
            heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S.value,
        )
    except (ValueError, RuntimeError) as error:
        fail(error)
    if jax.process_count() == 1:
        return run(CONFIG.value)
    try:
        run(CONFIG.value)
    except Exception as error:
        processes.end(error, HEARTBEAT_TIMEOUT_S.value)


def run(config) -> None:
    """Build the run of a config and train it, together with all other processes."""
    from jaxreason.build.start import open_run
    from jaxreason.runtime import memory, profile
    from jaxreason.runtime.files import Unwritable

    memory.give_back()
    flag = flags.FLAGS["config"]
    folder = WORKDIR.value or default_workdir(flag.config_filename, config_text(config))
    folder = folder if is_url(folder) else Path(os.path.expanduser(folder))
    keywords = {"resume": RESUME.value, "accept_config_change": ACCEPT_CONFIG_CHANGE.value, "say": tell}
    with contextlib.ExitStack() as stack:
        try:
            traced = None
            if PROFILE_STEPS.value is not None:
                traced = profile.parse_steps(PROFILE_STEPS.value, sum(config[name].steps for name in config.phases))
            opened = stack.enter_context(open_run(config, folder, **keywords))
            opened = opened._replace(run=opened.run._replace(profile_steps=traced))
        except (ValueError, OSError, Unwritable) as error:
            fail(error)
        tell(f"workdir: {opened.name}" + f", with a copy in {opened.folder}" * (opened.name != str(opened.folder)))
        if not train_to_the_end(opened, STOP_AFTER.value):
            return
        if opened.run.report:
            report(opened.folder)
    for line in what_next(opened.folder, flag.config_filename, flag.config_changes, opened.name):
        tell(line)


def train_to_the_end(opened, stop_after: str | None = None) -> bool:
    """Train an opened run; return whether it finished.

    Errors that a user can fix exit the program with one line.
    """
    import jax

    from jaxreason.environment import VerifierFailed
    from jaxreason.model.weights import BadWeights
    from jaxreason.runtime.files import Unwritable
    from jaxreason.runtime.processes import writes
    from jaxreason.runtime.trackers import NoTracker
    from jaxreason.train import Diverged, Interrupted, NotResumable, Stopped, train

    run, folder, _, checkpoints, stop, check_stays = opened
    if stop_after not in (None, *(names := [phase.name for phase in run.phases])):
        fail(ValueError(unknown_name_message("phase in --stop_after", stop_after, names)))
    keywords = {"log_options": run.log_options, "stop": stop, "stop_after": stop_after, "check_stays": check_stays, "say": tell}
    try:
        train(run, folder, checkpoints, **keywords)
    except Interrupted as interrupted:
        if writes():
            print(interrupted, file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Stopped as stopped:
        tell(str(stopped))
        if CODE_WHEN_STOPPED.value:
            sys.exit(CODE_WHEN_STOPPED.value)
        return False
    except (Diverged, NotResumable, BadWeights) as error:
        fail(error)
    except (Unwritable, VerifierFailed, NoTracker, folders.Moved) as error:
        if jax.process_count() > 1:  # the other processes would wait forever: `processes.end` ends them too
            raise
        fail(error)
    return True


def report(folder: Path) -> None:
    """Write the report of a finished run, on the process that writes."""
    from jaxreason.look.report import write_report
    from jaxreason.runtime.processes import writes

    if not writes():
        return
    try:
        write_report([folder], folder / "report.html")
    except Exception as error:  # whatever is wrong with the page, the run itself is done
        tell(f"warning: no report.html: {type(error).__name__}: {' '.join(str(error).split())}")


def tell(line: str) -> None:
    """Print a line, on the process that writes."""
    from jaxreason.runtime.processes import writes

    if writes():
        print(line, flush=True)


def quoted(value: str) -> str:
    """Quote a word for a shell.

    A word with single quotes is put in double quotes if that is safe, to stay readable.
    """
    return f'"{value}"' if "'" in value and not set(value) & set('"$`\\!') else shlex.quote(value)


def what_next(workdir: Path, config_flag: str, changes: Mapping[str, str], name: str = "") -> list[str]:
    """List the files that were written, and commands to copy that use them. `name` is
    what the user called the folder, if that is not its path.
    """
    name = name or str(workdir)
    files = ("report.html", "summary.json", "metrics.jsonl", "rollouts.jsonl")
    written = [f"{name}/{file}" for file in files if (workdir / file).is_file()]
    run, export = shlex.quote(name), shlex.quote(f"{name.rpartition('/')[2] if is_url(name) else name}-export")
    same = "".join(f" --config.{name}={quoted(value)}" for name, value in changes.items() if name != "init_from")
    todo = {
        "read its rollouts": f"python -m jaxreason.view {run}",
        "talk to it": f"python -m jaxreason.play --checkpoint={run}",
        "evaluate it with several samples": f"python -m jaxreason.evaluate --checkpoint={run} --samples=8 --temperature=1",
        "export the weights": f"python -m jaxreason.export {run} {export}",
        "begin another run with them": f"python -m jaxreason.main --config={shlex.quote(config_flag)}{same} "
        f"--config.init_from={run}",
    }
    if f"{name}/rollouts.jsonl" not in written:
        del todo["read its rollouts"]
    lines = ["written:", *(f"  {path}" for path in written)]
    return lines + [line for what, command in todo.items() for line in (f"to {what}:", f"  {command}")]


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:  # before the run handles the signal, or after its end
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
