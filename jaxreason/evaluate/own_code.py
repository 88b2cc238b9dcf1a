"""The user's own code in an evaluation: verifiers and tasks that are named
`module:maker`. Verdicts of two versions of it must not be mixed.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jaxreason

PACKAGE = Path(jaxreason.__file__).parent
LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


NAMING = ("name", "maker", "action", "show", "trace", "tools")  # fields that may name a user's function


def own_names(suites: Iterable[Mapping], verifier: Mapping, environment: Mapping | None = None) -> set[str]:
    """Return the names in sections of suites that refer to the user's own code;
    `verifier` and `environment` are the sections for suites without one.
    """
    defaults = {"verifier": verifier, "environment": environment}
    return {name for suite in suites for name in names_in({**defaults, **{k: v for k, v in suite.items() if v is not None}})}


def names_in(value: object) -> Iterator[str]:
    """Yield the names `module:function` in a section and in those within it."""
    # Sections are checked later, when suites are loaded, so a value may be anything.
    if isinstance(value, Mapping):
        for field, inner in value.items():
            if field in NAMING:
                yield from (
                    one for one in (inner if isinstance(inner, list | tuple) else (inner,)) if isinstance(one, str) and ":" in one
                )
            yield from names_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from names_in(inner)


def digest_sources(names: Iterable[str]) -> dict[str, str]:
    """Digest the source files behind names `module:maker`: module -> digest.

    These are the files of the named modules, and of all that they import, also inside
    functions, from the same package or from outside the installed libraries. Libraries
    count by their versions, and data that a verifier reads does not count.
    """
    found: dict[str, str] = {}
    left = [(module, module.partition(".")[0]) for module in sorted(name.partition(":")[0] for name in names)]
    seen = set(left)
    while left:
        module, package = left.pop()
        file = locate(module)
        if file is None or PACKAGE in file.parents or not (is_own(file) or module.partition(".")[0] == package):
            continue
        found[module] = hashlib.sha256(file.read_bytes()).hexdigest()[:10]
        new = {(imported, package) for imported in imports(file, module)} - seen
        seen |= new
        left += sorted(new)
    return dict(sorted(found.items()))


def is_own(file: Path) -> bool:
    return not any(library in file.parents for library in LIBRARIES)


def locate(module: str) -> Path | None:
    """Find the file of a module without importing anything; None for a module without a
    file.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    places: list[str] | None = None
    parts = module.split(".")
    for i in range(len(parts)) if file is None and all(parts) else ():
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: i + 1]), places)
        if spec is None:
            return None
        file, places = spec.origin, spec.submodule_search_locations
    return Path(file) if file is not None and Path(file).is_file() else None


def imports(file: Path, module: str) -> Iterator[str]:
    """Yield the modules that a source file may import: of `from a import b`, a and
    a.b.
    """
    if file.suffix != ".py":
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # whoever imports it gets the error
        return
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with contextlib.suppress(ImportError):  # beyond the top package: the import fails as well
                    base = importlib.util.resolve_name("." * node.level + base, package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in filter(None, names):
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
