r"""Learn to use a calculator by RL on right answers: a product and a sum that a tiny
model can't compute itself, `47*83+512:`. Nothing is downloaded.

    python -m jaxreason.main --config=configs/tools.py[:tool=off][,smoke]

The model writes `[47*83=`, the calculator writes `3901]`, which is not trained on, and
the model goes on. Its prior imitates people who call the calculator in a quarter of
their solutions and mostly guess. `tool=off` trains without the calculator: the model
itself writes what follows `=`. The suite `no_tool` takes it away at test time.

Result, 2026-11-28, one of two cores of an AMD EPYC per run, float32, 1,000 + 60 steps,
seeds 0 to 4, 512 held-out problems, temperature 1: accuracy 0.018 to 0.104 after the
prior, 0.89 to 0.96 after RL on four seeds and 0.225 on the fifth, with 1.93 to 1.99 of
2 calls; 0.000 without the calculator (experiments/tool_use.py). A run takes 98 s alone.
"""

from ml_collections import ConfigDict, config_dict

from jaxreason.options import parse


def get_config(arg: str = "") -> ConfigDict:
    options = parse(arg, tool="on", smoke=False, choices={"tool": ("on", "off")})
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # folder of a run, RUN/checkpoints/STEP or a Hugging Face model folder
    config.model = {"name": "tiny", "layers": 3}
    config.text = {"tokenizer": "characters", "format": "plain"}
    config.sampler = {"slots": 64, "max_prompt_tokens": 12, "max_tokens": 40, "chunk_tokens": 8, "prompts_per_prefill": 16}
    config.verifier = {"name": "exact", "marker": "A"}
    tool = {"name": "with_tools", "tools": ("calculator",), "dialect": "brackets", "max_calls": 4, "max_tool_tokens": 8}
    config.environment = tool if options.tool == "on" else {"name": "single_turn"}
    config.sharding = {"mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "sampling_devices": 0}

    config.phases = ("prior", "rl")
    config.prior = {
        "source": {
            "name": "demonstrations",
            "task": {"name": "calculator", "size": 20_000, "demonstrations": "human"},
            "rows": 128,
            "max_tokens": 52,
        },
        "objective": {"name": "sft"},
        "optimizer": {"lr": 3e-3, "schedule_kind": "cosine", "final_fraction": 0.1, "warmup_steps": 100, "weight_decay": 0.0},
        "steps": 1000,
        "microbatches": 4,
        "log_every": 20,
    }
    config.rl = {
        "source": {
            "name": "rollouts",
            "task": {"name": "calculator", "size": 4096},
            "problems": 32,
            "group": 8,
            "temperature": 1.0,
        },
        "objective": {"name": "rloo", "weigh": "per_token", "kl_coefficient": 0.0, "entropy_coefficient": 0.0},
        "optimizer": {"lr": 3e-4, "schedule_kind": "constant", "warmup_steps": 10, "weight_decay": 0.0},
        "steps": 60,
        "microbatches": 8,
        "evaluate_every": 20,
    }
    suites = {"calculator": {"name": "calculator"}, "no_tool": {"name": "calculator", "environment": {"name": "single_turn"}}}
    config.evaluate = {"n": 128, "final_n": 512, "temperatures": (0.0, 1.0), "suites": suites}
    config.checkpoint = {"every_steps": 500, "keep": 2}
    config.log = {"rollouts_kept": 16}

    if options.smoke:
        config.model.layers, config.sampler.slots = 1, 16
        config.prior.steps, config.prior.optimizer.warmup_steps, config.prior.source.task["size"] = 4, 2, 200
        config.rl.steps, config.rl.optimizer.warmup_steps, config.rl.source.task["size"] = 2, 1, 64
        config.rl.source.problems, config.rl.microbatches = 4, 2
        config.evaluate.n = config.evaluate.final_n = 8
    return config
