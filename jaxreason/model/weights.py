"""Conversion of weights between Hugging Face folders (safetensors) and the nested dict
of stacked arrays that a `Model` takes.

`table(config)` lists each tensor with its name in the file, its path in our params, and
the reshaping between them; loading and saving both use it. Loading fills each stacked
array layer by layer, straight from the file, and moves it to the devices before
beginning the next one, so host memory stays near one copy of the model. A tensor that
is missing, unexpected, misshapen or not finite is an error that names it. Where
possible, the file headers reveal such errors before anything is allocated. Not
supported: the value head, which no Hugging Face checkpoint has, and pickled or
quantised checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxreason.model.config import HUB_IDS, ModelConfig, read_hf, to_hf
from jaxreason.options import read_object
from jaxreason.runtime import hub

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


class Row(NamedTuple):
    """One kind of tensor: "theirs" in the file, "ours" in params. Ours (for one layer)
    is `theirs.reshape(split).transpose(axes)`; both are views.
    """

    name: str  # name in the file; {} is the layer number
    path: tuple[str, ...]  # path in params; under "layers" it is stacked on axis 0
    shape: tuple[int, ...]  # shape in the file
    split: tuple[int, ...]  # shape in the file, with heads and head size as separate axes
    axes: tuple[int, ...]  # transposition of split: theirs are (out, in), ours (in, out)

    @property
    def ours(self) -> tuple[int, ...]:
        """Return the shape in params, without the layer axis."""
        return tuple(self.split[a] for a in self.axes)

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    def names(self, config: ModelConfig) -> Iterator[str]:
        """Return the names in the file: one per layer, or just one."""
        return (self.name.format(i) for i in range(config.layers if self.stacked else 1))

    def from_theirs(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.split).transpose(self.axes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.axes)).reshape(self.shape)


def table(config: ModelConfig) -> list[Row]:
    """List every tensor of a Llama, Qwen2 or Qwen3 checkpoint of this shape."""
    c = config
    D, F, V, N, K, H = c.width, c.feed_forward, c.vocab_size, c.heads, c.kv_heads, c.head_size

    def row(name, path, *split, axes=None, merged=0):
        """Make a Row. In its shape in the file, the first `merged` axes of `split` are
        one axis, or the last `-merged` axes if `merged` is negative.
        """
        shape = split
        if merged > 0:
            shape = (math.prod(split[:merged]), *split[merged:])
        if merged < 0:
            shape = (*split[:merged], math.prod(split[merged:]))
        return Row(name, path, shape, split, axes or tuple(range(len(split))))

    def layer(name, *path):
        return f"model.layers.{{}}.{name}", ("layers", *path)

    rows = [
        row("model.embed_tokens.weight", ("embed", "embedding"), V, D),
        row(*layer("input_layernorm.weight", "attention_norm", "scale"), D),
        row(*layer("self_attn.q_proj.weight", "attention", "q", "kernel"), N, H, D, axes=(2, 0, 1), merged=2),
        row(*layer("self_attn.k_proj.weight", "attention", "k", "kernel"), K, H, D, axes=(2, 0, 1), merged=2),
        row(*layer("self_attn.v_proj.weight", "attention", "v", "kernel"), K, H, D, axes=(2, 0, 1), merged=2),
        row(*layer("self_attn.o_proj.weight", "attention", "o", "kernel"), D, N, H, axes=(1, 2, 0), merged=-2),
        row(*layer("post_attention_layernorm.weight", "mlp_norm", "scale"), D),
        row(*layer("mlp.gate_proj.weight", "mlp", "gate", "kernel"), F, D, axes=(1, 0)),
        row(*layer("mlp.up_proj.weight", "mlp", "up", "kernel"), F, D, axes=(1, 0)),
        row(*layer("mlp.down_proj.weight", "mlp", "down", "kernel"), D, F, axes=(1, 0)),
        row("model.norm.weight", ("final_norm", "scale"), D),
    ]
    if c.qkv_bias:
        rows += [
            row(*layer(f"self_attn.{x}_proj.bias", "attention", x, "bias"), heads, H, merged=2)
            for x, heads in (("q", N), ("k", K), ("v", K))
        ]
    if c.qk_norm:
        rows += [row(*layer(f"self_attn.{x}.weight", "attention", x, "scale"), H) for x in ("q_norm", "k_norm")]
    if not c.tied_embeddings:
        rows += [row("lm_head.weight", ("unembed", "kernel"), V, D, axes=(1, 0))]
    return rows


# --- finding ---


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, given as a folder, a named size, or a Hugging
    Face id. Files that the cache lacks are downloaded.

    `revision` is a commit, branch or tag of the hub.

    Raises:
      FileNotFoundError: it is neither a folder nor cached, and the hub is unreachable
        or does not have it.
      ValueError: the hub has no safetensors for it, or a revision was given with a
        folder.
    """
    name = HUB_IDS.get(str(path_or_hub_id), str(path_or_hub_id))
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision got {revision!r} with the folder {name!r}; allowed: None, or a Hugging Face id (owner/name)"
            )
        return folder
    if not hub.ID.fullmatch(name):
        raise FileNotFoundError(f"no folder {name!r}, and it is not a Hugging Face id either (owner/name)")
    return hub.fetch(name, lambda names: needed_files(name, names), revision=revision)


