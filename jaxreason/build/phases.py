"""Build phases: each has a source, an objective and an optimizer."""

from __future__ import annotations

from collections.abc import Callable

from jaxreason import batching, data, platforms, sources
from jaxreason import objectives as objectives_
from jaxreason import optimizer as optimizer_
from jaxreason.build.batches import Attempts, choose_microbatches, choose_rollouts_per_prompt, divisors
from jaxreason.build.environments import make_environment
from jaxreason.build.hints import make_hints
from jaxreason.build.mix import make_mix
from jaxreason.build.objective import check_distillation, check_objective, check_own
from jaxreason.build.sampler import make_filter
from jaxreason.build.tasks import (
    Parts,
    check_keys,
    check_positive,
    check_solutions,
    drop_long_prompts,
    encode_documents,
    equivalence_of,
    load_trained,
    parts_of,
)
from jaxreason.build.teacher import make_reference
from jaxreason.cost import shared_length
from jaxreason.draw import ALL, LOWEST_TEMPERATURE, is_temperature
from jaxreason.objectives.losses import nll
from jaxreason.options import call_with_section, find
from jaxreason.rollout import Completer
from jaxreason.train import Phase


def make_phase(
    *,
    name: str,
    parts: Parts,
    source: dict,  # source of the batches
    objective: dict,  # training objective
    optimizer: dict,  # update rule of the params
    steps: int,  # batches to train on; 0: evaluate only
    microbatches: int | None = None,  # parts of a batch to accumulate gradients over; None: as many as suit this machine
    updates_per_batch: int = 1,  # train steps per batch
    evaluate_every: int = 0,  # steps between evaluations; 0: only at the end of the phase
    log_every: int = 1,  # steps per line of metrics
    offload_reference: bool = False,  # keep the reference params in host memory while they are not used
    max_skipped: int = 5,  # stop the run after this many consecutive batches without a finite update
    reference: str | None = None,  # reference policy: start, current, or a checkpoint (its teacher); None: the objective's, start
) -> Phase:
    """Make one phase: `Source x Objective x steps`."""
    if steps < 0:
        raise ValueError(f"config.{name}.steps got {steps}; allowed: 0 (evaluate only) or more")
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"config.{name}.microbatches got {microbatches}; allowed: 1 or more, or None to choose")
    check_positive(f"config.{name}", updates_per_batch=updates_per_batch, max_skipped=max_skipped, log_every=log_every)
    if evaluate_every < 0:
        raise ValueError(f"config.{name}.evaluate_every got {evaluate_every}; allowed: 0 (at the end only) or more")
    made_objective = call_with_section(objectives_.make, objective, f"config.{name}.objective")
    optimizer = without_ignored(optimizer, f"config.{name}.optimizer", parts.say)
    try:
        made_optimizer = call_with_section(
            optimizer_.make, optimizer, f"config.{name}.optimizer", steps=steps * updates_per_batch
        )
    except ValueError as error:
        raise ValueError(f"config.{name}.optimizer: {error}") from None
    for part, section in parts_of(source).items():
        if section.get("objective") is None and (not part or section.get("name") == "rollouts"):
            if ":" in objective["name"]:
                group = section.get("group", 1)
                check_own(made_objective, where=f"config.{name}", what=objective["name"], group=group)
            check_objective(
                made_objective,
                name=name,
                what=objective["name"],
                where=f"{name}.source" + f".of.{part}" * bool(part),
                source=section,
                updates_per_batch=updates_per_batch,
                parts=parts,
            )
    if optimizer.get("value_lr") is not None and parts.model.value is None:
        raise ValueError(f"config.{name}.optimizer.value_lr is for a value head; set model.value_head=True, or leave it None")
    if source.get("name") == "mix" and (made_objective.critic is not None or made_objective.prepare):
        raise ValueError(
            f"config.{name}: objective {objective['name']!r} makes advantages of values, or chooses tokens, over a whole batch; "
            "allowed with the source rollouts alone, or an objective without these in a mix, such as grpo"
        )
    if offload_reference and not made_objective.refers:
        raise ValueError(
            f"config.{name}.offload_reference got True, but the objective has no reference policy; allowed: False, or set "
            f"{name}.objective.kl_coefficient above 0"
        )
    check_distillation(name, objective, made_objective, source)
    hinted = source.get("hint", "none") != "none"
    made_reference = make_reference(reference, made_objective, hinted, name, parts)
    if offload_reference and made_reference == "current":
        raise ValueError(f"config.{name}.offload_reference got True, but the reference is the current params; allowed: False")
    chosen = microbatches is None
    microbatches = microbatches_of(source, parts) if chosen else microbatches
    arguments = {"parts": parts, "objective": made_objective, "microbatches": microbatches, "steps": steps}
    made_source = call_with_section(make_source, {"name": None} | source, f"config.{name}.source", **arguments)
    check_rows(name, made_source.rows, parts.devices, microbatches, of_parts=source["name"] == "mix")
    if chosen:
        parts.say(f"{name}: microbatches={microbatches}, chosen for this machine; --config.{name}.microbatches changes it")
    return Phase(
        name,
        made_source,
        made_objective,
        made_optimizer,
        steps,
        microbatches,
        updates_per_batch,
        evaluate_every,
        log_every,
        offload_reference,
        max_skipped,
        made_reference,
    )


