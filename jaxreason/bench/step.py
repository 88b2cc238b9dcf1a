r"""Measure a whole RL step: sampling, scoring and the update.

    python -m jaxreason.bench step --config=configs/tiny.py \
        --prompts=8 --group=8 --prompt_tokens=32 --tokens=128

`python -m jaxreason.bench learner --help` says what is timed and what the floor is.
"""

import functools

from jaxreason.bench import learner

run = functools.partial(learner.run, whole=True)
