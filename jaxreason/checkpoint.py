"""Everything that decides the next step, in one directory a run: train state, reference policy, and the host's own state.

A checkpoint has three items: `state` (a pytree of arrays), `reference` (params, where a phase has one) and `host` (a JSON
dictionary: phase, step, source state, evaluations, ledger). The tree of `state` depends on the phase's optimizer, so resume
reads `host` first (`peek`), builds that phase, and restores into its abstract state, onto whatever mesh that names.

Over orbax's `CheckpointManager`: its v1 API is still under `experimental`. Saving is asynchronous: `save` returns when the
arrays are copied (donating them to the next step is safe), and a directory gets its name only when complete, so a killed save
leaves nothing that `latest` would see. With Adam, 150,000 parameters take 10 to 50 ms to copy and 50 to 100 more to write, on
a CPU. Random keys are saved as plain uint32 data. What goes into `host` is left to the loop.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np


class Checkpoints(NamedTuple):
    """The checkpoints of one run. An abstract tree has `jax.ShapeDtypeStruct` leaves, with the shardings to restore to."""

    due: Callable[[int], bool]  # (step): is a checkpoint to be saved after this many steps?
    save: Callable[..., None]  # (step, state, host, reference=None): copies, then writes in the background
    latest: Callable[[], int | None]  # step of the newest complete checkpoint
    steps: Callable[[], list[int]]  # of all complete checkpoints, oldest first
    peek: Callable[[int], dict[str, Any]]  # (step) -> host
    restore: Callable[[int, Any], tuple[Any, dict[str, Any]]]  # (step, abstract_state) -> (state, host)
    restore_params: Callable[[int, Any], Any]  # (step, abstract_params) -> `params` of the state, and nothing else of it
    check_params: Callable[[int, Any], None]  # (step, abstract_params): raise if `restore_params` would; reads no array
    restore_reference: Callable[[int, Any], Any]  # (step, abstract_params) -> reference params
    wait: Callable[[], None]  # until all saves are complete; raises what a save in the background raised
    close: Callable[[], None]  # waits too


def open_checkpoints(folder: str | os.PathLike, *, keep: int = 2, every_steps: int = 100, read_only: bool = False) -> Checkpoints:
    """Open the checkpoints in `folder`, of which the newest `keep` stay.

    Opening to write removes what a killed save left behind, so one process (or one SPMD program) at a time may do so; `read_only`
    is for everybody else. All processes of a run must call `save`, `restore...` and `wait` together.

    Raises:
      ValueError: a `keep` or `every_steps` below 1, a folder that can't be written, or (from `restore...`) a tree that does not
        fit the one saved.
    """
    if keep < 1 or every_steps < 1:
        raise ValueError(f"keep={keep}, every_steps={every_steps}; allowed: at least 1 of each")
    folder = _absolute(folder)
    if not read_only:
        check_writable(folder)
    elif "://" not in folder and not os.path.isdir(folder):
        raise ValueError(f"no checkpoints at {folder}; give the folder `checkpoints` of a run")
    ocp = _import_orbax()
    manager = ocp.CheckpointManager(
        folder,
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "reference": ocp.PyTreeCheckpointHandler(),
            "host": ocp.JsonCheckpointHandler(),
        },
        # orbax's own `read_only` warns at each opening; `save` below refuses instead.
        options=ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=ocp.checkpoint_managers.preservation_policy.LatestN(n=keep),
        ),
    )

    def save(step: int, state: Any, host: dict[str, Any], reference: Any = None) -> None:
        if read_only:
            raise ValueError(f"the checkpoints at {folder} are open read_only; open them to write")
        # Through JSON and back: what can't be written fails here, and what the loop changes later stays out of the checkpoint.
        items = {"state": ocp.args.PyTreeSave(state), "host": ocp.args.JsonSave(json.loads(json.dumps(host)))}
        if reference is not None:
            items["reference"] = ocp.args.PyTreeSave(reference)
        # Without `force` orbax skips a step that is not newer than the last one, silently.
        manager.save(step, args=ocp.args.Composite(**items), force=True)

    def check_item(step: int, item: str, abstract: Any, partial: bool = False) -> None:
        metadata = manager.item_metadata(step)
        if item not in metadata or metadata[item] is None:
            raise ValueError(f"the checkpoint of step {step} at {folder} has no {item}")
        saved, wanted = (_leaves(ocp.tree.to_flat_dict(tree), partial) for tree in (metadata[item].tree, abstract))
        _check_fit(f"{item} at step {step} of {folder}", saved, wanted)

    def restore_item(step: int, item: str, abstract: Any, partial: bool = False) -> Any:
        check_item(step, item, abstract, partial)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        return manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def peek(step: int) -> dict[str, Any]:
        return manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]

    return Checkpoints(
        due=lambda step: step % every_steps == 0,
        save=save,
        latest=manager.latest_step,
        steps=lambda: sorted(manager.all_steps()),
        peek=peek,
        restore=lambda step, abstract_state: (restore_item(step, "state", abstract_state), peek(step)),
        restore_params=lambda step, abstract: restore_item(step, "state", {"params": abstract}, partial=True)["params"],
        check_params=lambda step, abstract: check_item(step, "state", {"params": abstract}, partial=True),
        restore_reference=lambda step, abstract: restore_item(step, "reference", abstract),
        wait=manager.wait_until_finished,
        close=manager.close,
    )


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        return checkpoints.steps()


def check_writable(folder: str | os.PathLike) -> None:
    """Make `folder` and write a file in it, so that a run fails before its first step and not at its first checkpoint."""
    folder = _absolute(folder)
    if "://" in folder:  # object stores: orbax itself makes the folder at once
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"can't write to {folder}: {error.strerror}; choose another workdir") from None


def _leaves(flat: dict[tuple, Any], params_only: bool) -> dict[str, str]:
    """Describe each array by its path; of the params alone without their type, since those may be cast when restored."""
    leaves = {".".join(map(str, path)): leaf for path, leaf in flat.items() if hasattr(leaf, "shape")}
    if params_only:
        return {path: f"{list(leaf.shape)}" for path, leaf in leaves.items() if path.split(".")[0] == "params"}
    return {path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _check_fit(name: str, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise ValueError naming the first leaf that differs; orbax itself does so after a page of errors from its reader tasks."""
    for path in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(path, "missing"), wanted.get(path, "missing")
        if there != here:
            raise ValueError(f"{name} does not fit: {path} is {there} there and {here} here; use the config it was saved with")


def _absolute(folder: str | os.PathLike) -> str:
    folder = os.fspath(folder)
    return folder if "://" in folder else os.path.abspath(folder)


def _import_orbax():
    """Import orbax (1 s, so not with this module) and keep its some 50 lines of information a save out of the log."""
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_not_orbax_info)  # adding the same filter again does nothing
    return ocp


def _not_orbax_info(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname
