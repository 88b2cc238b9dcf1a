"""Compare one real checkpoint with transformers on nine texts: token ids, prompts,
top-1 agreement, largest logit difference.

Two steps, as torch and jax may live in different environments. By hand; no test needs
it:

    python tests/golden/compare_checkpoint.py reference FOLDER out.npz        # torch and transformers
    python tests/golden/compare_checkpoint.py compare FOLDER out.npz [RUN]    # jaxreason; exits 1 on disagreement

FOLDER is a download, or an export of RUN (`python -m jaxreason.export RUN FOLDER`):
then the params compared are those of the run's newest checkpoint, read from there.
Texts that the tokenizer has no words for are left out, by both.

2026-11-23, SmolLM2-135M-Instruct (de-quantised from Q4_1 to bfloat16), float32 compute
on a CPU, against transformers 5.23.0: top-1 428/428, largest difference 1.6e-4 where
logits have a standard deviation of 6.2. 2026-11-24, exports beside their runs:
configs/tiny.py:smoke 74/74, 1.9e-6 (1.0); the above after two steps of configs/sft.py,
4 rows, float32: 452/452, 1.5e-4 (6.1) with all params trained at 1e-4, and 452/452,
4.1e-4 (5.6) with adapters on a bfloat16 base at 1e-2.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

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
    "7+5*3-2:7+5=2*3=6-2=4;A4",
]
QUESTION = "7+5*3-2:"
SYSTEM = "Be brief."


def reference(folder: str, out: str) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    arrays = {"eos": np.array(tokenizer.eos_token_id), "stops": np.atleast_1d(model.generation_config.eos_token_id)}
    for i, text in enumerate(TEXTS):
        try:
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        except Exception as error:  # the library raises bare Exception
            print(f"text {i} is left out: {error}")
            continue
        with torch.no_grad():
            arrays[f"logits{i}"] = model(tokens).logits[0].numpy()
        arrays[f"tokens{i}"] = tokens[0].numpy().astype(np.int32)
        arrays[f"text{i}"] = np.array(tokenizer.decode(tokens[0], skip_special_tokens=True))
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
        arrays["prompt"] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        arrays["prompt"] = tokenizer(QUESTION).input_ids
    np.savez(out, **arrays)


def run_params(run: str):
    """The model and the params of a run's newest checkpoint, adapters and all."""
    import jax
    from ml_collections import ConfigDict

    from jaxreason import build
    from jaxreason.model import transformer
    from jaxreason.runtime.checkpoint import open_checkpoints

    config = ConfigDict(json.loads((Path(run) / "config.json").read_text()))
    shape = build.read_model_and_text(config.model.to_dict(), config.text.to_dict()).shape
    model = transformer(dataclasses.replace(shape, dtype="float32"))
    checkpoints = open_checkpoints(Path(run) / "checkpoints", read_only=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return model, checkpoints.restore_params(checkpoints.latest(), wanted)


def compare(folder: str, out: str, run_folder: str | None = None) -> bool:
    import jax

    from jaxreason import text as text_package
    from jaxreason.model import transformer
    from jaxreason.model.weights import load
    from jaxreason.types import Task

    if run_folder:
        model, params = run_params(run_folder)
    else:
        config, params = load(folder)
        model = transformer(config)
    tokenizer = text_package.load(folder)
    run = jax.jit(lambda params, tokens, position: model.unembed(params, model.apply(params, tokens, position)[0]))
    saved = np.load(out)
    texts = [i for i in range(len(TEXTS)) if f"tokens{i}" in saved]
    longest = max(len(saved[f"tokens{i}"]) for i in texts)
    if tokenizer.eos_ids[0] != saved["eos"] or set(tokenizer.eos_ids) != set(saved["stops"].tolist()) | {int(saved["eos"])}:
        sys.exit(f"eos is {tokenizer.eos_ids} here, {saved['eos']} there, and generation stops at {saved['stops']}")
    try:
        format = text_package.chat(tokenizer, text_package.load_template(folder), system=SYSTEM)
    except FileNotFoundError:
        format = text_package.plain(tokenizer)
    if format.prompt(Task(QUESTION, "")) != saved["prompt"].tolist():
        sys.exit(f"the prompt is {format.prompt(Task(QUESTION, ''))} here and {saved['prompt'].tolist()} there")
    agree = count = 0
    largest = 0.0
    for i in texts:
        tokens, expected = saved[f"tokens{i}"], saved[f"logits{i}"]
        if tokenizer.encode(TEXTS[i]) != tokens.tolist():
            sys.exit(f"text {i} is tokenised differently")
        if tokenizer.decode(tokens, skip_special=True) != str(saved[f"text{i}"]):
            sys.exit(f"text {i} is decoded differently")
        row = np.pad(tokens, (0, longest - len(tokens)))  # one length, one compilation; attention never looks ahead
        got = np.asarray(run(params, row[None], np.arange(longest)[None])[0])[: len(tokens)]
        agree += int((got.argmax(-1) == expected.argmax(-1)).sum())
        count += len(tokens)
        largest = max(largest, float(np.abs(got - expected).max()))
    spread = float(np.std(saved[f"logits{texts[0]}"]))
    print(
        f"{folder}: {len(texts)} texts and a prompt tokenised alike, top-1 {agree}/{count}, largest difference {largest:.2e} "
        f"(logits spread {spread:.1f})"
    )
    return agree == count and largest < 1e-2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["reference", "compare"])
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("run", nargs="?")
    args = parser.parse_args()
    if args.step == "reference":
        reference(args.folder, args.out)
    else:
        sys.exit(0 if compare(args.folder, args.out, args.run) else 1)
