"""Tokenizers behind one NamedTuple of functions: characters of an alphabet, bytes, or a
`tokenizer.json`.

Encoding never adds bos or eos. It recognises special tokens written in the text,
because chat templates write them. `special=False` reads them as plain characters:
solutions are encoded this way, so that they cannot end a turn or open another.
`added=False` reads every token with a meaning of its own as plain characters, also
those that are not special (Qwen3's `</think>`): text from outside (questions, tool
output) is encoded this way. Decoding never fails: any ids that a model samples give a
text.

Tokenizers of the SentencePiece kind (Llama 2) write a space in front of a text and
remove it when they decode. A text that continues another has no such space: pass
`continues=True` for every piece that is encoded or decoded separately from the text
before it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxreason.options import read_object, read_text, unknown_name_message

UNKNOWN = "\ufffd"  # text of an id without a token: checkpoints pad their vocabulary, and models may sample such ids


class Tokenizer(NamedTuple):
    """Text to token ids and back."""

    vocab_size: int  # every id is below it
    bos_id: int | None
    eos_ids: tuple[int, ...]  # any of them ends a completion; the first one is appended to demonstrations
    pad_id: int  # may equal an eos id: lengths and masks are data, never inferred from it
    special: Mapping[str, int]  # special tokens: text to id
    encode: Callable[..., list[int]]
    """`encode(text, special=True, added=True, continues=False) -> ids`. Special tokens written in the text are recognised unless
    `special` is False; with `added=False` neither they nor those of `added` are."""
    decode: Callable[..., str]
    """`decode(ids, skip_special=False, continues=False) -> text`; never raises. An id decodes the same beside any others,
    except for the bytes of a character."""
    token_text: Callable[[int], str]
    """`token_text(id) -> text` of one token, to show to a person."""
    save: Callable[[Path], None] | None
    """`save(folder)` writes the files that `load` and transformers read; None for a tokenizer read from such files."""
    added: Mapping[str, int] = MappingProxyType({})
    """Tokens with a meaning of their own that are not special, such as `</think>` in Qwen3: text to id."""
    rewrites: bool = False
    """Whether a normalizer may make a token of `special` or `added` from a text that does not contain it."""


# --- our own tokenizers ---

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def _made(
    pieces: int, vocab_size: int | None, encode_plain: Callable, decode_plain: Callable, show: Callable, save: Callable
) -> Tokenizer:
    """Make a tokenizer with ids 0 = pad, 1 = bos, 2 = eos, then `pieces` more. The
    given functions count these from 0.
    """
    ids_of = {PAD: 0, BOS: 1, EOS: 2}
    texts = {i: text for text, i in ids_of.items()}
    first = len(ids_of)
    if vocab_size is not None and vocab_size < first + pieces:
        raise ValueError(f"vocab_size got {vocab_size}; allowed: at least {first + pieces} ({pieces} + pad, bos, eos)")
    splitter = re.compile("(" + "|".join(map(re.escape, ids_of)) + ")")

    def encode(text, special=True, added=True, continues=False):
        ids, special = [], special and added
        for part in splitter.split(text) if special else [text]:
            ids += [ids_of[part]] if special and part in ids_of else [first + i for i in encode_plain(part)]
        return ids

    def decode(ids, skip_special=False, continues=False):
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
    """Make a tokenizer with one token per character: ids 0 = pad, 1 = bos, 2 = eos,
    then the alphabet in its order.

    Args:
      alphabet: the characters, each once.
      vocab_size: None, or a larger size, where a model's vocabulary is rounded up.

    Raises:
      ValueError: here, a repeated character; when encoding, a character that is not in
        the alphabet.
    """
    index = {c: i for i, c in enumerate(alphabet)}
    if len(index) < len(alphabet):
        raise ValueError(f"alphabet repeats {sorted(c for c in index if alphabet.count(c) > 1)}; give each character once")

    def encode_plain(text):
        for c in text:
            if c not in index:
                raise ValueError(f"character {c!r} in {text[:40]!r} is not in the alphabet {alphabet!r} (config.text.alphabet)")
        return [index[c] for c in text]

    def decode_plain(ids):
        return "".join(alphabet[i] for i in ids)

    def save(folder):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        # The vocabulary lacks "<unk>", so a character outside the alphabet is an error
        # there too.
        made = tokenizers.Tokenizer(models.WordLevel(_numbered(alphabet), unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        _write(made, folder)

    return _made(len(alphabet), vocab_size, encode_plain, decode_plain, lambda i: alphabet[i], save)


def byte_level(vocab_size: int | None = None) -> Tokenizer:
    """Make a tokenizer with one token per byte of UTF-8: ids 0 = pad, 1 = bos, 2 = eos,
    then the 256 bytes.
    """

    def show(i):
        return chr(i) if 32 <= i < 127 else f"<0x{i:02X}>"

    def encode_plain(text):
        return list(text.encode("utf-8", errors="replace"))  # lone surrogates, which JSON can hold, become "?"

    def save(folder):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        # tokenizer.json writes each byte as a visible character: itself, or one from
        # code point 256 on, as GPT-2 does.
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
    """Write tokenizer.json and tokenizer_config.json. Encoding with special tokens
    starts a text with bos, as a plain prompt does.
    """
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


# --- tokenizer.json ---


def load(folder: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`, with bos, eos and pad from the files beside it.

    The first eos id is `eos_token` of tokenizer_config.json (or of
    special_tokens_map.json). The next are those of generation_config.json (Llama and
    Qwen list several there) or, if it has none, of config.json. bos comes from the
    first two of these files alone, because some families give a bos id elsewhere that
    they never use.

    Args:
      folder: of a checkpoint; for a Hugging Face id pass `weights.resolve(id)`.

    Raises:
      FileNotFoundError: no tokenizer.json.
      ValueError: a file cannot be read, no end-of-sequence token is known, or the
        tokenizer lacks a token that a file names.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; pass the folder of a checkpoint (for a Hugging Face id: weights.resolve(id))")
    new_reader = functools.partial(make_reader, path, read_text(path))
    reader, plain_reader = new_reader(), new_reader()
    plain_reader.encode_special_tokens = True
    tokens = {token.content: (i, token.special) for i, token in reader.get_added_tokens_decoder().items()}
    special = {content: i for content, (i, is_special) in tokens.items() if is_special}
    # Some tokenizers add runs of white space as tokens; these need no protection, as
    # they mean only themselves.
    added = {content: i for content, (i, is_special) in tokens.items() if not is_special and content.strip()}
    outside_reader = plain_reader
    if added:
        outside_reader = new_reader()
        outside_reader.add_special_tokens(list(added))  # they exist already; this makes them special
        outside_reader.encode_special_tokens = True
    bare = _bare(reader)  # parts changed to neither add nor remove a leading space
    starts, strips = ("normalizer" in bare or "pre_tokenizer" in bare), "decoder" in bare
    inner_reader = new_reader() if starts else outside_reader
    if starts:
        inner_reader.add_special_tokens(list(added))
        inner_reader.encode_special_tokens = True
    decoder = new_reader() if strips else reader
    replace_parts(inner_reader, bare, ("normalizer", "pre_tokenizer"))
    replace_parts(decoder, bare, ("decoder",))
    read = functools.partial(encode_without, inner_reader)
    texts = {i: t for t, i in special.items()}
    known = frozenset(reader.get_vocab().values())
    size = max(known) + 1
    byte_of = _bytes_of(reader)
    bos_id, eos_ids, pad_id = _special_ids(folder, reader.token_to_id, known)
    rewrites = reader.normalizer is not None and _may_write(reader, [*special, *added])
    unknown_id = _unknown_id(reader)
    barred = frozenset(special.values()) - {unknown_id}
    barred_outside = barred | frozenset(added.values()) - {unknown_id}
    any_token = {one: _any(found) for one, found in ((True, [*special, *added]), (False, added))}

    def encode(text, special=True, added=True, continues=False):
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        one = outside_reader if not added else reader if special else plain_reader
        inner = 0
        if continues and starts:  # `inner_reader` encodes up to the first token that `one` recognises
            found = any_token[bool(special)].search(text) if added else None
            inner = found.start() if found else len(text)
        no = barred_outside if not added else frozenset() if special else barred
        before = read(inner_reader, text[:inner], no) if inner else []
        return before + read(one, text[inner:], no)

    def kind(i):
        return bytes if i in byte_of else str if i in known else None

    def decode(ids, skip_special=False, continues=False):
        out = []
        for what, run in itertools.groupby(map(int, ids), kind):
            if what is bytes:  # the library gives up a whole run of bytes if one is invalid
                out.append(bytes(byte_of[i] for i in run).decode("utf-8", errors="replace"))
            elif what is str:
                out.append(decoder.decode(list(run), skip_special_tokens=skip_special))
            else:
                out.extend(UNKNOWN for _ in run)
        text = "".join(out)
        return text[1:] if strips and not continues and text.startswith(" ") else text

    def token_text(i):
        return texts.get(int(i)) or decode([i], continues=True)

    return Tokenizer(size, bos_id, eos_ids, pad_id, special, encode, decode, token_text, None, added, rewrites)


def make_reader(path: Path, source: str):
    """Parse the text of a tokenizer.json with the tokenizers library."""
    import tokenizers  # imported here: it takes 30 ms, which the other tokenizers avoid

    try:
        made = tokenizers.Tokenizer.from_str(source)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, or panics
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library reads ({error})") from None
    made.no_truncation()  # some files ask to truncate or pad every text
    made.no_padding()
    return made


def replace_parts(reader, bare: dict, names: Sequence[str]) -> None:
    """Replace the named parts of a tokenizer by those of `bare`, which leave spaces
    alone.
    """
    for name in names:
        if name in bare:
            setattr(reader, name, bare[name])


def encode_without(inner_reader, reader, text: str, barred: frozenset[int]) -> list[int]:
    """Encode a text without the ids of `barred`.

    The model itself may have a barred token as a piece of text. Such a piece is encoded
    character by character instead; a character that is a whole barred token is left
    out.
    """
    found = reader.encode(text, add_special_tokens=False)
    ids = found.ids  # each access makes a copy
    if not barred or barred.isdisjoint(ids):
        return ids

    def spell(text):
        if inner_reader.normalizer is not None:  # before the split: one character may normalize to a whole token
            text = inner_reader.normalizer.normalize_str(text)
        return [i for c in text for i in inner_reader.encode(c, add_special_tokens=False).ids if i not in barred]

    spelled = []
    for i, (start, end) in zip(ids, found.offsets, strict=True):
        spelled += [i] if i not in barred else spell(text[start:end])
    return spelled


def _may_write(reader, words: Sequence[str]) -> bool:
    """Tell whether one of these tokens is matched in normalized text, or is a piece of
    the model itself.
    """
    return any(token.normalized for token in reader.get_added_tokens_decoder().values() if token.content in words) or any(
        reader.model.token_to_id(word) is not None for word in words
    )


def _unknown_id(reader) -> int | None:
    """Return the id of the token for text that a model has no piece for; None without
    one.
    """
    import tokenizers

    if isinstance(reader.model, tokenizers.models.Unigram):
        return json.loads(reader.to_str())["model"].get("unk_id")
    text = getattr(reader.model, "unk_token", None)
    return None if text is None else reader.token_to_id(text)


def _any(words: Iterable[str]) -> re.Pattern:
    """Compile a pattern that matches any of these words, the longest first; without
    words it matches nothing.
    """
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


# --- leading space, and bytes ---

PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}  # part -> its key in a Sequence


def _bare(reader) -> dict[str, Any]:
    """Rebuild, by name, the parts of a tokenizer that add or remove a leading space, so
    that they no longer do.
    """
    import tokenizers

    shell = tokenizers.Tokenizer(tokenizers.models.BPE())  # holds the parts alone, without the vocabulary
    for name in PARTS:
        if getattr(reader, name) is not None:
            setattr(shell, name, getattr(reader, name))
    there = json.loads(shell.to_str())
    had = {name: there[name] for name in PARTS if there[name] is not None}
    left = {name: _without_space(name, part) or {"type": "Sequence", PARTS[name]: []} for name, part in had.items()}
    made = tokenizers.Tokenizer.from_str(json.dumps(there | left))
    return {name: getattr(made, name) for name in had if left[name] != had[name]}


def _without_space(name: str, part: dict[str, Any]) -> dict[str, Any] | None:
    """Change a part of a tokenizer.json, or of a sequence there, so that it neither
    adds nor removes a leading space; None if nothing is left of it.
    """
    kind = part["type"]
    if kind == "Sequence":
        left = [_without_space(name, one) for one in part[PARTS[name]]]
        return part | {PARTS[name]: [one for one in left if one is not None]}
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in part else {})
    if kind == "ByteLevel" and name == "pre_tokenizer":
        return part | {"add_prefix_space": False}
    if kind == "Prepend" or (kind == "Strip" and name == "decoder"):
        return None
    return part


def _bytes_of(reader) -> dict[int, int]:
    """Map the ids of single-byte tokens to their bytes; empty for a tokenizer without
    byte fallback.
    """
    if reader.decoder is None or "ByteFallback" not in str(reader.decoder):
        return {}
    ids = {byte: reader.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {i: byte for byte, i in ids.items() if i is not None}


# --- bos, eos and pad ---


def _special_ids(folder: Path, token_to_id: Callable, known: frozenset[int]) -> tuple[int | None, tuple[int, ...], int]:
    """Read the ids of bos, eos and pad from the files beside a tokenizer.json."""
    files = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json")
    there = {file: read_object(folder / file) if (folder / file).is_file() else {} for file in files}
    ids: dict[str, int | None] = {}
    for file in files[:2]:  # the latter wins
        for name in ("bos_token", "eos_token", "pad_token"):
            if text := there[file].get(name):
                ids[name] = _id_of(folder / file, name, text, token_to_id)
    for file in files[2:]:
        listed = _ids(folder / file, "eos_token_id", there[file], known)
        if listed:
            break
    eos = tuple(dict.fromkeys(i for i in (ids.get("eos_token"), *listed) if i is not None))
    if not eos:
        raise ValueError(f"{folder} names no end-of-sequence token; set eos_token in its tokenizer_config.json")
    pads = (
        ids.get("pad_token"),
        *_ids(folder / "generation_config.json", "pad_token_id", there["generation_config.json"], known),
    )
    return ids.get("bos_token"), eos, next((i for i in pads if i is not None), eos[0])


def _id_of(path: Path, name: str, text: Any, token_to_id: Callable) -> int | None:
    """Return the id of a token that a file names; None for a pad token that the
    tokenizer lacks, because nothing reads it.
    """
    text = text.get("content") if isinstance(text, dict) else text
    if not isinstance(text, str):
        raise ValueError(f"{path}: {name} got {text!r}; allowed: the text of a token")
    try:
        found = token_to_id(text)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
        found = None
    if found is None and name != "pad_token":
        raise ValueError(f"{path}: {name} got {text!r}, which is no token of tokenizer.json; do they belong together?")
    return found


def _ids(path: Path, name: str, there: dict[str, Any], known: frozenset[int]) -> list[int]:
    """Return the token ids, one or several, that a file gives under a name."""
    value = there.get(name)
    if value is None or (name == "pad_token_id" and value == -1):  # Llama 1's way to say that there is none
        return []
    found = value if isinstance(value, list) else [value]
    for i in found:
        if not isinstance(i, int) or isinstance(i, bool) or i not in known:
            raise ValueError(f"{path}: {name} got {i!r}; allowed: ids of tokenizer.json's tokens, 0 to {max(known)}")
    return found


def with_eos(tokenizer: Tokenizer, eos: Sequence[str | int]) -> Tokenizer:
    """Add end-of-sequence tokens, given as texts or ids, after those that a tokenizer
    has.

    Raises:
      ValueError: a token that it does not have, or a text of more than one token.
    """
    if isinstance(eos, str) or not isinstance(eos, Sequence):
        raise ValueError(f"text.eos got {eos!r}; allowed: a tuple of token texts or ids, such as ('<|im_end|>',)")
    return tokenizer._replace(eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *(_one_token(tokenizer, one) for one in eos)])))


def _one_token(tokenizer: Tokenizer, one: str | int) -> int:
    if isinstance(one, int) and not isinstance(one, bool):
        if not 0 <= one < tokenizer.vocab_size or tokenizer.token_text(one) == UNKNOWN:
            raise ValueError(f"text.eos got {one}; allowed: ids of the tokenizer's tokens, below {tokenizer.vocab_size}")
        return one
    if not isinstance(one, str) or not one:
        raise ValueError(f"text.eos got {one!r}; allowed: token texts or ids")
    try:
        ids = tokenizer.encode(one, continues=True)
    except ValueError:  # a character that is not in an alphabet
        ids = []
    if len(ids) != 1 or tokenizer.token_text(ids[0]) != one:
        near = ", ".join(repr(text) for text in (*tokenizer.special, *tokenizer.added))
        raise ValueError(f"text.eos got {one!r}, which is no token of the tokenizer; its own: {near[:300]}, and pieces of text")
    return ids[0]


TOKENIZERS = {"characters": characters, "byte_level": byte_level, "pretrained": load}


def make(name: str, **kwargs) -> Tokenizer:
    """Make a tokenizer from its name and keyword arguments."""
    if name not in TOKENIZERS:
        raise ValueError(unknown_name_message("tokenizer", name, TOKENIZERS))
    return TOKENIZERS[name](**kwargs)


def check_same(there: Tokenizer, here: Tokenizer) -> None:
    """Check that every id decodes to the same text in both tokenizers; their eos ids
    may differ.

    Raises:
      ValueError: names the first id that differs.
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
    """Check that a model of this config has an embedding for every token. More
    embeddings than tokens are fine.

    Raises:
      ValueError: too few embeddings.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model vocab_size={config.vocab_size}; they do not belong "
            f"together: set vocab_size to at least {tokenizer.vocab_size}, or load both from one folder"
        )


LONGEST_CHARACTER = 8  # tokens that a character may be split into


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token in a sequence that continues another.

    Tokens that are parts of one character get its text at the first of them, and "" at
    the others.
    """
    found, at, ids = [], 0, [int(i) for i in ids]
    while at < len(ids):
        for end in range(at + 1, min(len(ids), at + LONGEST_CHARACTER) + 1):
            text = tokenizer.decode(ids[at:end], continues=True)
            if "\ufffd" not in text:
                break
        else:  # no character at all
            end, text = at + 1, tokenizer.decode(ids[at : at + 1], continues=True)
        found += [text, *[""] * (end - at - 1)]
        at = end
    return found
