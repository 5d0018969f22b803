"""Products of few rows as one Pallas kernel (Triton lowering).

So few rows are multiplied in the time that reading the matrices takes. A program has
some columns of one matrix, or the same of a gate's and its partner's, and all rows.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices, inside, load, padded
from gdn_jax.ops.few_rows.call import Inputs, Options
from gdn_jax.ops.few_rows.tuning import FewRowsConfig


def few_rows_kernel(
    inputs: Any, *outputs: Any, config: FewRowsConfig, gated: bool
) -> None:
    """Grid: (tiles of columns of all matrices, parts of the sum)."""
    x, matrices, live = inputs
    tile, part = pl.program_id(0), pl.program_id(1)
    groups = [matrices] if gated else [(matrix,) for matrix in matrices]
    first = 0
    for group, out in zip(groups, outputs, strict=True):
        count = pl.cdiv(group[0].shape[1], config.block_f)

        @pl.when((tile >= first) & (tile < first + count))
        def _(group=group, out=out, first=first):
            multiply(x, live, group, out, tile - np.int32(first), part, config)

        first += count


def multiply(
    x: Any,
    live: Any,
    group: Sequence[Any],
    out: Any,
    tile: Array,
    part: Array,
    config: FewRowsConfig,
) -> None:
    num_rows, D = x.shape
    row = indices(padded(num_rows))
    is_read = inside(row, num_rows)
    if live is not None:
        is_read = _triton.load(live.at[row], mask=row < num_rows, other=0) != 0
    column = tile * np.int32(config.block_f) + indices(config.block_f)
    steps = pl.cdiv(D, config.block_d * config.splits)
    begin = part * np.int32(steps * config.block_d)

    def add(step, totals):
        summed = begin + step * np.int32(config.block_d) + indices(config.block_d)
        is_summed = inside(summed, D, config.splits)
        left = load(x, (row, summed), (is_read, is_summed))
        rights = (
            load(
                matrix,
                (summed, column),
                (is_summed, inside(column, matrix.shape[1])),
            )
            for matrix in group
        )
        return tuple(
            total + _triton.dot(left, right)
            for total, right in zip(totals, rights, strict=True)
        )

    total = jnp.zeros((row.size, config.block_f), jnp.float32)
    totals = (total,) * len(group)
    totals = lax.fori_loop(np.int32(0), np.int32(steps), add, totals)
    y = totals[0]
    if len(group) == 2:
        gate, up = (total.astype(x.dtype).astype(jnp.float32) for total in totals)
        y = (gate * jax.nn.sigmoid(gate)).astype(x.dtype).astype(jnp.float32) * up
    mask = (row < num_rows)[:, None] & (column < group[0].shape[1])[None, :]
    lead = () if config.splits == 1 else (part,)
    place = out.at[(*lead, row[:, None], column[None, :])]
    _triton.store(place, y.astype(out.dtype), mask=mask)


def triton(
    x: Inputs, options: Options, config: FewRowsConfig, *, interpret: bool = False
) -> tuple[Array, ...]:
    """[S, L, F] of each product."""
    num_rows = x.x.shape[0]
    columns = [matrix.shape[1] for matrix in x.matrices][: 1 if options.gated else None]
    splits = config.splits
    lead, dtype = ((), x.x.dtype) if splits == 1 else ((splits,), jnp.float32)
    found = _triton.launch(
        functools.partial(few_rows_kernel, config=config, gated=options.gated),
        x,
        [((*lead, num_rows, F), dtype) for F in columns],
        grid=(sum(pl.cdiv(F, config.block_f) for F in columns), splits),
        aliases={},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return tuple(parts.reshape(splits, num_rows, -1) for parts in found)
