"""Supervised fine-tuning on GSM8K's worked solutions: the same training loop as RL,
with demonstrations instead of rollouts.

    python -m jaxreason.main --config=configs/sft.py[:model=NAME][,smoke]

Source: Cobbe et al. 2021, arXiv 2110.14168. For imitation before RL in one run, use
configs/gsm8k.py:sft=100. Not yet run on an accelerator.
"""

from ml_collections import ConfigDict, config_dict

from jaxreason.options import parse


def get_config(arg: str = "") -> ConfigDict:
    options = parse(arg, model="qwen2.5_0.5b", smoke=False)
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # folder of a run, RUN/checkpoints/STEP or a Hugging Face model folder
    config.model = {
        "name": options.model,
        "weights": "pretrained",
        "dtype": "bfloat16",
        "param_dtype": "float32",
        "remat": "full",
        "attention": "xla",
        "scan_layers": config_dict.placeholder(bool),
    }
    config.text = {"tokenizer": "pretrained", "format": "chat", "instruction": "{question}", "system": ""}
    config.sampler = {"slots": 128, "max_prompt_tokens": 256, "max_tokens": 400, "chunk_tokens": 32}
    config.verifier = {"name": "number", "must_finish": True}
    config.sharding = {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}}
    config.phases = ("sft",)
    config.sft = {
        "source": {
            "name": "demonstrations",
            "task": {"name": "gsm8k", "split": "train"},
            "rows": 64,
            "max_tokens": 512,
        },
        "objective": {"name": "sft"},
        "optimizer": {"lr": 1e-5, "schedule_kind": "cosine", "final_fraction": 0.1, "warmup_steps": 10, "b2": 0.95},
        "steps": 233,  # two epochs
        "microbatches": 8,
        "evaluate_every": 100,
    }
    config.evaluate = {
        "n": 200,
        "final_n": 1319,
        "temperatures": (0.0, 1.0),
        "suites": {"gsm8k": {"name": "gsm8k", "split": "test"}},
    }
    config.checkpoint = {"every_steps": 50, "keep": 2}
    config.log = {}

    if options.smoke:
        config.sampler.slots, config.sampler.max_tokens, config.sampler.chunk_tokens = 8, 16, 8
        config.sft.source.rows, config.sft.microbatches = 8, 1
        config.sft.steps, config.sft.evaluate_every, config.sft.optimizer.warmup_steps = 2, 0, 1
        config.evaluate.n = config.evaluate.final_n = 8
    return config
