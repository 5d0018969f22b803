"""The part of the kernel that writes zeros for tokens that belong to no live row."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax.ops import ragged
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.tile import Tile
from gdn_jax.ops.gated_delta.tuning import LaunchConfig


def clear(new_ref, out_ref, begin, length, head, tile: Tile, options: Options) -> None:
    """Zeros for tokens that belong to no live row."""

    def clear_token(step, _):
        at = begin + step
        tile.store_v(out_ref, jnp.zeros(tile.v.shape, jnp.float32), at, head)
        if options.per_token_states:
            tile.store_state(new_ref, tile.zeros(), True, at, head)

    lax.fori_loop(0, length, clear_token, None)


def clear_unowned(
    x: Any,
    new_ref,
    out_ref,
    program: Array,
    programs: int,
    config: LaunchConfig,
    options: Options,
) -> None:
    """Clears the tokens that `cu_seqlens` gives to no row. The programs of the extra
    row share the tokens out; one that finds such a token clears it for all heads."""
    num_tokens, heads, V = x.v.shape
    tiles = np.int32(pl.cdiv(V, config.block_v))

    def visit(turn, _):
        at = program + turn * programs
        owned = ragged.is_owned(x.cu_seqlens, at)

        def clear_part(part, _):
            head, index = lax.div(part, tiles), lax.rem(part, tiles)
            tile = Tile.of(x.state, index, config)
            clear(new_ref, out_ref, at, 1, head, tile, options)

        parts = jnp.where(owned > 0, np.int32(0), np.int32(tiles * heads))
        lax.fori_loop(0, parts, clear_part, None)

    turns = (num_tokens - program + programs - 1) // programs
    lax.fori_loop(0, turns, visit, None)
