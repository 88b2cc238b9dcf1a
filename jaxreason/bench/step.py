"""A whole step of RL, sampled, scored and learned from; see `bench.learner`."""

import functools

from jaxreason.bench import learner

run = functools.partial(learner.run, whole=True)
