"""Products as XLA:CPU computes them fastest: results are those of the plain forms.

`scaled` and `product` are used on every platform; the others only in the decode layout
of a CPU. Measurements: jaxreason/bench/README.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def scaled(x, scale_D):
    """Return `x * scale_D`; the gradient of the scale is a matrix product with ones.

    Otherwise XLA:CPU would sum into a row of the stacked scales, [1, D], one number at
    a time (jaxreason/bench/README.md).
    """
    return x * scale_D


def scaled_forward(x, scale_D):
    return x * scale_D, (x, scale_D)


def scaled_backward(kept, gradient):
    x, scale_D = kept
    products_RD = (gradient * x).reshape(-1, x.shape[-1])
    ones_R = jnp.ones(len(products_RD), x.dtype)
    by_scale_D = jnp.matmul(ones_R, products_RD, precision="highest", preferred_element_type=jnp.float32)
    return gradient * scale_D, by_scale_D.astype(scale_D.dtype)


scaled.defvjp(scaled_forward, scaled_backward)


@jax.custom_vjp
def product(x, kernel_IO):
    """Return `x @ kernel_IO`; the gradient of the kernel is computed as [I, O].

    jax computes it as [O, I] and transposes it, for which XLA:CPU copies the wider
    factor and uses its slower product (jaxreason/bench/README.md).
    """
    return x @ kernel_IO


def product_forward(x, kernel_IO):
    return x @ kernel_IO, (x, kernel_IO)


def product_backward(kept, gradient):
    x, kernel_IO = kept
    rows = tuple(range(x.ndim - 1))
    by_kernel_IO = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
    return gradient @ kernel_IO.T, by_kernel_IO


product.defvjp(product_forward, product_backward)


def of_few_rows(name: str, size: int):
    """Return the fastest product on a CPU of a few rows with a kernel of `size`
    numbers.

    `from_left`, which takes the transposed kernel, is fastest while kernels fit the
    processor's caches; beyond that `from_columns` is. `qkv` uses neither if it is
    small: `from_left` returns its result in columns, which slows the next operation on
    queries and keys (jaxreason/bench/README.md).
    """
    if size >= 2**18:
        return from_columns
    return product if name == "qkv" else from_left


def from_left(x, kernel_OI, out_dtype=None, precision=None):
    """Return `x @ kernel_OI.T`, computed with the kernel as the left factor.

    The barriers keep XLA from folding the transposes back into x @ kernel_OI.T, which
    is slower than either order.
    """
    x_IR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    y_OR = jax.lax.optimization_barrier(jnp.matmul(kernel_OI, x_IR, precision=precision, preferred_element_type=out_dtype))
    return y_OR.T.reshape(*x.shape[:-1], -1)


def from_columns(x, kernel_IO):
    """Return `x @ kernel_IO`, computed with the rows of x as columns. XLA:CPU then uses
    Eigen instead of YNNPACK.

    Eigen is faster if the kernel comes from memory (jaxreason/bench/README.md),
    presumably because YNNPACK waits for it.
    """
    x_IR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return jax.lax.dot_general(x_IR, kernel_IO, (((0,), (0,)), ((), ()))).reshape(*x.shape[:-1], -1)
