"""Everything that decides the next step, in one directory a run: train state, reference
policy, and the host's own state.

A checkpoint has three items: `state` (a pytree of arrays), `reference` (params, where a
phase has one) and `host` (a JSON dictionary: phase, step, source state, evaluations,
ledger). The tree of `state` depends on the phase's optimizer, so resume reads `host`
first (`peek`), builds that phase, and restores into its abstract state, onto whatever
mesh that names.

Over orbax's `CheckpointManager`: its v1 API is still under `experimental`. Saving is
asynchronous: `save` returns when the arrays are copied (donating them to the next step
is safe), and a directory gets its name only when complete, so a killed save leaves
nothing that `latest` would see. With Adam, 150,000 parameters take 10 to 50 ms to copy
and 50 to 100 more to write, on a CPU. Random keys are saved as plain uint32 data. What
goes into `host` is left to the loop.

Beside the arrays stands a fingerprint of each, made on the devices before saving and
compared after restoring: what comes back is what was there, bit for bit, on whatever
mesh, or the checkpoint is `Damaged` and says which array is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.runtime import processes
from jaxreason.runtime.workdir import free_name

# Errors of a read that say nothing of what is read: to set a checkpoint aside would be
# wrong.
NOT_THE_CHECKPOINTS = re.compile(
    r"MemoryError|RESOURCE_EXHAUSTED|[Oo]ut of memory|Cannot allocate memory|PERMISSION_DENIED|Permission denied"
    r"|Too many open files|Input/output error|Stale file handle|UNAVAILABLE|DEADLINE_EXCEEDED"
)


class Damaged(ValueError):
    """A checkpoint can't be read, or is not what was saved."""


class Checkpoints(NamedTuple):
    """The checkpoints of one run. An abstract tree has `jax.ShapeDtypeStruct` leaves,
    with the shardings to restore to.
    """

    due: Callable[[int], bool]  # (step): is a checkpoint to be saved after this many steps?
    save: Callable[..., None]  # (step, state, host, reference=None): copies, then writes in the background
    failure: Callable[[], str | None]  # why the last save failed, if it has; said once
    steps: Callable[[], list[int]]  # of the complete checkpoints, the newest first
    latest: Callable[[], int | None]  # step of the newest complete checkpoint
    gone: Callable[[], list[int]]  # steps of complete checkpoints that somebody has removed since; told once
    set_aside: Callable[[int], None]  # (step): rename a damaged one, so that it is no longer among the steps
    peek: Callable[[int], dict[str, Any]]  # (step) -> host
    restore: Callable[[int, Any], tuple[Any, dict[str, Any]]]  # (step, abstract_state) -> (state, host)
    restore_params: Callable[[int, Any], Any]  # (step, abstract_params) -> `params` of the state, and nothing else of it
    check_params: Callable[[int, Any], None]  # (step, abstract_params): raise if `restore_params` would; reads no array
    restore_reference: Callable[[int, Any], Any]  # (step, abstract_params) -> reference params
    wait: Callable[[], None]  # until all saves are complete, or have failed
    close: Callable[[], None]  # waits too; a save that fails meanwhile is told by `failure`


