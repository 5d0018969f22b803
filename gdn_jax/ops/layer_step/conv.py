"""The convolution of a key head's channels, as a program of the fused step does it.

No reader meets a writer: a program has all value heads of its key head, so that nobody
else reads or writes what the state holds of its channels; all of its warps, of which
several may have a channel, load that before one stores. `start` is read by all
programs of a row, and none can tell when the last one has. So it stays, and the inputs
move under it: the oldest one that the next step needs is put where `start` says.
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import indices, inside
from gdn_jax.ops.layer_step.call import Inputs

MINUS_LOG2_E = -math.log2(math.e)

Index: TypeAlias = Array | np.integer | int
Window: TypeAlias = list[Array]  # of some inputs, oldest first


class Ring(NamedTuple):
    """A row's own. `first` is the column of the oldest input, once the tokens of the
    last step that do not stand are forgotten."""

    row: Rows
    size: int
    start: Array
    first: Array

    @classmethod
    def of(cls, x: Inputs, row: Rows) -> "Ring":
        size = x.conv.buffer.shape[2]
        start = jnp.remainder(x.conv.start[row.read], np.int32(size))
        first = start
        if x.tables.num_accepted is not None:
            first = start + x.tables.num_accepted[row.number] - 1
        return cls(row, size, start, first)

    def column(self, place: Array) -> Array:
        return jnp.remainder(place, np.int32(self.size))


class Part(NamedTuple):
    """Some neighbouring channels, q's, k's or v's; a lane has one or more. `column` is
    where they lie in a token's projections."""

    channel: Array
    column: Array
    mask: Array | None
    weight: Window

    @classmethod
    def of(cls, x: Inputs, channel: Array, column: Array, size: int) -> "Part":
        place = indices(pl.next_power_of_2(size))
        part = cls(channel + place, column + place, inside(place, size), [])
        for i in range(x.weights.conv.shape[1]):
            at = x.weights.conv.at[part.channel, np.int32(i)]
            part.weight.append(_triton.load_where(at, part.mask))
        return part

    def load_token(self, x: Inputs, token: Array) -> Array:
        return _triton.load_where(x.projected.qkv.at[token, self.column], self.mask)

    def load_history(self, x: Inputs, ring: Ring) -> Window:
        """The W - 1 inputs before the row's first token."""
        history, slot = [], ring.row.read
        for i in range(len(self.weight) - 1):
            at = x.conv.buffer.at[slot, self.channel, ring.column(ring.first + i)]
            value = _triton.load_where(at, self.mask).astype(jnp.float32)
            history.append(jnp.where(ring.row.keeps_state, value, 0.0))
        return history

    def convolve(self, window: Window) -> Array:
        """silu of it, of the last W inputs."""
        y = jnp.zeros(self.channel.shape, jnp.float32)
        for weight, value in zip(self.weight, window, strict=True):
            y += weight.astype(jnp.float32) * value
        return y / (1.0 + jnp.exp2(y * MINUS_LOG2_E))

    def keep(
        self, buffer_ref: Any, ring: Ring, place: Index, value: Array, wanted: Any
    ) -> None:
        """`place` columns behind `start`."""
        mask = jnp.broadcast_to(wanted & ring.row.live, self.channel.shape)
        mask = mask if self.mask is None else mask & self.mask
        # Pallas' interpreter writes back what a mask spares: out of the ring, where
        # nobody else writes
        column = jnp.where(mask, ring.column(ring.start + place), ring.size)
        at = buffer_ref.at[ring.row.read, self.channel, column]
        _triton.store(at, value.astype(buffer_ref.dtype), mask=mask)
