"""Notebook API: load a model, sample from it, make train steps.

It uses the parts that `main` builds from a config, but keeps the state in a `Policy`
instead of a run folder: `sample` and `train_step` take a policy, and `train_step`
returns the next one. It has no checkpoints, logs, evaluation or reference policy; for
these write a config and run `python -m jaxreason.main`.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import batching, build, learner, metrics, objectives, sharding, sources
from jaxreason import optimizer as optimizers
from jaxreason.build.environments import Made, make_unjudged, unjudged
from jaxreason.build.tasks import Parts
from jaxreason.draw import TEMPERATURES, is_temperature
from jaxreason.environment import single_turn, verifier_failed
from jaxreason.learner import name_metrics, new_state
from jaxreason.model import Model, transformer
from jaxreason.objectives import controls
from jaxreason.options import call_with_section, fields, new_name
from jaxreason.platforms import PLATFORMS
from jaxreason.rollout import Completer, Request, collect_groups
from jaxreason.runtime import mirror, warm_start
from jaxreason.runtime.workdir import checkpoints_of
from jaxreason.text import Format, Tokenizer, check_vocabulary
from jaxreason.types import Group, Task, TrainState, Verdict


class Policy(NamedTuple):
    """Model, tokenizer, sampler and train state."""

    model: Model
    tokenizer: Tokenizer
    format: Format
    completer: Completer
    mesh: jax.sharding.Mesh
    state: TrainState  # `opt_state` is None before the first train step
    learning: tuple | None = None  # fields of the objective and optimizer that made `state.opt_state`
    playing: Callable[[Callable], Made] | None = None  # from a verifier to the environment and its prompts; None: a single turn

    @property
    def params(self) -> Any:
        return self.state.params

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
        c, count = self.model.config, sum(x.size for x in jax.tree.leaves(self.params))
        return f"Policy({count:,} params, {c.layers} layers, {c.dtype}, mesh {sizes}, {int(self.state.step)} steps trained)"


def load(
    path: str | Path,
    *,
    max_prompt_tokens: int = 512,
    max_tokens: int = 256,
    slots: int = 16,
    mesh: Mapping[str, int] | None = None,
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a model to sample from and to train.

    Args:
      path: a Hugging Face id, a named size ("qwen2.5_0.5b"), the folder of a checkpoint
        in Hugging Face format, or a jaxreason run (RUN, or RUN/checkpoints/STEP).
      max_prompt_tokens: tokens per prompt, at most.
      max_tokens: tokens per completion, at most.
      slots: completions sampled at the same time.
      mesh: sizes of the axes data, fsdp and tensor; None uses one device.
      seed: for weights that the checkpoint lacks, such as new adapters.
      model: fields of a config's `model` section. By default params are float32 and the
        computation is float32 on a CPU and bfloat16 elsewhere; a run keeps its own
        fields.
      text: fields of a config's `text` section. By default the chat template with the
        unchanged question; a run keeps its own fields.
      environment: a config's `environment` section with tools, such as {"name":
        "with_tools", "tools": ("python",)}; `sample` answers the model's calls. By
        default that of the run, or none; {"name": "single_turn"} takes a run's tools
        away.

    Raises:
      ValueError, FileNotFoundError: no such model, or fields that do not fit it.
    """
    check_types(load, path=path, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, slots=slots, mesh=mesh, seed=seed)
    check_types(load, model=model, text=text, environment=environment)
    if not os.fspath(path):
        raise ValueError("load: path got ''; allowed: a Hugging Face id, a named size, or a folder")
    sizes = {"data": 1} if mesh is None else dict(mesh)
    fields.check(build.section(sharding.make_mesh, "devices")(sizes), sizes, "mesh")
    devices = jax.devices()[: None if -1 in sizes.values() else max(1, math.prod(sizes.values()))]
    placed = call_with_section(sharding.make_mesh, sizes, "mesh", devices=devices)
    described, reword, own = describe(path, model or {}, text or {}, devices[0].platform)
    check_vocabulary(described.tokenizer, described.shape)
    build.check_size(described.shape, placed.devices)
    made = transformer(described.shape, placed)
    words = {"tokenizer": described.tokenizer, "format": described.format}
    limits = {"slots": slots, "max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    completer = build.make_completer(model=made, mesh=placed, processes=1, **words, **limits)
    if environment is not None and environment.get("name") not in PLAYED:
        raise ValueError(f"load: environment got name={environment.get('name')!r}; allowed: {' or '.join(PLAYED)}")
    playing = player(own if environment is None else environment, described.tokenizer, described.format, reword)
    say_once(f"loading {path}", completer.sampler)
    params = build.init_params(made, described.load, seed, placed)
    return Policy(made, **words, completer=completer, mesh=placed, state=TrainState(params, None, jnp.int32(0)), playing=playing)


PLAYED = ("with_tools", "single_turn")  # environments that `sample` plays; for others write a config


def player(section: Mapping[str, Any] | None, tokenizer: Tokenizer, format: Format, reword: Callable) -> Callable | None:
    """Return a function from a verifier to a new environment and the format of its
    prompts; None if there is no section.

    Raises:
      ValueError: a section that does not fit.
    """
    if section is None:
        return None
    where = {"seed": 0, "model": None, "completer": None, "meshes": sharding.Meshes(None, None), "devices": 1, "verifier": {}}

    say = functools.lru_cache(maxsize=16)(print)  # each note once

    def playing(verify: Callable[[str, Task], Verdict]) -> Made:
        words = {"tokenizer": tokenizer, "format": format, "reword": reword, "say": say, "loaded": [], "environments": []}
        return make_unjudged(section, Parts(**where, **words), verify)

    playing(unjudged)  # raises the section's errors before the params are loaded
    return playing


def describe(
    path: str | Path, model: Mapping, text: Mapping, platform: str
) -> tuple[build.ModelAndText, Callable[..., Format], Mapping | None]:
    """Read the model shape and text settings of a path, and how to load its params.

    Also return a function that makes the format with other words, and the run's own
    environment.
    """
    fields.check(build.section_of_model(dict(model)), dict(model), "model")
    fields.check(build.section(build.make_text, "folder")(dict(text)), dict(text), "text")
    folder = mirror.local(path)
    if not checkpoints_of(folder).is_dir() and folder.parent.name != "checkpoints":
        dtype = PLATFORMS[platform].dtype
        pretrained = {"name": str(path), "weights": "pretrained", "dtype": dtype, **model}
        words = {"tokenizer": "pretrained", "format": "chat", **text}
        mine = build.read_model_and_text(pretrained, words)
        return mine, functools.partial(build.reword, words, mine.folder), None
    found, theirs = build.find_model_and_text(folder)
    words = {**found.config["text"], **text}
    mine = build.read_model_and_text({**found.config["model"], **model}, words)
    warm_start.check(found, theirs.shape, mine.shape)
    mine = mine._replace(load=functools.partial(warm_start.load, found, theirs.shape, mine.shape))
    return mine, functools.partial(build.reword, words, mine.folder), found.config.get("environment")


def check_types(function: Callable, **values: Any) -> None:
    """Check arguments of a function of this module against its annotations.

    Raises:
      ValueError: an argument has the wrong type.
    """
    for field in fields.parameters(function):
        value = plain(values.get(field.name, field.default))
        if field.name in values and not fields.fits(value, field.type):
            raise ValueError(fields.wrong_type(f"{function.__name__}: {field.name}", value, field.type))


def plain(value: Any) -> Any:
    """Turn a NumPy or JAX scalar into a Python number, and a path into text."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@functools.lru_cache(maxsize=16)
def say_once(what: str, *of: Any) -> None:
    """Announce on stderr work that may take minutes, once per distinct arguments."""
    print(f"{what} ...", file=sys.stderr, flush=True)


def sample(
    policy: Policy,
    prompts: Sequence[str | Task],
    n: int = 1,
    *,
    temperature: float = 1.0,
    verify: Callable[[str, Task], Verdict] = unjudged,
    seed: int = 0,
) -> list[Group]:
    """Sample `n` completions of each prompt; return one group of rollouts per prompt.

    A prompt is a question or a `Task`; the policy's chat format renders it. Temperature
    0 is greedy. `verify(text, task)` judges each completion. Equal seeds give equal
    samples, whatever the order of the slots. The policy's tools, those of its run or of
    `load(environment=...)`, answer the model's calls; `verify` then judges the last
    turn.

    Raises:
      ValueError: a prompt that is too long, no prompt, n below 1, or a `verify` that
        fails or returns no Verdict.
    """
    check_policy(sample, policy)
    check_types(sample, n=n, temperature=temperature, seed=seed)
    several = isinstance(prompts, list | tuple) and all(isinstance(prompt, str | Task) for prompt in prompts)
    if not several or not prompts or n < 1:
        raise ValueError(f"sample got prompts={prompts!r}, n={n}; allowed: a list of questions or tasks, and n of 1 or more")
    if not callable(verify):
        raise ValueError(f"sample got verify={verify!r}; allowed: a function, such as jr.verify.make('number')")
    if not is_temperature(temperature):
        raise ValueError(f"sample got temperature={temperature}; allowed: {TEMPERATURES}")
    tasks = [Task(prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    made = Made(single_turn(verify), policy.format) if policy.playing is None else policy.playing(verify)
    ids = [made.format.prompt(task) for task in tasks]
    wanted = [[Request(task, p, g, ids[p]) for g in range(n)] for p, task in enumerate(tasks)]
    say_once("compiling the sampler", policy.completer.sampler)
    weights = policy.completer.sampler.prepare(policy.params)
    key = jax.random.key(seed)
    groups, _ = collect_groups(policy.completer, weights, wanted, made.environment, key=key, temperature=temperature)
    if failed := [r.verdict.reason for group in groups for r in group.attempts if verifier_failed(r.verdict)]:
        raise ValueError(f"verify failed for {len(failed)} of {len(groups) * n} completions; the first: {failed[0]}")
    return groups


def train_step(
    policy: Policy,
    groups: Sequence[Group],
    *,
    objective: str = "grpo",
    lr: float,
    microbatches: int = 1,
    objective_options: Mapping[str, Any] | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
) -> tuple[Policy, dict[str, float]]:
    """Make one update from groups of rollouts; return the new policy and its metrics.

    The params of `policy` are donated: continue with the returned policy. The optimizer
    state carries over between steps and is reset when the objective or the optimizer
    changes. Metrics are named as in `metrics.jsonl`.

    Args:
      policy: as returned by `load` or `train_step`.
      groups: as returned by `sample`, all of one size.
      objective: a name in `objectives.OBJECTIVES`, without a reference policy.
      lr: the learning rate, constant.
      microbatches: parts to accumulate the gradient over, to save memory.
      objective_options: further fields of a config's `objective` section.
      optimizer_options: further fields of a config's `optimizer` section (default:
        AdamW).

    Raises:
      ValueError: groups of different sizes, rollouts that nothing can be learned from
        (greedy ones, or rewards that are not finite), or a field that does not fit.
    """
    check_policy(train_step, policy)
    options = {"objective_options": objective_options, "optimizer_options": optimizer_options}
    check_types(train_step, objective=objective, lr=lr, microbatches=microbatches, **options)
    lr, microbatches = plain(lr), plain(microbatches)
    objective_options, optimizer_options = (
        {name: plain(value) for name, value in (given or {}).items()} for given in (objective_options, optimizer_options)
    )
    size = check_groups(groups)
    check_options(objective_options, optimizer_options)
    asked = {"name": objective, **objective_options}, {"lr": lr, **optimizer_options}
    for where, section, values in zip(("objective", "optimizer"), LEARNING, asked, strict=True):
        fields.check(section(values), values, where)
    learning = tuple(map(_frozen, asked))
    rows, shares = size * len(groups), microbatches * policy.mesh.size
    if microbatches < 1 or rows % shares:
        raise ValueError(f"train_step got microbatches={microbatches} of {rows} rollouts; allowed: a divisor of their number")
    made, optimizer, complete, step, abstract = compiled_step(policy.model, policy.mesh, microbatches, *learning)
    if made.needs_group and size < 2:
        raise ValueError(
            f"objective {objective!r} compares the rollouts of a group; got groups of {size}; sample with n=2 or more"
        )
    longest = max(len(r.prompt) + len(r.tokens) for group in groups for r in group.attempts)
    limits = {
        "buckets": batching.length_buckets(max(longest, policy.completer.sampler.length)),
        "limit": policy.completer.max_tokens,
    }
    batch = batching.from_groups(groups, made, microbatches=microbatches, **limits)
    say_once("compiling the train step", policy.model, policy.mesh, microbatches, learning, batch.tokens_BT.shape)
    state, goes_on = policy.state, policy.learning == learning
    control = state.control if goes_on else controls.begin(made.controls)
    batch = complete(sharding.put_rows(batch, policy.mesh), state.params, control=control)
    jax.eval_shape(step, abstract, batch)  # raises the step's errors before the params are donated
    if not goes_on:
        begin = jax.jit(new_state, static_argnums=(1, 2), donate_argnums=0)
        state = begin(state.params, optimizer, made.controls)
    state, learned = step(state, batch)
    measured = jax.device_get(name_metrics(learned, sampled=True) | sources.measure(groups))
    reached = {name: pair for name, pair in measured.items() if pair[1] or not name.startswith(learner.MISMATCH_BY_DEPTH)}
    return policy._replace(state=state, learning=learning), metrics.divide(reached)


def check_options(objective: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Raise ValueError for options that a train step can't take.

    These are a second `name` or `lr`, renamed fields, values that can't be hashed, and
    fields of a schedule: it needs a number of steps, and with the single step here its
    rate would be 0 from the second step on.
    """
    for options, taken, argument in ((objective, "name", "objective"), (optimizer, "lr", "lr")):
        if taken in options:
            raise ValueError(f"train_step got {argument} twice, as {argument}= and as {taken!r} in its options; give it once")
    if scheduled := [name for name in SCHEDULE if name in optimizer]:
        raise ValueError(
            f"train_step got optimizer_options with {scheduled[0]!r}, and its rate is constant; change lr= from step to step"
        )
    for where, options in (("objective", objective), ("optimizer", optimizer)):
        for name, value in options.items():
            if new := new_name(f"config.phase.{where}", name):
                raise ValueError(f"field {name!r} of {where} is called {new!r} now; write {new}")
            try:
                hash(value)
            except TypeError:
                raise ValueError(f"train_step got {name}={value!r} in {where}_options; allowed: numbers, texts, None") from None


