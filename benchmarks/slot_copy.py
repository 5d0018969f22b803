"""The bound of an update in place: a kernel that only reads and writes slots.

It walks a pool as `fused_update`'s kernel does, one token a row, and scales each state
by a constant. What it takes more than a plain copy is the price of slots in random
order, not of arithmetic.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gdn_jax import LaunchConfig, _triton
from gdn_jax.ops.gated_delta.tile import Tile, unpack

CONFIG = LaunchConfig(block_v=8, lanes_v=2)


def slot_copy_kernel(x, new_ref, *, config: LaunchConfig) -> None:
    state, slots = x
    tile = Tile.of(state, pl.program_id(0), config)
    head, slot = pl.program_id(1), slots[pl.program_id(2)]
    loaded = tile.load_state(state, jnp.bool_(True), slot, head)
    scaled = tuple(value * 0.999 for value in unpack(loaded))
    tile.store_state(new_ref, scaled, True, slot, head)


@functools.partial(jax.jit, donate_argnums=0)
def slot_copy(state: jax.Array, slots: jax.Array) -> jax.Array:
    _, HV, V, _ = state.shape
    [new] = _triton.launch(
        functools.partial(slot_copy_kernel, config=CONFIG),
        (state, slots),
        ((state.shape, state.dtype),),
        grid=(V // CONFIG.block_v, HV, slots.shape[0]),
        aliases={0: 0},
        num_warps=CONFIG.num_warps,
        interpret=False,
    )
    return new
