"""Contents of a device's HBM at each stage of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxreason.plan.arrays import completer_of, samples_apart, size_of, slots_of, state_of, weights_of
from jaxreason.plan.programs import Compiled, compile_decode, compile_passes, compile_prefill, compile_train, passes_of
from jaxreason.plan.work import Work


class Stage(NamedTuple):
    """A stage of the training loop, and the bytes by kind in a device's HBM at that
    time.
    """

    name: str
    kinds: dict[str, float]
    refused: str = ""  # why the compiler refused the program, if it did

    @property
    def bytes(self) -> float:
        return sum(self.kinds.values())


KINDS = ("params", "optimizer", "reference", "sampler's weights", "KV cache", "batch", "temporaries", "programs")


def resident(work: Work) -> dict[str, float]:
    """Return the sizes of the learner's arrays that stay in HBM throughout."""
    state = state_of(work)
    params = size_of(state.params)
    return {
        "params": params,
        "optimizer": size_of(state.opt_state),
        "reference": params if work.objective.refers and not work.offload_reference else 0.0,
    }


def beside_sampling(work: Work) -> dict[str, float]:
    """Return the sizes of the learner's arrays on a device that samples."""
    return {} if samples_apart(work) else resident(work)


def layout_stage(work: Work) -> Stage:
    """Compute the stage in which the sampler's weights are made. No program of ours is
    compiled for it.
    """
    return Stage("lay out weights", beside_sampling(work) | {"sampler's weights": weights_of(work)[1]})


def program_stage(name: str, compiled: Compiled, kinds: dict[str, float], given: str) -> Stage:
    """Make the stage of a program that runs beside the arrays in `kinds`. `given` is
    the kind of its arguments that are not yet counted there.
    """
    if compiled.program is None:
        return Stage(
            name, {"temporaries": compiled.needed_bytes}, refused="by the compiler, even without the other arrays in HBM"
        )
    return Stage(name, kinds | {given: kinds.get(given, 0.0), "temporaries": compiled.temporaries, "programs": compiled.code})


def learner_stages(work: Work) -> list[Stage]:
    """Compile and return the stages of an update."""
    kinds, compiled = resident(work), compile_train(work)
    kinds["batch"] = max(0.0, compiled.arguments - kinds["params"] - kinds["optimizer"])
    stages = [program_stage("train step", compiled, kinds, "batch")]
    for name, scored in zip(passes_of(work), compile_passes(work), strict=True):
        here = {"reference": kinds["params"]} if name.startswith("reference") else {}
        stages.append(program_stage(name, scored, kinds | here, "batch"))
    return stages


def sampler_stages(work: Work) -> list[Stage]:
    """Compile and return the stages of sampling, starting with the layout of
    weights.
    """
    buckets, (_, _, left) = completer_of(work).sampler.buckets, weights_of(work)
    prefill, decode = compile_prefill(work), compile_decode(work)
    slots, prompts = size_of(slots_of(work)), prefill.results  # one batch of prompts waits while another is prefilled or placed
    before = size_of(slots_of(work, buckets[-2]).cache) if len(buckets) > 1 else 0.0
    kinds = beside_sampling(work) | {"sampler's weights": left, "KV cache": slots + prompts}
    return [
        layout_stage(work),
        program_stage("prefill", prefill, kinds, "KV cache"),
        program_stage("decode", decode, kinds, "KV cache"),
        # The grown cache is a copy, so both caches exist for a moment.
        Stage("grow the cache", kinds | {"KV cache": slots + before + prompts, "programs": decode.code}),
    ]


def fits(stages: Sequence[Stage], work: Work) -> bool:
    return all(stage.bytes <= work.chip.hbm_bytes and not stage.refused for stage in stages)


def still_stages(work: Work) -> list[Stage]:
    """Return the stages whose memory is computed without compiling."""
    return [Stage("between steps", resident(work))] + ([layout_stage(work)] if work.sampler is not None else [])


def stages_of(work: Work) -> list[Stage]:
    """Return all stages; if params and optimizer alone do not fit, only the stages that
    need no compiling.
    """
    still = still_stages(work)
    if not fits(still[:1], work):
        return still
    return learner_stages(work) + (sampler_stages(work) if work.sampler is not None else [])
