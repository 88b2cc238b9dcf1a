"""Accelerator types of Cloud TPU: chips, hosts, software version and list price.

Type names: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, read 2026-11-28. A type of v5p
counts cores, two per chip; the others count chips. Software versions: the page
"TPU software versions" of the same documentation.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxreason.chips import CHIPS, chips_of
from jaxreason.options import unknown_name_message


class Machine(NamedTuple):
    """A slice of one accelerator type."""

    type: str  # as gcloud calls it: v5litepod-16
    topology: str  # as `jaxreason.plan` calls it: v5e:4x4
    chips: int
    hosts: int
    version: str  # software version of its virtual machines
    usd_per_hour: float | None  # of all chips, on demand; None: not known


class Family(NamedTuple):
    """The types of one kind of chip."""

    chip: str
    prefix: str
    per_chip: int  # what the number in a type's name counts, per chip
    version: str
    queued: bool  # whether capacity usually needs a queued resource


FAMILIES = (
    Family("v5e", "v5litepod", 1, "v2-alpha-tpuv5-lite", queued=False),
    Family("v5p", "v5p", 2, "v2-alpha-tpuv5", queued=True),
    Family("v6e", "v6e", 1, "v2-alpha-tpuv6e", queued=True),
)


def machines() -> dict[str, Machine]:
    """List the accelerator types that are known, by name."""
    found = {}
    for family in FAMILIES:
        chip = CHIPS[family.chip]
        for shape in chip.topologies:
            topology = f"{family.chip}:{shape}"
            chips = chips_of(topology)
            name = f"{family.prefix}-{chips * family.per_chip}"
            # A slice of several hosts has four chips on each.
            hosts = 1 if chips <= chip.chips_per_host else chips // 4
            usd = None if chip.usd_per_hour is None else chips * chip.usd_per_hour
            found[name] = Machine(name, topology, chips, hosts, family.version, usd)
    return found


def machine_of(type: str) -> Machine:
    """Return the machine of a type.

    Raises:
      ValueError: an unknown type; the message lists those that are known.
    """
    known = machines()
    if not type:
        raise ValueError("no --type given; for example --type=v5litepod-8; --type=list shows all")
    # The nearest name of v5e-8 is v6e-8: another chip at another price.
    other = {f"v5e-{one.chips}": one for one in known.values() if one.topology.startswith("v5e:")}
    other |= {one.topology: one for one in known.values()}
    if type in other and type not in known:
        raise ValueError(f"unknown --type {type!r}; Google Cloud calls it {other[type].type!r}; --type=list shows all")
    if type not in known:
        raise ValueError(unknown_name_message("--type", type, known))
    return known[type]


def needs_queue(machine: Machine) -> bool:
    """Tell whether a slice of this type is usually had by a queued resource alone."""
    return next(family.queued for family in FAMILIES if machine.type.startswith(f"{family.prefix}-"))


ZONE = re.compile(r"[a-z]+(-[a-z]+)+[0-9]+-[a-z]")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?")


def check_name(name: str) -> str:
    """Raise ValueError for a name that Google Cloud does not accept."""
    if not NAME.fullmatch(name or ""):
        raise ValueError(f"--name got {name!r}; allowed: up to 62 of a-z, 0-9 and -, beginning with a letter, not ending in -")
    return name


def check_zone(zone: str) -> str:
    if not ZONE.fullmatch(zone or ""):
        raise ValueError(f"--zone got {zone!r}; allowed: a zone such as us-west4-a (gcloud compute tpus locations list)")
    return zone
