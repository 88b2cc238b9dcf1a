"""Entry point: `python -m jaxreason.report RUN [RUN...] [--out=FILE.html] [--png]`
writes one self-contained page about runs.

It has their learning curves, accuracies with intervals and paired tests, times, costs,
configs and versions. Runs that differ only in their seed become one line with a band.
The page of one run is RUN/report.html, that of several report.html in the working
directory. Training writes it at the end (`config.log.report`). `--png` also writes
each chart as a PNG file beside the page, which needs matplotlib (`pip install -e
'.[look]'`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags, logging

from jaxreason.options import command


def default_out(runs: list[Path]) -> Path:
    return runs[0] / "report.html" if len(runs) == 1 else Path("report.html")


def main(argv) -> None:
    from jaxreason.look.report import write_report
    from jaxreason.look.runs import folder_of

    options = flags.FLAGS
    try:
        runs = list(dict.fromkeys(folder_of(word) for word in argv[1:]))
        if not runs:
            raise ValueError("needed: one or more folders of runs: python -m jaxreason.report RUN [RUN...]")
        out = Path(os.path.expanduser(options.out)) if options.out else default_out(runs)
        if out.suffix not in (".html", ".htm"):
            raise ValueError(f"--out got {str(out)!r}; allowed: the name of a file that ends in .html")
        written = write_report(runs, out, png=options.png)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install -e '.[look]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "HTML file to write. Default: RUN/report.html, or report.html for several runs.")
    flags.DEFINE_boolean("png", False, "Also write each chart as a PNG file.")
    logging.set_verbosity(logging.WARNING)  # at INFO matplotlib reports its search for fonts
    app.run(main, flags_parser=command.parse_or_exit)
