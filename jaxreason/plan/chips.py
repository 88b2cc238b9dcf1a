"""The roofline time of a program on one of the known chips."""

from __future__ import annotations

from typing import NamedTuple

from jaxreason.chips import CHIPS, GIB, Chip, chips_of, topology_names
from jaxreason.plan.hlo import Program

__all__ = ["CHIPS", "GIB", "Chip", "Roofline", "chips_of", "roofline", "topology_names"]


class Roofline(NamedTuple):
    """Least seconds that a program takes on a chip if compute, memory and network
    overlap perfectly.
    """

    compute_s: float
    memory_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return ("compute", "HBM", "network")[self.index(max(self))]


def roofline(program: Program, chip: Chip) -> Roofline:
    """Time each kind of work at the chip's peak rate. Collectives are assumed to run
    along one axis of the torus, in both directions.
    """
    return Roofline(
        program.flops / chip.flops_per_s, program.bytes / chip.hbm_bytes_per_s, program.sent_bytes / chip.ici_bytes_per_s
    )
