"""From a config to a run: the only reader of ConfigDict.

Each section of a config is the keyword arguments of one function here or below, so a
field that nothing reads can't exist: it is refused by name. Everything that can be wrong
with a config is found here, before anything is compiled.

    layout       the fields of a config, their defaults, and those of earlier versions
    model        model, params, tokenizer and prompt format
    sampler      the compiled sampler and the text handling around it
    tasks        tasks of sources and suites, and what judges them
    phases       sources, objectives, optimizers
    evaluation   held-out tasks and texts; the options of the log
    run          `build`: all of these together
"""

from jaxreason.build.evaluation import make_log
from jaxreason.build.layout import (
    OPTIONAL,
    SECTIONS,
    VERSION,
    check_changes,
    complete,
    families,
    from_earlier,
    is_phase,
    layout,
    section,
    section_of_model,
    section_of_objective,
    section_of_source,
    section_of_task,
    section_of_verifier,
    settle,
)
from jaxreason.build.model import Described, check_size, describe, find_described, init_params, make_model, make_text
from jaxreason.build.phases import SOURCES, attempts_that_share, corpus, demonstrations, rollouts
from jaxreason.build.run import build
from jaxreason.build.sampler import make_roller
from jaxreason.build.tasks import check_keys, judge, make_environment

__all__ = [
    "OPTIONAL",
    "SECTIONS",
    "SOURCES",
    "VERSION",
    "Described",
    "attempts_that_share",
    "build",
    "check_changes",
    "check_keys",
    "check_size",
    "complete",
    "corpus",
    "demonstrations",
    "describe",
    "families",
    "find_described",
    "from_earlier",
    "init_params",
    "is_phase",
    "judge",
    "layout",
    "make_environment",
    "make_log",
    "make_model",
    "make_roller",
    "make_text",
    "rollouts",
    "section",
    "section_of_model",
    "section_of_objective",
    "section_of_source",
    "section_of_task",
    "section_of_verifier",
    "settle",
]
