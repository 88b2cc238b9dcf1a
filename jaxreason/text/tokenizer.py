"""Tokenizers behind one NamedTuple of functions: characters of an alphabet, bytes, or a `tokenizer.json`.

Encoding never adds tokens. It recognises special tokens written in the text, because chat templates write them;
`special=False` reads them as plain characters, which is how text from outside (questions, solutions, tool output) is
encoded, so that it cannot end a turn or open another. Decoding is total: whatever ids a model samples, it gives a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.options import unknown

UNKNOWN = "\ufffd"  # what an id without a token decodes to: checkpoints pad their vocabulary, and models sample from all of it


class Tokenizer(NamedTuple):
    """Text to token ids and back."""

    vocab_size: int  # ids are below it
    bos_id: int | None
    eos_ids: tuple[int, ...]  # any of them ends a completion; the first is the one that is written
    pad_id: int  # may equal an eos id: lengths and masks are data, never inferred from it
    special: Mapping[str, int]  # special tokens: text to id
    encode: Callable[..., list[int]]
    """`encode(text, special=True) -> ids`; special tokens written in the text are recognised unless `special` is False."""
    decode: Callable[..., str]
    """`decode(ids, skip_special=False) -> text`; never raises."""
    token_text: Callable[[int], str]
    """`token_text(id) -> text` of one token, to show to a person."""
    save: Callable[[Path], None] | None
    """`save(folder)` writes the files that `load` and transformers read; None for one that was read from such files."""


# ------------------------------------------------------------------------------------------------- made by us

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def _made(
    pieces: int, vocab_size: int | None, encode_plain: Callable, decode_plain: Callable, show: Callable, save: Callable
) -> Tokenizer:
    """A tokenizer with ids 0 = pad, 1 = bos, 2 = eos, then `pieces` more that start at 0 for the functions given."""
    ids_of = {PAD: 0, BOS: 1, EOS: 2}
    texts = {i: text for text, i in ids_of.items()}
    first = len(ids_of)
    if vocab_size is not None and vocab_size < first + pieces:
        raise ValueError(f"vocab_size got {vocab_size}; allowed: at least {first + pieces} ({pieces} + pad, bos, eos)")
    splitter = re.compile("(" + "|".join(map(re.escape, ids_of)) + ")")

    def encode(text, special=True):
        ids = []
        for part in splitter.split(text) if special else [text]:
            ids += [ids_of[part]] if special and part in ids_of else [first + i for i in encode_plain(part)]
        return ids

    def decode(ids, skip_special=False):
        out, run = [], []
        for i in [*map(int, ids), None]:
            if i is not None and first <= i < first + pieces:
                run.append(i - first)
                continue
            out.append(decode_plain(run))
            run = []
            if i is not None:
                out.append(("" if skip_special else texts[i]) if i in texts else UNKNOWN)
        return "".join(out)

    def token_text(i):
        return show(i - first) if first <= i < first + pieces else texts.get(i, UNKNOWN)

    return Tokenizer(vocab_size or first + pieces, 1, (2,), 0, ids_of, encode, decode, token_text, save)


def characters(alphabet: str, vocab_size: int | None = None) -> Tokenizer:
    """Make one token a character: ids 0 = pad, 1 = bos, 2 = eos, then the alphabet in its order.

    Args:
      alphabet: the characters, each once.
      vocab_size: None, or more than that, where a model's vocabulary is rounded up.

    Raises:
      ValueError: here, a repeated character; when encoding, a character that is not in the alphabet.
    """
    index = {c: i for i, c in enumerate(alphabet)}
    if len(index) < len(alphabet):
        raise ValueError(f"alphabet repeats {sorted(c for c in index if alphabet.count(c) > 1)}; give each character once")

    def encode_plain(text):
        for c in text:
            if c not in index:
                raise ValueError(f"character {c!r} in {text[:40]!r} is not in the alphabet {alphabet!r}; add it there")
        return [index[c] for c in text]

    def decode_plain(ids):
        return "".join(alphabet[i] for i in ids)

    def save(folder):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        # "<unk>" is no word of it, so that a character which is not in the alphabet is an error there too.
        made = tokenizers.Tokenizer(models.WordLevel(_numbered(alphabet), unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        _write(made, folder)

    return _made(len(alphabet), vocab_size, encode_plain, decode_plain, lambda i: alphabet[i], save)


def byte_level(vocab_size: int | None = None) -> Tokenizer:
    """Make one token a byte of UTF-8: ids 0 = pad, 1 = bos, 2 = eos, then the 256 bytes."""

    def show(i):
        return chr(i) if 32 <= i < 127 else f"<0x{i:02X}>"

    def encode_plain(text):
        return list(text.encode("utf-8", errors="replace"))  # lone surrogates, which JSON can hold, become "?"

    def save(folder):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        # In such a file a byte is a character that can be seen: itself, or one from 256 on, as GPT-2 had it.
        seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
        unseen = [byte for byte in range(256) if byte not in seen]
        pieces = [chr(256 + unseen.index(byte) if byte in unseen else byte) for byte in range(256)]
        made = tokenizers.Tokenizer(models.BPE(_numbered(pieces), merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        _write(made, folder)

    return _made(256, vocab_size, encode_plain, lambda ids: bytes(ids).decode("utf-8", errors="replace"), show, save)


def _numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate([PAD, BOS, EOS, *pieces])}


def _write(made, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; with its special tokens a text begins with bos, as a plain prompt does."""
    from tokenizers import AddedToken, processors

    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS)])
    first = {"special_tokens": [(BOS, made.token_to_id(BOS))]}
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", **first)
    made.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------- tokenizer.json


