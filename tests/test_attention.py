"""Attention kernels: each gives the values and gradients of plain XLA, and refuses
early where it can't run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.model import ModelConfig, attention, transformer
from jaxreason.model import cache as kv
from jaxreason.model.cpu import product
from jaxreason.model.layers import Seen, attend, read, read_then_write, rotate
from jaxreason.model.tpu import product_by_head, rotate_by_product
from jaxreason.sharding import make_mesh

B, N, K, H = 4, 4, 2, 8
CONFIG = ModelConfig(vocab_size=24, width=16, layers=2, heads=N, kv_heads=K, head_size=H, feed_forward=32, dtype="bfloat16")
# As they run on a CPU: cuDNN's call with XLA's implementation of it, the TPU kernel
# interpreted.
ANYWHERE = {
    "cudnn": functools.partial(attention.cudnn, implementation="xla"),
    "splash": functools.partial(attention.splash, interpret=True),
}


def rows(T, *, seed=0):
    """Make random q, k, v of T tokens, with these rows: a full one, two packed segments
    with padding after them, one segment with padding, and only padding.
    """
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    third = T // 3
    segment_BT = np.zeros((B, T), np.int32)
    segment_BT[0] = 1
    segment_BT[1, :third], segment_BT[1, third : 2 * third] = 1, 2
    segment_BT[2, :third] = 1
    return q, k, v, segment_BT


def with_gradients(kernel, q, k, v, segment_BT):
    """Return a kernel's output, and the gradients of a weighted sum of it."""
    T = q.shape[1]
    weight_BTNH = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        mixed = kernel.attend(q, k, v, kernel.see(jnp.broadcast_to(jnp.arange(T), (B, T)), segment_BT))
        return jnp.sum(mixed * weight_BTNH), mixed

    gradients, mixed = jax.grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return mixed, *gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rotation_by_a_product_is_a_rotation(dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(B, 9, N, H)), dtype) for _ in range(2))
    angle = np.tile(rng.normal(size=(B, 9, H // 2)), 2)
    turns = jnp.float32(np.cos(angle)), jnp.float32(np.sin(angle))
    (expected, back), (got, got_back) = (jax.vjp(lambda x, f=f: f(x, *turns), x) for f in (rotate, rotate_by_product))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(
        got_back(weight)[0].astype(np.float32),
        back(weight)[0].astype(np.float32),
        rtol=1e-6 if dtype == "float32" else 2**-7,
        atol=1e-6,
    )


def test_a_product_by_head_is_a_product():
    rng = np.random.default_rng(0)
    x_BTD, kernel_DNH = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, 9, 16), (16, N, H)))
    weight = jnp.asarray(rng.normal(size=(B, 9, N, H)), jnp.float32)

    def plain(x_BTD, kernel_DNH):
        return product(x_BTD, kernel_DNH.reshape(16, -1)).reshape(B, 9, N, H)

    (expected, back), (got, got_back) = (jax.vjp(f, x_BTD, kernel_DNH) for f in (plain, product_by_head))
    for x, y in zip((got, *got_back(weight)), (expected, *back(weight)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("name", "T"), [("cudnn", 9), ("cudnn", 10), ("cudnn", 401), ("splash", 9), ("splash", 300)])
def test_a_kernel_gives_what_xla_gives(name, T, segmented):
    """300 tokens are three blocks of splash; for the plain kernel 300 and 401 are two
    parts and three.
    """
    q, k, v, segment_BT = rows(T)
    segment_BT = segment_BT if segmented else None
    expected = with_gradients(attention.xla(CONFIG), q, k, v, segment_BT)
    got = with_gradients(ANYWHERE[name](CONFIG), q, k, v, segment_BT)
    for part, x, y in zip(("mixed", "q", "k", "v"), got, expected, strict=True):
        assert np.abs(y).max() > 0.1, part
        np.testing.assert_allclose(x, y, atol=2e-5, err_msg=part)


@pytest.mark.parametrize("prompt", [1, 4])
def test_branches_see_the_prompt_and_themselves(prompt):
    """Attempts behind one copy of a prompt attend as they would behind a copy of their
    own.
    """
    rng = np.random.default_rng(0)
    lengths, heads = (3, 1, 5), {"q": CONFIG.heads, "k": CONFIG.kv_heads, "v": CONFIG.kv_heads}
    kernel = attention.xla(CONFIG)

    def mix(tokens, position, segment):
        made = [np.stack([table[name][t] for t in tokens])[None] for name in "qkv"]
        return kernel.attend(*made, kernel.see(jnp.array([position]), jnp.array([segment])))[0]

    count = prompt + sum(lengths)
    table = {name: rng.normal(size=(count, n, CONFIG.head_size)).astype(np.float32) for name, n in heads.items()}
    begin, tokens, position, own = prompt, list(range(prompt)), list(range(prompt)), []
    for i, n in enumerate(lengths):
        again = [prompt - 1] if i else []
        own.append(slice(len(tokens) + len(again), len(tokens) + len(again) + n))
        tokens += [*again, *range(begin, begin + n)]
        position += range(prompt - len(again), prompt + n)
        begin += n
    # Behind another segment, which must not be seen either, and before padding.
    shared = mix([0, 1, *tokens, 0], [0, 1, *position, 9], [1, 1, *[2] * len(tokens), 0])[2:-1]
    begin = prompt
    for n, where in zip(lengths, own, strict=True):
        alone = mix([*range(prompt), *range(begin, begin + n)], range(prompt + n), [1] * (prompt + n))
        np.testing.assert_allclose(shared[where], alone[prompt:], atol=1e-6)
        np.testing.assert_allclose(
            shared[where.start - 1], alone[prompt - 1], atol=1e-6
        )  # the position that predicts its first token
        begin += n


@pytest.mark.parametrize("segmented", [False, True])
def test_cudnn_gets_an_even_number_of_tokens(monkeypatch, segmented):
    """cuDNN has no gradient at an odd number; XLA stands in for it here and takes
    any.
    """
    taken = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: taken.append((q, k, v)) or q)
    q, k, v, segment_BT = rows(9)
    kernel = attention.cudnn(CONFIG)
    mixed = kernel.attend(q, k, v, kernel.see(jnp.zeros((B, 9), int), segment_BT if segmented else None))
    assert [x.shape[1] for x in taken[0]] == [10, 10, 10]
    np.testing.assert_array_equal(mixed, q)


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_kernel_runs_on_each_device_of_a_mesh(name):
    """Rows over two axes and heads over a third give the values of one device, and
    nothing is gathered.
    """
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    q, k, v, segment_BT = rows(6)
    expected = with_gradients(ANYWHERE[name](CONFIG), q, k, v, segment_BT)
    spec = jax.P(("data", "fsdp"), None, "tensor")
    placed = jax.device_put((q, k, v), jax.NamedSharding(mesh, spec))
    got = with_gradients(ANYWHERE[name](CONFIG, mesh), *placed, segment_BT)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert x.sharding.spec == spec
    one_head = dataclasses.replace(CONFIG, kv_heads=1, attention=name)
    with pytest.raises(ValueError, match=rf"attention='{name}' got kv_heads 1, which do not divide over tensor=2"):
        transformer(one_head, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("scan_layers", "remat"), [(False, "full"), (True, "full"), (True, "dots")])
