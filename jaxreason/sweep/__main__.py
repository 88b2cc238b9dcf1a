r"""An entry point: run the same config with different fields, on paired seeds, and
compare the arms.

    python -m jaxreason.sweep --config=configs/tiny.py \
        --grid="rl.objective.name=rloo,grpo; seed=0..4" [--config.rl.steps=80] \
        [--search=tpe --pruner=halving --budget=flops=1e14]
        [--engine=sky --place=gs://my-bucket/x --engine_options=type=v5litepod-8]
    python -m jaxreason.sweep --experiment=experiments/prior.py[:quick]
    python -m jaxreason.sweep --report=FOLDER

The first value of each field is the baseline. Every arm is run with every seed, phases
that runs share are trained once, and the same command continues where it was stopped.
`--dry_run` lists the runs and what they will need.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags, logging

from jaxreason.options import command, lines_of
from jaxreason.sweep import engine_flags
from jaxreason.sweep.arms import Sweep, named_arms, parse_grid, word_of

FLAGS = flags.FLAGS


def define_flags() -> None:
    command.define("Config file and options, as of jaxreason.main; --config.FIELD=VALUE sets a field in all arms.")
    flags.DEFINE_string("grid", None, "Arms: 'field=value,value; field=first..last; seed=0..4'.")
    flags.DEFINE_string("experiment", None, "A file with a function sweep(arg), as experiments/prior.py[:quick].")
    flags.DEFINE_integer("seeds", None, "Seeds 0 to this number less one, for every arm. Default: 5.", lower_bound=1)
    flags.DEFINE_string("folder", None, "Folder of the sweep. Default: sweeps/<name>-<hash of its arms>.")
    flags.DEFINE_string("metric", None, "What is compared: eval/SUITE/MODE/accuracy. Default: the first suite's.")
    flags.DEFINE_integer("workers", None, "Runs at a time. Default: one per core, or per accelerator.", lower_bound=1)
    flags.DEFINE_integer("devices_per_run", 1, "Accelerators of each run.", lower_bound=1)
    engine_flags.define_flags()
    flags.adopt_module_key_flags(engine_flags)  # for --help
    flags.DEFINE_integer("retries", 0, "How often a run that failed is tried again.", lower_bound=0)
    flags.DEFINE_boolean("share", True, "Train phases that runs have in common once.")
    flags.DEFINE_enum("search", None, ["random", "tpe"], "Let optuna choose arms of the grid, in the place of all of them.")
    flags.DEFINE_enum("pruner", "none", ["none", "halving", "wilcoxon"], "With --search: which runs are stopped early.")
    flags.DEFINE_integer("trials", 100, "With --search: how many arms are tried, at most.", lower_bound=1)
    flags.DEFINE_string("budget", None, "Stop once all runs together have used this: steps=, flops=, device_s= or joules=AMOUNT.")
    flags.DEFINE_boolean("dry_run", False, "List the runs and what they need, and end.")
    flags.DEFINE_boolean("json", False, "With --dry_run: print one JSON object.")
    flags.DEFINE_string("report", None, "Folder of a sweep: write its report again, and end.")
    flags.DEFINE_boolean("across_commits", False, "Compare runs of different versions of the code.")
    flags.DEFINE_boolean("figures", True, "Draw figures, if matplotlib is installed.")


class Asked(NamedTuple):
    """A sweep, and what else its command says."""

    sweep: Sweep
    name: str
    experiment: str | None = None  # FILE:OPTIONS
    prepare: Callable | None = None  # (folder, seeds), called before the runs


def read_sweep(words: command.Words) -> Asked:
    """Read the sweep that a command asks for.

    Raises:
      ValueError: neither an experiment nor a grid, or a wrong one.
    """
    if FLAGS.experiment is not None:
        if words.config is not None or FLAGS.grid is not None:
            raise ValueError("got --experiment with --config or --grid; allowed: one of the two ways to say the arms")
        return read_experiment(FLAGS.experiment, words.changes)
    if words.config is None or FLAGS.grid is None:
        raise ValueError('needed: --experiment=FILE, or --config=FILE --grid="field=value,value"; see --help')
    arms, seeds = parse_grid(FLAGS.grid)
    if seeds is not None and FLAGS.seeds is not None:
        raise ValueError(f"got --seeds={FLAGS.seeds} and a --grid with seed=...; allowed: one of them")
    if twice := words.changes.keys() & {field for arm in arms for field in arm}:
        raise ValueError(f"--config.{min(twice)} is a field of --grid too; allowed: one of them")
    seeds = range(FLAGS.seeds or 5) if seeds is None else seeds
    sweep = Sweep(words.config, arms, tuple(seeds), common=words.changes, metric=FLAGS.metric)
    return Asked(sweep, Path(words.config.partition(":")[0]).stem)


EXAMPLE = "experiments/prior.py:quick"


def read_experiment(experiment: str, changes: dict[str, str]) -> Asked:
    """Run the file of an experiment; `changes` are set in all its arms."""
    file, colon, options = experiment.partition(":")
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        raise ValueError(f"--experiment got {file!r}, which is no file; allowed: a Python file with sweep(arg), as {EXAMPLE}")
    with lines_of(str(path)):
        found = runpy.run_path(str(path))
        if "sweep" not in found:
            raise ValueError(f"{path} has no function sweep(arg='') that returns a Sweep")
        sweep = found["sweep"](options) if colon else found["sweep"]()
    if not isinstance(sweep, Sweep):
        raise ValueError(f"sweep of {path} returned {type(sweep).__name__}; allowed: a jaxreason.sweep.Sweep")
    sweep = sweep._replace(common={**sweep.common, **changes}, metric=FLAGS.metric or sweep.metric)
    if FLAGS.seeds is not None:
        sweep = sweep._replace(seeds=tuple(range(FLAGS.seeds)))
    return Asked(sweep, path.stem + (f"-{options}" if options else ""), experiment, found.get("prepare"))


def definition(asked: Asked) -> dict:
    """Return the contents of sweep.json: config, common fields, arms, seeds, metric."""
    sweep = asked.sweep
    arms = {name: {field: word_of(value) for field, value in arm.items()} for name, arm in named_arms(sweep).items()}
    common = {field: word_of(value) for field, value in sweep.common.items()}
    found = {"config": sweep.config, "common": common, "arms": arms, "seeds": list(sweep.seeds), "metric": sweep.metric}
    return found | {"experiment": asked.experiment}


def default_folder(asked: Asked) -> Path:
    """The folder of a sweep: one for its config, its common fields and its arms."""
    text = json.dumps({k: v for k, v in definition(asked).items() if k in ("config", "common", "arms")}, sort_keys=True)
    return Path("sweeps") / f"{asked.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_definition(folder: Path) -> dict | None:
    """Read sweep.json; None if there is none.

    Raises:
      ValueError: it is damaged, so nobody knows which arms are in the folder.
    """
    from jaxreason.runtime.workdir import json_object

    path = folder / "sweep.json"
    if not path.exists():
        return None
    kinds = {"config": str, "common": dict, "arms": dict, "seeds": list}
    found = json_object(path) or {}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()) or not found["arms"]:
        raise ValueError(f"{path} is damaged; bring it back, or move it away: the same command then writes it with its own arms")
    return found


def write_definition(folder: Path, here: dict) -> dict:
    """Write sweep.json; a sweep in the folder may gain arms and seeds.

    Raises:
      ValueError: the folder is of another sweep.
    """
    from jaxreason.runtime.files import replacing

    there = read_definition(folder)
    if there is not None:
        for name in ("config", "common"):
            if there.get(name) != here[name]:
                raise ValueError(
                    f"{folder} is of another sweep ({name}: {there.get(name)} there, {here[name]} here); choose another --folder"
                )
        for name, arm in there["arms"].items():
            if here["arms"].get(name, arm) != arm:
                raise ValueError(f"{folder} has an arm {name!r} with other fields ({arm} there); choose another --folder")
        here = here | {"arms": there["arms"] | here["arms"], "seeds": sorted({*there["seeds"], *here["seeds"]})}
        here |= {"dropped": there.get("dropped", {}) | here.get("dropped", {})}
    with replacing(folder / "sweep.json") as file:
        json.dump(here, file, indent=2)
    return here


def provenance(folder: Path) -> dict[str, str]:
    """Name the version of this code, for the state of each run.

    `code` is the same for the same sources of the package, in whatever commit. Changes
    that are in no commit are kept as a file.
    """
    import jaxreason

    root = Path(__file__).parents[2]

    def git(*words: str, allowed: tuple[int, ...] = (0,)) -> str:
        made = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, errors="replace")
        if made.returncode not in allowed:
            raise subprocess.CalledProcessError(made.returncode, "git")
        return made.stdout

    try:
        commit, tree = git("rev-parse", "--short=12", "HEAD").strip(), git("rev-parse", "--short=12", "HEAD:jaxreason").strip()
        diff = git("diff", "--no-ext-diff", "--no-color", "HEAD", "--", "jaxreason")
        for new in git("ls-files", "-z", "--others", "--exclude-standard", "--", "jaxreason").split("\0")[:-1]:
            diff += git("diff", "--no-ext-diff", "--no-color", "--no-index", "--", os.devnull, new, allowed=(0, 1))
    except (OSError, subprocess.CalledProcessError):  # no git, or installed without its repository
        from jaxreason.sweep.runs import sources_hash

        return {"code": f"jaxreason {jaxreason.__version__}-{sources_hash()[:8]}", "commit": ""}
    if not diff:
        return {"code": tree, "commit": commit}
    name = f"{tree}-{hashlib.sha256(diff.encode()).hexdigest()[:8]}"
    if not (folder / f"{name}.diff").exists():
        (folder / f"{name}.diff").write_text(diff, encoding="utf-8")
    return {"code": name, "commit": commit}


def devices_of_a_run() -> str:
    """Say which devices each run gets: only runs on the same ones share phases."""
    from jaxreason.sweep import queue

    if FLAGS.engine:
        return f"{FLAGS.engine} {FLAGS.engine_options}"
    kind, _ = queue.find_devices()
    worker = queue.make_workers(FLAGS.workers, FLAGS.devices_per_run)[0]
    return f"{len(worker.cores) if kind == 'core' else FLAGS.devices_per_run} {kind}"


def list_runs(asked: Asked, folder: Path) -> list[str]:
    """The lines of `--dry_run`."""
    from jaxreason.runtime.terminal import duration
    from jaxreason.sweep import predict
    from jaxreason.sweep.runs import dropped_fields, dropped_lines, make_runs

    runs = make_runs(asked.sweep, folder, FLAGS.share and not engine_flags.is_handed_over(), devices_of_a_run())
    needed = predict.needs(runs)
    chosen = "; --search chooses arms of them until the budget or --trials end it" if FLAGS.search else ""
    lines = [f"{len(runs)} runs in {folder}{chosen}", *dropped_lines(dropped_fields(runs)), ""]
    for run in runs:
        need = needed[run.name]
        parts = ["done" if run.is_done() else f"stops after {run.stop_after}" if run.stop_after else ""]
        at_most = "at most " if need.by_formula else ""
        parts += [f"{run.steps} steps", f"{at_most}{need.flops:.3g} FLOPs" if need.flops else "FLOPs unknown"]
        parts += [f"about {duration(need.wall_s)}"] if need.wall_s else []
        parts += [f"{need.joules:,.0f} J"] if need.joules else []
        parts += [f"{need.bytes / 2**20:,.0f} MiB"] if need.bytes else []
        parts += [f"begins with {run.shared.name}"] if run.shared else []
        lines.append(f"  {run.name}: {', '.join(filter(None, parts))}")
        lines.append(f"    {shlex.join(run.words)}")
    if left := predict.flops_left(runs, needed):
        lines += ["", f"in all: at most {left:.3g} FLOPs, without what is done and with shared phases once"]
    known = [need for need in needed.values() if need.bytes]
    if known:
        free, size = shutil.disk_usage(folder if folder.exists() else Path.cwd()).free, sum(need.bytes for need in known)
        lines += ["", f"disk: about {size / 2**20:,.0f} MiB of {free / 2**20:,.0f} MiB that are free"]
    if engine_flags.is_handed_over():
        from jaxreason.sweep import fleet

        lines += fleet.dry_run(asked.sweep, folder)
    return lines


def runs_and_needs(asked: Asked, folder: Path) -> dict:
    """The object of `--dry_run --json`: each run with its folder and its needs, and the
    FLOPs of all at most; null where a need is not known.
    """
    from jaxreason.sweep import predict
    from jaxreason.sweep.runs import make_runs

    runs = make_runs(asked.sweep, folder, FLAGS.share, devices_of_a_run())
    needed = predict.needs(runs)
    listed = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "shared": str(run.shared) if run.shared else None,  # folder of the run that it begins with a copy of
            "steps": run.steps,
            "done": run.is_done(),
            "flops_at_most": needed[run.name].flops,
            "flops_unrecorded": predict.flops_unrecorded(run.config, run.stop_after),  # at most, of a run that is killed
            "wall_s": needed[run.name].wall_s,
            "bytes": needed[run.name].bytes,
        }
        for run in runs
    ]
    return {"folder": str(folder), "runs": listed, "flops_at_most": predict.flops_left(runs, needed)}


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def run_sweep(asked: Asked, folder: Path) -> None:
    """Execute the runs of a sweep, and write its report."""
    from jaxreason.runtime import workdir
    from jaxreason.sweep import fleet, jobs, progress, queue, results, search
    from jaxreason.sweep.runs import dropped_fields, dropped_lines, make_runs

    fleet.check_none_handed_over(folder)
    runs = make_runs(asked.sweep, folder, FLAGS.share, devices_of_a_run())
    importlib.import_module("jaxreason.sweep.report")  # now: its file may change before a long sweep ends
    budget = search.parse_budget(FLAGS.budget)
    suite, temperature = results.parse_metric(asked.sweep.metric, runs[-1].config)
    if FLAGS.follow:
        workers = [queue.Worker(f"job {i}", frozenset(), {}) for i in range(FLAGS.workers or 8)]
    else:
        workers = queue.make_workers(FLAGS.workers, FLAGS.devices_per_run)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(workdir.lock(folder, print, "--folder"))
        known = write_definition(folder, definition(asked) | {"dropped": dropped_fields(runs), "search": how_searched()})
        if asked.prepare is not None:
            asked.prepare(folder, asked.sweep.seeds)
            runs = make_runs(asked.sweep, folder, FLAGS.share, devices_of_a_run())  # with the files that are there now
        state = queue.State(folder / "state.json")
        print(f"sweep: {count(len(known['arms']), 'arm')}, seeds {known['seeds']}, {count(len(workers), 'worker')}, in {folder}")
        print("".join(f"{line}\n" for line in dropped_lines(dropped_fields(runs))), end="", flush=True)
        metric = results.name_metric(suite, temperature)
        with queue.interruptible() as stopped, progress.shown(runs, state, metric, len(workers)) as (show, say):
            keywords = {"retries": FLAGS.retries, "provenance": lambda: provenance(folder), "show": show, "say": say}
            keywords["stopped"] = lambda: stopped() or (budget is not None and search.spent(runs, budget[0]) >= budget[1])
            if FLAGS.follow:
                keywords["launch"] = jobs.Jobs(FLAGS.engine, folder, jobs.parse_options(FLAGS.engine_options))
            if FLAGS.search is None:
                queue.execute(runs, workers, state, folder, **keywords)
            else:
                options = {"search": FLAGS.search, "pruner": FLAGS.pruner, "trials": FLAGS.trials, "share": FLAGS.share}
                options["machine"] = devices_of_a_run()
                options["stop_arm"] = lambda run, reason: state.set(run, status="pruned", reason=reason)
                study = search.Search(asked.sweep, folder, **options)
                keywords |= {"prune": study.prune, "more": study.more, "finished": study.finished}
                queue.execute([], workers, state, folder, **keywords)
            if stopped():
                say("stopped; the same command continues")
                sys.exit(130)
            if budget is not None:
                say(f"used {search.spent(runs, budget[0]):.3g} of {budget[1]:.3g} {budget[0]}")
            if keywords["stopped"]():
                say(f"the budget of {FLAGS.budget} is spent; the same command with a larger one continues")
    report(folder)


def hand_over(asked: Asked, folder: Path) -> None:
    """Hand the runs of a sweep over to an engine, collect those that are done, and
    write the report of these.
    """
    from jaxreason.runtime import workdir
    from jaxreason.sweep import fleet
    from jaxreason.sweep.queue import State
    from jaxreason.sweep.runs import dropped_fields, dropped_lines

    if asked.prepare is not None:
        raise ValueError(
            f"{asked.experiment} makes files for its runs on this machine (prepare), which jobs of --engine={FLAGS.engine} can't "
            "read; allowed: without --engine"
        )
    chosen = fleet.read_flags(folder)
    runs = fleet.make_runs(asked.sweep, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(workdir.lock(folder, print, "--folder"))
        write_definition(folder, definition(asked) | {"dropped": dropped_fields(runs), "search": ""})
        print("".join(f"{line}\n" for line in dropped_lines(dropped_fields(runs))), end="", flush=True)
        state = State(folder / "state.json")
        fleet.hand_over(runs, state, chosen, lambda: provenance(folder), FLAGS.retries, FLAGS.workers)
    if any(run.is_done() for run in runs):
        report(folder)
    elif any(state.of(run)["status"] == "failed" for run in runs):
        sys.exit(1)


def recorded_config(folder: Path, known: dict) -> dict:
    """Return the config of the first run that recorded one, or else of the baseline. A
    report can thus be written where the config file is not.
    """
    from jaxreason.runtime.workdir import json_object
    from jaxreason.sweep.runs import read_config

    for arm, seed in itertools.product(known["arms"], known["seeds"]):
        found = json_object(folder / "runs" / arm / f"seed{seed}" / "config.json") or {}
        if isinstance(found.get("evaluate"), dict) and found.get("phases"):
            return found
    return read_config(known["config"], {**known["common"], **next(iter(known["arms"].values()))})


def how_searched() -> str:
    """Say how arms are chosen; nothing if all of them are run."""
    if FLAGS.search is None:
        return ""
    return f"{FLAGS.search}, pruner {FLAGS.pruner}" + (f", budget {FLAGS.budget}" if FLAGS.budget else "")


def setting(known: dict) -> str:
    """Say what all arms of a sweep have in common, as words of a command."""
    return shlex.join([f"--config={known['config']}", *(f"--config.{field}={value}" for field, value in known["common"].items())])


def report(folder: Path) -> None:
    """Write the report of a sweep, and print it."""
    from jaxreason.sweep import queue, results
    from jaxreason.sweep import report as reports

    known = read_definition(folder)
    if known is None:
        raise ValueError(f"{folder} is no folder of a sweep: it has no sweep.json")
    config = recorded_config(folder, known)
    metric = results.parse_metric(FLAGS.metric or known.get("metric"), config)
    states = queue.read_states(folder / "state.json")
    made = reports.make_report(folder, known["arms"], known["seeds"], metric, states, FLAGS.across_commits)
    made.setting, made.dropped = setting(known), known.get("dropped") or {}
    made.search = known.get("search") or ""
    drawn = draw(made, folder, config["phases"][-1], known.get("experiment") or "") if FLAGS.figures and made.arms else True
    print(reports.write_report(made, folder))
    print(f"written: {folder / 'report.md'}, {folder / 'report.json'}")
    if not drawn or any(what.startswith("failed") for what in made.missing.values()):
        sys.exit(1)


def draw(made, folder: Path, last_phase: str, experiment: str) -> bool:
    """Draw the figures of a report, and what the experiment adds to it. Return whether
    that succeeded: whatever the experiment's own code raises, the report is written.
    """
    from jaxreason.sweep import report as reports

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    path = Path(os.path.expanduser(experiment.partition(":")[0]))
    try:
        reports.draw_figures(made, folder, last_phase, say)
        if path.is_file():  # it may be on another machine
            runpy.run_path(str(path)).get("figures", lambda *_: None)(folder, made)
    except ModuleNotFoundError as error:
        say(f"no figures: {error.name} is not installed; pip install 'jaxreason[look]'")
    except Exception as error:
        say(f"error: figures of {path if path.is_file() else folder}: {type(error).__name__}: {' '.join(str(error).split())}")
        return False
    return True


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    words = FLAGS["config"].words
    try:
        if len(argv) > 1:
            raise ValueError(f"got the words {' '.join(argv[1:])!r}; all that a sweep takes are flags, see --help")
        if FLAGS.report is not None:
            report(Path(os.path.expanduser(FLAGS.report)))
            return
        if FLAGS.json and not FLAGS.dry_run:
            raise ValueError("got --json without --dry_run; allowed: with it")
        asked = read_sweep(words)
        folder = Path(os.path.expanduser(FLAGS.folder)) if FLAGS.folder else default_folder(asked)
        if FLAGS.dry_run:
            print(json.dumps(runs_and_needs(asked, folder)) if FLAGS.json else "\n".join(list_runs(asked, folder)))
        else:
            (hand_over if engine_flags.is_handed_over() else run_sweep)(asked, folder)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install 'jaxreason[sweep]'")
    except KeyboardInterrupt:  # a second one: the runs are stopped, but perhaps not saved
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


OF_A_SEARCH = ("pruner", "trials")


def check_search(given: Sequence[str], search: str | None) -> None:
    """Raise ValueError if a flag is given that only a search reads."""
    for name in given:
        if name in OF_A_SEARCH and search is None:
            raise ValueError(f"got --{name} without --search; allowed: with --search=random or --search=tpe")


def parse_flags(argv: list[str]) -> list[str]:
    try:
        words = command.split(argv)
        rest = FLAGS(words.rest)
        check_search([name for name in OF_A_SEARCH if FLAGS[name].present], FLAGS.search)
        engine_flags.check_flags()
        FLAGS["config"].words = words
        return rest
    except (flags.Error, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
