"""Joules of a run: from a counter of the hardware where there is one, else estimated
from the stated watts, else not counted.

    nvml    NVIDIA GPUs (Volta or newer), through `nvidia-ml-py`: whole boards with
            their memory, without the host. All visible GPUs count, used or not.
    rapl    CPU packages, through /sys/class/powercap: whole packages with everything
            else that runs on them, without memory modules, disks and power supply.
            Package domains alone are read, because the others are parts of them.
    watts   device-seconds x `config.log.watts`. An estimate: nothing is metered.

Counters restart when a machine or a driver does, so only differences are used. A
counter has a resolution of a millisecond (RAPL) to about 100 ms (NVML); consecutive
stretches share their readings, so the sum over a run has the error of a single reading.
TPUs have no such counter.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxreason.runtime import processes

POWERCAP = Path("/sys/class/powercap")
POLL_S = 30.0  # a RAPL counter of 65 kJ wraps around after 130 s at 500 W


class NoCounter(Exception):
    """There is no counter that can be read; the message says why."""


class Domain(NamedTuple):
    """One counter."""

    name: str  # unique over all machines
    read_j: Callable[[], float]  # joules so far; raises NoCounter
    wraps_at_j: float = 0.0  # the counter continues from 0 here; 0: never


class Meter:
    """Sum of counters since the meter was made."""

    def __init__(self, source: str | None, domains: Sequence[Domain] = (), watts: float | None = None, reason: str = ""):
        self.source = source  # "nvml", "rapl", "watts" or None
        self.reason = reason  # why there is no counter, or what failed later
        self.watts = watts  # of a busy device, for the estimate
        self._domains, self._lock, self._ended = list(domains), threading.Lock(), threading.Event()
        self._last_j = [domain.read_j() for domain in self._domains]
        self._total_j = self._lap_j = 0.0
        if any(domain.wraps_at_j for domain in self._domains):
            threading.Thread(target=self._poll, name="energy", daemon=True).start()

    @property
    def counts(self) -> bool:
        return self.source in ("nvml", "rapl")

    def joules(self) -> float:
        """Return the joules of this process's counters since the meter was made.

        A counter that can no longer be read is named in `reason` and adds nothing.
        """
        with self._lock:
            with contextlib.suppress(NoCounter):
                for i, domain in enumerate(self._domains):
                    now_j = self._read(domain)
                    # Less than before: it wrapped around, or a driver restarted it.
                    passed_j = now_j - self._last_j[i] + domain.wraps_at_j * (now_j < self._last_j[i])
                    self._total_j, self._last_j[i] = self._total_j + max(passed_j, 0.0), now_j
            return self._total_j

    def _read(self, domain: Domain) -> float:
        try:
            return domain.read_j()
        except NoCounter as error:
            self.reason, self._domains = str(error), []
            raise

    def _poll(self) -> None:
        """Read so often that no counter wraps around twice between two readings."""
        while not self._ended.wait(POLL_S):
            self.joules()

    def lap(self) -> float:
        """Return the joules of all processes since the last call. With a counter, all
        processes must call it together.
        """
        if not self.counts:
            return 0.0
        total_j = self.joules()
        shares = processes.gather((total_j - self._lap_j, self.reason))
        self._lap_j = total_j
        if failed := [reason for _, reason in shares if reason]:
            self.source, self.reason = None if self.watts is None else "watts", failed[0]
        return sum(joules for joules, _ in shares)

    def divide(self, lap_j: float, device_s: Mapping[str, float]) -> dict[str, float]:
        """Return the joules of each kind of work of a lap, given its device-seconds.

        Metered joules are divided in proportion to the device-seconds.
        """
        if self.source == "watts":
            return {kind: amount * self.watts for kind, amount in device_s.items()}
        total_s = sum(device_s.values())
        return {kind: lap_j * amount / total_s if total_s > 0 else 0.0 for kind, amount in device_s.items()}

    def close(self) -> None:
        self._ended.set()


def open_meter(watts: float | None) -> Meter:
    """Open the counters of the devices of all processes; with none, estimate from
    `watts` per device, if given. All processes must call it together.
    """
    source, domains, reason = None, [], ""
    try:
        source, domains = find_counters(jax.default_backend())
        for domain in domains:
            domain.read_j()
    except NoCounter as error:
        source, domains, reason = None, [], str(error)
    # Processes of one machine share its counters: the first one that sees a counter
    # reads it.
    found = processes.gather((source, [domain.name for domain in domains], reason))
    if any(other != found[0][0] for other, _, _ in found) or source is None:
        reason = next((why for _, _, why in found if why), "the processes have counters of different kinds")
        return Meter(None if watts is None else "watts", watts=watts, reason=reason)
    earlier = {name for _, names, _ in found[: jax.process_index()] for name in names}
    return Meter(source, [domain for domain in domains if domain.name not in earlier], watts)


def find_counters(platform: str) -> tuple[str, list[Domain]]:
    """Return the source and the counters of the devices that this process sees.

    Raises:
      NoCounter: there is none.
    """
    if platform in ("gpu", "cuda"):
        return "nvml", gpu_domains([device.local_hardware_id for device in jax.local_devices()])
    if platform == "cpu":
        return "rapl", package_domains(POWERCAP)
    raise NoCounter(f"{platform.upper()}s have no counter of joules that can be read")


# --- CPUs ---


def package_domains(folder: Path) -> list[Domain]:
    """Return the counters of the CPU packages.

    `intel-rapl-mmio` shows the same packages again, so it is left out; AMD's packages
    have the same names as Intel's.
    """
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
    packages = [zone for zone in zones if (zone / "name").is_file() and (zone / "name").read_text().startswith("package")]
    if not packages:
        raise NoCounter(f"{folder} has no CPU package (no RAPL, or a virtual machine without it)")
    host = socket.gethostname()
    return [
        Domain(
            f"{host} {zone.name}", lambda zone=zone: microjoules(zone / "energy_uj"), microjoules(zone / "max_energy_range_uj")
        )
        for zone in packages
    ]


def microjoules(path: Path) -> float:
    """Read a file of microjoules, in joules."""
    try:
        return int(path.read_text()) / 1e6
    except PermissionError:
        raise NoCounter(f"{path} is readable by root alone; 'sudo chmod a+r {path}' allows it until the next boot") from None
    except (OSError, ValueError) as error:
        raise NoCounter(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


# --- NVIDIA GPUs ---


def gpu_domains(ordinals: Sequence[int | None]) -> list[Domain]:
    """Return the counters of the GPUs that jax sees, by their numbers among those of
    CUDA_VISIBLE_DEVICES.
    """
    try:
        import pynvml
    except ImportError:
        raise NoCounter("nvidia-ml-py is not installed; pip install 'jaxreason[gpu]'") from None
    try:
        pynvml.nvmlInit()
        handles = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        chosen = [handles[i] for i in ordinals if i is not None and i < len(handles)]
        if len(chosen) < len(ordinals):
            raise NoCounter(f"NVML shows {len(handles)} of the visible GPUs, and jax {len(ordinals)}")
        return [Domain(text_of(pynvml.nvmlDeviceGetUUID(handle)), gpu_reader(pynvml, handle)) for handle in chosen]
    except pynvml.NVMLError as error:
        raise NoCounter(f"NVML: {error}") from None


def gpu_reader(pynvml, handle) -> Callable[[], float]:
    """Return a function that reads a GPU's joules since its driver was loaded."""

    def read_j() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except pynvml.NVMLError as error:
            raise NoCounter(f"NVML: {error}") from None

    return read_j


def visible_handles(pynvml, visible: str | None) -> list:
    """Return the NVML handles of CUDA_VISIBLE_DEVICES, in its order; None means all.

    An entry is a number or the beginning of a UUID. As in CUDA, an entry that fits no
    GPU hides itself and all after it. NVML numbers GPUs by bus, CUDA by speed unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID; on machines with one kind of GPU these are the same.

    Raises:
      NoCounter: an entry is a part of a GPU (MIG), which has no counter.
    """
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    if visible is None:
        return handles
    uuids, chosen = [text_of(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles], []
    for entry in map(str.strip, visible.split(",")):
        if entry.startswith("MIG"):
            raise NoCounter(f"CUDA_VISIBLE_DEVICES has {entry}, a part of a GPU; only whole GPUs have a counter")
        if re.fullmatch(r"\d+", entry):
            fitting = [int(entry)] if int(entry) < len(handles) else []
        else:
            fitting = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(fitting) != 1:
            break
        chosen.append(handles[fitting[0]])
    return chosen


def text_of(uuid: str | bytes) -> str:
    return uuid.decode() if isinstance(uuid, bytes) else uuid  # older versions return bytes
