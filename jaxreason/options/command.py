"""A config from the words of a command, read alike by every entry point that takes one.

    --config=configs/tiny.py:task=countdown,smoke --config.rl.optimizer.lr=1e-4

The file is run, fields named by the words are set, and all others are added with their
defaults (see `fields`, `build.layout`), so any field can be named, whether the file has
it or not. `None` unsets a field, `(1, 2)` or `1,2` is a tuple, a section is a Python
dictionary. A folder of the config's is where a user's own modules are found.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from jaxreason import options

FLAGS = flags.FLAGS


class Words(NamedTuple):
    """The words of a command about its config, and the other words."""

    config: str | None  # FILE, or FILE:OPTIONS
    changes: dict[str, str]  # fields by their full names, without the first word `config`
    rest: list[str]


def define(help: str) -> flags.FlagHolder:
    """Define the flag `--config`, whose value `parse` makes the whole config."""
    return flags.DEFINE_string("config", None, help)


def split(argv: list[str]) -> Words:
    """Take `--config=FILE` and `--config.FIELD=VALUE` out of a command's words.

    Raises:
      ValueError: several files, or a word without its value.
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
    """Parse flags, and give the flag `config` the whole config; return the words that
    are no flags.

    Raises:
      ValueError, flags.Error, OSError: anything wrong, in one line.
    """
    words = split(argv)
    if words.config is not None:
        find_file(words.config)  # before anything that takes time
    rest = FLAGS(words.rest)
    if words.config is None and words.changes:
        raise ValueError(f"--config.{next(iter(words.changes))} is given and no --config=FILE")
    if words.config is not None:
        FLAGS["config"].value = read(words.config, words.changes, say=functools.partial(print, file=sys.stderr))
        FLAGS["config"].config_filename, FLAGS["config"].config_changes = words.config, words.changes
    return rest


def parse_or_exit(argv: list[str]) -> list[str]:
    """Parse flags as `parse` does; end with one line where something is wrong."""
    try:
        return parse(argv)
    except (flags.Error, ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def find_file(config: str) -> Path:
    """The file of FILE:OPTIONS."""
    path = Path(os.path.expanduser(config.partition(":")[0]))
    name = config.partition(":")[0]
    if name and path.is_dir():
        raise ValueError(f"--config got the folder {name!r}; allowed: a file, as configs/tiny.py")
    if not name or not path.is_file():
        raise ValueError(f"no config file {name!r}; configs are in configs/, options follow a colon: configs/tiny.py:smoke")
    return path


def read(config: str, changes: dict[str, str], say: Callable[[str], None] = print) -> ConfigDict:
    """Read the whole config of FILE:OPTIONS, with some of its fields changed; `say`
    gets a line about each section whose new name drops fields of the file.

    Raises:
      ValueError: the file does not run, or a field that there is not or is not of its
        type.
    """
    tree = load(config)
    from jaxreason import build  # jax is imported here, which takes a second
    from jaxreason.options import fields

    tree = fields.assign(build.layout, tree, changes, say)
    tree = build.complete(tree)
    fields.check(build.layout(tree), tree)
    build.check_changes(tree, changes)
    made = ConfigDict(tree)
    made.lock()
    return made


def load(config: str) -> dict:
    """Run a config file and return what its `get_config` gives.

    Raises:
      ValueError: it does not run; where an error is the file's own, its line is said.
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
