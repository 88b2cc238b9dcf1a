"""Make the golden files: small random checkpoints with the logits that transformers
computes, and a chat as it encodes it.

Run once, by hand, where torch and transformers are installed (written by transformers
5.23.0; no test needs it):

    python tests/golden/make_golden.py

Weights are drawn wide (and norms, biases away from one and zero), so that a wrong RoPE,
norm or head order moves the logits by far more than rounding does. They are rounded to
bfloat16, so the files are small and float32 logits exact.
"""

import json
import pathlib

import numpy as np
import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rms_norm_eps": 1e-5}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama_yarn": ("llama", {"rope_parameters": YARN | {"rope_theta": 10000.0}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 16}),
}


def make_checkpoint(name: str, family: str, more: dict) -> None:
    torch.manual_seed(sorted(FAMILIES).index(name))
    config = transformers.AutoConfig.for_model(family, **(SHAPE | more))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "embed" in parameter_name or "lm_head" in parameter_name:
                parameter.normal_(std=0.6)
            else:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            parameter.copy_(parameter.bfloat16().float())
        tokens = torch.randint(0, SHAPE["vocab_size"], (2, 24))
        logits = model(tokens).logits
    folder = HERE / name
    model.bfloat16().save_pretrained(folder)
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    print(name, f"logits up to {logits.abs().max():.1f}")


ROPES = [  # (model type, head size, theta, what the published config.json says)
    ("llama", 64, 500000.0, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
    ("qwen3", 128, 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    ("llama", 64, 1e4, YARN | {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0, "original_max_position_embeddings": 4096}),
    ("llama", 64, 1e4, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 4096}),
    ("llama", 64, 1e4, YARN | {"attention_factor": 1.25, "original_max_position_embeddings": 4096}),
]


def make_rope() -> None:
    cases = []
    for family, head_size, theta, rope in ROPES:
        settings = {"hidden_size": 4 * head_size, "head_dim": head_size, "num_attention_heads": 4, "num_key_value_heads": 2}
        settings |= {"vocab_size": 96, "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 131072}
        config = transformers.AutoConfig.for_model(family, **settings, rope_parameters=rope | {"rope_theta": theta})
        compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequency, factor = compute(config, "cpu")
        old_form = {"model_type": family, "rope_theta": theta, "rope_scaling": rope} | settings
        cases.append({"config": old_form, "frequency": frequency.tolist(), "factor": factor})
    (HERE / "rope.json").write_text(json.dumps(cases) + "\n")


TEMPLATE = """{% for message in messages %}
<|start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}

{% else %}
{{ message['content'] }}<|end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}"""
CONVERSATIONS = [
    [("user", "What is 3 + 4?")],
    [("user", "What is 3 + 4?"), ("assistant", "3 + 4 = 7.\n#### 7")],
    [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "Two + two?"), ("assistant", "Four. ")],
]


def make_chat() -> None:
    text = ["what is three plus four? it is seven.", "Hello. Be brief. Two plus two is four."] * 4
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    folder = HERE / "chat"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}) + "\n")
    expected = []
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        open_ended = conversation[-1][0] == "user"
        out = fast.apply_chat_template(
            messages,
            add_generation_prompt=open_ended,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenize=True,
        )
        text = fast.apply_chat_template(messages, add_generation_prompt=open_ended, tokenize=False)
        expected.append({"messages": messages, "text": text, "ids": out["input_ids"], "assistant": out["assistant_masks"]})
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    for checkpoint, (kind, settings) in FAMILIES.items():
        make_checkpoint(checkpoint, kind, settings)
    make_rope()
    make_chat()
