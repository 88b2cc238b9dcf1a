r"""Entry point: say whether a config fits on a TPU slice, what bounds its speed and
what a run costs, without a TPU.

    python -m jaxreason.plan --config=configs/gsm8k.py:size=8b --topology=v5e:2x4 \
        [--config.sharding.mesh.fsdp=8] [--prices=FILE.json] [--json]
    python -m jaxreason.plan --topology=list
    python -m jaxreason.plan --topology=v5e:2x4 --compare=FILE.hlo

It needs libtpu (`pip install -e '.[tpu]'`) and downloads nothing. The exit code is 0 if
the config fits and 1 if not. jaxreason/plan/README.md explains the tables.
"""

from __future__ import annotations

import json
import os
import sys

from absl import app, flags, logging

from jaxreason.options import command
from jaxreason.plan import chips

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define flags. Not at import: other entry points define flags of the same
    names.
    """
    command.define("As of jaxreason.main; --config.rl.microbatches=64 changes a field.")
    flags.DEFINE_string("topology", None, "As v5e:4x8; 'list' shows what is known.")
    flags.DEFINE_string("phase", None, "The phase to plan; default: the last.")
    flags.DEFINE_float("efficiency", 0.5, "Fraction of the roofline that the predicted time assumes; a guess.", 0.01, 1.0)
    flags.DEFINE_string("prices", None, 'JSON file of dollars per chip and hour, as {"v5e": 1.2}; default: list prices.')
    flags.DEFINE_boolean("search", True, "Compile more to say what fits, or how the network bounds the train step no longer.")
    flags.DEFINE_string(
        "compare", None, "Text of a compiled program, compiled.as_text(): count it; with --config, per token of that train step."
    )
    flags.DEFINE_boolean("json", False, "Print one JSON object and no tables.")


def plan() -> bool:
    """Plan the config and topology of the flags, print the plan, and return whether it
    fits.
    """
    from jaxreason.plan import report
    from jaxreason.plan.arrays import devices_of
    from jaxreason.plan.config import read
    from jaxreason.plan.search import fewer_microbatches, find_fitting, larger_topology
    from jaxreason.plan.work import flags_for

    if FLAGS.topology is None:
        raise ValueError("no --topology given; for example --topology=v5e:4x8, and --topology=list shows what is known")
    prices = report.read_prices(FLAGS.prices)
    if FLAGS.compare is not None:
        report.read_hlo(FLAGS.compare)  # fail before anything is compiled
    if FLAGS.config is None:
        told = report.compare(FLAGS.compare, FLAGS.topology, None)
        print(json.dumps(told)) if FLAGS.json else report.show_compared(FLAGS.compare, told)
        return True
    devices_of(FLAGS.topology)
    work = read(FLAGS.config.to_dict(), FLAGS.topology, FLAGS.phase)
    found = report.describe(work, FLAGS.efficiency, prices)
    other = find_fitting(work) if not found["fits"] and FLAGS.search else None
    if not found["fits"] and FLAGS.search and other is None:
        found["larger_topology"] = larger_topology(work)
    if other is not None:
        found["fits_with"] = {"flags": flags_for(work, other), **report.describe(other, FLAGS.efficiency, prices)}
    fewer = fewer_microbatches(work) if found["fits"] and FLAGS.search else None
    if fewer is not None:
        found["not_bound_by_network"] = report.describe_fewer(work, fewer)
    if FLAGS.compare is not None:
        found["compared"] = report.compare(FLAGS.compare, FLAGS.topology, found)
    if FLAGS.json:
        print(json.dumps(found))
        return found["fits"]
    report.show(found)
    if FLAGS.compare is not None:
        report.show_compared(FLAGS.compare, found["compared"])
    print(report.verdict(found))
    if fewer is not None:
        print(report.faster(found["not_bound_by_network"]))
    if other is not None:
        print(f"\nfits with: {' '.join(found['fits_with']['flags'])}\n")
        report.show(found["fits_with"])
    elif not found["fits"] and FLAGS.search:
        larger = found["larger_topology"]
        hint = f"; params, optimizer and the sampler's weights would fit on {larger}, with another mesh" if larger else ""
        print(f"nothing that was tried fits on {work.topology}: take other chips, a smaller model or shorter sequences{hint}")
    return found["fits"]


def fail(error: Exception) -> None:
    """Exit with one line that says which input was bad, without a traceback."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error  # a KeyError would quote it
    sys.exit(f"error: {' '.join(str(message).split())}")


def parse_flags(argv):
    define_flags()
    os.environ["JAX_PLATFORMS"] = "cpu"  # even on a machine with a TPU, which may be in use
    try:
        rest = command.parse(argv)
        if len(rest) > 1:
            raise ValueError(
                f"got the arguments {' '.join(rest[1:])!r}; options of a config follow a colon: configs/tiny.py:smoke"
            )
        if FLAGS.config is None and FLAGS.topology != "list" and FLAGS.compare is None:
            raise ValueError("no --config given; for example --config=configs/gsm8k.py:model=qwen3_8b")
        return rest
    except (flags.Error, ValueError, OSError) as error:
        fail(error)


def show_topologies() -> None:
    """Print the known chips and topologies."""
    for name, chip in chips.CHIPS.items():
        usd = chip.usd_per_hour
        price = "no price known" if usd is None else f"${usd:.2f} a chip and hour"
        print(
            f"{name}: {chip.hbm_bytes / chips.GIB:.2f} GiB, {chip.flops_per_s / 1e12:.0f} TFLOP/s, "
            f"{chip.hbm_bytes_per_s / 1e9:.0f} GB/s a chip, up to {chip.chips_per_host} chips a host, {price}"
        )
        print("  " + " ".join(f"{name}:{shape}" for shape in chip.topologies))


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if FLAGS.topology == "list":
        show_topologies()
        return
    try:
        fits = plan()
    except (ValueError, KeyError, OSError) as error:
        fail(error)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
