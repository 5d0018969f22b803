"""Stochastic rounding of stored states: up or down at random, right on the average.

A state whose every step changes it by less than half of its last place stays as it is
when it is rounded to nearest: it forgets too little. The bits are those of a counter:
a hash of the key, where a value is stored (slot or token, head, row, column), and
nothing else, so that every implementation rounds one float32 value alike.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gdn_jax.ops.gated_delta.rule import Chunks
from gdn_jax.ops.gated_delta.tile import Tile

ROUNDINGS = ("nearest", "stochastic")
BITS = 16  # of one value; two neighbours along K share a hash
# Those of MurmurHash3's 32-bit finalizer, by Austin Appleby, in the public domain.
FACTORS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
BEGIN = np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15)


class Seeds(NamedTuple):
    """Two words, so that states of as many slots, heads and steps as there are draw
    bits of their own."""

    first: Array
    second: Array


def _shifted(x: Array, by: int) -> Array:
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, by))


def _mix(x: Array, between: Array | int = 0) -> Array:
    """A permutation of 32 bits, another one for each value of `between`."""
    x = _shifted(x, 16) * FACTORS[0] + jnp.asarray(between, jnp.uint32)
    x = _shifted(x, 13) * FACTORS[1]
    return _shifted(x, 16)


def seeds(words: Iterable[Array], place: Array, head: Array) -> Seeds:
    """Of a key's words, and of where a head's state is stored; all broadcast."""
    numbers: list[Any] = [x.astype(jnp.uint32) for x in (*words, place, head)]
    start = [jnp.full_like(numbers[0], begin) for begin in BEGIN]
    return Seeds(
        *(functools.reduce(lambda h, x: _mix(h ^ x), numbers, h) for h in start)
    )


def _hash(seeds: Seeds, v: Array, pair: Array, K: int) -> Array:
    """Of row v and a pair of columns of a head's state; the row is not cut to V."""
    number = v.astype(jnp.uint32) * np.uint32(-(-K // 2)) + pair.astype(jnp.uint32)
    return _mix(number + seeds.first, seeds.second)


def _half(hashed: Array, odd: Array | int) -> Array:
    """uint32 below 2^16, of one column of the pair."""
    by = jnp.asarray(odd * BITS, jnp.uint32)
    by = jnp.broadcast_to(by, jnp.broadcast_shapes(hashed.shape, by.shape))
    hashed = jnp.broadcast_to(hashed, by.shape)
    return lax.shift_right_logical(hashed, by) & np.uint32(0xFFFF)


def stochastic(x: Array, bits: Array, dtype: Any) -> Array:
    """float32 x as float32 values that dtype has, bfloat16 or float16.

    Up, away from zero, for as many of the 2^16 `bits` as are the share of a last place
    that is beyond the value below. So a value that dtype has stays, and infinities and
    NaN do.
    """
    if dtype == jnp.bfloat16:
        raw = lax.bitcast_convert_type(x, jnp.uint32)
        rounded = lax.bitcast_convert_type(
            (raw + bits) & np.uint32(0xFFFF0000), jnp.float32
        )
        return jnp.where(jnp.abs(x) < jnp.inf, rounded, x)
    least, digit = np.float32(2.0**-14), np.float32(2.0**-10)
    raw = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000)
    place = jnp.maximum(lax.bitcast_convert_type(raw, jnp.float32), least) * digit
    # 1 / place, by its exponent: a GPU's quotients are not exact
    raw = np.uint32(254 << 23) - lax.bitcast_convert_type(place, jnp.uint32)
    places = jnp.abs(x) * lax.bitcast_convert_type(raw, jnp.float32)
    below = places.astype(jnp.int32).astype(jnp.float32)
    up = (places - below) * np.float32(2.0**BITS) > bits.astype(jnp.int32)
    rounded = (below + up.astype(jnp.float32)) * place
    rounded = jnp.where(x < 0, -rounded, rounded)
    return jnp.where(jnp.abs(x) < jnp.inf, rounded, x)


def stored(x: Array, words: Array | None, place: Array | None, dtype: Any) -> Array:
    """States [.., HV, V, K] in the dtype in which they are stored at place [..]; to
    nearest where there is no key, whose words are [W]."""
    if words is None or place is None:
        return x.astype(dtype)
    return _stored(x, words, place, np.dtype(dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _stored(x: Array, words: Array, place: Array, dtype: np.dtype) -> Array:
    HV, V, K = x.shape[-3:]
    heads, v, k = (jnp.arange(n, dtype=jnp.int32) for n in (HV, V, K))
    found = seeds(tuple(words), place[..., None, None, None], heads[:, None, None])
    half = _half(_hash(found, v[:, None], k >> 1, K), k & 1)
    return stochastic(x, half, dtype).astype(dtype)


@_stored.defjvp
def _(dtype, primals, tangents):
    """As if nothing was rounded, as where it is rounded to nearest."""
    return _stored(*primals, dtype), tangents[0].astype(dtype)


def stored_tile(state: Chunks, tile: Tile, seeds: Seeds, K: int, dtype: Any) -> Chunks:
    """A program's values of a head's state, cut along E."""
    lanes, each = tile.v.shape[3], tile.k[0].shape[-1]
    rounded, hashed = [], None
    for i, x in enumerate(state):
        chunk, e = divmod(i, each)
        k = tile.lane * each + np.int32(chunk * lanes * each + e)
        if each % 2 or hashed is None or e % 2 == 0:
            hashed = _hash(seeds, tile.row, k >> 1, K)
        half = _half(hashed, k & 1 if each % 2 else e % 2)
        rounded.append(stochastic(x, half, dtype))
    return tuple(rounded)
