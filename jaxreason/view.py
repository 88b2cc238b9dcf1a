"""Entry point: `python -m jaxreason.view RUN [--out=FILE.html] [--max_mb=20]` writes a
page of a run's rollouts, or of an evaluation's: one file that needs no network.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from absl import app, flags, logging

OUT = flags.DEFINE_string("out", None, "The file. Default: view.html in the folder.")
MAX_MB = flags.DEFINE_float("max_mb", 20.0, "Size of the rollouts in the file, at most, in MB.", lower_bound=0.001)


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    from jaxreason.look.runs import folder_of
    from jaxreason.look.view import make_view

    try:
        if len(argv) != 2:
            raise ValueError(f"got {len(argv) - 1} folders; needed: python -m jaxreason.view RUN")
        if not math.isfinite(MAX_MB.value):
            raise ValueError(f"--max_mb got {MAX_MB.value}; allowed: a finite number of at least 0.001")
        folder = folder_of(argv[1])
        html, notes = make_view(folder, int(MAX_MB.value * 1e6))
        out = folder / "view.html" if OUT.value is None else Path(os.path.expanduser(OUT.value))
        out.write_text(html, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {out}")


def parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
