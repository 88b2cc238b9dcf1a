r"""Draw a metric over the steps of a phase, one curve per group of runs, as a PNG file.

    python -m jaxreason.look.curves --out=tiny.png --phase=rl \
        --metric=eval/chain/greedy/accuracy 'prior, then RL=runs/seed*' \
        'random reward=runs/random' 'no prior=runs/noprior'

Each argument is LABEL=GLOB of run folders. A curve is the mean over the runs of a
group; its band spans the lowest to the highest run. Steps count from the start of the
phase; the value at step 0 is the last one before the phase. Needs matplotlib (`pip
install -e '.[look]'`).
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from jaxreason.look.figures import draw, read_curve
from jaxreason.options import command


def read_groups(arguments: Sequence[str], metric: str, phase: str | None) -> dict[str, list[dict[int, float]]]:
    """Read the curves that LABEL=GLOB arguments name: label -> one curve per run.

    Raises:
      ValueError: an argument of another form, or a run without the metric.
      FileNotFoundError: an argument that no run matches.
    """
    groups = {}
    for argument in arguments:
        label, separator, pattern = argument.partition("=")
        if not separator:
            raise ValueError(f"got the argument {argument!r}; allowed: LABEL=GLOB of run folders")
        runs = sorted(path for path in glob.glob(os.path.expanduser(pattern)) if Path(path, "metrics.jsonl").is_file())
        if not runs:
            raise FileNotFoundError(f"no run folder matches {pattern!r}; a run folder holds metrics.jsonl")
        groups[label] = [read_curve(Path(run), metric, phase) for run in runs]
    return groups


def main(argv) -> None:
    options = flags.FLAGS
    try:
        if len(argv) < 2 or options.metric is None or options.out is None:
            raise ValueError("needed: --out=FILE.png, --metric=NAME and one or more LABEL=GLOB; see --help")
        groups = read_groups(argv[1:], options.metric, options.phase)
        xlabel = f"updates of phase {options.phase}" if options.phase else "updates"
        draw(groups, options.metric, xlabel, Path(os.path.expanduser(options.out)))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install -e '.[look]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "PNG file to write.")
    flags.DEFINE_string("metric", None, "Name in metrics.jsonl, as eval/chain/greedy/accuracy.")
    flags.DEFINE_string("phase", None, "Draw this phase only, and count steps from its start.")
    logging.set_verbosity(logging.WARNING)  # at INFO matplotlib reports its search for fonts
    app.run(main, flags_parser=command.parse_or_exit)