def open_checkpoints(
    folder: str | os.PathLike,
    *,
    keep: int = 2,  # newest checkpoints that stay
    every_steps: int = 100,  # steps between two saves; the last step of a phase is saved too
    keep_every_steps: int | None = None,  # those of every so many steps stay too; None: none
    keep_best: str | None = None,  # a suite: its best checkpoint stays too
    read_only: bool = False,
) -> Checkpoints:
    """Open the checkpoints in `folder`, of which the newest `keep` stay.

    So do those of every `keep_every_steps`-th step, and the one whose `keep_best` is
    highest: the name of a suite, of which the last evaluation at the first temperature
    counts.

    Opening to write removes what a killed save left behind, so one process (or one SPMD
    program) at a time may do so; `read_only` is for everybody else, and for one of
    several processes alone. All processes of a run must call `save`, `restore...` and
    `wait` together.

    A save that fails, for want of space or of rights, is told by `failure` and ends
    nothing: the next one is tried.

    Raises:
      ValueError: a `keep` or `every_steps` below 1, a folder that can't be written, or
        (from `restore...`) a tree that does not fit the one saved.
      Damaged: from `peek` and `restore...`.
    """
    if keep < 1 or every_steps < 1 or (keep_every_steps is not None and keep_every_steps < 1):
        raise ValueError(f"keep={keep}, every_steps={every_steps}, {keep_every_steps=}; allowed: at least 1 of each")
    folder = _absolute(folder)
    if not read_only:
        check_writable(folder)
    elif "://" not in folder and not os.path.isdir(folder):
        raise ValueError(f"no checkpoints at {folder}; give the folder `checkpoints` of a run")
    ocp = _import_orbax()
    policy = ocp.checkpoint_managers.preservation_policy
    kept = [policy.LatestN(n=keep)]
    if keep_every_steps is not None:
        kept.append(policy.EveryNSteps(keep_every_steps))
    if keep_best is not None:
        kept.append(policy.BestN(get_metric_fn=lambda metrics: metrics["best"], n=1, keep_checkpoints_without_metrics=False))
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
            save_root_metadata=not read_only,  # it has nothing in it, but all processes would wait for each other
            preservation_policy=policy.AnyPreservationPolicy(kept),
            # Else its threads wait at exit, for 5 minutes, for a folder that could not
            # be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        ),
    )

    failures: list[str] = []  # that nobody has asked for yet
    missed: set[int] = set()  # steps whose checkpoints were found to be gone
    failed: list[int] = []  # steps whose saves may have left something behind

    def attempt(step: int, function: Callable) -> None:
        try:
            function()
        except Exception as error:  # OSError, or whatever orbax and tensorstore make of it
            newest = "there is no checkpoint" if latest() is None else f"the newest checkpoint is of step {latest()}"
            failures.append(f"the save of step {step} failed: {first_line(error)}; {newest}")
            failed.append(step)

    def save(step: int, state: Any, host: dict[str, Any], reference: Any = None) -> None:
        if read_only:
            raise ValueError(f"the checkpoints at {folder} are open read_only; open them to write")
        # Through JSON and back: what can't be written fails here, and what the loop
        # changes later stays out of the checkpoint.
        host = json.loads(json.dumps(host))
        trees = {"state": state} | ({} if reference is None else {"reference": reference})
        marks = {name: fingerprints(tree) for name, tree in trees.items()}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items["host"] = ocp.args.JsonSave({"host": host, "fingerprints": marks, "crc32": checksum(host, marks)})
        metrics = None if keep_best is None else {"best": score(host, keep_best)}
        wait()  # for the save before this one, whose failure is not this one's
        sweep()
        # Without `force` orbax skips a step that is not newer than the last one,
        # silently.
        attempt(step, lambda: manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True))

    def wait() -> None:
        attempt(max(manager.all_steps(), default=0), manager.wait_until_finished)

    def sweep() -> None:
        """Remove what was written of saves that failed: it takes the space of others.

        Again and again, as threads of a failed save may write on for a while. Never
        while a save is under way.
        """
        for step in failed:
            if processes.writes() and "://" not in folder:
                shutil.rmtree(Path(folder, f"{step}.orbax-checkpoint-tmp"), ignore_errors=True)

    def is_there(step: int) -> bool:
        # The folders themselves: orbax remembers checkpoints that have been removed.
        # Only on the process that writes, since a network file system may show a new
        # folder to others late.
        return "://" in folder or not processes.writes() or Path(folder, str(step)).is_dir()

    def steps() -> list[int]:
        return sorted(filter(is_there, manager.all_steps()), reverse=True)

    def latest() -> int | None:
        return max(steps(), default=None)

    def gone() -> list[int]:
        wait()  # a save under way has no folder yet
        missing = sorted(step for step in manager.all_steps() if not is_there(step) and step not in missed)
        missed.update(missing)
        if missing and os.path.isdir(folder):
            manager.reload()
        return missing

    def damaged(step: int, what: object) -> Damaged:
        return Damaged(f"the checkpoint of step {step} at {folder} is damaged: {what}")

    def read(step: int, **items) -> Any:
        try:
            return manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            if NOT_THE_CHECKPOINTS.search(f"{type(error).__name__}: {error}"):
                raise ValueError(f"can't read the checkpoint of step {step} at {folder}: {first_line(error)}") from None
            raise damaged(step, first_line(error)) from None

    def read_host(step: int) -> dict:
        found = read(step, host=ocp.args.JsonRestore())["host"]
        if not isinstance(found, dict) or checksum(found.get("host"), found.get("fingerprints")) != found.get("crc32"):
            raise damaged(step, "host/metadata is not what was saved")
        return found

    def check_item(step: int, item: str, abstract: Any, partial: bool = False) -> None:
        """Check an item that was saved. Reads metadata alone, so one of several
        processes may call it.
        """
        try:
            metadata = manager.item_metadata(step).get(item)
            saved = None if metadata is None else _leaves(ocp.tree.to_flat_dict(metadata.tree), partial)
        except Exception as error:
            raise damaged(step, first_line(error)) from None
        if saved is None:
            raise damaged(step, f"{item} was saved, but it or its _METADATA is missing")
        _check_fit(f"{item} at step {step} of {folder}", saved, _leaves(ocp.tree.to_flat_dict(abstract), partial))

    def restore_item(step: int, item: str, abstract: Any, partial: bool = False) -> Any:
        marks = read_host(step)["fingerprints"].get(item)
        if marks is None:
            raise ValueError(f"the checkpoint of step {step} at {folder} has no {item}")
        check_item(step, item, abstract, partial)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        tree = read(step, **{item: args})[item]
        for path, mark in fingerprints(tree).items():
            cast = mark.split()[0] != marks[path].split()[0]
            if mark != marks[path] and not cast:
                raise damaged(step, f"{item}.{path} is not what was saved")
        return tree

    def close() -> None:
        attempt(max(manager.all_steps(), default=0), manager.close)
        sweep()

    def set_aside(step: int) -> None:
        if processes.writes():
            path = Path(folder, f"{step}.damaged")
            Path(folder, str(step)).rename(free_name(path) if path.exists() else path)
        processes.gather(None)  # until it is done
        manager.reload()

    return Checkpoints(
        due=lambda step: step % every_steps == 0,
        save=save,
        failure=lambda: failures.pop(0) if failures else None,
        steps=steps,
        latest=latest,
        gone=gone,
        set_aside=set_aside,
        peek=lambda step: read_host(step)["host"],
        restore=lambda step, abstract_state: (restore_item(step, "state", abstract_state), read_host(step)["host"]),
        restore_params=lambda step, abstract: restore_item(step, "state", {"params": abstract}, partial=True)["params"],
        check_params=lambda step, abstract: check_item(step, "state", {"params": abstract}, partial=True),
        restore_reference=lambda step, abstract: restore_item(step, "reference", abstract),
        wait=wait,
        close=close,
    )


