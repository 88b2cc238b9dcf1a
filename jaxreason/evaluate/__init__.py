"""Evaluations: attempts of a checkpoint at suites of held-out tasks, made, continued
after a kill, and summarised.

    asked       flags -> which checkpoint, suites and settings
    identity    what makes two evaluations the same: checkpoint, settings, tasks
    attempts    rollouts.jsonl, written as attempts finish
    series      attempts at one suite, at one temperature and budget, and their summary
    table       progress and results on the terminal

`python -m jaxreason.evaluate` is the entry point. The statistics are those of an
evaluation inside a run: see `jaxreason.evaluation`.
"""