def needed_files(id: str, names: Sequence[str]) -> list[str]:
    """Choose the files of a checkpoint by name, the weights last. Pickles and other
    formats are left out.

    Raises:
      ValueError: the repository lacks config.json or safetensors weights.
    """
    shards = [n for n in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]
    weights = [SINGLE] if SINGLE in names else [INDEX, *sorted(shards)] if INDEX in names and shards else []
    if not weights or "config.json" not in names:
        some = ", ".join(sorted(n for n in names if "/" not in n)[:12])
        raise ValueError(
            f"{id} lacks config.json, or {SINGLE}, or {INDEX} and its files; it has: {some or 'nothing'}; choose a repository "
            "with safetensors"
        )
    return [n for n in ("config.json", *TOKENIZER_FILES) if n in names] + weights


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}; the checkpoint is incomplete: download it again") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again") from None


def _weight_map(folder: Path) -> dict[str, str]:
    """Map each tensor of a sharded checkpoint to its file, as listed in the index."""
    found = read_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensors to names of files beside it; download it again")
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Map each tensor to its file."""
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}; pickled weights (.bin) are not read")
    files = {name: folder / file for name, file in _weight_map(folder).items()}
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in {n for n, p in files.items() if p == path} - set(file.keys()):
                raise ValueError(f"{INDEX} puts {name} into {path.name}, which lacks it; download both again")
    return files


# --- loading ---


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    sharding: Any = None,
    value_head: bool = False,
    init: Mapping[str, Any] | None = None,
    **overrides,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Load a checkpoint as `(config, params)`.

    Args:
      path_or_hub_id: as in `resolve`.
      dtype: of the computation; stored in the config.
      param_dtype: of the returned arrays; stored in the config.
      sharding: one `jax.sharding.Sharding` for all arrays, or a tree of them with the
        structure of params. Every process reads the files and keeps its own shards.
      value_head: whether the config has a value head. Its weights come from `init`;
        without `init`, params lack them.
      init: params that provide the weights that no checkpoint has.
      **overrides: further fields of ModelConfig, such as `remat`.

    Raises:
      FileNotFoundError: there is no such checkpoint, or one of its files is missing.
      ValueError: a file is damaged, or a tensor is missing, unexpected or misshapen;
        the message names it.
      BadWeights: a tensor is not finite in `param_dtype`, or config.json ties the
        output head but the file has a head that differs from the embedding.
    """
    folder = resolve(path_or_hub_id)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; pass the folder of a Hugging Face checkpoint")
    config = read_hf(folder, dtype=dtype, param_dtype=param_dtype, value_head=value_head, **overrides)
    rows, files = table(config), _files(folder)
    _check_headers(config, rows, files, folder)
    if config.tied_embeddings and HEAD in files:
        _check_tied(files, folder)
    params: dict[str, Any] = {}
    for row in rows:
        stack = np.empty((*([config.layers] if row.stacked else []), *row.ours), np.dtype(param_dtype))
        for i, name in enumerate(row.names(config)):
            ours = stack[i] if row.stacked else stack
            with np.errstate(over="ignore"):  # reported below, with the tensor's name
                ours[...] = row.from_theirs(_read(files[name], name))
            if not _is_finite(ours):
                raise BadWeights(f"tensor {name} in {files[name]} holds NaN or infinity as {param_dtype}; download it again")
        _put(params, row.path, _to_devices(stack, _at(sharding, row.path)))
    if value_head and init is not None:
        params["value"] = init["value"]
    return config, params


