"""FLOPs by formula: of a train step, prefill, decode, adapters and attention
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence


def layer_weights(c) -> int:
    """Count the matrix weights of one layer."""
    return c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.feed_forward


def forward_flops(c, lengths) -> float:
    """Count the FLOPs of the matrix products of one forward pass.

    `lengths` has a pair (prompt tokens, trained tokens) for each sequence.
    """
    weights = c.layers * layer_weights(c)
    tokens = sum(p + g for p, g in lengths)
    attended = sum((p + g) * (p + g + 1) / 2 for p, g in lengths)
    trained = sum(g for _, g in lengths)
    return 2 * weights * tokens + 4 * c.layers * c.heads * c.head_size * attended + 2 * c.width * c.vocab_size * trained


def dense_flops(c, rows: int, length: int, keys: float, logits: int) -> dict[str, float]:
    """Count the FLOPs of a forward pass as computed, with padding and masked scores.

    `rows` x `length` tokens attend to `keys` keys each; logits are made for
    `logits` tokens. Return the parts layers, attention and logits.
    """
    tokens = rows * length
    return {
        "layers": 2.0 * c.layers * layer_weights(c) * tokens,
        "attention": 4.0 * c.layers * c.heads * c.head_size * tokens * keys,
        "logits": 2.0 * c.width * c.vocab_size * logits,
    }


def shared_length(prompt: int, completions: Sequence[int]) -> int:
    """Count the keys of one prompt followed by several attempts at it."""
    return prompt + sum(completions) + len(completions) - 1


def attempts_behind_a_prompt(c, choices, prompt: int, completion: int) -> int:
    """Choose from `choices` the number of attempts per copy of their prompt.

    Sharing a prompt saves tokens in the learner but adds attention scores, most of
    which are masked. An attention FLOP counts four times, because softmax and masks
    come with it (jaxreason/bench/README.md). Sharing must save a tenth: completions of
    unequal length waste more space in longer rows.
    """

    def flops(attempts: int) -> float:
        length = shared_length(prompt, [completion] * attempts)
        parts = dense_flops(c, 1, length, causal_keys(length), 0)
        return (parts["layers"] + 4 * parts["attention"]) / attempts * (1.1 if attempts > 1 else 1)

    return min(choices, key=flops)


def causal_keys(length: int) -> float:
    """Average the number of keys that a token attends to in the plain kernel.

    Masked keys that the kernel computes count too.
    """
    from jaxreason.model.attention import query_parts  # local, because it imports jax

    return sum((stop - first) * stop for first, stop in query_parts(length)) / length


def prefill_flops(c, rows: int, length: int) -> float:
    """Count the FLOPs of computing the keys and values of prompts.

    The last layer computes only its queries, keys and values.
    """
    parts = dense_flops(c, rows, length, length, 0)
    queries = 2.0 * c.width * c.head_size * (c.heads + 2 * c.kv_heads) * rows * length
    return (parts["layers"] + parts["attention"]) * (c.layers - 1) / c.layers + queries


def adapter_flops(c, tokens: int) -> float:
    """Count the FLOPs of the adapters in a forward pass over `tokens` tokens."""
    if c.lora is None:
        return 0.0
    heads, kv_heads = c.heads * c.head_size, c.kv_heads * c.head_size
    sizes = {"q": c.width + heads, "k": c.width + kv_heads, "v": c.width + kv_heads, "o": heads + c.width}
    sizes |= dict.fromkeys(("gate", "up", "down"), c.width + c.feed_forward)
    return 2.0 * c.layers * c.lora.rank * sum(sizes[target] for target in c.lora.targets) * tokens


def train_flops(c, rows: int, length: int, remade: bool) -> float:
    """Count the FLOPs of the matrix products of a train step over `rows` full rows.

    Recomputation is included. The backward pass costs twice the forward pass, or once
    if the base is frozen, because frozen weights have no gradient. If `remade`, logits
    are computed a second time (see `platforms.py`). `c.remat` "full" recomputes a layer
    except its last product; "dots" recomputes only attention.
    """
    parts = dense_flops(c, rows, length, causal_keys(length), rows * length)
    adapters = adapter_flops(c, rows * length)
    full, gradient = c.remat == "full", c.lora is None
    last = 2.0 * c.layers * c.width * c.feed_forward * rows * length
    layers = parts["layers"] * (2 + gradient + full) - last * full + adapters * (3 + full)
    logits = parts["logits"] * (2 + gradient + remade)
    attention = parts["attention"] * (3 + (c.remat != "none")) if c.attention == "xla" else flash_flops(c, rows, length)
    return layers + logits + attention


def flash_flops(c, rows: int, length: int) -> float:
    """Count the FLOPs of a flash attention kernel in a train step.

    The forward pass counts once, once more with `remat`, except "dots" with splash,
    and the backward pass 2.5 times. The kernel skips the masked half of the scores and
    recomputes scores in its backward pass (Dao 2023, arXiv 2307.08691).
    """
    again = c.remat == "full" or (c.remat == "dots" and c.attention != "splash")
    return dense_flops(c, rows, length, length, 0)["attention"] / 2 * (3.5 + again)
