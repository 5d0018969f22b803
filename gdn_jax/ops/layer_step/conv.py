"""The convolution of one head's channels, as a program of the fused step does it.

No reader meets a writer. Programs that share a key head all read its q and k channels:
of the ring the W - 1 columns from `start` on, behind which the step's own tokens go, so
that the columns that are written are none of these; one of the programs writes them.
`start` has to move on, though all programs of a row read it. Each adds R to it once it
has read, which as a column changes nothing; the one that finds all others have done so
puts down the new start.
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.blocks import indices, inside
from gdn_jax.ops.layer_step.call import Inputs

MINUS_LOG2_E = -math.log2(math.e)

Index: TypeAlias = Array | np.integer | int


class Ring(NamedTuple):
    """A row's own: `first` is the column of its oldest input."""

    row: Rows
    size: int
    first: Array
    moved: Array

    @classmethod
    def of(cls, x: Inputs, row: Rows) -> "Ring":
        size, moved = x.conv.buffer.shape[2], row.length
        first = x.conv.start[row.read]
        if x.tables.num_accepted is not None:
            first += x.tables.num_accepted[row.number] - 1
            moved = jnp.ones_like(moved)
        first = jnp.where(row.keeps_state, jnp.remainder(first, np.int32(size)), 0)
        return cls(row, size, first, moved)

    def column(self, place: Index) -> Array:
        """The one that is `place` behind the oldest."""
        return jnp.remainder(self.first + place, np.int32(self.size))

    def arrive(self, start_ref: Any, programs: int) -> None:
        """Called once by each of a row's programs, when it has read `start`."""
        size, slot = np.int32(self.size), self.row.read

        @pl.when(self.row.live)
        def _():
            before = _triton.atomic_add(start_ref, slot, size)

            @pl.when(lax.div(before, size) == np.int32(programs - 1))
            def _():
                start_ref[slot] = self.column(self.moved)


class Part(NamedTuple):
    """Some neighbouring channels, those of one head's q, k or v; a lane has one or
    more. `column` is where they lie in a token's projections."""

    channel: Array
    column: Array
    mask: Array | None
    weight: list[Array]
    history: list[Array]

    @classmethod
    def load(
        cls, x: Inputs, ring: Ring, channel: Array, column: Array, size: int
    ) -> "Part":
        place = indices(pl.next_power_of_2(size))
        mask = inside(place, size)
        channel, column = channel + place, column + place
        part = cls(channel, column, mask, [], [])
        width = x.weights.conv.shape[1]
        for i in range(width - 1):
            at = x.conv.buffer.at[ring.row.read, channel, ring.column(i)]
            value = part.read(at).astype(jnp.float32)
            part.history.append(jnp.where(ring.row.keeps_state, value, 0.0))
        for i in range(width):
            at = x.weights.conv.at[channel, np.int32(i)]
            part.weight.append(part.read(at).astype(jnp.float32))
        return part

    def read(self, at: Any) -> Array:
        other = None if self.mask is None else 0
        return _triton.load(at, mask=self.mask, other=other)

    def load_token(self, x: Inputs, token: Array) -> Array:
        return self.read(x.projected.qkv.at[token, self.column])

    def convolve(self, window: list[Array]) -> Array:
        """silu of it, of the last W inputs."""
        pairs = zip(self.weight, window, strict=True)
        y = sum(weight * value for weight, value in pairs)
        return y / (1.0 + jnp.exp2(y * MINUS_LOG2_E))

    def keep(
        self, buffer_ref: Any, ring: Ring, place: Index, token: Array, wanted
    ) -> None:
        mask = jnp.broadcast_to(wanted & ring.row.live, self.channel.shape)
        mask = mask if self.mask is None else mask & self.mask
        # Pallas' interpreter writes back what a mask spares: out of the ring, where
        # nobody else writes
        column = jnp.where(mask, ring.column(place), ring.size)
        at = buffer_ref.at[ring.row.read, self.channel, column]
        _triton.store(at, token.astype(buffer_ref.dtype), mask=mask)

    def forget(self, buffer_ref: Any, ring: Ring, wanted) -> None:
        """Zeros before the first token of a row that starts afresh."""
        for i in range(len(self.history)):
            nothing = jnp.zeros(self.channel.shape, jnp.float32)
            fresh = wanted & ~ring.row.keeps_state
            self.keep(buffer_ref, ring, i, nothing, fresh)
