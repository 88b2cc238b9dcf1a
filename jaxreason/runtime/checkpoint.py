"""Checkpoints of a run: everything that determines the next step, saved under one
folder.

A checkpoint has three items: `state` (a pytree of arrays), `reference` (params, if the
phase has a reference policy) and `host` (a JSON dictionary: phase, step, source state,
evaluations, ledger). The tree of `state` depends on the phase's optimizer. Resume
therefore reads `host` first (`peek`), builds that phase, and restores `state` into the
phase's abstract state, onto any mesh. The training loop decides what `host` contains.

This module wraps orbax's `CheckpointManager`; orbax's v1 API is still under
`experimental`. Saving is asynchronous: `save` returns once the arrays are copied, so
donating them to the next step is safe. A folder gets its final name only when it is
complete, so `latest` never sees a save that was killed. Random keys are saved as plain
uint32 data. `jaxreason/runtime/README.md` lists the cost of saves.

Each array has a fingerprint, which is computed on the devices before saving and again
after restoring. If they differ, the restore raises `Damaged`, which names the array. A
restored array thus equals the saved one bit for bit, on any mesh, unless the restore
casts it.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.runtime import processes
from jaxreason.runtime.bucket import is_url, remote
from jaxreason.runtime.workdir import free_name

# Read errors that are not the checkpoint's fault: a checkpoint must not be set aside
# for one of these.
NOT_THE_CHECKPOINTS = re.compile(
    r"MemoryError|RESOURCE_EXHAUSTED|[Oo]ut of memory|Cannot allocate memory|PERMISSION_DENIED|Permission denied"
    r"|Too many open files|Input/output error|Stale file handle|UNAVAILABLE|DEADLINE_EXCEEDED"
)


class Damaged(ValueError):
    """A checkpoint that can't be read, or that differs from what was saved."""


