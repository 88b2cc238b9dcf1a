"""The door of the benchmarks: the first word says which, the rest are its flags."""

import importlib
import sys

from jaxreason.options import unknown

BENCHMARKS = {name: f"jaxreason.bench.{name}" for name in ("sampler", "learner", "step", "lookup", "cache")}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        sys.exit(f"error: {unknown('benchmark', name, BENCHMARKS)}; for example: python -m jaxreason.bench sampler --help")
    sys.argv[:2] = [f"python -m jaxreason.bench {name}"]
    importlib.import_module(BENCHMARKS[name]).run()


if __name__ == "__main__":
    main()
