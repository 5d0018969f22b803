"""A tile of a value head's state as a program's registers hold it.

Triton lays a load out from the last axis to the first: over a lane's 16 bytes, then the
lanes of a warp, then the warps. So the shape of the index decides which lane holds
what. A tile is C chunks of [R W LV LK E]:

    K = C LK E:   E neighbours in one 16-byte load, LK lanes side by side, C chunks
    V = W R LV:   LV lanes side by side, R in registers, W warps;  LV LK = 32, a warp

A sum over K then adds C E values within a lane and crosses only LK lanes: with LK = 8,
3 shuffles for 4 rows at once, where a row across the whole warp takes 5 for each row
(K=V=128, 8 rows, float32: 21 shuffles a program instead of 95). q and k are loaded once
for each lane of W and LV: loaded without those axes they would bring a layout of their
own, and the state would pass through shared memory to meet them. Chunks are separate
values because a sum of products over them can use FMA; a reduction cannot.
A load's size must be a power of two, so K and the tail of V are padded and masked.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.rule import Chunks
from gdn_jax.ops.gated_delta.tuning import LaunchConfig

LANES = 32
LOAD_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    v: Array  # [R W LV 1 1], row numbers
    k: Chunks  # [1 1 1 LK E], column numbers
    in_v: Array | None  # None where no row is out of range
    in_k: Chunks | None

    @classmethod
    def of(cls, state, index: Array, config: LaunchConfig) -> "Tile":
        """The `index`-th tile along V of a head of `state` [P HV V K]."""
        V, K = state.shape[2:]
        padded = pl.next_power_of_2(K)
        lanes_v = config.lanes_v
        vector = min(LOAD_BYTES // state.dtype.itemsize, padded)
        lanes_k = min(LANES // lanes_v, padded // vector)
        warps = config.num_warps
        per_lane = config.block_v // (lanes_v * warps)
        r, w, lv, lk, e = (
            jnp.arange(n, dtype=jnp.int32).reshape(
                [-1 if d == i else 1 for d in range(5)]
            )
            for i, n in enumerate((per_lane, warps, lanes_v, lanes_k, vector))
        )
        v = index * config.block_v + (w * per_lane + r) * lanes_v + lv
        first = lk * vector + e
        k = tuple(first + c for c in range(0, padded, lanes_k * vector))
        return cls(
            v,
            k,
            None if V % (config.block_v * config.tiles) == 0 else v < V,
            None if padded == K else tuple(chunk < K for chunk in k),
        )

    def sum_k(self, x: Array) -> Array:
        """[R W LV LK E] -> [R W LV 1 1]"""
        within_lane = jnp.sum(x, axis=-1)
        return jnp.sum(within_lane, axis=-1)[:, :, :, None, None]

    def load_k(self, ref, *index) -> Chunks:
        """[1 W LV LK E]: every lane gets the values that meet its part of the state."""
        shape = (1, *self.v.shape[1:3], *self.k[0].shape[3:])
        return tuple(
            _load(
                ref.at[(*index, jnp.broadcast_to(k, shape))],
                None if mask is None else jnp.broadcast_to(mask, shape),
            ).astype(jnp.float32)
            for k, mask in zip(self.k, self._k_masks(), strict=True)
        )

    def load_v(self, ref, *index) -> Array:
        return _load(ref.at[(*index, self.v)], self.in_v).astype(jnp.float32)

    def store_v(self, ref, value: Array, *index) -> None:
        _triton.store(ref.at[(*index, self.v)], value.astype(ref.dtype), mask=self.in_v)

    def load_state(self, ref, wanted: Array, *index) -> Chunks:
        """In the state's own dtype: a conversion would wait for the load to arrive."""
        return tuple(
            _load(ref.at[(*index, self.v, k)], mask)
            for k, mask in zip(self.k, self._state_masks(wanted), strict=True)
        )

    def store_state(self, ref, state: Chunks, wanted: Array | bool, *index) -> None:
        masks = self._state_masks(wanted)
        for k, chunk, mask in zip(self.k, state, masks, strict=True):
            at = ref.at[(*index, self.v, k)]
            _triton.store(at, chunk.astype(ref.dtype), mask=mask)

    def zeros(self) -> Chunks:
        shape = jnp.broadcast_shapes(self.v.shape, self.k[0].shape)
        return (jnp.zeros(shape),) * len(self.k)

    def _k_masks(self) -> tuple[Array | None, ...]:
        return (None,) * len(self.k) if self.in_k is None else self.in_k

    def _state_masks(self, wanted: Array | bool) -> Chunks:
        shape = jnp.broadcast_shapes(self.v.shape, self.k[0].shape)
        mask = jnp.broadcast_to(wanted, shape)
        mask = mask if self.in_v is None else mask & self.in_v
        return tuple(mask if k is None else mask & k for k in self._k_masks())


def _load(at, mask: Array | None) -> Array:
    other = None if mask is None else 0
    return _triton.load(at, mask=mask, other=other)
