"""The grouped product as a Pallas kernel (Triton lowering), its gradient's, and their
launches.

A program has a tile of rows of one group and a tile of columns. Which rows, it finds
from the group sizes itself: that takes no launch before its own. How many tiles there
are depends on the sizes; the grid has as many as there can be, and a program past the
last one ends at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices, inside, load
from gdn_jax.ops.gated_delta.chunk_parts import cut_array, dot
from gdn_jax.ops.grouped_dot.call import Inputs, Options
from gdn_jax.ops.grouped_dot.tuning import (
    GroupedDotConfig,
    heuristic,
    outer_heuristic,
)

FLOAT32_PARTS = 3  # of bfloat16


class Rows(NamedTuple):
    """[begin, end), of one group; past the last group, of none."""

    group: Array
    begin: Array
    end: Array


def dot_kernel(
    inputs: Any, y_ref: Any, *, config: GroupedDotConfig, transposed: bool
) -> None:
    """Grid: (tiles of columns, tiles of rows), so that programs beside each other read
    one group's weights; `transposed`, those are [E columns summed]."""
    x, weights, group_sizes = inputs
    rows = find_tile(group_sizes, x.shape[0], config.block_l, pl.program_id(1))
    row = rows.begin + indices(config.block_l)
    column = pl.program_id(0) * config.block_f + indices(config.block_f)
    live = rows.group < weights.shape[0]
    group = jnp.where(live, rows.group, 0)
    valid, num_summed = row < rows.end, x.shape[1]

    def add(step, total):
        summed = step * config.block_d + indices(config.block_d)
        left = load(x, (row, summed), (valid, inside(summed, num_summed)))
        if transposed:
            right = _load_weights(weights, group, column, summed)
        else:
            right = _load_weights(weights, group, summed, column)
        return total + _multiply(left, right, trans_right=transposed)

    steps = np.int32(pl.cdiv(num_summed, config.block_d))
    total = jnp.zeros((config.block_l, config.block_f), jnp.float32)
    steps = jnp.where(live, steps, np.int32(0))  # rows of no group are stored as zeros
    total = lax.fori_loop(np.int32(0), steps, add, total)
    mask = valid[:, None] & (column < y_ref.shape[1])[None, :]
    place = y_ref.at[row[:, None], column[None, :]]
    _triton.store(place, total.astype(y_ref.dtype), mask=mask)


def outer_kernel(inputs: Any, sums_ref: Any, *, config: GroupedDotConfig) -> None:
    """x^T y of each group. Grid: (tiles of y's columns, of x's columns, groups)."""
    x, y, group_sizes = inputs
    group = pl.program_id(2)
    sizes, number = _load_sizes(group_sizes)
    begin = jnp.sum(jnp.where(number < group, sizes, 0), dtype=jnp.int32)
    own = jnp.sum(jnp.where(number == group, sizes, 0), dtype=jnp.int32)
    end = jnp.minimum(begin + own, x.shape[0])
    d = pl.program_id(1) * config.block_d + indices(config.block_d)
    f = pl.program_id(0) * config.block_f + indices(config.block_f)

    def add(step, total):
        row = begin + step * config.block_l + indices(config.block_l)
        left = load(x, (row, d), (row < end, inside(d, x.shape[1])))
        right = load(y, (row, f), (row < end, inside(f, y.shape[1])))
        return total + _multiply(left, right, trans_left=True)

    size = np.int32(config.block_l)
    steps = lax.div(jnp.maximum(end - begin, 0) + size - 1, size)
    total = jnp.zeros((config.block_d, config.block_f), jnp.float32)
    total = lax.fori_loop(np.int32(0), steps, add, total)
    mask = (d < x.shape[1])[:, None] & (f < y.shape[1])[None, :]
    place = sums_ref.at[group, d[:, None], f[None, :]]
    _triton.store(place, total.astype(sums_ref.dtype), mask=mask)