class Checkpoints:
    """The checkpoints of one run. The leaves of an abstract tree are
    `jax.ShapeDtypeStruct`s, with the shardings to restore to.
    """

    def __init__(self, folder: str, ocp, manager, *, every_steps: int, keep_best: str | None, read_only: bool, before_save):
        self.folder, self.ocp, self.manager, self.before_save = folder, ocp, manager, before_save
        self.every_steps, self.keep_best, self.read_only = every_steps, keep_best, read_only
        self.failures: list[str] = []  # failed saves that `failure` has not returned yet
        self.missed: set[int] = set()  # steps whose checkpoints `gone` has already reported
        self.failed: list[int] = []  # steps of failed saves, which may have left files

    # --- saving ---

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this many steps."""
        return step % self.every_steps == 0

    def save(self, step: int, state: Any, host: dict[str, Any], reference: Any = None) -> None:
        """Copy the state, and write it in the background."""
        if self.read_only:
            raise ValueError(f"the checkpoints at {self.folder} are open read_only; open them to write")
        ocp = self.ocp
        # A round trip through JSON raises here for values that JSON lacks, and protects
        # the checkpoint from later changes by the loop.
        host = json.loads(json.dumps(host))
        trees = {"state": state} | ({} if reference is None else {"reference": reference})
        marks = {name: fingerprints(tree) for name, tree in trees.items()}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items["host"] = ocp.args.JsonSave({"host": host, "fingerprints": marks, "crc32": checksum(host, marks)})
        metrics = None if self.keep_best is None else {"best": score(host, self.keep_best)}
        self.wait()  # for the previous save: its failure must not be reported as this one's
        self.sweep()

        def save() -> None:
            if self.before_save is not None:
                processes.on_all_processes(self.before_save)
            # Without `force`, orbax silently skips a step that is not newer than the
            # last one.
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

        self.attempt(step, save)

    def wait(self) -> None:
        """Wait until all saves have completed or failed."""
        self.attempt(max(self.manager.all_steps(), default=0), self.manager.wait_until_finished)

    def close(self) -> None:
        """Wait for the saves, then close; `failure` reports a save that fails
        meanwhile.
        """
        self.attempt(max(self.manager.all_steps(), default=0), self.manager.close)
        self.sweep()

    def failure(self) -> str | None:
        """Return why the last save failed, or None. Each failure is returned once."""
        return self.failures.pop(0) if self.failures else None

    def attempt(self, step: int, function: Callable) -> None:
        try:
            function()
        except Exception as error:  # orbax and tensorstore also wrap OSError in other types
            latest = self.latest()
            newest = "there is no checkpoint" if latest is None else f"the newest checkpoint is of step {latest}"
            self.failures.append(f"the save of step {step} failed: {first_line(error)}; {newest}")
            self.failed.append(step)

    def sweep(self) -> None:
        """Remove the unfinished files of failed saves, which take space from later
        ones.

        This runs before each save and at the end, since threads of a failed save may
        keep writing for a while. Never call it during a save.
        """
        for step in self.failed:
            if processes.writes() and "://" not in self.folder:
                shutil.rmtree(Path(self.folder, f"{step}.orbax-checkpoint-tmp"), ignore_errors=True)

    # --- existing checkpoints ---

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        return sorted(filter(self.is_there, self.manager.all_steps()), reverse=True)

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def gone(self) -> list[int]:
        """Return the steps of complete checkpoints that somebody has removed. Each step
        is returned once.
        """
        self.wait()  # an unfinished save has no folder yet
        missing = sorted(s for s in self.manager.all_steps() if not self.is_there(s) and s not in self.missed)
        self.missed.update(missing)
        if missing and os.path.isdir(self.folder):
            self.manager.reload()
        return missing

    def is_there(self, step: int) -> bool:
        # Look at the folders, since orbax still lists checkpoints that have been
        # removed. Only the process that writes looks: a network file system may show a
        # new folder late to the other processes.
        return "://" in self.folder or not processes.writes() or Path(self.folder, str(step)).is_dir()

    def set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint so that `steps` no longer lists it."""
        if processes.writes():
            path = path_of(self.folder) / f"{step}.damaged"
            (path_of(self.folder) / str(step)).rename(free_name(path) if path.exists() else path)
        processes.gather(None)  # a barrier: no process continues before the rename
        self.manager.reload()

    # --- restoring ---

    def peek(self, step: int) -> dict[str, Any]:
        """Read the `host` item."""
        return self.read_host(step)["host"]

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Read the `state` and `host` items."""
        return self.restore_item(step, "state", abstract_state), self.peek(step)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Read only the params of the `state` item."""
        return self.restore_item(step, "state", {"params": abstract_params}, partial=True)["params"]

    def check_params(self, step: int, abstract_params: Any) -> None:
        """Raise if `restore_params` would. Reads no array."""
        self.check_item(step, "state", {"params": abstract_params}, partial=True)

    def restore_reference(self, step: int, abstract_params: Any) -> Any:
        """Read the `reference` item."""
        return self.restore_item(step, "reference", abstract_params)

    def damaged(self, step: int, what: object) -> Damaged:
        return Damaged(f"the checkpoint of step {step} at {self.folder} is damaged: {what}")

    def read(self, step: int, **items) -> Any:
        try:
            return self.manager.restore(step, args=self.ocp.args.Composite(**items))
        except Exception as error:
            if NOT_THE_CHECKPOINTS.search(f"{type(error).__name__}: {error}"):
                raise ValueError(f"can't read the checkpoint of step {step} at {self.folder}: {first_line(error)}") from None
            raise self.damaged(step, first_line(error)) from None

    def read_host(self, step: int) -> dict:
        found = self.read(step, host=self.ocp.args.JsonRestore())["host"]
        if not isinstance(found, dict) or checksum(found.get("host"), found.get("fingerprints")) != found.get("crc32"):
            raise self.damaged(step, "host/metadata is not what was saved")
        return found

    def check_item(self, step: int, item: str, abstract: Any, partial: bool = False) -> None:
        """Check that an item was saved and fits the abstract tree. Reads only metadata,
        so one process of several may call it alone.
        """
        ocp = self.ocp
        try:
            metadata = self.manager.item_metadata(step).get(item)
            saved = None if metadata is None else _leaves(ocp.tree.to_flat_dict(metadata.tree), partial)
        except Exception as error:
            raise self.damaged(step, first_line(error)) from None
        if saved is None:
            raise self.damaged(step, f"{item} was saved, but it or its _METADATA is missing")
        _check_fit(f"{item} at step {step} of {self.folder}", saved, _leaves(ocp.tree.to_flat_dict(abstract), partial))

    def restore_item(self, step: int, item: str, abstract: Any, partial: bool = False) -> Any:
        marks = self.read_host(step)["fingerprints"].get(item)
        if marks is None:
            raise ValueError(f"the checkpoint of step {step} at {self.folder} has no {item}")
        self.check_item(step, item, abstract, partial)
        ocp = self.ocp
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        tree = self.read(step, **{item: args})[item]
        for path, mark in fingerprints(tree).items():
            cast = mark.split()[0] != marks[path].split()[0]
            if mark != marks[path] and not cast:
                raise self.damaged(step, f"{item}.{path} is not what was saved")
        return tree


