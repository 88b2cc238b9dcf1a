"""Writes the values that the losses of TRL and Tunix have on fixed rollouts, for
test_peers.py, which compares ours with them and needs neither library.

Each library runs in an environment of its own (torch is of no use to jaxreason):

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch numpy
    trl/bin/python tests/values_of_peers.py trl
    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    tunix/bin/python tests/values_of_peers.py tunix

The libraries' own functions do the work. Only what would need a language model is
replaced: log-probs, sampling, rewards. Every field whose default has changed between
versions is set here. A case holds the advantages, the loss, and its gradient with
respect to the learner's log-probs.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

FILE = Path(__file__).parent / "golden" / "values_of_peers.json"
LIMIT = 12  # longest allowed completion, in tokens
LONGEST = 9  # of those here: a divisor must be the first number, not the second
P, G = 4, 4


def draw() -> dict:
    """Draw ragged groups: rewards, log-probs under three policies, values, which tokens
    were sampled, and which rollouts were cut off at the limit.

    All numbers are multiples of 2^-10, so float32 holds them exactly.
    """
    rng = np.random.default_rng(0)
    reward = rng.integers(0, 5, (P, G)) / 4
    reward[1] = 0.5  # a group of equal rewards
    length = rng.integers(1, LONGEST, (P, G)).reshape(-1)
    length[[2, 9]] = LONGEST

    def rounded(x):
        return (np.round(np.asarray(x) * 1024) / 1024).tolist()

    sampler = [rng.uniform(-2.5, -0.3, n) for n in length]
    learner = [np.minimum(x + rng.normal(0, 0.3, len(x)), -0.01) for x in sampler]
    reference = [np.minimum(x + rng.normal(0, 0.5, len(x)), -0.01) for x in sampler]
    sampled = [(rng.random(n) > 0.2).astype(int).tolist() for n in length]
    for row in sampled:
        row[0] = 1
    return {
        "reward": rounded(reward),
        "sampler": [rounded(x) for x in sampler],
        "learner": [rounded(x) for x in learner],
        "reference": [rounded(x) for x in reference],
        "value": [rounded(rng.normal(0, 1, n)) for n in length],
        "new_value": [rounded(rng.normal(0, 1, n)) for n in length],
        "sampled": sampled,
        "cut": [int(n == LONGEST) for n in length],
    }


def on_grid(rows: list, fill: float = 0.0) -> np.ndarray:
    """Pad the rows with `fill` to the longest one."""
    width = max(map(len, rows))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])


def off_grid(grid, rows: list) -> list:
    """Return the numbers of a grid in the lengths of `rows`, with seven digits."""
    return [[float(f"{x:.7g}") for x in line[: len(row)]] for line, row in zip(np.asarray(grid), rows, strict=True)]


def found(drawn: dict, loss: float, gradient, advantage=None) -> dict:
    case = {"loss": float(f"{loss.item():.9g}"), "gradient": off_grid(gradient, drawn["learner"])}
    return case if advantage is None else case | {"advantage": [float(f"{x:.8g}") for x in np.asarray(advantage)]}


# --- TRL ---

# Each: fields of GRPOConfig, and which policy TRL calls the old one. With vLLM it
# compares two ratios: learner / old in the loss, old / sampler as its correction.
TRL_COMMON = {
    "importance_sampling_level": "token",
    "scale_rewards": "none",
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "vllm_importance_sampling_correction": False,
}
KL = {"loss_type": "dapo", "beta": 0.1}
VLLM = {
    "loss_type": "dapo",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_clip_min": 0.8,
    "vllm_importance_sampling_clip_max": 1.2,
}
TRL_CASES = {
    "grpo": {"loss_type": "grpo"},
    "grpo, scaled by the group": {"loss_type": "grpo", "scale_rewards": "group"},
    "grpo, scaled by the batch": {"loss_type": "grpo", "scale_rewards": "batch"},
    "grpo, delta": {"loss_type": "grpo", "delta": 1.3},
    "grpo, without cut": {"loss_type": "grpo", "mask_truncated_completions": True},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo, without cut": {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "vespo": {"loss_type": "vespo"},
    "kl": KL,
    "kl, corrected": {**KL, "use_bias_correction_kl": True},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.1},
    "off_policy_mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    **{f"vllm {mode}": {**VLLM, "vllm_importance_sampling_mode": mode} for mode in
       ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")},
}  # fmt: skip
EOS, PAD = 7, 0
COPIED = (  # fields that a trainer copies from its config
    *("importance_sampling_level", "scale_rewards", "loss_type", "off_policy_mask_threshold", "top_entropy_quantile"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min"),
    *("vllm_importance_sampling_clip_max", "multi_objective_aggregation", "entropy_coef", "use_adaptive_entropy"),
    *("beta", "mask_truncated_completions", "num_iterations", "num_generations", "max_completion_length"),
    *("reward_clip_range", "normalize_advantages"),
)


def trl_trainer(drawn: dict, kind, args, learner) -> SimpleNamespace:
    """Make a stand-in for a trainer: the fields that its methods read, and the methods
    that would run a model.
    """
    import torch

    copied = {name: getattr(args, name) for name in COPIED if hasattr(args, name)}
    corrects = copied.get("vllm_importance_sampling_correction", False)
    # With vLLM, and for RLOO, the old policy is the one that learns, before its update.
    old = "learner" if corrects or kind.__name__ == "RLOOTrainer" else "sampler"

    def logps(model, *_, **__):
        if model == "learning":
            return learner, torch.full_like(learner, 0.7), None
        return torch.tensor(on_grid(drawn["reference" if model == "reference" else old]), dtype=torch.float64), None, None

    def generate(prompts):
        ids = [[5] * (len(row) - 1) + [5 if cut else EOS] for row, cut in zip(drawn["sampler"], drawn["cut"], strict=True)]
        asked = [[1, 2]] * len(ids)
        if kind.__name__ == "RLOOTrainer":
            return asked, ids, ids
        return asked, ids, drawn["sampled"], ids, drawn["sampler"] if corrects else None, {}, None, None

    def reward(*_):
        return torch.tensor(drawn["reward"], dtype=torch.float64).reshape(-1, 1)

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True,
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
    )  # fmt: skip
    return SimpleNamespace(
        args=args, accelerator=accelerator, model=mock.Mock(training=True), ref_model="reference",
        epsilon_low=args.epsilon, epsilon_high=args.epsilon_high, use_vllm=corrects, current_gradient_accumulation_steps=1,
        _tokenizer=SimpleNamespace(pad_token_id=PAD), eos_token_ids=[EOS], pad_to_multiple_of=None,
        tools=[], environments=None, environment_factories=None, aux_loss_enabled=False, log_multimodal=False,
        reward_weights=torch.ones(1, dtype=torch.float64), reward_funcs=[None], reward_func_names=["reward"],
        _metrics=defaultdict(lambda: defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _generate=generate, _calculate_rewards=reward, _get_per_token_logps_and_entropies=logps,
        _entropy_bonus_enabled=bool(copied.get("entropy_coef")), **copied,
        **{name: getattr(kind, name, None) for name in ("get_off_policy_mask", "get_gamma_weights")},
    )  # fmt: skip


def trl_values(drawn: dict) -> dict:
    import torch
    import trl

    def case(kind, config, fields):
        with tempfile.TemporaryDirectory() as folder:
            # Two iterations, so that the old policy need not be the one that learns.
            args = config(
                output_dir=folder, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=P * G,
                num_generations=G, max_completion_length=LIMIT, steps_per_generation=1, num_iterations=2, **fields,
            )  # fmt: skip
        learner = torch.tensor(on_grid(drawn["learner"]), dtype=torch.float64, requires_grad=True)
        stand_in = trl_trainer(drawn, kind, args, learner)
        inputs = kind._generate_and_score_completions(stand_in, [{"prompt": "a"}] * (P * G))
        loss = kind._compute_loss(stand_in, "learning", inputs)
        (gradient,) = torch.autograd.grad(loss, learner)
        return found(drawn, loss, gradient, inputs["advantages"]) | {"fields": fields}

    cases = {name: case(trl.GRPOTrainer, trl.GRPOConfig, TRL_COMMON | fields) for name, fields in TRL_CASES.items()}
    rloo = {"beta": 0.0, "normalize_advantages": False, "epsilon": 0.2, "epsilon_high": 0.2}
    cases["rloo"] = case(trl.RLOOTrainer, trl.RLOOConfig, rloo)
    return {"version": trl.__version__, "cases": cases}


# --- Tunix ---

TUNIX_COMMON = {"num_generations": G, "loss_algo": "grpo", "beta": 0.0, "epsilon": 0.2, "kl_loss_mode": "low_var_kl"}
SEQUENCE = {"loss_agg_mode": "sequence-mean-token-mean"}
TOKEN = {"loss_agg_mode": "token-mean"}
TUNIX_CASES = {
    "grpo": ("grpo", SEQUENCE),
    "grpo, without cut": ("grpo", SEQUENCE),
    "token-mean": ("grpo", TOKEN),
    "dr_grpo": ("drgrpo", {"loss_agg_mode": "sequence-mean-token-scale"}),
    "token sum": ("drgrpo", {"loss_agg_mode": "seq-mean-token-sum"}),
    "gspo": ("grpo", SEQUENCE | {"loss_algo": "gspo-token", "epsilon": 0.1}),
    "rloo": ("rloo", SEQUENCE),
    "kl": ("drgrpo", TOKEN | {"beta": 0.1, "kl_loss_mode": "kl"}),
    "mse_kl": ("drgrpo", TOKEN | {"beta": 0.1, "kl_loss_mode": "mse_kl"}),
    "low_var_kl": ("drgrpo", TOKEN | {"beta": 0.1, "kl_loss_mode": "low_var_kl"}),
}


def tunix_values(drawn: dict) -> dict:
    """Call the loss functions with log-probs and values in the place of a model."""
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl import algo_core, common
    from tunix.rl.grpo.grpo_learner import GRPOConfig
    from tunix.rl.ppo.ppo_learner import PPOConfig

    def array(name):
        return jnp.asarray(on_grid(drawn[name]), jnp.float32)

    learner, mask = array("learner"), array("sampled")
    example = SimpleNamespace(
        prompt_ids=jnp.ones((P * G, 2), jnp.int32), completion_ids=jnp.ones(mask.shape, jnp.int32), completion_mask=mask,
        old_per_token_logps=array("sampler"), ref_per_token_logps=array("reference"), old_values=array("value"),
    )  # fmt: skip
    rewards = np.array(drawn["reward"]).reshape(-1)

    def value_and_grad(loss_fn, at, patched, **fields):
        made = SimpleNamespace(**vars(example) | fields)

        def loss(x):
            with mock.patch.object(common, patched, return_value=replaced(patched, x)):
                return loss_fn(made)[0]

        return jax.value_and_grad(loss)(at)

    def replaced(name, x):
        return (x, jnp.zeros((*x.shape, 2))) if name == "compute_per_token_logps" else jnp.pad(x, ((0, 0), (2, 1)))[:, 1:]

    estimators = {
        "grpo": algo_core.compute_advantages,
        "rloo": algo_core.compute_rloo_advantages,
        "drgrpo": algo_core.compute_drgrpo_advantages,
    }
    model, cases = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {}
    without_cut = mask * (1 - jnp.asarray(drawn["cut"])[:, None])
    for name, (estimator, fields) in TUNIX_CASES.items():
        config = GRPOConfig(**TUNIX_COMMON | fields)
        config.temperature = 1.0
        advantage = np.asarray(estimators[estimator](rewards, G))

        def grpo(made, config=config):
            return algo_core.grpo_loss_fn(model, made, config, 0, 1)

        more = {"completion_mask": without_cut} if "without cut" in name else {}
        loss, gradient = value_and_grad(grpo, learner, "compute_per_token_logps", advantages=jnp.asarray(advantage), **more)
        cases[name] = found(drawn, loss, gradient, advantage) | {"fields": TUNIX_COMMON | fields}
    last = (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1) * mask  # the last sampled token, which gets the reward
    advantages, returns = algo_core.compute_gae_advantages(last * rewards[:, None], array("value"), mask, 0.97, 0.9)
    cases["gae"] = {"advantages": off_grid(advantages, drawn["value"]), "returns": off_grid(returns, drawn["value"])}
    for name, fields in (("ppo", {}), ("ppo, dual clip", {"epsilon_c": 1.3})):
        config = PPOConfig(epsilon_low=0.2, epsilon_high=0.28, entropy_coef=0.0, **fields)

        def ppo(made, config=config):
            return algo_core.ppo_policy_loss_fn(model, made, config, 0, 1)

        loss, gradient = value_and_grad(ppo, learner, "compute_per_token_logps", advantages=advantages)
        cases[name] = found(drawn, loss, gradient)

    def value(made):
        return algo_core.ppo_value_loss_fn(model, made, 0.2, 0, 1)

    loss, gradient = value_and_grad(value, array("new_value"), "compute_score", returns=returns)
    cases["value loss"] = found(drawn, loss, gradient)
    return {"version": version("google-tunix"), "cases": cases}


def main(library: str) -> None:
    """Write the section of one library; the other's stays."""
    drawn = draw()
    written = json.loads(FILE.read_text()) if FILE.exists() else {}
    values = {"trl": trl_values, "tunix": tunix_values}[library](drawn)
    assert all(math.isfinite(case["loss"]) for case in values["cases"].values() if "loss" in case)
    written |= {"limit": LIMIT, "inputs": drawn, library: values}
    FILE.write_text(json.dumps(written, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
