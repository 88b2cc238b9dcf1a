"""Compare one real checkpoint with transformers on eight texts: top-1 agreement and the largest logit difference.

Two steps, as torch and jax may live in different environments. By hand; no test needs it:

    python tests/golden/compare_checkpoint.py reference FOLDER out.npz     # torch and transformers
    python tests/golden/compare_checkpoint.py compare FOLDER out.npz       # jaxreason; exits 1 on disagreement

2026-11-23, SmolLM2-135M-Instruct (de-quantised from Q4_1 to bfloat16), float32 compute on a CPU, against transformers
5.23.0: top-1 428/428, largest difference 1.6e-4 where logits have a standard deviation of 6.2.
"""

import argparse
import sys

import numpy as np

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "<|im_start|>user\nWhat is 17 * 3?<|im_end|>\n<|im_start|>assistant\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "E = mc^2; \\int_0^1 x^2 dx = \\frac{1}{3}; 数学は楽しい。",
    "Once upon a time there was a small mouse who lived under the floor of a very large library. " * 12,
]


def reference(folder: str, out: str) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    arrays = {}
    for i, text in enumerate(TEXTS):
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            arrays[f"logits{i}"] = model(tokens).logits[0].numpy()
        arrays[f"tokens{i}"] = tokens[0].numpy().astype(np.int32)
    np.savez(out, **arrays)


def compare(folder: str, out: str) -> bool:
    import jax

    from jaxreason import text as text_package
    from jaxreason.model import transformer
    from jaxreason.model.weights import load

    config, params = load(folder)
    model, tokenizer = transformer(config), text_package.load(folder)
    run = jax.jit(lambda params, tokens, position: model.unembed(params, model.apply(params, tokens, position)[0]))
    saved = np.load(out)
    longest = max(len(saved[f"tokens{i}"]) for i in range(len(TEXTS)))
    agree = count = 0
    largest = 0.0
    for i, text in enumerate(TEXTS):
        tokens, expected = saved[f"tokens{i}"], saved[f"logits{i}"]
        if tokenizer.encode(text) != tokens.tolist():
            sys.exit(f"text {i} is tokenised differently")
        row = np.pad(tokens, (0, longest - len(tokens)))  # one length, one compilation; attention never looks ahead
        got = np.asarray(run(params, row[None], np.arange(longest)[None])[0])[: len(tokens)]
        agree += int((got.argmax(-1) == expected.argmax(-1)).sum())
        count += len(tokens)
        largest = max(largest, float(np.abs(got - expected).max()))
    spread = float(np.std(saved["logits0"]))
    print(f"{folder}: top-1 {agree}/{count}, largest difference {largest:.2e} (logits spread {spread:.1f})")
    return agree == count and largest < 1e-2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["reference", "compare"])
    parser.add_argument("folder")
    parser.add_argument("out")
    args = parser.parse_args()
    if args.step == "reference":
        reference(args.folder, args.out)
    else:
        sys.exit(0 if compare(args.folder, args.out) else 1)