def open_checkpoints(
    folder: str | os.PathLike,
    *,
    keep: int = 2,  # number of newest checkpoints to keep
    every_steps: int = 100,  # steps between saves; the last step of a phase is always saved
    keep_every_steps: int | None = None,  # also keep checkpoints whose step is a multiple of this; None: none
    keep_best: str | None = None,  # name of a suite, whose best checkpoint is kept too
    read_only: bool = False,
    before_save: Callable[[], None] | None = None,  # called before each save, which fails if it raises OSError
) -> Checkpoints:
    """Open the checkpoints in `folder`.

    The newest `keep` checkpoints stay. Those at every `keep_every_steps`-th step stay
    too, and so does the best one for the suite `keep_best`, by its accuracy at the
    first temperature in its last evaluation.

    Opening for writing removes the files of killed saves, so only one process (or one
    SPMD program) at a time may do it. Any other reader passes `read_only`, including
    one process of a run that opens the folder alone. All processes of a run must call
    `save`, `restore...` and `wait` together.

    A save that fails, for lack of space or permission, doesn't raise: `failure` reports
    it, and the next save is attempted as usual.

    Raises:
      ValueError: `keep`, `every_steps` or `keep_every_steps` is below 1, the folder
        can't be written, or (from `restore...`) the tree does not fit the saved one.
      Damaged: from `peek` and `restore...`.
    """
    if keep < 1 or every_steps < 1 or (keep_every_steps is not None and keep_every_steps < 1):
        raise ValueError(f"keep={keep}, every_steps={every_steps}, {keep_every_steps=}; allowed: at least 1 of each")
    folder = _absolute(folder)
    if not read_only:
        check_writable(folder)
    elif not path_of(folder).is_dir():
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
        # orbax's own `read_only` warns at each opening; `Checkpoints.save` raises
        # instead.
        options=ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            save_root_metadata=not read_only,  # it is empty, but all processes would wait for each other
            preservation_policy=policy.AnyPreservationPolicy(kept),
            # Otherwise orbax's threads wait 5 minutes at exit for a folder that could
            # not be created.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        ),
    )

    return Checkpoints(
        folder, ocp, manager, every_steps=every_steps, keep_best=keep_best, read_only=read_only, before_save=before_save
    )


def score(host: dict, suite: str) -> float:
    """Return the accuracy of the last evaluation of a suite at its first temperature;
    -inf if there was none.
    """
    found = [e for e in host.get("evaluations", ()) if e["suite"] == suite]
    last = [e for e in found if e["step"] == found[-1]["step"]]
    return last[0]["accuracy"] if last else -math.inf


# --- integrity ---


