"""Measure a whole RL step: sampling, scoring and the update; see `bench.learner`."""

import functools

from jaxreason.bench import learner

run = functools.partial(learner.run, whole=True)
