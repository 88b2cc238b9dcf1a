r"""ScaleRL, the recipe of Khatri et al. 2025 (arXiv 2510.13786, sec. 4), on GSM8K or on
chains of operations.

    python -m jaxreason.main \
        --config=configs/scalerl.py[:size=SIZE][,model=NAME][,smoke]
    python -m jaxreason.main --config=configs/scalerl.py:task=chain[,smoke]

`size` and `model` are those of configs/gsm8k.py, the rest is its set-up. `task=chain`
is configs/tiny.py, prior included. Not yet run on an accelerator, nor to the end.

    their choice                                        here
    CISPO, importance weight at most 4, 5 or 8 (A.17.2) objective cispo, at most 5
    mean inside each prompt, then over prompts          weigh=per_mixed_prompt
    prompts of equal rewards dropped, not replaced      the same
    advantage over the std of all in the batch          centre_group_scale_batch
    prompts solved in 9 of 10 attempts not drawn again  source.curriculum
    truncated attempts left out (A.15)                  cut=out
    output projection in float32, both sides            model.head_dtype=float32
    PipelineRL, at most 8 updates behind                lag=8
    48 prompts x 16 attempts (A.3)                      the same; chain: 16 x 16
    AdamW, eps 1e-15, weight decay 0.01 (A.3)           the same
    constant rate 5e-7, 100 steps of warm-up (A.3)      the same; LoRA 1e-5, chain 3e-4

What differs: their sampler gets new params in the middle of an attempt, ours at the
start of a batch, so with `lag=8` every batch is eight updates old. Their rewards are
+1 and -1, which centring and scaling make the same as 1 and 0. Their standard deviation
may not count the dropped prompts; ours does. They force the end of thinking at 12,000
tokens: `--config.sampler.thinking_tokens=N`, for a model that writes <think>. Adam's
other numbers are not given.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxreason.options import parse

OBJECTIVE = {
    "name": "cispo",
    "advantage": "centre_group_scale_batch",
    "weigh": "per_mixed_prompt",
    "cut": "out",
    "clip_low": 1.0,  # no lower bound of the weight
    "clip_high": 4.0,  # at most 5
}
OPTIMIZER = {"schedule_kind": "constant", "eps": 1e-15, "weight_decay": 0.01}


def get_config(arg: str = "") -> ConfigDict:
    options = parse(arg, task="gsm8k", size="", model="", smoke=False, choices={"task": ("gsm8k", "chain")})
    chain = options.task == "chain"
    if chain and (options.size or options.model):
        raise ValueError("size and model are for task=gsm8k; task=chain has the model of configs/tiny.py")
    base = Path(__file__).with_name("tiny.py" if chain else "gsm8k.py")
    chosen = [f"{name}={getattr(options, name)}" for name in ("size", "model") if getattr(options, name)]
    config = runpy.run_path(str(base))["get_config"](",".join([*chosen, *["smoke"] * options.smoke]))
    config.model.head_dtype = "float32"
    config.rl.objective = OBJECTIVE
    adapted = "lora" in config.model
    config.rl.optimizer = {**OPTIMIZER, "lr": 3e-4 if chain else 1e-5 if adapted else 5e-7, "warmup_steps": 10 if chain else 100}
    config.rl.source.lag = 8
    config.rl.source.curriculum = {"name": "success_rate", "most": 0.9}
    if options.smoke:
        config.rl.source.lag, config.rl.optimizer.warmup_steps = 1, 0
        return config
    config.rl.source.problems, config.rl.source.group = (16, 16) if chain else (48, 16)
    if not chain:
        config.rl.steps, config.rl.microbatches = 400, 96
    return config
