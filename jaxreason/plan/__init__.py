r"""Plan of a config on a TPU slice, made on any machine: whether it fits, what limits
its speed, and what it costs.

    python -m jaxreason.plan --config=configs/gsm8k.py:model=qwen3_8b \
        --topology=v5e:4x8 --config.sharding.mesh.fsdp=8 \
        --config.sharding.mesh.tensor=4 --config.sharding.mesh.data=1

libtpu compiles the train step, the pass of a reference policy (if there is one; it is
taken to have the model's own shape and rows, which a teacher or a hint may change),
prefill and decode for the topology. The plan reads memory, FLOPs, HBM traffic and
collectives from the compiled programs. Nothing is downloaded and no task is loaded: a
named size comes from our own table, any other model from a folder with a config.json.
If the config does not fit, the plan searches for smaller micro-batches, fewer slots or
another mesh that fits. As in a run, each host is one process and samples its part of
the problems on its own chips.

The modules, in the order of use: `config` reads a config into a `work.Work`, `arrays`
makes the shapes and shardings of its state, `programs` compiles its programs, `hlo` and
`chips` compute their cost and roofline, `memory` adds up HBM, `search` looks for a plan
that fits, `report` prints the result. `__main__` is the entry point.

Pessimistic assumptions: every sequence has the maximum length, all micro-batches are
used, and every decode step attends to the longest cache. Optimistic assumptions: only
matrix products, memory and network take time; `--efficiency`, the fraction of that
roofline which is reached, is a guess. HBM follows the `train` loop: it always holds
params, optimizer state and reference; while sampling also the sampler's weights, the
slots and two batches of prompts. Left out: the host (verifiers, layout of batches),
checkpoints and evaluations, fragmentation, and the code of programs that are not
running.

A value above 1 in the column "of formula" means that some devices repeat the work of
others or compute padding, as prefill does where a batch of prompts does not divide over
data x fsdp.

Findings of 2026-11-24, none of them compared with a TPU yet: jaxreason/plan/README.md.
"""