def check(folder: str | Path, config: ModelConfig) -> None:
    """Check that a folder has the tensors of this config, reading only file headers.

    Raises:
      FileNotFoundError, ValueError: as `load` does.
    """
    _check_headers(config, table(config), _files(Path(folder)), Path(folder))


class BadWeights(ValueError):
    """Weights that no run can start from; only reading the tensors reveals them."""


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYER = re.compile(r"(model\.layers\.)(0|[1-9]\d{0,8})(\..+)")


def _check_headers(config: ModelConfig, rows: list[Row], files: Mapping[str, Path], folder: Path) -> None:
    """Raise ValueError if a tensor is missing, unexpected, misshapen or of an
    unsupported dtype.
    """
    row_of, wanted = {row.name: row for row in rows}, {}
    for name in files:
        found = LAYER.fullmatch(name)
        row = row_of.get(f"{found[1]}{{}}{found[3]}" if found else name)
        if row is not None and (int(found[2]) < config.layers if found else not row.stacked):
            wanted[name] = row.shape
    # Find the first missing name lazily: a wrong config.json may ask for any number of
    # names.
    more = sum(config.layers if row.stacked else 1 for row in rows) - len(wanted) - 1
    if more >= 0:
        missing, shape = next((name, row.shape) for row in rows for name in row.names(config) if name not in files)
        also = f" and {more} more" if more else ""
        raise ValueError(f"{folder} lacks tensor {missing} of shape {shape}{also}; does config.json belong to it?")
    # Ignore RoPE frequencies in old checkpoints, which config.json determines, and a
    # tied head that is stored twice.
    extra = sorted(n for n in files if n not in wanted and not n.endswith("rotary_emb.inv_freq") and n != HEAD)
    if extra:
        also = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{folder} has tensor {extra[0]}{also}, which this config has no place for; is it another kind of model?"
        )
    for path in sorted({files[name] for name in wanted}):
        with _open(path) as file:
            for name in (n for n in wanted if files[n] == path):
                _check_tensor(file, path, name, wanted[name])


def _check_tensor(file, path: Path, name: str, shape: tuple[int, ...]) -> None:
    lazy = file.get_slice(name)
    got, kind = tuple(lazy.get_shape()), lazy.get_dtype()
    if got != shape:
        raise ValueError(f"tensor {name} in {path} got shape {got}; config.json asks for {shape}")
    if kind not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"tensor {name} in {path} got dtype {kind}; allowed: F64, F32, F16, BF16 (no quantised weights)")


def _check_tied(files: Mapping[str, Path], folder: Path) -> None:
    """Raise BadWeights if a checkpoint with tied embeddings has a different head: it is
    unclear which of the two is meant.
    """
    head, embedding = _read(files[HEAD], HEAD), _read(files[EMBEDDING], EMBEDDING)
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
        raise BadWeights(
            f"tensor {HEAD} in {files[HEAD]} differs from {EMBEDDING}, although {folder / 'config.json'} says "
            "tie_word_embeddings: true; set it to false there to use the head, or remove the head from the file"
        )


def _read(path: Path, name: str) -> np.ndarray:
    """Read one tensor. Each call opens the file anew, because its mapped pages count as
    this process's memory until it is closed.
    """
    with _open(path) as file:
        return file.get_tensor(name)


def _is_finite(array: np.ndarray) -> bool:
    """Return whether all numbers are finite, without a temporary array of the same size
    for float32.
    """
    if array.dtype == np.float32:  # max and min are NaN if any number is
        return bool(np.isfinite(array.max()) and np.isfinite(array.min()))
    exponent = np.uint16(0x7F80)  # bfloat16's exponent bits, all ones if not finite; NumPy has no fast loops for bfloat16
    return not ((array.view(np.uint16) & exponent) == exponent).any()