def check_rows(name: str, rows: int, devices: int, microbatches: int, of_parts: bool) -> None:
    """Raise ValueError if the rows of a batch do not divide over devices x
    micro-batches. It names the numbers that do, except for a mix (`of_parts`), whose
    parts must divide as well.
    """
    if rows % (devices * microbatches) == 0:
        return
    each, more = divmod(rows, devices)
    allowed = [] if more or of_parts else divisors(each)
    instead = f"microbatches may be {', '.join(map(str, allowed))}, or None to choose; or " if allowed else ""
    raise ValueError(
        f"config.{name} has {rows} rows a batch, which do not divide over {devices} devices x {microbatches} micro-batches; "
        f"{instead}change rows, problems x group or source.rollouts_per_prompt"
    )


def microbatches_of(source: dict, parts: Parts) -> int:
    """Choose the number of micro-batches of a source's batches for this machine."""
    limits = Attempts(parts.completer.max_tokens, parts.completer.sampler.length - parts.completer.max_tokens)
    platform = platforms.platform_of(parts.meshes.learn)
    return choose_microbatches(parts_of(source).values(), parts.model.config, limits, parts.devices, platform)


def without_ignored(section: dict, where: str, say: Callable[[str], None]) -> dict:
    """Drop the fields that the section's optimizer does not read, with a warning."""
    unread = optimizer_.ignored(section)
    for field, (why, default) in unread.items():
        say(f"warning: {where}.{field}={section[field]!r} changes nothing: {why}; --{where}.{field}={default} silences this")
    return {name: value for name, value in section.items() if name not in unread}


def make_source(
    *,
    name: str,  # corpus, demonstrations, rollouts, kept_rollouts, mix, or module:maker of your own
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    **section,
) -> sources.Source:
    """Make the named source."""
    arguments = {"parts": parts, "objective": objective, "microbatches": microbatches, "steps": steps}
    arguments |= {"keep": None} if name == "rollouts" else {}  # so it is no field of its section
    made = call_with_section(find("source", name, SOURCES), section, f"source {name!r}", **arguments)
    if not isinstance(made, sources.Source):
        raise ValueError(f"source {name!r} made a {type(made).__name__}; allowed: a sources.Source")
    return made


def corpus(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    task: dict,  # texts, or tasks with worked solutions
    rows: int,  # windows per batch
    length: int,  # tokens per window
) -> sources.Source:
    """Draw windows of `length` tokens from the token stream of a text corpus or of a
    task family's worked solutions.
    """
    check_positive("source", rows=rows, length=length)
    windows = data.token_windows(encode_documents(load_trained(task, parts), parts, task), length)
    return sources.corpus(data.batches(data.shuffled(windows, seed=parts.seed), rows), objective, rows=rows)


