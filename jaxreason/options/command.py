"""The config of a command line, read in the same way by all entry points.

    --config=configs/tiny.py:task=countdown,smoke --config.rl.optimizer.lr=1e-4

The config file is run, the fields named on the command line are set, and all other
fields get their defaults (see `fields`, `build.layout`). Any field can thus be set,
even if the file does not mention it. `None` unsets a field, `(1, 2)` or `1,2` is a
tuple, and a section is a Python dictionary. The folder of the config file is on the
import path, so a user's modules can be beside it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from jaxreason import options

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # `--help` shows an entry point's own flags: --config is one of them


class Words(NamedTuple):
    """The arguments of a command, split into those about the config and the rest."""

    config: str | None  # FILE, or FILE:OPTIONS
    changes: dict[str, str]  # full field name without the leading `config.` -> value
    rest: list[str]


def define(help: str) -> flags.FlagHolder:
    """Define the flag `--config`. `parse` replaces its value by the complete config."""
    return flags.DEFINE_string("config", None, help)


def split(argv: list[str]) -> Words:
    """Separate `--config=FILE` and `--config.FIELD=VALUE` from the other arguments of a
    command.

    Raises:
      ValueError: several files, or an argument without its value.
    """
    files, changes, rest = [], {}, argv[:1]
    words = FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        found = re.fullmatch(r"--?(no)?config(\.[^=]*)?(=.*)?", word, re.DOTALL)
        if not found or (found[1] and not found[2]):
            rest.append(word)
            continue
        has_next = bool(words) and not re.match("--?[a-zA-Z]", words[0])
        if found[3] is not None:
            value = found[3][1:]
        elif found[1] or (found[2] and not has_next):  # --config.rl.source.pack, --noconfig.rl.source.pack
            value = "false" if found[1] else "true"
        elif has_next:
            value = words.pop(0)
        else:
            raise ValueError("--config needs a value, for example --config=configs/tiny.py")
        if found[2]:
            changes[found[2][1:]] = value
        else:
            files.append(value)
    if len(files) > 1:
        raise ValueError(f"--config is given {len(files)} times ({', '.join(files)}); allowed: once")
    return Words(files[0] if files else None, changes, rest)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags, set the flag `config` to the complete config, and return the
    arguments that are not flags.

    Raises:
      ValueError, flags.Error, OSError: any error of the user, in one line.
    """
    words = split(argv)
    if words.config is not None:
        if "config" not in FLAGS:
            raise ValueError("this command has no --config; --help lists its flags")
        find_file(words.config)  # fail before anything slow
    rest = FLAGS(words.rest)
    if words.config is None and words.changes:
        raise ValueError(f"--config.{next(iter(words.changes))} is given and no --config=FILE")
    if words.config is not None:
        FLAGS["config"].value = read(words.config, words.changes, say=functools.partial(print, file=sys.stderr))
        FLAGS["config"].config_filename, FLAGS["config"].config_changes = words.config, words.changes
    return rest


def parse_or_exit(argv: list[str]) -> list[str]:
    """Parse flags as `parse` does; on an error exit with one line."""
    try:
        return parse(argv)
    except (flags.Error, ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


@contextlib.contextmanager
def while_read() -> Iterator[None]:
    """Stop printing, without an error, once nobody reads the output: `| head` has
    ended.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end


def find_file(config: str) -> Path:
    """Return the path of the file in FILE:OPTIONS."""
    path = Path(os.path.expanduser(config.partition(":")[0]))
    name = config.partition(":")[0]
    if name and path.is_dir():
        raise ValueError(f"--config got the folder {name!r}; allowed: a file, as configs/tiny.py")
    if not name or not path.is_file():
        raise ValueError(f"no config file {name!r}; configs are in configs/, options follow a colon: configs/tiny.py:smoke")
    return path


def read(config: str, changes: dict[str, str], say: Callable[[str], None] = print) -> ConfigDict:
    """Read the complete config of FILE:OPTIONS and set the fields in `changes`. `say`
    gets one line for each section whose new name drops fields of the file.

    Raises:
      ValueError: the file does not run, or a field is unknown or has the wrong type.
    """
    tree = load(config)
    from jaxreason import build  # jax is imported here, which takes a second
    from jaxreason.options import fields

    try:
        tree = fields.assign(build.layout, tree, changes, say)
    except ValueError as error:
        raise ValueError(f"{error}{option_meant(changes, str(error))}") from None
    tree = build.complete(tree)
    fields.check(build.layout(tree), tree)
    build.check_changes(tree, changes)
    made = ConfigDict(tree)
    made.lock()
    return made


def option_meant(changes: Mapping[str, str], error: str) -> str:
    """Say so if the field that an error calls unknown is an option of the file."""
    names = [path.partition(".")[0] for path in changes]
    found = next((name for name in names if name in options.OFFERED and f"field of config {name!r}" in error), None)
    return f"; {found!r} is an option of the file: --config=FILE:{found}=..." if found else ""


def load(config: str) -> dict:
    """Run a config file and return the result of its `get_config`.

    Raises:
      ValueError: the file does not run; the message names the line if the error is in
        the file.
    """
    path = find_file(config)
    _, colon, arguments = config.partition(":")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    options.OFFERED.clear()
    with options.lines_of(str(path)):
        made = runpy.run_path(str(path)).get("get_config")
        if made is not None:
            made = made(arguments) if colon else made()
    if made is None:
        raise ValueError(f"{path} has no function get_config(arg='') that returns a ConfigDict")
    if not isinstance(made, ConfigDict | dict):
        raise ValueError(f"get_config of {path} returned {type(made).__name__}; allowed: a ConfigDict")
    return made.to_dict() if isinstance(made, ConfigDict) else ConfigDict(made).to_dict()
