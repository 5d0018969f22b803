"""A tile of a value head's state as a program's registers hold it.

Triton lays a load out from the last axis to the first: over a lane's 16 bytes, then the
lanes of a warp, then the warps. So the shape of the index decides which lane holds
what. A tile is C chunks of [R W LV LK E]:

    K = C LK E:   E neighbours in one load of up to 16 bytes, LK lanes side by side,
                  C chunks
    V = W LV R:   R neighbours in a lane, LV lanes side by side, W warps

LV LK is a warp's 32 lanes, or less where K is too short to fill them.

A sum over K then adds C E values within a lane and crosses only LK lanes, for R rows at
once. R neighbouring rows of v and out are one access. Whatever meets the state is
loaded once for each lane that needs it, q and k with the axes of V, v and out with LK:
loaded without them they would bring a layout of their own, and pass through shared
memory to meet the state.

In registers a chunk is cut along E into values of their own (`unpack`), because a sum
of products over separate values can use FMA; a reduction cannot.
A load's size must be a power of two, so the last chunk of K and the last tile of V may
reach past the end, and are masked.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.rule import Chunks
from gdn_jax.ops.gated_delta.tuning import LaunchConfig

LOAD_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    row: Array  # [R W LV 1 1], row numbers
    v: Array  # [R W LV LK 1], the same for each lane that holds some of a row
    k: Chunks  # [1 1 1 LK E], column numbers
    lane: Array  # [1 1 1 LK 1], numbers of the lanes along K
    in_row: Array | None  # None where no row is out of range
    in_v: Array | None
    in_k: Chunks | None

    @classmethod
    def of(cls, state, index: Array, config: LaunchConfig) -> "Tile":
        """The `index`-th tile along V of a head of `state` [P HV V K]."""
        V, K = state.shape[2:]
        padded = pl.next_power_of_2(K)
        lanes_v, warps = config.lanes_v, config.num_warps
        aligned = K & -K  # the power of two that divides K: no load crosses a row's end
        vector = min(LOAD_BYTES // state.dtype.itemsize, aligned)
        if config.block_v == 1:  # of a tile in one lane Triton's compiler crashes
            vector = min(vector, pl.cdiv(padded, 2))
        lanes_k = min(_triton.LANES // lanes_v, padded // vector)
        chunk = lanes_k * vector
        rows = config.block_v // (lanes_v * warps)
        r, w, lv, lk, e = (
            jnp.arange(n, dtype=jnp.int32).reshape(
                [-1 if d == i else 1 for d in range(5)]
            )
            for i, n in enumerate((rows, warps, lanes_v, lanes_k, vector))
        )
        row = index * config.block_v + (w * lanes_v + lv) * rows + r
        v = jnp.broadcast_to(row, (*row.shape[:3], lanes_k, 1))
        fills = V % (config.block_v * config.tiles) == 0
        k = tuple(lk * vector + e + first for first in range(0, K, chunk))
        return cls(
            row,
            v,
            k,
            lk,
            None if fills else row < V,
            None if fills else v < V,
            None if K % chunk == 0 else tuple(columns < K for columns in k),
        )

    @staticmethod
    def sum_k(x: Array) -> Array:
        """[R W LV LK 1] -> [R W LV 1 1]"""
        return jnp.sum(x[..., 0], axis=3)[..., None, None]

    # Loads keep the dtype they find: a conversion would wait for the load to arrive.

    def load_k(self, ref, *index) -> Chunks:
        """[1 W LV LK E] along K of `ref`."""
        shape = (1, *self.v.shape[1:4], self.k[0].shape[4])
        return tuple(
            _triton.load_where(
                ref.at[(*index, jnp.broadcast_to(k, shape))],
                None if mask is None else jnp.broadcast_to(mask, shape),
            )
            for k, mask in zip(self.k, self._k_masks(), strict=True)
        )

    def load_v(self, ref, *index) -> Array:
        """[R W LV LK 1] along V of `ref`."""
        return _triton.load_where(ref.at[(*index, self.v)], self.in_v)

    def load_state(self, ref, wanted: Array, *index) -> Chunks:
        """[R W LV LK E], zeros unless `wanted`."""
        return tuple(
            _triton.load_where(ref.at[(*index, self.v, k)], mask)
            for k, mask in zip(self.k, self._state_masks(wanted), strict=True)
        )

    def store_v(self, ref, value: Array, *index) -> None:
        value = jnp.broadcast_to(value, self.v.shape).astype(ref.dtype)
        _triton.store(ref.at[(*index, self.v)], value, mask=self.in_v)

    def store_state(self, ref, state: Chunks, wanted: Array | bool, *index) -> None:
        """`state` as `unpack` gave it."""
        chunks = _pack(tuple(x.astype(ref.dtype) for x in state), len(self.k))
        masks = self._state_masks(wanted)
        for k, chunk, mask in zip(self.k, chunks, masks, strict=True):
            _triton.store(ref.at[(*index, self.v, k)], chunk, mask=mask)

    def zeros(self) -> Chunks:
        zeros = jnp.zeros(self.v.shape, jnp.float32)
        return (zeros,) * (len(self.k) * self.k[0].shape[-1])

    def _k_masks(self) -> tuple[Array | None, ...]:
        return (None,) * len(self.k) if self.in_k is None else self.in_k

    def _state_masks(self, wanted: Array | bool) -> Chunks:
        shape = (*self.v.shape[:4], self.k[0].shape[4])
        mask = jnp.broadcast_to(wanted, shape)
        mask = mask if self.in_v is None else mask & self.in_v
        return tuple(mask if k is None else mask & k for k in self._k_masks())


def unpack(chunks: Chunks) -> Chunks:
    """Float32 values [... 1], E of them for each chunk [... E]."""
    return tuple(
        part
        for chunk in chunks
        for part in lax.split(
            chunk.astype(jnp.float32), (1,) * chunk.shape[-1], axis=chunk.ndim - 1
        )
    )


def _pack(parts: Chunks, chunks: int) -> Chunks:
    """The inverse of `unpack`."""
    each = len(parts) // chunks
    return tuple(
        _triton.join([part[..., 0] for part in parts[i : i + each]])
        for i in range(0, len(parts), each)
    )
