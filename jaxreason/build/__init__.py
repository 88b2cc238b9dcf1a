"""From a config to a run: the only package that reads a ConfigDict.

Each section of a config is the keyword arguments of one function here or below, so a
field that nothing reads is refused by name. All errors in a config are raised here,
before anything is compiled.

    layout       the fields of a config, their defaults, and those of earlier versions
    model        model, params, tokenizer and prompt format
    sampler      the compiled sampler and its text handling
    tasks        tasks of sources and suites, and their judges
    environments tools and further attempts around a judge
    phases       sources, objectives, optimizers
    batches      rows, attempts behind a prompt, micro-batches
    teacher      reference policies
    hints        what a teacher is shown beside the prompt
    evaluation   held-out tasks and texts; the options of the log
    run          `build`: all of these together
    start        `open_run`: build a run, lock its folder, open its checkpoints
"""

from jaxreason.build.batches import Attempts, batch_size, choose_microbatches, choose_rollouts_per_prompt
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
from jaxreason.build.model import (
    ModelAndText,
    check_size,
    find_model_and_text,
    init_params,
    make_model,
    make_text,
    read_model_and_text,
    read_shape,
    reword,
)
from jaxreason.build.phases import SOURCES, corpus, demonstrations, rollouts
from jaxreason.build.run import build
from jaxreason.build.sampler import make_completer
from jaxreason.build.tasks import check_keys, judge, make_judge

__all__ = [
    "OPTIONAL",
    "SECTIONS",
    "SOURCES",
    "VERSION",
    "Attempts",
    "ModelAndText",
    "batch_size",
    "build",
    "check_changes",
    "check_keys",
    "check_size",
    "choose_microbatches",
    "choose_rollouts_per_prompt",
    "complete",
    "corpus",
    "demonstrations",
    "families",
    "find_model_and_text",
    "from_earlier",
    "init_params",
    "is_phase",
    "judge",
    "layout",
    "make_completer",
    "make_judge",
    "make_log",
    "make_model",
    "make_text",
    "read_model_and_text",
    "read_shape",
    "reword",
    "rollouts",
    "section",
    "section_of_model",
    "section_of_objective",
    "section_of_source",
    "section_of_task",
    "section_of_verifier",
    "settle",
]
