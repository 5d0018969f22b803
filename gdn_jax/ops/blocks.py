"""Blocks of matrices in kernels."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton

MIN_DOT = 16  # Triton pads a smaller product, with wrong results
NARROW = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}  # of products in one pass


def padded(size: int) -> int:
    """An axis of a product, as Triton can have it."""
    return max(MIN_DOT, pl.next_power_of_2(size))


def indices(n: int) -> Array:
    return jnp.arange(n, dtype=jnp.int32)


def inside(index: Array, size: int, blocks: int = 1) -> Array | None:
    """Which indices an axis has. None where blocks like this one, or groups of so many,
    fill it: a mask that says nothing would be computed all the same."""
    return None if size % (index.size * blocks) == 0 else index < size


def load(
    ref: Any,
    at: tuple[Array, Array],
    is_inside: tuple[Array | None, Array | None],
    *lead: Any,
) -> Array:
    """[rows columns] of ref[lead], 0 where it is not inside; None: all are."""
    place = ref.at[(*lead, at[0][:, None], at[1][None, :])]
    mask = both(*is_inside, shape=(at[0].size, at[1].size))
    return _triton.load(place, mask=mask, other=None if mask is None else 0)


def both(
    rows: Array | None, columns: Array | None, *, shape: tuple[int, ...]
) -> Array | None:
    """Which elements of a block are inside along both axes; None: all are."""
    masks = [
        mask[:, None] if axis == 0 else mask[None, :]
        for axis, mask in enumerate((rows, columns))
        if mask is not None
    ]
    if not masks:
        return None
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape)