def checksum(*values: Any) -> int:
    """Return the CRC-32 of JSON values."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def fingerprints(tree: Any) -> dict[str, str]:
    """Return the dtype and a 32-bit fingerprint of each array of a tree, by path. The
    result does not depend on the sharding.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [".".join(_name(key) for key in path) for path, _ in flat]
    marks = jax.device_get(fingerprint([x for _, x in flat]))
    return {path: f"{np.dtype(x.dtype).name} {mark:08x}" for path, (_, x), mark in zip(paths, flat, marks, strict=True)}


@jax.jit
def fingerprint(arrays: list) -> list:
    """Sum `bits * (2 * index + 1)` over the entries of each array, modulo 2^32. Any
    single flipped bit changes the sum.

    Integer sums are exact in any order, so the result does not depend on the sharding.
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
    """Return the steps of the complete checkpoints in `folder`, oldest first; an empty
    list if the folder is missing.
    """
    if not path_of(folder).is_dir():
        return []
    with closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        return sorted(checkpoints.steps())


def check_writable(folder: str | os.PathLike, over: Sequence[str] = ()) -> None:
    """Create `folder` and write a file in it, so that a run fails before its first step
    and not at its first checkpoint.

    Existing files in it with the names `over` must be writable too.

    Raises:
      ValueError: the folder or one of these files can't be written.
    """
    folder = _absolute(folder)
    if "://" in folder:  # object stores: orbax creates the folder itself
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"\n")  # on a full disk an empty file can still be created
            file.flush()
    except OSError as error:
        raise ValueError(f"can't write to {folder}: {error.strerror}; make room or choose another workdir") from None
    for path in (os.path.join(folder, name) for name in over):
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise ValueError(f"can't write to {path}; make it writable, or choose another workdir")


def _leaves(flat: dict[tuple, Any], params_only: bool) -> dict[str, str]:
    """Describe each array by its path. With `params_only`, describe only params, and
    leave out the dtype because a restore may cast them.
    """
    leaves = {".".join(map(str, path)): leaf for path, leaf in flat.items() if hasattr(leaf, "shape")}
    if params_only:
        return {path: f"{list(leaf.shape)}" for path, leaf in leaves.items() if path.split(".")[0] == "params"}
    return {path: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _check_fit(name: str, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise a ValueError that names the first leaf that differs. Orbax would raise too,
    after a page of errors from its reader tasks.
    """
    for path in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(path, "missing"), wanted.get(path, "missing")
        if there != here:
            raise ValueError(f"{name} does not fit: {path} is {there} there and {here} here; use the config it was saved with")


def path_of(folder: str | os.PathLike) -> Any:
    """Return a local path, or one in a bucket with the same methods."""
    return remote(os.fspath(folder)) if is_url(folder) else Path(folder)


def _absolute(folder: str | os.PathLike) -> str:
    folder = os.fspath(folder)
    return folder if "://" in folder else os.path.abspath(folder)


def _import_orbax():
    """Import orbax (1 s, so not at module level) and silence the 50 or so lines it logs
    per save.

    A failed save logs some 200 lines, with the same traceback five times. Orbax raises
    each of these errors too, and this module reports them. Tensorstore adds a traceback
    for each array of such a save, since orbax closes the event loop at the first error.
    """
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_worth_saying)  # adding the same filter again does nothing
    logging.getLogger("asyncio").addFilter(_worth_saying)
    warnings.filterwarnings("ignore", r"coroutine '.*serialize.*' was never awaited", RuntimeWarning)  # raised by a failed save
    if not getattr(sys.unraisablehook, "skips_closed_loops", False):
        sys.unraisablehook = _skip_closed_loops(sys.unraisablehook)
    return ocp


def _worth_saying(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        message = record.getMessage()
        return "exception was never retrieved" not in message or not re.search("orbax|tensorstore|OCDBT", message)
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _skip_closed_loops(show: Callable) -> Callable:
    """Return an `unraisablehook` that ignores "Event loop is closed", which
    tensorstore's futures raise after a failed save.
    """

    def hook(unraisable) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    hook.skips_closed_loops = True
    return hook