def demonstrations(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    task: dict,  # tasks with worked solutions
    rows: int,  # solutions per batch
    max_tokens: int,  # tokens per prompt and solution; longer ones are cut
    pack: bool = True,  # put several short ones in a row
) -> sources.Source:
    """Draw `rows` worked solutions per batch, each cut to `max_tokens` tokens, prompt
    included.
    """
    check_positive("source", rows=rows, max_tokens=max_tokens)
    items = check_solutions(load_trained(task, parts), task)
    parts.format.demonstration(items[0])  # raises if the template can't render demonstrations
    buckets = batching.length_buckets(max_tokens)
    return sources.demonstrations(
        data.shuffled(items, seed=parts.seed),
        parts.format.demonstration,
        objective,
        rows=rows,
        buckets=buckets,
        pack=pack,
        microbatches=microbatches,
    )


def rollouts(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    keep: sources.Keep | None = None,
    task: dict,  # tasks to attempt
    problems: int,  # problems per batch
    group: int,  # attempts per problem
    temperature: float = 1.0,  # sampling temperature
    max_tokens: int | None = None,  # tokens per attempt; None: sampler.max_tokens
    reward: str = "verdict",  # verdict; majority: the most frequent answer is right; random or format: controls
    credit: str = "rollout",  # rollout, or attempt: each attempt of environment retry is paid for its own reward
    dynamic_sampling: int = 1,  # draw up to this many times `problems`, until enough have mixed rewards
    replay: int = 0,  # problems per batch that come from earlier batches, with mixed rewards
    replay_age: int = 4,  # batches; older ones are not replayed
    curriculum: dict | None = None,  # {'name': 'success_rate'}: which tasks to pass over when they come again; None: none
    lag: int = 0,  # updates between the params that sample and those that learn
    pack: bool = True,  # put several short attempts in a row
    rollouts_per_prompt: int
    | None = None,  # attempts per copy of the prompt in the learner; None: the number with the least work
    hint: str = "none",  # what a teacher is shown beside the prompt: answer, solution, verdict or attempt (see sources.hints)
    hint_text: str | None = None,  # its question: text with {question} and {hint}; None: that of the kind
    hint_tokens: int | None = None,  # tokens that a hint may add to a prompt; None: as many as needed, or as an attempt may have
    top_k: int = 0,  # refused in training unless 0: the importance ratio would be biased
    top_p: float = 1.0,  # refused in training unless 1
    min_p: float = 0.0,  # refused in training unless 0
) -> sources.Source:
    """Sample `group` verified attempts at each of `problems` tasks per step, from the
    params `lag` updates ago.

    Training refuses truncated sampling; `top_k`, `top_p` and `min_p` exist only to give
    a helpful error.
    """
    if make_filter(top_k, top_p, min_p, "source") != ALL:
        raise ValueError(
            f"source got top_k={top_k}, top_p={top_p}, min_p={min_p}; allowed in training: 0, 1 and 0. The learner's log-probs "
            "are over all tokens, so the importance ratio would be biased: on-policy it would be the mass of the kept tokens. "
            "Change the temperature instead, or set them in config.evaluate"
        )
    check_positive("source", problems=problems, group=group)
    if temperature == 0 or not is_temperature(temperature):
        raise ValueError(
            f"source.temperature got {temperature}; allowed: finite, above 0 (greedy attempts are all alike), at least "
            f"{LOWEST_TEMPERATURE:g}"
        )
    completer = parts.completer if max_tokens is None else with_limit(parts.completer, max_tokens)
    longest_prompt = completer.sampler.length - parts.completer.max_tokens
    share = choose_rollouts_per_prompt(
        rollouts_per_prompt,
        parts.model.config,
        group=group,
        rows=problems * group,
        multiple=parts.devices * microbatches,
        longest_prompt=longest_prompt,
        completion=completer.max_tokens,
    )
    loaded, what = load_trained(task, parts), f"task {task['name']!r}"
    made = make_environment(parts.environment, parts.verifier, loaded, parts)
    prompted = drop_long_prompts(loaded, made.format.prompt, longest_prompt, what, parts.say)
    if made.asks_verifier:
        check_keys([task for task, _ in prompted], parts.verifier, what, parts.say)
    sizes = {"longest_prompt": longest_prompt, "completion": completer.max_tokens, "share": share}
    hints = make_hints(hint, hint_text, hint_tokens, tasks=prompted, prompt=made.format.prompt, **sizes)
    return sources.rollouts(
        data.shuffled(prompted, seed=parts.seed),
        made.environment,
        completer,
        objective,
        problems=problems,
        group=group,
        temperature=temperature,
        buckets=batching.length_buckets(shared_length(longest_prompt, [completer.max_tokens] * share)),
        reward=reward,
        same=equivalence_of(parts.verifier) if reward == "majority" else None,  # it makes a judge
        dynamic_sampling=dynamic_sampling,
        credit=credit,
        replay=replay,
        replay_age=replay_age,
        keep=keep,
        curriculum=None if curriculum is None else curriculum_of(curriculum, len(prompted)),
        pack=pack,
        microbatches=microbatches,
        rollouts_per_prompt=share,
        lag=lag,
        hints=hints,
        background=not set(parts.meshes.sample.devices.flat) & set(parts.meshes.learn.devices.flat),
        steps=steps,
    )


