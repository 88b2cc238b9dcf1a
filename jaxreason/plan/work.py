"""A piece of work that is planned, how else it could be split, and the flags that say
so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreason.plan import chips


class Work(NamedTuple):
    """The work that is planned. Hashable, so that programs compiled for one part of it
    are kept.
    """

    topology: str
    mesh: tuple[tuple[str, int], ...]  # of the learner
    sampling: tuple[tuple[str, Any], ...]  # what else config.sharding has
    shape: Any  # ModelConfig
    phase: str
    objective: Any
    optimizer: Any
    rows: int
    length: int  # of a row
    microbatches: int
    updates: int  # of a batch
    offload_reference: bool  # it is on the devices only while it is used
    samples: bool  # in every step; otherwise only for evaluations, if there is a sampler at all
    sampler: tuple[tuple[str, Any], ...] | None  # its section
    problems: int  # of a batch that is sampled
    group: int
    new_tokens: int  # of an attempt, at most

    @property
    def chip(self) -> chips.Chip:
        return chips.CHIPS[self.topology.partition(":")[0]]

    @property
    def row_devices(self) -> int:
        return dict(self.mesh)["data"] * dict(self.mesh)["fsdp"]

    @property
    def slots(self) -> int:
        return dict(self.sampler)["slots"]

    def with_slots(self, slots: int) -> Work:
        return self._replace(sampler=tuple({**dict(self.sampler), "slots": slots}.items()))


def microbatch_choices(work: Work) -> list[Work]:
    """As many micro-batches as asked for, or more: those that divide."""
    each, rest = divmod(work.rows, work.row_devices)
    counts = [n for n in range(1, each + 1) if each % n == 0] if not rest else []
    enough = [n for n in counts if n >= work.microbatches]
    return [work._replace(microbatches=n) for n in enough or counts[-1:]]


def flags_for(work: Work, found: Work) -> list[str]:
    """The flags that change one piece of work into the other."""
    changed = []
    if found.mesh != work.mesh:
        changed += [f"--config.sharding.mesh.{axis}={size}" for axis, size in found.mesh]
    if found.microbatches != work.microbatches:
        changed.append(f"--config.{work.phase}.microbatches={found.microbatches}")
    if work.sampler is not None and found.slots != work.slots:
        changed.append(f"--config.sampler.slots={found.slots}")
    return changed
