r"""An entry point: serve the lab to an MCP host, over stdin and stdout.

    python -m jaxreason.lab --budget=flops=2e15[,device_s=3600][,joules=1e6] \
        [--folder=sweeps/lab]

A host starts it itself, by an entry such as

    {"command": "python", "args": ["-m", "jaxreason.lab", "--budget=flops=2e15"]}

The folder keeps the audit log, which is the ledger of the budget, and the sweeps. The
same folder with another budget continues, and costs stay spent. A sweep that runs
continues when the host ends.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from absl import app, flags, logging

import jaxreason
from jaxreason.lab import budget

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("budget", None, "What all sweeps may use: flops=, device_s= or joules=AMOUNT, several with commas.")
    flags.DEFINE_string("folder", None, "Folder of the audit log and the sweeps. Default: sweeps/lab of the repository.")


def find_root() -> Path:
    """Return the folder of the repository that this package is part of.

    Raises:
      ValueError: the package is installed without its repository.
    """
    root = Path(jaxreason.__file__).resolve().parents[1]
    if not ((root / "configs").is_dir() and (root / "experiments").is_dir() and (root / "pyproject.toml").is_file()):
        raise ValueError(
            f"jaxreason is installed in {root}, without configs/ and experiments/; needed: a checkout of the repository, "
            "installed by `pip install -e '.[lab]'` in it"
        )
    return root


def serve() -> None:
    """Check the budget and the folder, and serve until the host closes stdin."""
    amounts = budget.parse(FLAGS.budget)
    root = find_root()
    if importlib.util.find_spec("mcp") is None:
        raise ValueError("mcp is not installed; pip install 'jaxreason[lab]'")
    from jaxreason.lab.server import make_server
    from jaxreason.lab.sweeps import Lab
    from jaxreason.runtime import workdir

    folder = Path(os.path.expanduser(FLAGS.folder)).resolve() if FLAGS.folder else root / "sweeps" / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    release = workdir.lock(folder, lambda line: print(line, file=sys.stderr), "--folder")
    try:
        server = make_server(Lab(root, folder, amounts))
        print(f"lab: {folder}, budget {FLAGS.budget}", file=sys.stderr, flush=True)
        server.run("stdio")
    finally:
        release()


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"got the words {' '.join(argv[1:])!r}; all that the lab takes are flags, see --help")
        serve()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