SCHEDULE = ("schedule_kind", "warmup_steps", "warmup_fraction", "final_fraction")
LEARNING = build.section_of_objective, build.section(optimizers.make, "steps")


def check_policy(function: Callable, policy: Any) -> None:
    """Raise ValueError if `policy` is not a Policy or its params were donated."""
    if not isinstance(policy, Policy):
        raise ValueError(f"{function.__name__} got policy of type {type(policy).__name__}; allowed: a policy from jr.load")
    if any(x.is_deleted() for x in jax.tree.leaves(policy.params)):
        raise ValueError(f"{function.__name__} got a policy that a train_step has used up; use the one that it returned")


def check_groups(groups: Any) -> int:
    """Return the common size of groups of rollouts.

    Raises:
      ValueError: the sizes differ, a group is empty, or nothing can be learned from a
        rollout.
    """
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Group) for group in groups):
        inside = f" of {type(groups[0]).__name__}" if isinstance(groups, list | tuple) and groups else ""
        kind = f"a {type(groups).__name__}{inside}"
        raise ValueError(f"train_step got {kind}; allowed: a list of groups, as jr.sample returns")
    sizes = [len(group.attempts) for group in groups]
    if not sizes or not sizes[0] or len(set(sizes)) > 1:
        raise ValueError(f"train_step got groups of {sizes} rollouts; allowed: one size, 1 or more")
    for r in (r for group in groups for r in group.attempts):
        if not (isinstance(r.verdict.reward, int | float | np.number) and math.isfinite(r.verdict.reward)):
            where = f"attempt {r.attempt} at problem {r.problem}"
            raise ValueError(f"train_step got the reward {r.verdict.reward!r} of {where}; allowed: finite numbers")
        if not r.temperature > 0:
            raise ValueError("train_step got greedy rollouts (temperature=0), which are all alike; sample with one above 0")
    return sizes[0]


@functools.lru_cache(maxsize=4)
def compiled_step(model: Model, mesh, microbatches: int, objective: tuple, optimizer: tuple) -> tuple:
    """Make the objective, the optimizer, what completes a batch, the jitted train step
    and abstract state.
    """
    made = call_with_section(objectives.make, dict(objective), "objective")
    if made.refers:
        raise ValueError(
            "train_step keeps no reference policy; allowed: an objective without one (kl_coefficient=0, no distillation), or a "
            "config and `jaxreason.main`"
        )
    if made.critic is not None and model.value is None:
        raise ValueError(
            "train_step got an objective with a critic, and the model has no value head; allowed: load(..., "
            "model={'value_head': True}), or an objective without values"
        )
    rule = call_with_section(optimizers.make, dict(optimizer), "optimizer", steps=1)
    abstract = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), rule, made.controls))
    placed = sharding.shardings(abstract, mesh)
    step = learner.compile_train_step(model, made, rule, microbatches=microbatches, state_shardings=placed)
    complete = learner.compile_completion(model, made, microbatches=microbatches, mesh=mesh)
    return made, rule, complete, step, abstract


def _frozen(fields: Mapping[str, Any]) -> tuple:
    return tuple(sorted(fields.items()))
