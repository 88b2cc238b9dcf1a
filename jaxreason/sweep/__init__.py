"""Sweeps: the same config with different fields, on paired seeds, run, resumed and
compared.

    arms        arms from Python or from a grid, and the names of their folders
    runs        the runs of a sweep: commands, folders, and the phases that they share
    queue       workers that execute runs, one process each, and the state of each run
    results     what finished runs measured
    report      table, sentences, figures

An experiment is a file with a function `sweep(arg)` that returns a `Sweep`; see
`experiments/`. Two more functions are called if it has them: `prepare(folder, seeds)`
before the runs, to make data or checkpoints that they read (it must skip what is there:
the same command continues), and `figures(folder, report)` at the end.
"""

from jaxreason.sweep.arms import Sweep, chain, fixed, over, product, zip_

__all__ = ["Sweep", "chain", "fixed", "over", "product", "zip_"]
