r"""Plan a config on a TPU slice, from any machine: does it fit, what bounds it, what
will it cost.

    python -m jaxreason.plan --config=configs/gsm8k.py:model=qwen3_8b \
        --topology=v5e:4x8 --config.sharding.mesh.fsdp=8 \
        --config.sharding.mesh.tensor=4 --config.sharding.mesh.data=1

Compiles the train step, the log-probs of a reference policy if there is one, prefill
and decode for the topology, with libtpu, and reads memory, FLOPs, traffic and
collectives from what was compiled. Nothing is downloaded and no task is loaded: a named
size is taken from our own table, any other model from a folder with a config.json. If
it does not fit, says what would. A host is a process, and each of several samples its
share on its own chips, as a run does.

The modules, in the order of what happens: `config` reads a piece of `work`, `arrays`
are what stands for its state, `programs` compiles it, `memory` and `search` say what
fits, `report` says all of it, `__main__` is the entry point.

Assumed, and worse than what will be: every sequence is as long as it may be, all
micro-batches are in use, every decode step attends to the longest cache. Assumed, and
better: nothing but matrix products, memory and network takes time; `--efficiency` is
the share of that roofline that is reached, and is a guess. HBM holds at each moment
what the loop of `train` holds then: params, optimizer and reference throughout;
sampler's weights, slots, and two batches of prompts while sampling. Left out: the host
(verifiers, layout of batches), checkpoints and evaluations, memory lost to
fragmentation, programs but the one that runs.

A column "of formula" above 1 says that devices compute the same thing, or nothing: of
prefill where a batch of prompts does not divide over data x fsdp.

Findings, 2026-11-24 (jax 0.10.2, libtpu 0.0.42, no TPU at hand: nothing here has been
held against one).
- FLOPs of train step, prefill and decode equal the formula to three digits: Qwen3-8B on
  v5e:4x8 (fsdp=8, tensor=4), Qwen2.5-0.5B on v5e:2x4 (fsdp=8). Products of gradients
  that go around a ring while they are made are loops unrolled by two; as long as those
  counted twice it seemed 1.24 and 1.19 of a train step. Prefill was 8.00, each of eight
  devices computing every prompt.
- On one CPU the compiler's sizes are what a train step takes: temporaries of 2,902,
  4,478 and 15,951 MiB, and the process grew by 2,999, 4,541 and 15,938 (SmolLM2-135M, 8
  x 256, remat full; the same in 2 micro-batches, none; Qwen3-0.6B, 4 x 256 in 2, dots).
- Qwen2.5-0.5B with fsdp=8 sends 104 GB from a chip of v5e:2x4 in a step of
  `configs/gsm8k.py`. If the compiler were left to add up activations over `fsdp` it
  would send 636 (see `sharding.gather_weights`).
- While the sampler's weights are made Qwen3-8B takes 7.15 GiB of a chip on v5e:4x8 with
  fsdp=8, tensor=4: they are cast and then gathered. The other way round it was 14.31 of
  15.75.
- Qwen3-32B fits no slice of v5e: each host samples by itself, so its four chips must
  hold all weights, 15.3 GiB each (21.9 with the learner's and while they are made, on
  v5e:8x8 with fsdp=16, tensor=4).
"""
