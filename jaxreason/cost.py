"""FLOPs by formula: of a train step, prefill, decode, adapters and attention
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence


def layer_weights(c) -> int:
    """Matrix weights of a layer."""
    return c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.feed_forward


def forward_flops(c, lengths) -> float:
    """FLOPs of the matrix products of one forward pass over sequences of `lengths`,
    pairs of (prompt tokens, trained tokens).
    """
    weights = c.layers * layer_weights(c)
    tokens = sum(p + g for p, g in lengths)
    attended = sum((p + g) * (p + g + 1) / 2 for p, g in lengths)
    trained = sum(g for _, g in lengths)
    return 2 * weights * tokens + 4 * c.layers * c.heads * c.head_size * attended + 2 * c.width * c.vocab_size * trained


def dense_flops(c, rows: int, length: int, columns: float, logits: int) -> dict[str, float]:
    """FLOPs of a forward pass as it is computed, padding, masked squares and all: of
    layers, attention and logits.

    `rows` x `length` tokens attend to `columns` columns each; `logits` is how many rows
    of them are made.
    """
    tokens = rows * length
    return {
        "layers": 2.0 * c.layers * layer_weights(c) * tokens,
        "attention": 4.0 * c.layers * c.heads * c.head_size * tokens * columns,
        "logits": 2.0 * c.width * c.vocab_size * logits,
    }


def shared_length(prompt: int, completions: Sequence[int]) -> int:
    """Columns that attempts take behind one copy of their prompt."""
    return prompt + sum(completions) + len(completions) - 1


def attempts_behind_a_prompt(c, choices, prompt: int, completion: int) -> int:
    """Choose from `choices` the number of attempts that follow one copy of their prompt
    in the learner.

    Fewer tokens then, but more scores, of which most are masked. A FLOP of theirs
    counts four times, since softmax and masks go with it (jaxreason/bench/README.md).
    Sharing must save a tenth: completions of unlike lengths leave more room in longer
    rows.
    """

    def flops(attempts: int) -> float:
        length = shared_length(prompt, [completion] * attempts)
        parts = dense_flops(c, 1, length, causal_columns(length), 0)
        return (parts["layers"] + 4 * parts["attention"]) / attempts * (1.1 if attempts > 1 else 1)

    return min(choices, key=flops)


def causal_columns(length: int) -> float:
    """To how many columns each of `length` tokens attends in the plain kernel, on
    average, those included that are masked.
    """
    from jaxreason.model.attention import query_parts  # here, as it takes jax with it

    return sum((stop - first) * stop for first, stop in query_parts(length)) / length


def prefill_flops(c, rows: int, length: int) -> float:
    """FLOPs of the keys and values of prompts, as they are computed: of the last layer
    nothing but these, and its queries.
    """
    parts = dense_flops(c, rows, length, length, 0)
    queries = 2.0 * c.width * c.head_size * (c.heads + 2 * c.kv_heads) * rows * length
    return (parts["layers"] + parts["attention"]) * (c.layers - 1) / c.layers + queries


def adapter_flops(c, tokens: int) -> float:
    """FLOPs of the adapters of a forward pass over so many tokens."""
    if c.lora is None:
        return 0.0
    heads, kv_heads = c.heads * c.head_size, c.kv_heads * c.head_size
    sizes = {"q": c.width + heads, "k": c.width + kv_heads, "v": c.width + kv_heads, "o": heads + c.width}
    sizes |= dict.fromkeys(("gate", "up", "down"), c.width + c.feed_forward)
    return 2.0 * c.layers * c.lora.rank * sum(sizes[target] for target in c.lora.targets) * tokens


def train_flops(c, rows: int, length: int, remade: bool) -> float:
    """FLOPs of the matrix products of a train step over `rows` full rows, with what is
    computed again.

    Backward is twice forward; of a frozen base half of that, as its weights have no
    gradient. If `remade`, logits are made once more (see `platforms.py`). `c.remat`
    "full" does all of a layer again but its last product, "dots" attention alone.
    """
    parts = dense_flops(c, rows, length, causal_columns(length), rows * length)
    adapters = adapter_flops(c, rows * length)
    full, gradient = c.remat == "full", c.lora is None
    last = 2.0 * c.layers * c.width * c.feed_forward * rows * length
    layers = parts["layers"] * (2 + gradient + full) - last * full + adapters * (3 + full)
    logits = parts["logits"] * (2 + gradient + remade)
    attention = parts["attention"] * (3 + (c.remat != "none")) if c.attention == "xla" else flash_flops(c, rows, length)
    return layers + logits + attention


def flash_flops(c, rows: int, length: int) -> float:
    """FLOPs of a flash kernel in a train step: forward, once more with `remat`, and 2.5
    times that backward.

    It skips the masked half of each square, and makes scores once more in its backward
    pass (Dao 2023, arXiv 2307.08691).
    """
    return dense_flops(c, rows, length, length, 0)["attention"] / 2 * (3.5 + (c.remat != "none"))
