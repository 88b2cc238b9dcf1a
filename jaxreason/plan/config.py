"""Reader that turns a config into a `Work`, by the code that `build` uses, but without
tasks, tokenizer or weights.
"""

from __future__ import annotations

import inspect

from jaxreason import build, objectives, optimizer, sharding
from jaxreason.build.tasks import check_positive
from jaxreason.model import attention
from jaxreason.options import call_with_section, fields, unknown_name_message
from jaxreason.plan.arrays import completer_of, devices_of, state_of, weights_of
from jaxreason.plan.work import Work, microbatch_choices
from jaxreason.platforms import PLATFORMS

PREFILL_TOKENS = 1024  # the sampler's default on an accelerator


def read(config: dict, topology: str, phase: str | None) -> Work:
    """Read a config into a `Work`, by the code that `build` uses, but without tasks,
    tokenizer or weights.

    Raises:
      ValueError: the config is wrong; says how in one line.
    """
    for key in build.SECTIONS:
        if key not in config:
            raise ValueError(f"the config lacks {key!r}; it has: {', '.join(sorted(config))}")
    fields.check(build.layout(config), config)
    names = tuple(config["phases"])
    phase = names[-1] if phase is None else phase
    if phase not in config or phase in build.SECTIONS or not isinstance(config[phase], dict):
        raise ValueError(unknown_name_message("phase", phase, names))
    section = config[phase]
    placement = {"devices": devices_of(topology), "process": 0}
    mesh = call_with_section(sharding.make_meshes, config["sharding"], "config.sharding", **placement).learn.shape
    scan_layers = config["model"].get("scan_layers")
    scan_layers = True if scan_layers is None else scan_layers  # the default of `build` on an accelerator
    shape = build.read_shape({**config["model"], "scan_layers": scan_layers}, config["text"])
    attention.check_platform(shape, "tpu")
    objective = call_with_section(objectives.make, section["objective"], f"config.{phase}.objective")
    updates, steps = section.get("updates_per_batch", 1), section["steps"]
    source = section["source"]
    devices, microbatches = mesh["data"] * mesh["fsdp"], section.get("microbatches")
    check_sizes(section, config["sampler"]["max_tokens"], f"config.{phase}")
    if microbatches is None:
        limits = build.Attempts(config["sampler"]["max_tokens"], config["sampler"]["max_prompt_tokens"])
        microbatches = build.choose_microbatches([source], shape, limits, devices, PLATFORMS["tpu"])
    keywords = {"sampler": config["sampler"], "shape": shape, "multiple": devices * microbatches}
    sizes = call_with_section(read_source, {"name": None} | source, f"config.{phase}.source", **keywords)
    evaluated = bool(config["evaluate"].get("suites"))
    sampler = {key: tuple(v) if isinstance(v, list) else v for key, v in config["sampler"].items()}
    sampler["prefill_tokens"] = sampler.get("prefill_tokens") or PREFILL_TOKENS
    work = Work(
        topology=topology,
        mesh=tuple(mesh.items()),
        sampling=tuple((key, value) for key, value in config["sharding"].items() if key != "mesh"),
        shape=shape,
        phase=phase,
        objective=objective,
        optimizer=call_with_section(optimizer.make, section["optimizer"], f"config.{phase}.optimizer", steps=steps * updates),
        microbatches=microbatches,
        updates=updates,
        offload_reference=section.get("offload_reference", False),
        samples=source["name"] == "rollouts",
        sampler=tuple(sampler.items()) if evaluated or source["name"] == "rollouts" else None,
        **sizes,
    )
    check(work)
    return work


def check_sizes(section: dict, most_tokens: int, where: str) -> None:
    """Raise ValueError for a size of a phase that no run can have."""
    source = section["source"]
    sizes = {f"source.{name}": source.get(name) for name in ("rows", "length", "problems", "group", "max_tokens")}
    sizes["microbatches"] = section.get("microbatches")
    check_positive(where, **{name: size for name, size in sizes.items() if size is not None})
    if source.get("name") == "rollouts" and 0 < most_tokens < (source.get("max_tokens") or 1):
        raise ValueError(
            f"{where}.source.max_tokens got {source['max_tokens']}; allowed: 1 to config.sampler.max_tokens={most_tokens}"
        )


SIZED = ("corpus", "demonstrations", "rollouts")


def read_source(*, name: str, sampler: dict, shape, multiple: int, **section) -> dict:
    """Read the sizes of a source: rows per batch, longest row, and the problems, group
    size and new tokens that it samples.
    """
    if name not in build.SOURCES:
        raise ValueError(unknown_name_message("source", name, build.SOURCES))
    if name not in SIZED:
        raise ValueError(
            f"the source {name!r} can't be planned; allowed: {', '.join(SIZED)}; plan a config with its largest part"
        )
    allowed = inspect.signature(build.SOURCES[name]).parameters
    for key in section:
        if key not in allowed:
            raise ValueError(unknown_name_message("field of the source", key, allowed))
    limits = build.Attempts(sampler["max_tokens"], sampler["max_prompt_tokens"])
    size = build.batch_size({"name": name, **section}, shape, limits, multiple)
    if size is None:
        raise ValueError(f"the source {name!r} lacks a size; needed: rows and length, rows and max_tokens, or problems and group")
    samples = name == "rollouts"
    return {
        "rows": size.rows,
        "length": size.length,
        "problems": section["problems"] if samples else 0,
        "group": section["group"] if samples else 0,
        "new_tokens": (samples and section.get("max_tokens")) or limits.completion,
    }


def check(work: Work) -> None:
    """Raise ValueError if the rows or an axis of a parameter do not divide over the
    mesh.
    """
    if work.microbatches < 1 or work.rows % (work.row_devices * work.microbatches):
        allowed = ", ".join(str(w.microbatches) for w in microbatch_choices(work._replace(microbatches=1)))
        raise ValueError(
            f"config.{work.phase} has {work.rows} rows a batch, which do not divide over {work.row_devices} devices (data x "
            f"fsdp) x {work.microbatches} micro-batches; on this mesh --config.{work.phase}.microbatches may be "
            f"{allowed or 'nothing'}; or change problems x group (or rows), or config.sharding.mesh"
        )
    state_of(work)  # raises if an axis of a parameter does not divide
    weights_of(work)
    if work.sampler is not None:
        completer_of(work)
