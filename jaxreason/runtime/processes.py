"""Several processes of one run: how they connect, exchange data and end together.

Each process runs the same program on its own devices. All processes run each
computation on the mesh. Work on the host, mostly sampling, is divided between them, and
`gather` sends each result to every process. So all processes hold the same batch,
metrics and source state, however many there are. For a batch of 4,096 rollouts of 2,000
tokens each process receives about 100 MB per step.

All processes must start programs on the mesh, including `gather`, in the same order.
Only the main thread may therefore start them.
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

# Messages of failed collectives, which have several error types.
ANOTHER_DIED = re.compile(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (reset|closed|refused)|Socket closed|Broken pipe")
PIECE_BYTES = 2**20  # sent at a time: one shape, so one compilation


def join(
    *, coordinator_address: str | None, num_processes: int | None, process_id: int | None, heartbeat_timeout_s: int = 100
) -> None:
    """Join the other processes of the run, if there are any.

    The arguments describe the processes. If all are None, Cloud TPU, Slurm or Open MPI
    describes them. Call this before any other use of jax. If a process is silent for
    `heartbeat_timeout_s`, jax ends all others.

    Raises:
      ValueError: only some of the three arguments are given, or they do not fit
        together.
    """
    wanted = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    options = {"heartbeat_timeout_seconds": heartbeat_timeout_s}
    if all(value is None for value in wanted.values()):
        if not in_cluster():
            return
        try:
            jax.distributed.initialize(**options)
        except ValueError:  # a TPU on a single host, outside any cluster
            if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
                raise
        return
    missing = [f"--{name}" for name, value in wanted.items() if value is None]
    if missing:
        raise ValueError(f"several processes need {' and '.join(missing)} too; give all of {', '.join(f'--{n}' for n in wanted)}")
    if ":" not in coordinator_address or not 0 <= process_id < num_processes:
        raise ValueError(
            f"got coordinator_address {coordinator_address!r}, process {process_id} of {num_processes}; allowed: host:port of "
            "process 0, and numbers of processes that start at 0"
        )
    jax.distributed.initialize(coordinator_address, num_processes, process_id, **options)


def in_cluster() -> bool:
    """Return whether this process was started as one of several, judging by its
    environment variables and TPUs.
    """
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return True
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    return on_tpu_vm()


def on_tpu_vm() -> bool:
    """Return whether this machine has TPUs that jax may use."""
    if os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def gather(item: Any) -> list:
    """Return the `item` of each process, in process order. Items are pickled. All
    processes must call this together.
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
    """Return [P, N]: the array of each process, in process order.

    The transfer uses the first device of each process. That device is never one of the
    `sampling_devices`, so sampling on those does not wait for the transfer.
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
    """Return whether this process writes the run's files and prints for all
    processes.
    """
    return jax.process_index() == 0


def on_all_processes(function: Callable, *args, **kwargs) -> Any:
    """Call a function on every process; if it fails on any, raise on all. A run thus
    starts on all processes or on none.

    Raises:
      ValueError, OSError: the function raised it on this process.
      ValueError: the function failed on another process.
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
    """Print the error and end this process, so that the other processes do not wait for
    it.

    If the cause is the death of another process, first wait: jax names that process
    once its heartbeats are overdue, and then ends this one.
    """
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, jax.errors.JaxRuntimeError) or ANOTHER_DIED.search(str(error)):
        print(
            f"error: {who} lost another process, which jax names within {heartbeat_timeout_s} s: {first_line(error)}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        time.sleep(heartbeat_timeout_s + 10)  # jax ends this process meanwhile
    else:
        traceback.print_exception(error)
        print(f"error: {who} ends, and with it the others: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # skip jax's barrier at exit, which waits for the other processes


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
