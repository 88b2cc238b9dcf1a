"""The flags of a sweep whose runs are jobs of an engine. `fleet` hands such runs over,
and `jobs` follows them.
"""

from __future__ import annotations

from absl import flags

from jaxreason.launch.fleets import ENGINES

FLAGS = flags.FLAGS
FOLLOWED = ("local", "slurm")


def define_flags() -> None:
    engines = ["local", *ENGINES]
    flags.DEFINE_enum(
        "engine", None, engines, "Hand runs over, a job each; the same command collects them. local: with --follow."
    )
    flags.DEFINE_string(
        "engine_options", "", "type=v5litepod-8,spot=true, as of jaxreason.launch; with --follow those of submitit."
    )
    flags.DEFINE_boolean("follow", False, "local, slurm: stay, and follow the jobs by submitit; --workers is how many at a time.")
    flags.DEFINE_string("place", None, "With --engine: gs://BUCKET/FOLDER for the runs. Default for slurm: the sweep's folder.")
    flags.DEFINE_enum("submit", None, FOLLOWED, "Earlier name of --engine=... --follow.")
    flags.DEFINE_alias("submit_options", "engine_options")


def check_flags() -> None:
    """Check the flags about engines. `--submit` sets `--engine` and `--follow`.

    Raises:
      ValueError: flags that don't go together.
    """
    if FLAGS.submit is not None:
        if FLAGS.engine is not None:
            raise ValueError(f"got --submit and --engine; allowed: --engine={FLAGS.submit} --follow")
        FLAGS.engine, FLAGS.follow = FLAGS.submit, True
    if FLAGS.engine is None or FLAGS.follow:
        if FLAGS.place is not None:
            raise ValueError("got --place; allowed: with --engine, without --follow")
        if FLAGS.follow and FLAGS.engine not in FOLLOWED:
            raise ValueError(f"got --follow with --engine={FLAGS.engine}; allowed: with {' or '.join(FOLLOWED)}")
        return
    if FLAGS.engine == "local":
        raise ValueError("got --engine=local; allowed: --engine=local --follow, or no --engine for processes of this machine")
    refused = [name for name in ("search", "budget", "devices_per_run") if FLAGS[name].present]
    if refused or (FLAGS["share"].present and FLAGS.share):
        raise ValueError(
            f"got --{refused[0] if refused else 'share'} with --engine={FLAGS.engine}; allowed: with --engine=slurm --follow, "
            "whose process stays to choose, stop and share runs, or on this machine"
        )


def is_handed_over() -> bool:
    return FLAGS.engine is not None and not FLAGS.follow
