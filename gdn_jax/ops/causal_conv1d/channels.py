"""A block of channels as a program's registers hold it.

The block is cut into `parts`, and in each of them a lane has `each` neighbours. What
lies along channels, as tokens do, comes in one access a part, of up to 16 bytes a lane.
A filter or a ring has its channel's columns along the last axis: lanes load those side
by side too, as memory has them, and where `each` > 1 Triton hands them to the lane that
has the channel, by shuffles or through shared memory. Everything is then cut into
values [B 1] of one channel in each of B lanes, a tuple of them for all channels of a
lane, and meets in its own lane.
"""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.causal_conv1d.tuning import ConvConfig

Values: TypeAlias = tuple[Array, ...]  # [B 1] for each channel of a lane
Columns: TypeAlias = tuple[Values, ...]


@dataclasses.dataclass(frozen=True)
class Channels:
    first: tuple[Array, ...]  # of each part
    lanes: int
    each: int
    masked: bool  # the block may reach past the last channel

    @classmethod
    def of(cls, channels: int, index: Array, config: ConvConfig) -> "Channels":
        """The `index`-th block of so many channels."""
        size = config.channels // config.parts
        first = tuple(index * config.channels + i * size for i in range(config.parts))
        return cls(first, config.lanes, config.each, channels % config.channels != 0)

    def load(self, ref, wanted: Array, *index) -> Values:
        """Channels along the last axis of `ref`; zeros unless `wanted`."""
        values = []
        for first in self.first:
            channel = self._numbers(first)
            mask = self._mask(ref.shape[-1], channel, wanted)
            loaded = _triton.load(ref.at[(*index, channel)], mask=mask, other=0)
            values += _split(loaded)
        return tuple(values)

    def store(self, refs, values: Values, wanted: Array, *index) -> None:
        """Channels along the last axis of `refs`, which have some each."""
        for i, first in enumerate(self.first):
            channel = self._numbers(first)
            part = values[i * self.each : (i + 1) * self.each]
            joined = _join(tuple(value.astype(refs[0].dtype) for value in part))
            begin = 0
            for ref in refs:
                size = ref.shape[-1]
                mask, place = self._mask(begin + size, channel, wanted), channel
                if len(refs) > 1:
                    mask &= (channel >= begin) & (channel < begin + size)
                    # unsigned: what is before the array is far past it, not at its end
                    place = (channel - begin).astype(jnp.uint32)
                _triton.store(ref.at[(*index, place)], joined, mask=mask)
                begin += size

    def zeros(self) -> Values:
        return (jnp.zeros((self.lanes, 1), jnp.float32),) * (
            len(self.first) * self.each
        )

    def load_columns(self, ref, wanted: Array, *index) -> Columns:
        """For each column of `ref` [.. C R]; zeros unless `wanted`."""
        parts = []
        for first in self.first:
            channel, column, mask = self._columns(ref, first, wanted)
            at = ref.at[(*index, channel, column)]
            loaded = _triton.load(at, mask=mask, other=0)  # [B*each R]
            parts += _split(loaded.reshape(self.lanes, -1))
        padded = pl.next_power_of_2(ref.shape[-1])
        return tuple(tuple(parts[i::padded]) for i in range(ref.shape[-1]))

    def store_columns(self, ref, columns: Columns, wanted: Array, *index) -> None:
        """`columns` in the dtype of `ref`, as `load_columns` gave them."""
        missing = pl.next_power_of_2(len(columns)) - len(columns)
        by_channel = list(zip(*columns, *columns[:1] * missing, strict=True))
        for i, first in enumerate(self.first):
            channel, column, mask = self._columns(ref, first, wanted)
            part = by_channel[i * self.each : (i + 1) * self.each]
            joined = _join(tuple(value for values in part for value in values))
            at = ref.at[(*index, channel, column)]
            _triton.store(at, joined.reshape(mask.shape), mask=mask)

    def _numbers(self, first: Array) -> Array:
        """[B each]"""
        lane = jnp.arange(self.lanes, dtype=jnp.int32)[:, None]
        return first + lane * self.each + jnp.arange(self.each, dtype=jnp.int32)

    def _columns(self, ref, first: Array, wanted: Array) -> tuple[Array, Array, Array]:
        """[B*each 1], [1 R] and a mask of both, R rounded up to a power of two."""
        size, columns = self.lanes * self.each, ref.shape[-1]
        channel = first + jnp.arange(size, dtype=jnp.int32)[:, None]
        column = jnp.arange(pl.next_power_of_2(columns), dtype=jnp.int32)[None]
        mask = self._mask(ref.shape[-2], channel, wanted)
        mask = mask if columns == column.shape[1] else mask & (column < columns)
        return channel, column, jnp.broadcast_to(mask, (size, column.shape[1]))

    def _mask(self, channels: int, channel: Array, wanted: Array) -> Array:
        mask = jnp.broadcast_to(wanted, channel.shape)
        return mask & (channel < channels) if self.masked else mask


def _split(joined: Array) -> Values:
    return tuple(lax.split(joined, (1,) * joined.shape[1], axis=1))


def _join(values: Values) -> Array:
    return _triton.join([value[:, 0] for value in values])