def score(host: dict, suite: str) -> float:
    """The accuracy of the last evaluation of a suite at its first temperature; -inf if
    there was none.
    """
    found = [e for e in host.get("evaluations", ()) if e["suite"] == suite]
    last = [e for e in found if e["step"] == found[-1]["step"]]
    return last[0]["accuracy"] if last else -math.inf


# --- is it what was saved? ---


def checksum(*values: Any) -> int:
    """Of what JSON has."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def fingerprints(tree: Any) -> dict[str, str]:
    """Type and 32 bits of each array of a tree, by its path; the same whatever devices
    it lies on.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [".".join(_name(key) for key in path) for path, _ in flat]
    marks = jax.device_get(fingerprint([x for _, x in flat]))
    return {path: f"{np.dtype(x.dtype).name} {mark:08x}" for path, (_, x), mark in zip(paths, flat, marks, strict=True)}


@jax.jit
def fingerprint(arrays: list) -> list:
    """The sum of the bits of each entry times an odd number of its own, modulo 2^32: no
    single flipped bit leaves it as it was.

    Sums of integers are exact in any order, so sharding does not matter.
    """

    def of(x):
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")).astype(jnp.uint32)
        strides = [math.prod(bits.shape[axis + 1 :]) for axis in range(bits.ndim)]
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis, stride in enumerate(strides):
            index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return [of(jnp.asarray(x)) for x in arrays]


