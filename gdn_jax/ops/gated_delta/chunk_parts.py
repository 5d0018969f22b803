"""Products of float32's grade on tensor cores, by bfloat16 parts.

A bfloat16 operand is one part. Another is cut into two, which leaves an error of 2^-17,
or three, which leaves float32's own. Sums are float32.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gdn_jax import _triton

Parts = tuple[Array, ...]


def cut(x: Array, parts: int = 2) -> Parts:
    """Float32 values in parts, each rounded to the nearest.

    By their bits: a conversion is slow on a GPU's special units, and XLA, and so the
    interpreter, would take one that is converted back for excess precision.
    """
    found = []
    for _ in range(parts - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(0x8000)
        part = lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return *found, x.astype(jnp.bfloat16)


def cut_array(x: Array, parts: int = 2) -> Parts:
    """The same of any array; a bfloat16 one is its own only part."""
    return (x,) if x.dtype == jnp.bfloat16 else cut(x.astype(jnp.float32), parts)


def join(parts: Parts) -> Array:
    """The float32 values that parts are of."""
    return functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))


def dot(x: Parts, y: Parts, *, trans_x: bool = False, trans_y: bool = False) -> Array:
    """x y, each transposed if so said; products below the error of the finer operand
    are left out."""
    most = max(len(x), len(y))
    pairs = [(x_part, y_part) for i, x_part in enumerate(x) for y_part in y[: most - i]]
    products = (
        _triton.dot(*pair, trans_a=trans_x, trans_b=trans_y) for pair in reversed(pairs)
    )
    return functools.reduce(jnp.add, products)


def long_dot(x: Parts, y: Parts) -> Array:
    """x y^T, of three parts each, in three products of twice the length: a tensor core
    takes 16 at a time, and x and y may have fewer."""
    (x1, x2, x3), (y1, y2, y3) = x, y
    pairs = [((x1, x3), (y3, y1)), ((x1, x2), (y2, y2)), ((x1, x2), (y1, y1))]
    products = (
        _triton.dot(_beside(*left), _beside(*right), trans_b=True)
        for left, right in pairs
    )
    return functools.reduce(jnp.add, products)


def wide_dot(x: Parts, y: Parts, *, trans_x: bool = False) -> Array:
    """x y or x^T y, with two parts of y side by side in one product: a warpgroup waits
    for a product before it starts the next, so few and wide ones are fast."""
    most = max(len(x), len(y))
    products = []
    for i, part in enumerate(x):
        own = y[: most - i]
        if len(own) > 1:
            both = _triton.dot(part, _beside(*own[:2]), trans_a=trans_x)
            both = both.reshape(both.shape[0], 2, both.shape[1] // 2)
            products.append(jnp.sum(both, axis=1))
            own = own[2:]
        products += [_triton.dot(part, y_part, trans_a=trans_x) for y_part in own]
    return functools.reduce(jnp.add, products)


def _beside(x: Array, y: Array) -> Array:
    """[m 2n]"""
    pairs = jnp.stack([x, y], axis=-1).transpose(0, 2, 1)
    return pairs.reshape(x.shape[0], 2 * x.shape[1])
