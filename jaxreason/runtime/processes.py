"""Several processes of one run: how they find each other, tell each other things, and
end together.

Each process runs the same program on its own devices; what is computed on the mesh is
computed by all. The host's own work, of which sampling is most, is shared out, and its
results are made known to all (`gather`): so every process holds the same batch, the
same metrics and the same state of its sources, whatever the number of processes. A
batch of 4,096 rollouts of 2,000 tokens is some 100 MB that each process receives a
step. Programs on the mesh, and so `gather`, must be started by all processes in the
same order: from the main thread alone.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import pickle
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What failed collectives say, under several types of error.
ANOTHER_DIED = re.compile(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (reset|closed|refused)|Socket closed|Broken pipe")
PIECE_BYTES = 2**20  # that are sent at a time: one shape, so one compilation


def join(
    *, coordinator_address: str | None, num_processes: int | None, process_id: int | None, heartbeat_timeout_s: int = 100
) -> None:
    """Become one of several processes, if there are: by what is given, or as Cloud TPU,
    Slurm or Open MPI has it.

    Call before anything else of jax. A process that is not heard of for
    `heartbeat_timeout_s` ends all others.

    Raises:
      ValueError: only some of the three are given, or they do not fit together.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    options = {"heartbeat_timeout_seconds": heartbeat_timeout_s}
    if all(value is None for value in given.values()):
        if not in_cluster():
            return
        try:
            jax.distributed.initialize(**options)
        except ValueError:  # a TPU of one host that belongs to no cluster
            if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
                raise
        return
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"several processes need {' and '.join(missing)} too; give all of {', '.join(f'--{n}' for n in given)}")
    if ":" not in coordinator_address or not 0 <= process_id < num_processes:
        raise ValueError(
            f"got coordinator_address {coordinator_address!r}, process {process_id} of {num_processes}; allowed: host:port of "
            "process 0, and numbers of processes that start at 0"
        )
    jax.distributed.initialize(coordinator_address, num_processes, process_id, **options)


def in_cluster() -> bool:
    """Whether something has started this process as one of several, as far as its
    environment tells.
    """
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return True
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    return on_tpu_vm()


def on_tpu_vm() -> bool:
    """Whether this machine has TPUs that jax is to use."""
    if os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def gather(item: Any) -> list:
    """Return what each process has given, in their order. It is pickled; all processes
    must call this together.
    """
    if jax.process_count() == 1:
        return [item]
    mine = np.frombuffer(pickle.dumps(item), np.uint8)
    size_P2 = all_gather_host(np.array(divmod(len(mine), PIECE_BYTES), np.int32))
    size_P = size_P2[:, 0].astype(int) * PIECE_BYTES + size_P2[:, 1]
    mine = np.pad(mine, (0, -(-max(size_P) // PIECE_BYTES) * PIECE_BYTES - len(mine)))
    pieces = [all_gather_host(mine[i : i + PIECE_BYTES]) for i in range(0, len(mine), PIECE_BYTES)]
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(np.concatenate(pieces, axis=1), size_P, strict=True)]


def all_gather_host(x_N: np.ndarray) -> np.ndarray:
    """Return [P, N]: the array of each process.

    By way of the first device of each, which no process keeps for sampling: what
    samples must not wait for this.
    """
    if jax.process_count() == 1:
        return x_N[None]
    first = {d.process_index: d for d in reversed(jax.devices())}
    mesh = Mesh(np.array([first[p] for p in sorted(first)]), "process")
    part = jax.device_put(x_N[None], first[jax.process_index()])
    shape = (jax.process_count(), len(x_N))
    x_PN = jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec("process")), [part])
    return np.asarray(replicate(x_PN, mesh))


@functools.partial(jax.jit, static_argnums=1)
def replicate(x, mesh: Mesh):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def writes() -> bool:
    """Whether this process writes the files of the run, and speaks for all."""
    return jax.process_index() == 0


def on_all_processes(function: Callable, *args, **kwargs) -> Any:
    """Call a function on every process; if its input is bad for any of them, raise on
    all: a run starts on all or on none.

    Raises:
      ValueError, OSError: as the function does, and ValueError where it failed on
        another process.
    """
    result = error = None
    try:
        result = function(*args, **kwargs)
    except (ValueError, OSError) as caught:
        error = caught
    others = gather(error)
    if error is not None:
        raise error
    for process, found in enumerate(others):
        if found is not None:
            raise ValueError(f"process {process}: {found}")
    return result


def end(error: BaseException, heartbeat_timeout_s: int) -> None:
    """End this process of several, now that it has failed, so that the others do not
    wait for it.

    If it failed since another has died, first wait to hear which: jax names it when its
    heartbeats have been missed, and ends the process.
    """
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, jax.errors.JaxRuntimeError) or ANOTHER_DIED.search(str(error)):
        print(f"error: {who} lost another, which is named within {heartbeat_timeout_s} s: {first_line(error)}", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(heartbeat_timeout_s + 10)  # ended from outside in the meantime
    else:
        traceback.print_exception(error)
        print(f"error: {who} ends, and with it the others: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # without the barrier at exit, where the others would be waited for


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