@pytest.mark.parametrize("name", ANYWHERE)
def test_a_model_is_the_same_under_each_kernel(tiny, monkeypatch, name, scan_layers, remat):
    monkeypatch.setitem(attention.KERNELS, name, ANYWHERE[name])
    fields = {"remat": remat, "scan_layers": scan_layers, "dtype": "bfloat16", "qk_norm": True}
    xla, params = tiny(**fields)
    other = transformer(dataclasses.replace(xla.config, attention=name), make_mesh(data=2, fsdp=2))
    tokens_BT = np.random.default_rng(0).integers(0, 24, (B, 9))
    position_BT = np.broadcast_to(np.arange(9), (B, 9))
    *_, segment_BT = rows(9)

    def gradient(model):
        def loss(params):
            hidden_BTD, _ = model.apply(params, tokens_BT, position_BT, segment_BT)
            return -jnp.mean(jax.nn.log_softmax(model.unembed(params, hidden_BTD))[..., 0])

        return jax.jit(jax.grad(loss))(params)

    for x, y in zip(*(jax.tree.leaves(gradient(model)) for model in (other, xla)), strict=True):
        assert jnp.linalg.norm(x - y) < 0.03 * jnp.linalg.norm(y)  # bfloat16 has 8 bits; segments left out: 0.2 and more


@pytest.mark.parametrize("name", ANYWHERE)
def test_several_tokens_read_a_cache_by_xla(name):
    """Any other kernel would raise on this CPU, as it does without a cache."""
    model = transformer(dataclasses.replace(CONFIG, attention=name))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens_BT, position_BT = np.ones((B, 3), np.int32), np.broadcast_to(np.arange(3), (B, 3))
    hidden, _ = jax.jit(model.apply)(params, tokens_BT, position_BT, cache=model.init_cache(B, 5))
    same, _ = jax.jit(transformer(CONFIG).apply)(params, tokens_BT, position_BT, cache=model.init_cache(B, 5))
    np.testing.assert_array_equal(hidden, same)
    with pytest.raises((ValueError, RuntimeError)):
        jax.jit(model.apply)(params, tokens_BT, position_BT)


