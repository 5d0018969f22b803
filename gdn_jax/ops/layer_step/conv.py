"""The convolution of a row's channels, as programs of the fused step do it.

The value heads that read a key head are programs of their own, and each convolves its
channels of q and k. No reader meets a writer: new inputs go to columns of the ring that
hold no history, so that a program may come late; and where the ring begins is told
apart from where it will begin until the last program of the row has read it (`Ring`).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.causal_conv1d.triton import MINUS_LOG2_E
from gdn_jax.ops.layer_step.call import Inputs

ADDED = 2**20  # by a program of a row but one; more than a ring has columns

Window = list[Array]  # of some inputs, oldest first


class Ring(NamedTuple):
    """A row's own, as one of its programs finds it.

    `start` is read by all programs of a row, which add something to it when they have:
    all but one the same large number, that one what it moves by less all of those. So
    until a program has added its own, what others have says itself what was there: a
    few large numbers more, or, negative, what will be. When all have, it has moved.

    Attributes:
      found: what `start` said.
      first: the column of the oldest input, once the tokens of the last step that do
        not stand are forgotten.
      left: where the ring begins behind this step.
    """

    row: Rows
    size: int
    found: Array
    first: Array
    left: Array

    @classmethod
    def of(cls, x: Inputs, row: Rows) -> "Ring":
        size, found = np.int32(x.conv.buffer.shape[2]), x.conv.start[row.read]
        forgotten, moved = np.int32(0), row.length
        if x.tables.num_accepted is not None:
            forgotten, moved = x.tables.num_accepted[row.number] - 1, np.int32(1)
        known = jnp.remainder(found, np.int32(ADDED))
        start = jnp.where(found < 0, known - moved - forgotten, known)
        first = jnp.where(row.keeps_state, jnp.remainder(start + forgotten, size), 0)
        return cls(row, int(size), found, first, jnp.remainder(first + moved, size))

    def column(self, place: Array | int) -> Array:
        """So many columns behind the oldest input."""
        return jnp.remainder(self.first + place, np.int32(self.size))

    def move(self, start_ref: Any, program: Array, programs: int) -> None:
        """When all of this program has read `start`."""
        last = (
            self.left - self.found % np.int32(ADDED) - np.int32((programs - 1) * ADDED)
        )
        added = jnp.where(program == 0, last, np.int32(ADDED))
        added = jnp.where(self.row.live, added, 0)
        _triton.atomic_add(start_ref, (self.row.read,), added)


class Channels(NamedTuple):
    """Of a row's program, of any shape; `column` is where they lie in a token's
    projections. Of those that others have too, `mine` are kept by this one."""

    channel: Array
    column: Array
    mask: Array
    mine: Array


class Convolution(NamedTuple):
    """Of some channels: all that it needs, on its way."""

    channels: Channels
    ring: Ring
    weights: Window
    columns: list[Array]  # of the ring, in the order they have in memory
    tokens: list[Array]

    @classmethod
    def load(
        cls, x: Inputs, ring: Ring, channels: Channels, tokens: list[Array]
    ) -> "Convolution":
        """The whole ring, without waiting for where it begins."""

        def load(ref: Any, *index: Any, mask: Array = channels.mask) -> Array:
            return _triton.load_where(ref.at[index], mask)

        def has(step: int) -> Array:
            """What follows a packed row may be NaN, which no beta of 0 undoes."""
            if x.tables.cu_seqlens is None:
                return channels.mask
            return channels.mask & (step < ring.row.length)

        weight, buffer, channel = x.weights.conv, x.conv.buffer, channels.channel
        places = [
            [np.int32(i) for i in range(ref.shape[-1])] for ref in (weight, buffer)
        ]
        return cls(
            channels,
            ring,
            [load(weight, channel, i) for i in places[0]],
            [load(buffer, ring.row.read, channel, i) for i in places[1]],
            [
                load(x.projected.qkv, at, channels.column, mask=has(step))
                for step, at in enumerate(tokens)
            ],
        )

    def history(self) -> Window:
        """The W - 1 inputs before the row's first token."""
        window, ring = [], self.ring
        for i in range(len(self.weights) - 1):
            wanted, found = ring.column(i), self._zeros()
            for column, value in enumerate(self.columns):
                is_it = ring.row.keeps_state & (wanted == column)
                found = jnp.where(is_it, value.astype(jnp.float32), found)
            window.append(found)
        return window

    def run(self, dtype: Any, multiply_add: Any) -> list[Array]:
        """silu of it, for each token."""
        inputs = [*self.history(), *(x.astype(jnp.float32) for x in self.tokens)]
        outs = []
        for step in range(len(self.tokens)):
            y = self._zeros()
            for weight, value in zip(self.weights, inputs[step:], strict=False):
                y = multiply_add(weight.astype(jnp.float32), value, y)
            outs.append((y / (1.0 + jnp.exp2(y * MINUS_LOG2_E))).astype(dtype))
        return outs

    def keep(self, buffer_ref: Any) -> None:
        """What the next step needs: the tokens, behind a history of zeros where the row
        starts afresh."""
        past, row = len(self.weights) - 1, self.ring.row
        for i in range(past):
            afresh = row.live & ~row.keeps_state
            self._store(buffer_ref, i, self._zeros(), afresh)
        for step, value in enumerate(self.tokens):
            kept = row.live & (step < row.length)
            self._store(buffer_ref, past + step, value, kept)

    def _zeros(self) -> Array:
        return jnp.zeros(self.channels.channel.shape, jnp.float32)

    def _store(self, buffer_ref: Any, place: int, value: Array, wanted: Any) -> None:
        channel, mask = self.channels.channel, self.channels.mine & wanted
        ring = self.ring
        # Pallas' interpreter writes back what a mask spares: out of the ring, where
        # nobody else writes
        column = jnp.where(mask, ring.column(place), np.int32(ring.size))
        at = buffer_ref.at[ring.row.read, channel, column]
        _triton.store(at, value.astype(buffer_ref.dtype), mask=mask)
