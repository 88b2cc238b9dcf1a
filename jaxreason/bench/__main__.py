"""Entry point of the benchmarks: the first argument names one, the rest are its flags;
`--help` lists them.
"""

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

from jaxreason.options import unknown_name_message

BENCHMARKS = {name: f"jaxreason.bench.{name}" for name in ("sampler", "learner", "step", "lookup", "cache", "sandbox")}


def help() -> str:
    """Return one line per benchmark: the first sentence of its module docstring.
    Nothing is imported.
    """
    lines = ["python -m jaxreason.bench NAME [flags], one of:", ""]
    for name, module in BENCHMARKS.items():
        doc = ast.get_docstring(ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))) or ""
        first = re.split(r"(?<=[.?;])\s", " ".join(doc.split()))[0].rstrip(".;")
        lines.append(f"  {name.ljust(max(map(len, BENCHMARKS)))}  {first}")
    return "\n".join([*lines, "", "python -m jaxreason.bench NAME --help lists its flags."])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "-help", "--help", "--helpfull", "help"):
        print(help())
        return
    if name not in BENCHMARKS:
        sys.exit(
            f"error: {unknown_name_message('benchmark', name, BENCHMARKS)}; for example: python -m jaxreason.bench sampler --help"
        )
    sys.argv[:2] = [f"python -m jaxreason.bench {name}"]
    module = importlib.import_module(BENCHMARKS[name])
    sys.modules["__main__"].__doc__ = f"{module.__doc__}\n"  # `--help` prints it, and the flags of sys.argv[0]
    module.run()


if __name__ == "__main__":
    main()
