"""A tile of a value head's state as a warp's registers hold it.

Triton lays a load out over the lanes of a warp from the last axis to the first, so the
shape of the index decides which lane holds what. A tile is [C R LV LK E]:

    K = C LK E: E neighbours in one 16-byte load, LK lanes side by side, C in registers
    V = R LV:   LV lanes side by side, R in registers;  LV LK = 32, a warp

A sum over K then adds C E values within a lane and crosses only LK lanes: with LK = 8,
3 shuffles for 4 rows at once, where a row across the whole warp takes 5 for each row
(K=V=128, 8 rows, float32: 21 shuffles a program instead of 95).
A load's size must be a power of two, so K and the tail of V are padded and masked.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.tuning import LaunchConfig

LANES = 32
LOAD_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    shape: tuple[int, int, int, int, int]
    v: Array  # [1 R LV 1 1], row numbers
    k: Array  # [C 1 1 LK E], column numbers
    in_v: Array | None  # None where no row is out of range
    in_k: Array | None

    @classmethod
    def of(cls, state, index: Array, config: LaunchConfig) -> "Tile":
        """The `index`-th tile along V of a head of `state` [P HV V K]."""
        V, K = state.shape[2:]
        padded = pl.next_power_of_2(K)
        lanes_v = min(config.lanes_v, config.block_v)
        vector = min(LOAD_BYTES // state.dtype.itemsize, padded)
        lanes_k = min(LANES // lanes_v, padded // vector)
        chunks = padded // (lanes_k * vector)
        shape = (chunks, config.block_v // lanes_v, lanes_v, lanes_k, vector)
        c, r, lv, lk, e = (
            jnp.arange(n, dtype=jnp.int32).reshape(
                [n if d == i else 1 for d in range(5)]
            )
            for i, n in enumerate(shape)
        )
        v = index * config.block_v + r * lanes_v + lv
        k = (c * lanes_k + lk) * vector + e
        return cls(
            shape,
            v,
            k,
            None if V % (config.block_v * config.tiles) == 0 else v < V,
            None if padded == K else k < K,
        )

    @property
    def v_shape(self) -> tuple[int, ...]:
        return self.v.shape

    def sum_k(self, x: Array) -> Array:
        """[C R LV LK E] -> [1 R LV 1 1]"""
        x = jnp.sum(jnp.sum(x, axis=0), axis=-1)  # within a lane
        return jnp.sum(x, axis=-1)[None, :, :, None, None]  # across lanes

    def load_k(self, ref, *index) -> Array:
        """[C 1 LV LK E]: loaded once for each lane of LV, which costs no traffic and
        leaves every lane with the values that meet its part of the state."""
        shape = (self.shape[0], 1, *self.shape[2:])
        mask = None if self.in_k is None else jnp.broadcast_to(self.in_k, shape)
        return _load(ref.at[(*index, jnp.broadcast_to(self.k, shape))], mask)

    def load_v(self, ref, *index) -> Array:
        return _load(ref.at[(*index, self.v)], self.in_v)

    def store_v(self, ref, value: Array, *index) -> None:
        _triton.store(ref.at[(*index, self.v)], value.astype(ref.dtype), mask=self.in_v)

    def load_state(self, ref, wanted: Array, *index) -> Array:
        return _load(ref.at[(*index, self.v, self.k)], self._mask(wanted))

    def store_state(self, ref, value: Array, wanted: Array | bool, *index) -> None:
        at = ref.at[(*index, self.v, self.k)]
        _triton.store(at, value.astype(ref.dtype), mask=self._mask(wanted))

    def _mask(self, wanted: Array | bool) -> Array:
        mask = jnp.broadcast_to(wanted, self.shape)
        mask = mask if self.in_v is None else mask & self.in_v
        return mask if self.in_k is None else mask & self.in_k


def _load(at, mask: Array | None) -> Array:
    other = None if mask is None else 0
    return _triton.load(at, mask=mask, other=other).astype(jnp.float32)
