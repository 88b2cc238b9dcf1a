"""Layers of the package: a module imports from its own layer or a lower one, never from
a higher one or in a circle. Heavy or rare imports stay where they belong.
"""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A folder is one thing here. A new module gets its floor in this table (and in the tree
# of the README).
FLOORS = (
    "types options options.fields runtime",
    "runtime.bucket runtime.workdir runtime.mirror runtime.files runtime.terminal runtime.live runtime.trackers runtime.log"
    " runtime.hub runtime.processes runtime.compiling runtime.memory runtime.energy runtime.peak runtime.alarms"
    " runtime.profile sandbox",
    "platforms chips model text tasks verify tools objectives estimators sharding optimizer data draw metrics cost"
    " runtime.checkpoint",
    "learner sampler logp teacher environment batching runtime.warm_start runtime.ledger",
    "rollout sources runtime.preemption",
    "evaluation recovery runtime.resume runtime.journal look.figures look.page look.runs look.comparison",
    "launch.shell launch.machines",
    "launch.fleets",
    "build train options.command look.chart look.report_charts look.report_tables look.paired look.report look.view",
    "launch.gcloud launch.launch launch.remote launch.source launch.state launch.target launch.write",
    "main evaluate generate play report view api export sweep launch launch.__main__ plan bench look look.curves lab __main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
DOORS = FLOORS[-1].split()
FILES = sorted((ROOT / "jaxreason").rglob("*.py"))


def module(path: Path) -> str:
    """jaxreason/model/layers.py -> jaxreason.model.layers."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the full names of a file's imports, also inside functions; for a name from
    one of our modules, the module.
    """
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def room(name: str) -> str:
    """Return the layer of a module: jaxreason.model.layers -> model. The files of
    runtime/, options/, look/ and launch/ have layers of their own.
    """
    parts = name.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] in ("runtime", "options", "look", "launch") else parts[0]


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("jaxreason.")}


def test_every_module_has_a_floor():
    missing = {room(name) for name in MODULES if name != "jaxreason"} - FLOOR.keys()
    assert not missing, f"give {sorted(missing)} a floor in FLOORS"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_never_go_up(path):
    for name in ours(path):
        here, there = room(module(path)), room(name)
        assert FLOOR[there] <= FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"
        assert there == here or there not in DOORS, f"{here} imports {there}, but nothing imports a door"


def test_imports_never_go_in_a_circle():
    rooms = {name: set() for name in FLOOR}
    for name, path in MODULES.items():
        if name != "jaxreason":
            rooms[room(name)] |= {room(other) for other in ours(path)} - {room(name)}
    order = list(TopologicalSorter(rooms).static_order())  # raises CycleError, which names the circle
    assert set(order) >= set(rooms)


def users(library: str) -> set[str]:
    return {module(path) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}


def test_only_the_model_imports_flax():
    assert users("flax")
    assert all(room(name) == "model" for name in users("flax"))


def test_config_dicts_stop_at_the_doors():
    allowed = {name for name in MODULES if name != "jaxreason" and room(name) in ("build", "options.command", *DOORS)}
    assert users("ml_collections") <= allowed
    for name, path in MODULES.items():
        if name not in allowed:
            assert not re.search(r"\bConfigDict\b", path.read_text()), f"{name} speaks of ConfigDict: take plain arguments"


@pytest.mark.parametrize("library", ["torch", "tensorflow", "transformers"])
def test_no_heavy_library_is_imported(library):
    assert not users(library)


def test_the_base_install_is_light():
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in base}
    assert not names & {"torch", "tensorflow", "transformers"}


def test_extras_are_imported_where_they_are_used():
    rare = {
        "wandb",
        "trackio",
        "matplotlib",
        "reasoning_gym",
        "math_verify",
        "tensorflow_datasets",
        "optuna",
        "submitit",
        "mcp",
        "codecarbon",
        "pynvml",
    }
    for path in FILES:
        top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert not top & rare, f"{module(path)} imports {top & rare} when it is loaded; import it in the function that needs it"


def test_a_test_file_imports_no_other_test_file():
    for path in (ROOT / "tests").glob("test_*.py"):
        found = {name for name in imports(path) if name.startswith("test_")}
        assert not found, f"{path.name} imports {found}; move what they share to tests/runs.py"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_door_opens_without_jax():
    """`--help` and mistyped flags do not import jax, which would wait for an
    accelerator.
    """
    assert not loaded_by("import jaxreason.main") & {"jax", "jaxlib", "flax", "tensorflow", "torch", "orbax", "grain"}


def test_the_whole_house_loads_nothing_heavy():
    loaded = loaded_by("import jaxreason.build, jaxreason.train")
    assert "jax" in loaded
    assert not loaded & {"torch", "tensorflow", "transformers", "tensorflow_datasets", "wandb", "trackio", "matplotlib", "grain"}
