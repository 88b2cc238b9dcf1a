"""Entry point: `python -m jaxreason.export RUN OUT [--step=N] [--dtype=bfloat16]
[--overwrite]` writes a Hugging Face folder.

RUN is the folder of a run; `--step` chooses a checkpoint, by default the newest. OUT
gets safetensors, config.json, generation_config.json, the tokenizer and the chat
template: the files that transformers, vLLM and `config.init_from` read. Adapters are
merged. The value head is left out, because the format has no place for it, and so is
the run's instruction, because it is not part of the template. Weights have the dtype of
the run's params unless `--dtype` is given. The export runs on the CPU in one process.
It holds the params once in the written dtype (merged kernels twice) plus one file of at
most 5 GB: at most 1.3 GB and 7 s for SmolLM2-135M in float32 on two cores (2026-11-24).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from absl import app, flags, logging

STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the newest.", lower_bound=0)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the weights. Default: that of the run's params.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Write into a folder that is not empty.")


def export(run: str, out: str, *, step: int | None = None, dtype: str | None = None, overwrite: bool = False) -> str:
    """Write the params of a run as a Hugging Face folder; return a one-line summary.

    Raises:
      ValueError, FileNotFoundError: no such run or step, or a folder that may not be
        written to.
    """
    from jaxreason import build, sharding
    from jaxreason.model import weights
    from jaxreason.model.config import to_hf
    from jaxreason.runtime import warm_start

    found, described = build.find_model_and_text(run, step)
    if found.step is None:
        raise ValueError(f"{run} is a Hugging Face folder already; give the folder of a run")
    target = Path(os.path.expanduser(out))
    check_target(target, [folder for folder in (found.folder, described.folder) if folder], overwrite)
    theirs, tokenizer = described.shape, described.tokenizer
    shape = dataclasses.replace(theirs, lora=None, value_head=False, param_dtype=dtype or theirs.param_dtype)
    warm_start.check(found, theirs, shape)
    to_hf(shape)  # raises if no transformers family has such a model
    mesh = sharding.make_mesh(data=1)
    placed = sharding.shardings(warm_start.abstract(shape, mesh), mesh)
    params = warm_start.restore(found, theirs, shape, placed, fresh=lambda: {})

    target.mkdir(parents=True, exist_ok=True)
    for name in weights.TOKENIZER_FILES:  # remove those of an earlier export
        (target / name).unlink(missing_ok=True)
    if tokenizer.save is not None:
        tokenizer.save(target)
    if described.format.template is not None:
        (target / "chat_template.jinja").write_text(described.format.template, encoding="utf-8")
    eos = tokenizer.eos_ids
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ids["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0]
    ids = {name: i for name, i in ids.items() if i is not None}
    weights.save(target, shape, params, tokenizer_folder=None if tokenizer.save else described.folder, **ids)
    return f"{target}: the params of step {found.step} of {found.folder}, {shape.param_dtype}"


def check_target(target: Path, sources: list[Path], overwrite: bool) -> None:
    """Raise ValueError if `target` may not be written to or is one of the `sources`."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder that is new or empty")
    if any(target.resolve() == source.resolve() for source in sources) or (target / "checkpoints").exists():
        raise ValueError(f"{target} holds a run, or the model that this run began with; choose a folder that is new or empty")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} is not empty; choose another folder, or add --overwrite")


def parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)


def fail(error: Exception) -> None:
    """Exit with an error in one line, without a traceback."""
    sys.exit(f"error: {' '.join(str(error).split())}")


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) != 3:
        fail(ValueError(f"got the words {' '.join(argv[1:])!r}; needed: python -m jaxreason.export RUN OUT"))
    # Local import: `--help` and mistyped flags should not wait for jax.
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use, or too small for the params
    try:
        print(export(argv[1], argv[2], step=STEP.value, dtype=DTYPE.value, overwrite=OVERWRITE.value))
    except (ValueError, FileNotFoundError) as error:
        fail(error)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        print("interrupted; what is written is not whole: give the same command with --overwrite", file=sys.stderr)
        sys.exit(130)
