"""The file of a launch, by which another terminal finds it: what was asked, and what
costs money.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jaxreason.launch.gcloud import Place
from jaxreason.options import read_object, unknown_name_message

FIELDS: dict[str, dict[str, type]] = {  # of a file that can be read, by its kind
    "gpu": {"host": str, "workdir": str},
    "tpu": {"place": dict, "type": str, "step": str, "workdir": str, "delete": list},
}


def folder() -> Path:
    """Return the folder of all launches: `$XDG_STATE_HOME/jaxreason/launches`."""
    root = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(root) / "jaxreason" / "launches"


def write(name: str, values: dict[str, Any]) -> Path:
    """Write the file of a launch, atomically."""
    path = folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(part, path)
    return path


def read(name: str) -> dict[str, Any]:
    """Read the file of a launch.

    Raises:
      ValueError: there is none, and the message lists those that there are; or it is
        damaged.
    """
    path = folder() / f"{name}.json"
    if not path.is_file():
        raise ValueError(unknown_name_message("launch", name, names()))
    found = read_object(path)
    try:
        missing = [field for field, kind in FIELDS[found.get("kind")].items() if not isinstance(found.get(field), kind)]
        Place(**found.get("place", {"name": "", "zone": ""}))
    except (KeyError, TypeError):
        missing = ["kind or place"]
    if missing:
        raise ValueError(f"{path} has no {missing[0]} of a launch; it is damaged: remove it, and look with gcloud at what runs")
    return found


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.json"))


def forget(name: str) -> None:
    (folder() / f"{name}.json").unlink(missing_ok=True)