def test_wrong_kernels_are_refused_early():
    for change, message in [
        ({"attention": "splsh"}, r"unknown attention 'splsh' \(did you mean 'splash'\?\); one of: cudnn, splash, xla"),
        ({"attention": "cudnn", "dtype": "float32"}, "attention='cudnn' got dtype 'float32'; allowed: 'bfloat16'"),
        ({"attention": "cudnn", "head_size": 20}, "got head_size 20; allowed: multiples of 8 up to 256"),
        ({"attention": "cudnn", "head_size": 264}, "got head_size 264; allowed: multiples of 8 up to 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
    for name, right in {"cudnn": "gpu", "splash": "tpu"}.items():
        config = dataclasses.replace(CONFIG, attention=name)
        attention.check_platform(config, right)
        with pytest.raises(ValueError, match=rf"attention='{name}' got devices of platform 'cpu'.*jaxreason\[{right}\]"):
            attention.check_platform(config, "cpu")
    attention.check_platform(CONFIG, "cpu")


# --- with a cache ---


READERS = {
    "xla": (attention.xla, None),
    "written after": (lambda *given: attention.xla(*given)._replace(read=read_then_write), None),
    "kernel": (functools.partial(attention.cudnn, implementation="xla"), None),
    "kernel on a mesh": (functools.partial(attention.cudnn, implementation="xla"), {"data": 2, "tensor": 2}),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("shares", [True, False])
def test_a_decode_step_reads_prompts_and_columns_that_are_there(reader, shares):
    """Eight rows and four prompts, of which one is unused. The third row has all keys
    in its own cache; the last row is idle.

    70 positions are one block of the kernel and a part. Values beyond the end are
    large; the kernel must not read them.
    """
    make, axes = READERS[reader]
    mesh = None if axes is None else make_mesh(**axes, devices=jax.devices()[:4])
    draw, K, N, H, C = np.random.default_rng(1), 2, 4, 16, 70
    row_B = np.array([1, 1, -1, 0, 3, 2, 2, 2]) if shares else np.full(8, -1)
    length_R = np.array([66, 3, 64, 1])
    begins_B = np.where(row_B < 0, 0, length_R[row_B])
    cache_position_B = np.array([3, 0, 69, 64, 65, 1, 33, -1])
    whole = C + 70  # keys of each row, its prompt's first
    keys, values = draw.normal(size=(2, 8, whole, K, H)).astype(np.float32)
    stale = np.nan if "kernel" in reader else 100.0
    shapes = {"k": (H, C), "v": (C, H)}
    own, prompts = ({name: np.full((n, K, *shape), stale, np.float32) for name, shape in shapes.items()} for n in (8, 4))
    for b, r in enumerate(row_B):
        begins, column = begins_B[b], max(cache_position_B[b], 0)
        first = b if r < 0 else int(np.flatnonzero(row_B == r)[0])  # the rows of a prompt begin with the same keys
        keys[b, :begins], values[b, :begins] = keys[first, :begins], values[first, :begins]
        own["k"][b, ..., :column] = keys[b, begins : begins + column].transpose(1, 2, 0)
        own["v"][b, :, :column] = values[b, begins : begins + column].swapaxes(0, 1)
        if r >= 0:
            prompts["k"][r, ..., :begins] = keys[b, :begins].transpose(1, 2, 0)
            prompts["v"][r, :, :begins] = values[b, :begins].swapaxes(0, 1)
    q_BTNH = jnp.asarray(draw.normal(size=(8, 1, N, H)), jnp.float32)
    at_B = np.maximum(begins_B + cache_position_B, 0)
    new = [x[np.arange(8), at_B][:, None] for x in (keys, values)]
    members = kv.members(jnp.asarray(row_B), jnp.asarray(length_R), 3, 1 if mesh is None else 2) if shares else None
    given = (own, prompts if shares else None, Seen(jnp.asarray(cache_position_B)[:, None], members))
    mixed, after = jax.jit(make(CONFIG, mesh).read)(q_BTNH, *new, *given)
    visible_BTC = np.arange(whole) <= at_B[:, None, None]
    expected = attend(q_BTNH, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2), visible_BTC)
    np.testing.assert_allclose(mixed[:7], expected[:7], atol=1e-5)
    wanted = {"k": own["k"].copy(), "v": own["v"].copy()}
    for b, column in enumerate(cache_position_B[:7]):
        wanted["k"][b, ..., column], wanted["v"][b, :, column] = new[0][b, 0], new[1][b, 0]
    jax.tree.map(np.testing.assert_array_equal, after, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_keys_may_be_written_after_they_are_read(tokens, dtype):
    """A step also attends to its own key as the cache will hold it."""
    rng, C = np.random.default_rng(0), 9
    own = jax.tree.map(lambda x: x[0], kv.make(B, C, K, H, dtype, stacked=1))
    at_BT = jnp.asarray([0, 4, C - tokens, -1])[:, None] + jnp.arange(tokens) * jnp.asarray([1, 1, 1, 0])[:, None]

    def draw(n, T=tokens):
        return jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32)

    _, own = read(draw(N, C), draw(K, C), draw(K, C), own, None, Seen(jnp.broadcast_to(jnp.arange(C), (B, C)), None))
    given = draw(N), draw(K), draw(K), own, None, Seen(at_BT, None)
    (expected, before), (mixed, after) = (jax.jit(f)(*given) for f in (read, read_then_write))
    np.testing.assert_allclose(mixed[:3], expected[:3], atol=2e-6)
    assert np.isfinite(mixed).all()
    jax.tree.map(np.testing.assert_array_equal, after, before)
