r"""GSM8K by RL from a pretrained checkpoint: the model's own attempts, paid for right answers alone.

    TFDS_DATA_DIR=... python -m jaxreason.main --config=configs/gsm8k.py[:model=NAME][,smoke]

`model` is a named size (smollm2_135m, qwen2.5_1.5b, qwen3_8b, ...), a Hugging Face id or a folder. GSM8K: Cobbe et al. 2021,
arXiv 2110.14168, read through TFDS. Sized for one accelerator of 16 GB or more with the default model; for a slice add
`--config.sharding.mesh.fsdp=N`. Not yet run on an accelerator. An attempt that is cut off at its limit is paid nothing
(`must_finish`).

On one CPU core, 2026-11-24, SmolLM2-135M-Instruct (from 4-bit weights), float32, seed 0, six steps of 4 problems x 8 attempts
of at most 320 tokens at temperature 0.7, killed with -9 after step 2 and started again: 396 to 482 s a step beside other work,
mean |sampler - learner log-prob| 2.9e-6 to 3.7e-6 a step. 2 of 192 attempts were paid (steps 2 and 4, the only ones with a
gradient): each ended by itself on the right number, both by luck to a reader of their reasoning, one after six other "####"
lines. 156 ended wrong and 34 were cut. Six steps teach nothing: use a model that already solves some problems.

    TFDS_DATA_DIR=... python -m jaxreason.main --config=configs/gsm8k.py:model=FOLDER --config.model.dtype=float32 \
        --config.model.remat=none --config.sampler.slots=16 --config.sampler.max_tokens=320 --config.rl.source.problems=4 \
        --config.rl.source.group=8 --config.rl.source.temperature=0.7 --config.rl.microbatches=8 --config.rl.steps=6 \
        --config.rl.evaluate_every=0 --config.rl.optimizer.warmup_steps=0 --config.checkpoint.every_steps=1 \
        --config.evaluate.n=8 --config.evaluate.final_n=8 '--config.evaluate.temperatures=(0.7,)'
"""

from ml_collections import ConfigDict, config_dict

from jaxreason.options import parse

INSTRUCTION = "{question}\n\nThink step by step. Write the final answer, a number, on the last line after ####."


def get_config(arg: str = "") -> ConfigDict:
    options = parse(arg, model="qwen2.5_0.5b", smoke=False)
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # a run, RUN/checkpoints/STEP or a Hugging Face folder
    config.model = {
        "name": options.model,
        "weights": "pretrained",
        "dtype": "bfloat16",
        "param_dtype": "float32",
        "remat": "full",
        "attention": "xla",
        "scan_layers": config_dict.placeholder(bool),
    }
    config.text = {"tokenizer": "pretrained", "format": "chat", "instruction": INSTRUCTION, "system": ""}
    config.sampler = {
        "slots": 128,
        "max_prompt_tokens": 256,
        "max_tokens": 512,
        "chunk_tokens": 32,
        "cache_dtype": config_dict.placeholder(str),
        "prompt_rows": config_dict.placeholder(int),
        "stop_strings": (),
        "thinking_tokens": config_dict.placeholder(int),
    }
    config.verifier = {"name": "number", "must_finish": True}
    config.sharding = {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "sampling_devices": 0}
    config.phases = ("rl",)
    config.rl = {
        "source": {
            "name": "rollouts",
            "task": {"name": "gsm8k", "split": "train"},
            "problems": 32,
            "group": 8,
            "temperature": 1.0,
            "lag": 0,
        },
        "objective": {"name": "dr_grpo", "kl_coefficient": 0.0},
        "optimizer": {"lr": 1e-6, "warmup_steps": 10, "b2": 0.95},
        "steps": 200,
        "microbatches": 32,
        "evaluate_every": 50,
    }
    config.evaluate = {
        "n": 200,
        "final_n": 1319,
        "temperatures": (0.0, 1.0),
        "suites": {"gsm8k": {"name": "gsm8k", "split": "test"}},
    }
    config.checkpoint = {"every_steps": 20, "keep": 2}
    config.log = {"rollouts_kept": 64}

    if options.smoke:
        config.sampler.slots, config.sampler.max_tokens, config.sampler.chunk_tokens = 8, 16, 8
        config.rl.source.problems, config.rl.source.group, config.rl.microbatches = 2, 4, 1
        config.rl.source.task["limit"] = 16
        config.rl.steps, config.rl.evaluate_every, config.rl.optimizer.warmup_steps = 2, 0, 0
        config.evaluate.n = config.evaluate.final_n = 8
    return config