def with_limit(completer: Completer, max_tokens: int) -> Completer:
    if not 1 <= max_tokens <= completer.max_tokens:
        raise ValueError(f"source.max_tokens got {max_tokens}; allowed: 1 to sampler.max_tokens={completer.max_tokens}")
    return completer._replace(max_tokens=max_tokens)


def kept_rollouts(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    correct: bool = True,  # keep right attempts only
    per_problem: int | None = None,  # attempts to keep per problem, at most; None: all
    distinct: bool = True,  # of equal texts keep only the first
    **section,
) -> sources.Source:
    """Sample attempts as `rollouts` does, and learn from the right ones as
    demonstrations: rejection sampling.

    It is the inner loop of STaR (Zelikman et al. 2022, arXiv 2203.14465) without its
    rationalisation, and always with the newest params; STaR begins each round from the
    first ones. Distinct attempts are those of RFT (Yuan et al. 2023, arXiv 2308.01825),
    which tells them apart by their equations, here by their texts. A batch may have
    fewer rows than attempts, or none: then nothing is learned from it.
    """
    where = "source 'kept_rollouts'"
    if objective.token_loss is not nll:
        raise ValueError(f"{where} gives demonstrations, which an objective must imitate; allowed: sft, lm, expert_iteration")
    for field in ("replay", "dynamic_sampling", "rollouts_per_prompt", "credit", "hint", "hint_text", "hint_tokens"):
        if field in section:
            raise ValueError(f"{where} has no field {field!r}; allowed: with the source rollouts")
    keywords = {"parts": parts, "objective": objective, "microbatches": microbatches, "steps": steps}
    keep = sources.Keep(correct, per_problem, distinct)
    return call_with_section(rollouts, section, where, **keywords, keep=keep, rollouts_per_prompt=1)


def curriculum_of(section: dict, epoch: int) -> sources.SuccessRate:
    return call_with_section(sources.make_curriculum, {"name": None} | section, "source.curriculum", epoch=epoch)


def mix(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    of: dict,  # parts by name: each a source, with an objective if it is not that of the phase but imitates
    weights: dict | None = None,  # factor of each part's loss, by name; 1 where it is left out
) -> sources.Source:
    """Join the batches of several sources, each with a weight: the loss is the weighted
    sum of theirs.
    """
    keywords = {"parts": parts, "objective": objective, "microbatches": microbatches, "steps": steps}
    return make_mix(make_source, **keywords, of=of, weights=weights)


SOURCES = {"corpus": corpus, "demonstrations": demonstrations, "rollouts": rollouts, "kept_rollouts": kept_rollouts, "mix": mix}