def find_tile(group_sizes: Any, num_rows: int, size: int, number: Array) -> Rows:
    """Tiles of `size` rows are numbered through, group after group; the rows of no
    group follow as one group more."""
    sizes, group = _load_sizes(group_sizes)
    until = jnp.cumsum((sizes + np.int32(size - 1)) // np.int32(size), dtype=jnp.int32)
    is_before = (until <= number) & (group < group_sizes.shape[0])
    found = jnp.sum(is_before, dtype=jnp.int32)
    skipped = jnp.max(jnp.where(is_before, until, 0))
    first = jnp.sum(jnp.where(group < found, sizes, 0), dtype=jnp.int32)
    own = jnp.sum(jnp.where(group == found, sizes, 0), dtype=jnp.int32)
    end = jnp.where(found < group_sizes.shape[0], first + own, num_rows)
    begin = first + (number - skipped) * size
    return Rows(found, begin, jnp.minimum(end, num_rows))


def most_tiles(num_rows: int, num_groups: int, size: int) -> int:
    """However the groups, and the rows of none, share the rows out."""
    groups = min(num_groups + 1, num_rows)
    return groups + (num_rows - groups) // size


def _load_sizes(group_sizes: Any) -> tuple[Array, Array]:
    """Of all groups, and their numbers."""
    num_groups = group_sizes.shape[0]
    group = indices(pl.next_power_of_2(num_groups))
    sizes = _triton.load(group_sizes.at[group], mask=group < num_groups, other=0)
    return jnp.maximum(sizes, 0), group


def _load_weights(ref: Any, group: Array, d: Array, f: Array) -> Array:
    is_inside = inside(d, ref.shape[1]), inside(f, ref.shape[2])
    return load(ref, (d, f), is_inside, group)


def _multiply(
    left: Array, right: Array, *, trans_left: bool = False, trans_right: bool = False
) -> Array:
    """In float32, of 16-bit values as they are and of others in bfloat16 parts."""
    if left.dtype == right.dtype != jnp.float32:
        return _triton.dot(left, right, trans_a=trans_left, trans_b=trans_right)
    parts = (cut_array(value, FLOAT32_PARTS) for value in (left, right))
    return dot(*parts, trans_x=trans_left, trans_y=trans_right)


def grouped(
    x: Inputs, out_dtype: Any, config: GroupedDotConfig, *, transposed: bool, interpret
) -> Array:
    """One launch; `transposed` multiplies by the weights' transposes, read in place."""
    num_rows, num_groups = x.x.shape[0], x.weights.shape[0]
    columns = x.weights.shape[1 if transposed else 2]
    count = most_tiles(num_rows, num_groups, config.block_l)
    [y] = _triton.launch(
        functools.partial(dot_kernel, config=config, transposed=transposed),
        x,
        (((num_rows, columns), out_dtype),),
        grid=(pl.cdiv(columns, config.block_f), count),
        aliases={},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return y


def outer(
    x: Array,
    y: Array,
    group_sizes: Array,
    out_dtype: Any,
    config: GroupedDotConfig,
    *,
    interpret: bool,
) -> Array:
    """[E D F], in one launch."""
    D, F, num_groups = x.shape[1], y.shape[1], group_sizes.shape[0]
    [sums] = _triton.launch(
        functools.partial(outer_kernel, config=config),
        (x, y, group_sizes),
        (((num_groups, D, F), out_dtype),),
        grid=(pl.cdiv(F, config.block_f), pl.cdiv(D, config.block_d), num_groups),
        aliases={},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return sums


def triton(
    x: Inputs, options: Options, config: GroupedDotConfig, *, interpret: bool = False
) -> Array:
    return grouped(x, options.out_dtype, config, transposed=False, interpret=interpret)


def backward(
    x: Inputs,
    options: Options,
    config: GroupedDotConfig,
    dy: Array,
    *,
    interpret: bool = False,
) -> Inputs:
    """By launches of its own sizes: those of the forward pass are of other products."""
    del options, config
    num_rows, num_groups = x.x.shape[0], x.weights.shape[0]
    D, F = x.weights.shape[1:]
    itemsize = max(dy.dtype.itemsize, x.weights.dtype.itemsize)
    launch = heuristic(num_rows, num_groups, F, D, itemsize)
    pulled = x._replace(x=dy)
    dx = grouped(pulled, x.x.dtype, launch, transposed=True, interpret=interpret)
    itemsize = max(dy.dtype.itemsize, x.x.dtype.itemsize)
    launch = outer_heuristic(D, F, itemsize)
    dw = outer(x.x, dy, x.group_sizes, x.weights.dtype, launch, interpret=interpret)
    no_gradient: Any = np.zeros(x.group_sizes.shape, jax.dtypes.float0)
    return Inputs(dx, dw, no_gradient)