def _to_devices(array: np.ndarray, sharding) -> jax.Array:
    if sharding is None:
        placed = jax.device_put(array)
    else:
        placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.block_until_ready(placed)  # otherwise pending copies hold several host arrays at a time


def _at(tree, path: tuple[str, ...]):
    """Return the leaf at a path. A tree that is not a mapping stands for all of its
    leaves.
    """
    for key in path:
        if not isinstance(tree, Mapping):
            return tree
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


# --- saving ---


def save(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_folder: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    **tokens,
) -> None:
    """Write a folder that transformers, vLLM and `load` can read. The value head is not
    written.

    Args:
      folder: created if missing; model files of an earlier save in it are replaced.
      config: of the params.
      params: with stacked layers; every array must be addressable from this process.
      tokenizer_folder: source of the tokenizer files, and of the token ids and
        context length in its config.json.
      dtype: of the weights in the file; None keeps the dtype of the params.
      max_shard_bytes: maximum size of a file; a larger tensor gets its own file.
      **tokens: entries for config.json, such as `eos_token_id`; token ids are also
        written to generation_config.json.
    """
    folder = Path(folder)
    rows = table(config)
    for row in rows:  # check all of them before writing anything
        leaf, shape = _at(params, row.path), (*([config.layers] if row.stacked else []), *row.ours)
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError("save got arrays of other processes; gather them first: multihost_utils.process_allgather")
        if np.shape(leaf) != shape:
            raise ValueError(f"params {'.'.join(row.path)} got shape {np.shape(leaf)}; the config asks for {shape}")
    folder.mkdir(parents=True, exist_ok=True)
    given = tokens
    if tokenizer_folder is not None:
        tokens = _copy_tokenizer(Path(tokenizer_folder), folder) | tokens
    for old in [folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)
    stored = np.dtype(dtype or params["embed"]["embedding"].dtype)
    _write_json(folder / "config.json", to_hf(config, torch_dtype=str(stored), **tokens))
    _write_shards(folder, config, rows, params, stored, max_shard_bytes)
    path = folder / "generation_config.json"
    copied = read_object(path) if path.is_file() and tokenizer_folder is not None else {}
    tokens = given if copied else tokens  # a copied file's ids take precedence over config.json's, but not over the caller's
    ids = {k: tokens[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if tokens.get(k) is not None}
    if copied or "eos_token_id" in ids:
        _write_json(path, copied | ids)


def _copy_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copy a tokenizer's files, and return the entries of its config.json that concern
    the text and not the weights.
    """
    if not (source / "tokenizer.json").is_file():
        raise FileNotFoundError(f"tokenizer_folder {source} has no tokenizer.json; leave it out to save weights alone")
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
    config_json = read_object(source / "config.json") if (source / "config.json").is_file() else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    return {key: config_json[key] for key in keys if key in config_json}


def _write_shards(folder: Path, config: ModelConfig, rows: list[Row], params, stored: np.dtype, max_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    room, total = max_bytes, 0
    for row in rows:
        size = math.prod(row.shape) * stored.itemsize
        for name in row.names(config):
            if size > room and shards[-1]:
                shards.append([])
                room = max_bytes
            shards[-1].append(name)
            room, total = room - size, total + size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = [SINGLE] if len(shards) == 1 else names
    at_end = {shard[-1]: file for shard, file in zip(shards, files, strict=True)}
    tensors: dict[str, np.ndarray] = {}
    for row in rows:  # keep only one stacked array and one shard in host memory
        stack = np.asarray(_at(params, row.path))
        for i, name in enumerate(row.names(config)):
            theirs = row.to_theirs(stack[i] if row.stacked else stack)
            tensors[name] = np.ascontiguousarray(theirs, dtype=stored)
            if name in at_end:  # transformers requires the format in the metadata
                save_file(tensors, folder / at_end[name], metadata={"format": "pt"})
                shutil.copymode(folder / "config.json", folder / at_end[name])  # save_file makes it private
                tensors = {}
    if len(shards) > 1:
        weight_map = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