def load(folder: str | Path) -> Tokenizer:
    """Load a `tokenizer.json` and what stands beside it.

    eos ids: `eos_token` of tokenizer_config.json first, then those of generation_config.json (Llama and Qwen list several
    there), else those of config.json. bos: tokenizer_config.json alone, as some families name one that they never use.

    Args:
      folder: of a checkpoint; for a Hugging Face id pass `weights.resolve(id)`.

    Raises:
      FileNotFoundError: no tokenizer.json.
      ValueError: it cannot be read, or no end-of-sequence token is known.
    """
    import tokenizers  # here: 30 ms that characters and bytes need not pay

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; pass the folder of a checkpoint (for a Hugging Face id: weights.resolve(id))")
    text = path.read_text(encoding="utf-8")
    try:
        reader, plain_reader = tokenizers.Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library reads ({error})") from None
    for one in (reader, plain_reader):  # some files say to cut or pad every text to a length
        one.no_truncation()
        one.no_padding()
    plain_reader.encode_special_tokens = True
    special = {token.content: i for i, token in reader.get_added_tokens_decoder().items() if token.special}
    texts = {i: t for t, i in special.items()}
    known = frozenset(reader.get_vocab().values())
    size = max(known) + 1
    bos_id, eos_ids, pad_id = _special_ids(folder, reader.token_to_id)

    def encode(text, special=True):
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return (reader if special else plain_reader).encode(text, add_special_tokens=False).ids

    def decode(ids, skip_special=False):
        ids = [int(i) for i in ids]
        out, start = [], 0
        for end in [*(n for n, i in enumerate(ids) if i not in known), len(ids)]:
            out.append(reader.decode(ids[start:end], skip_special_tokens=skip_special))
            start = end + 1
        return UNKNOWN.join(out)

    def token_text(i):
        return texts.get(int(i)) or decode([i])

    return Tokenizer(size, bos_id, eos_ids, pad_id, special, encode, decode, token_text, None)


def _special_ids(folder: Path, token_to_id: Callable) -> tuple[int | None, tuple[int, ...], int]:
    """Read bos, eos and pad from the files beside a tokenizer.json."""
    names: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins
        names |= {k: v for k, v in _json(folder / file).items() if k.endswith("_token") and v}
    ids = {k: token_to_id(v["content"] if isinstance(v, dict) else v) for k, v in names.items() if isinstance(v, str | dict)}
    generation, model = _json(folder / "generation_config.json"), _json(folder / "config.json")
    eos = [ids.get("eos_token"), *_list(generation.get("eos_token_id"))]
    if not any(i is not None for i in eos):
        eos = _list(model.get("eos_token_id"))
    eos = tuple(dict.fromkeys(i for i in eos if i is not None))
    if not eos:
        raise ValueError(f"{folder} names no end-of-sequence token; set eos_token in its tokenizer_config.json")
    pads = (ids.get("pad_token"), generation.get("pad_token_id"), eos[0])
    return ids.get("bos_token"), eos, next(i for i in pads if i is not None)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _list(value) -> Sequence[int]:
    return value if isinstance(value, list) else [value]


TOKENIZERS = {"characters": characters, "byte_level": byte_level, "pretrained": load}


def make(name: str, **kwargs) -> Tokenizer:
    """Make the tokenizer of that name from its keyword arguments."""
    if name not in TOKENIZERS:
        raise ValueError(unknown("tokenizer", name, TOKENIZERS))
    return TOKENIZERS[name](**kwargs)


def check_same(there: Tokenizer, here: Tokenizer) -> None:
    """Check that an id means the same text to both; which of them end a completion may differ.

    Raises:
      ValueError: naming the first that does not.
    """
    for i in range(max(there.vocab_size, here.vocab_size)):
        a, b = there.decode([i]), here.decode([i])
        if a != b:
            raise ValueError(
                f"its tokenizer is another one: token {i} is {a!r} there and {b!r} here ({there.vocab_size} and "
                f"{here.vocab_size} tokens); set config.text (and config.model.name, where the tokenizer is pretrained) to what "
                "they are there"
            )


def check_vocabulary(tokenizer: Tokenizer, config) -> None:
    """Check that a model of this config has an embedding for every token. More embeddings than tokens are fine.

    Raises:
      ValueError: it has too few.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model vocab_size={config.vocab_size}; they do not belong "
            f"together: set vocab_size to at least {tokenizer.vocab_size}, or load both from one folder"
        )
