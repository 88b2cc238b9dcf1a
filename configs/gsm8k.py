r"""RL on GSM8K from a pretrained checkpoint: the model's own attempts, rewarded only
for right answers.

    python -m jaxreason.main \
        --config=configs/gsm8k.py\
            [:size=SIZE][,model=NAME][,sft=STEPS][,tool=calculator][,smoke]

Nothing needs to be prepared: model and data come from the Hugging Face hub; a prepared
TFDS folder is used if there is one. GSM8K: Cobbe et al. 2021, arXiv 2110.14168. An
attempt that is cut off at its limit gets no reward (`must_finish`). `model` replaces
the model of `size` by a named size (smollm2_135m, qwen2.5_7b, ...), a Hugging Face id
or a folder. `sft=STEPS` imitates the worked solutions for so many steps before RL.
`tool=calculator` answers `<<3*4=` in the model's text by `12>>`, as in the worked
solutions of the data set; with `sft` the model learns from them to write such calls,
without it the system message describes them.
Not yet run on an accelerator.

`size` chooses the model and its mesh, for TPU v5e chips of 16 GB (one GPU: add
`--config.sharding.mesh.fsdp=1`, `tensor=1`). `python -m jaxreason.plan
--config=configs/gsm8k.py:size=SIZE --topology=TOPOLOGY` says that these fit:

    size   model                   topology   mesh                 trained
    0.5b   Qwen2.5-0.5B-Instruct   v5e:1x1                         all weights
    1.5b   Qwen2.5-1.5B-Instruct   v5e:2x2    fsdp 4               all weights
    3b     Qwen2.5-3B-Instruct     v5e:2x4    fsdp 4 x tensor 2    all weights
    8b     Qwen3-8B                v5e:2x4    fsdp 2 x tensor 4    LoRA, rank 32

Result on one CPU core, 2026-11-24: SmolLM2-135M-Instruct (from 4-bit weights), float32,
seed 0, six steps of 4 problems x 8 attempts of at most 320 tokens at temperature 0.7,
killed with -9 after step 2 and started again. A step took 396 to 482 s beside other
work; mean |sampler - learner log-prob| per step was 2.9e-6 to 3.7e-6. 2 of 192 attempts
were rewarded (steps 2 and 4, the only ones with a gradient). Both ended by themselves
on the right number, but their reasoning shows that it was luck; one had written six
other "####" lines before. 156 ended wrong and 34 were cut off. Six steps teach nothing:
use a model that already solves some problems.

    python -m jaxreason.main --config=configs/gsm8k.py:model=FOLDER \
        --config.model.dtype=float32 --config.model.remat=none \
        --config.sampler.slots=16 --config.sampler.max_tokens=320 \
        --config.rl.source.problems=4 --config.rl.source.group=8 \
        --config.rl.source.temperature=0.7 --config.rl.microbatches=8 \
        --config.rl.steps=6 --config.rl.evaluate_every=0 \
        --config.rl.optimizer.warmup_steps=0 --config.checkpoint.every_steps=1 \
        --config.evaluate.n=8 --config.evaluate.final_n=8 \
        '--config.evaluate.temperatures=(0.7,)'
"""

from ml_collections import ConfigDict, config_dict

from jaxreason.options import parse

INSTRUCTION = "{question}\n\nThink step by step. Write the final answer, a number, on the last line after ####."

LORA = {"rank": 32, "alpha": 32.0, "targets": ("q", "k", "v", "o", "gate", "up", "down"), "base_dtype": "bfloat16"}
# Model, mesh, and LoRA adapters where training all weights does not fit.
SIZES = {
    "0.5b": ("qwen2.5_0.5b", {"fsdp": 1, "tensor": 1}, None),
    "1.5b": ("qwen2.5_1.5b", {"fsdp": 4, "tensor": 1}, None),
    "3b": ("qwen2.5_3b", {"fsdp": 4, "tensor": 2}, None),
    "8b": ("qwen3_8b", {"fsdp": 2, "tensor": 4}, LORA),
}


def get_config(arg: str = "") -> ConfigDict:
    options = parse(
        arg, size="0.5b", model="", sft=0, tool="none", smoke=False, choices={"size": SIZES, "tool": ("none", "calculator")}
    )
    model, mesh, lora = SIZES[options.size]
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # folder of a run, RUN/checkpoints/STEP or a Hugging Face model folder
    config.model = {
        "name": options.model or model,
        "weights": "pretrained",
        "dtype": "bfloat16",
        "param_dtype": "float32",
        "remat": "full",
        "attention": "xla",
        "scan_layers": config_dict.placeholder(bool),
    }
    if lora:
        config.model.lora = lora
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
    if options.tool == "calculator":
        tool = {"name": "with_tools", "tools": ("calculator",), "dialect": "angles", "max_calls": 12}
        config.environment = {**tool, "describe": not options.sft}
    config.sharding = {"mesh": {"data": -1, **mesh}, "sampling_devices": 0}
    config.phases = ("sft", "rl") if options.sft else ("rl",)
    if options.sft:
        config.sft = {
            "source": {
                "name": "demonstrations",
                "task": {"name": "gsm8k", "split": "train", "annotations": options.tool == "calculator"},
                "rows": 64,
                "max_tokens": 512,
            },
            "objective": {"name": "sft"},
            "optimizer": {"lr": 1e-4 if lora else 1e-5, "warmup_steps": min(10, options.sft), "b2": 0.95},
            "steps": options.sft,
            "microbatches": 8,
        }
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
        "optimizer": {"lr": 1e-5 if lora else 1e-6, "warmup_steps": 10, "b2": 0.95},
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
        config.sharding.mesh.fsdp = config.sharding.mesh.tensor = 1  # any devices will do
        config.sampler.slots, config.sampler.max_tokens, config.sampler.chunk_tokens = 8, 16, 8
        config.rl.source.problems, config.rl.source.group, config.rl.microbatches = 2, 4, 1
        config.rl.source.task["limit"] = 16
        config.rl.steps, config.rl.evaluate_every, config.rl.optimizer.warmup_steps = 2, 0, 0
        config.evaluate.n = config.evaluate.final_n = 8
        if options.sft:
            config.sft.source.rows, config.sft.microbatches = 8, 1
            config.sft.steps, config.sft.optimizer.warmup_steps = 2, 1
    return config
