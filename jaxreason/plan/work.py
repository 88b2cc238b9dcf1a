"""The work that a plan is made for, its alternatives, and the flags that select
them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxreason.plan import chips


class Work(NamedTuple):
    """Sizes and settings that a plan depends on. Hashable, so that compiled programs
    are cached by it.
    """

    topology: str
    mesh: tuple[tuple[str, int], ...]  # of the learner
    sampling: tuple[tuple[str, Any], ...]  # the other fields of config.sharding
    shape: Any  # ModelConfig
    phase: str
    objective: Any
    optimizer: Any
    rows: int
    length: int  # tokens per row
    microbatches: int
    updates: int  # per batch
    offload_reference: bool  # keep the reference in HBM only while it is used
    samples: bool  # in every step; if False, a sampler is used for evaluations only
    sampler: tuple[tuple[str, Any], ...] | None  # the section config.sampler; None: no sampler
    problems: int  # per sampled batch
    group: int
    new_tokens: int  # per attempt, at most

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
    """List the work with each number of micro-batches that divides the rows, from its
    own number up.
    """
    each, rest = divmod(work.rows, work.row_devices)
    counts = [n for n in range(1, each + 1) if each % n == 0] if not rest else []
    enough = [n for n in counts if n >= work.microbatches]
    return [work._replace(microbatches=n) for n in enough or counts[-1:]]


def flags_for(work: Work, found: Work) -> list[str]:
    """Return the flags that turn one work into another."""
    changed = []
    if found.mesh != work.mesh:
        changed += [f"--config.sharding.mesh.{axis}={size}" for axis, size in found.mesh]
    if found.microbatches != work.microbatches:
        changed.append(f"--config.{work.phase}.microbatches={found.microbatches}")
    if work.sampler is not None and found.slots != work.slots:
        changed.append(f"--config.sampler.slots={found.slots}")
    return changed
