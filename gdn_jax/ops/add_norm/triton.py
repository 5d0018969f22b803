"""The sum and its norm as one Pallas kernel (Triton lowering), a row a program."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.add_norm.call import Inputs, Options

VALUES_OF_A_LANE = 16


def add_norm_kernel(inputs: Any, x_ref: Any, y_ref: Any, *, eps: float) -> None:
    given, parts, weight = inputs
    D, row = given.shape[1], pl.program_id(0)
    column = jnp.arange(pl.next_power_of_2(D), dtype=jnp.int32)
    mask = None if column.size == D else column < D

    def load(place: Any) -> Array:
        other = None if mask is None else 0
        return _triton.load(place, mask=mask, other=other).astype(jnp.float32)

    added = load(parts.at[0, row, column])
    for part in range(1, parts.shape[0]):
        added += load(parts.at[part, row, column])
    # rounded as it would be between a layer and the sum
    added = added.astype(given.dtype).astype(jnp.float32)
    x = (load(given.at[row, column]) + added).astype(given.dtype)
    _triton.store(x_ref.at[row, column], x, mask=mask)
    x = x.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=0) / np.float32(D)
    y = x * lax.rsqrt(squares + np.float32(eps))
    y = y * (np.float32(1) + load(weight.at[column]))
    _triton.store(y_ref.at[row, column], y.astype(y_ref.dtype), mask=mask)


def triton(
    x: Inputs, options: Options, config: None = None, *, interpret: bool = False
) -> tuple[Array, Array]:
    del config
    num_rows, D = x.x.shape
    lanes = pl.next_power_of_2(D) // VALUES_OF_A_LANE
    shape = ((num_rows, D), x.x.dtype)
    found = _triton.launch(
        functools.partial(add_norm_kernel, eps=options.eps),
        x,
        (shape, shape),
        grid=(num_rows,),
        aliases={},
        num_warps=min(16, max(1, lanes // _triton.LANES)),
        interpret=interpret,
    )
    return tuple(found)