def _name(key) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- folders ---


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first; none where there is
    no such folder.
    """
    if not os.path.isdir(folder):
        return []
    with closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        return sorted(checkpoints.steps())


def check_writable(folder: str | os.PathLike, over: Sequence[str] = ()) -> None:
    """Make `folder` and write a file in it, so that a run fails before its first step
    and not at its first checkpoint.

    What it holds under the names `over` must be writable too.

    Raises:
      ValueError: it can't be written.
    """
    folder = _absolute(folder)
    if "://" in folder:  # object stores: orbax itself makes the folder at once
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"\n")  # a full disk lets an empty file be made
            file.flush()
    except OSError as error:
        raise ValueError(f"can't write to {folder}: {error.strerror}; make room or choose another workdir") from None
    for path in (os.path.join(folder, name) for name in over):
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise ValueError(f"can't write to {path}; make it writable, or choose another workdir")


def _leaves(flat: dict[tuple, Any], params_only: bool) -> dict[str, str]:
    """Describe each array by its path; of the params alone without their type, since
    those may be cast when restored.
    """
    leaves = {".".join(map(str, path)): leaf for path, leaf in flat.items() if hasattr(leaf, "shape")}
    if params_only:
        return {path: f"{list(leaf.shape)}" for path, leaf in leaves.items() if path.split(".")[0] == "params"}
    return {path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _check_fit(name: str, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise ValueError naming the first leaf that differs; orbax itself does so after a
    page of errors from its reader tasks.
    """
    for path in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(path, "missing"), wanted.get(path, "missing")
        if there != here:
            raise ValueError(f"{name} does not fit: {path} is {there} there and {here} here; use the config it was saved with")


def _absolute(folder: str | os.PathLike) -> str:
    folder = os.fspath(folder)
    return folder if "://" in folder else os.path.abspath(folder)


def _import_orbax():
    """Import orbax (1 s, so not with this module) and keep out of the log its some 50
    lines of information a save.

    And its 200 of a save that fails, with the same traceback five times: it raises each
    of these errors too, and we say them. Tensorstore adds one traceback for each array
    of such a save, since orbax closes the event loop at the first error.
    """
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_worth_saying)  # adding the same filter again does nothing
    logging.getLogger("asyncio").addFilter(_worth_saying)
    warnings.filterwarnings("ignore", r"coroutine '.*serialize.*' was never awaited", RuntimeWarning)  # of a save that failed
    if not getattr(sys.unraisablehook, "skips_closed_loops", False):
        sys.unraisablehook = _skip_closed_loops(sys.unraisablehook)
    return ocp


def _worth_saying(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        message = record.getMessage()
        return "exception was never retrieved" not in message or not re.search("orbax|tensorstore|OCDBT", message)
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _skip_closed_loops(show: Callable) -> Callable:
    """Return a hook that shows what cannot be raised, other than that a future of
    tensorstore found its event loop closed.
    """

    def hook(unraisable) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    hook.skips_closed_loops = True
    return hook
