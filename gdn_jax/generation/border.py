"""The least logit that top-k and top-p keep, found without a sort."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

RANK_BITS = 32


def kept_from(x: Array, w: Array, top: Array, top_p: Array, top_k: Array) -> Array:
    """The least logit that is kept, [P, ..., 1]."""

    def count(border):
        return jnp.sum(x >= border, axis=-1, keepdims=True, dtype=jnp.int32)

    def mass(border):
        return jnp.sum(jnp.where(x >= border, w, 0), axis=-1, keepdims=True)

    def within_top_k(border):
        return _largest(
            count, jnp.where(top_k > 0, top_k, x.shape[-1] + 1), border, top
        )

    def within_top_p(border):
        share = jnp.where(top_p < 1, top_p * mass(border), jnp.inf)
        return _largest(mass, share, border, top)

    border = jnp.full_like(top, -jnp.inf)
    border = lax.cond(jnp.any(top_k > 0), within_top_k, lambda x: x, border)
    return lax.cond(jnp.any(top_p < 1), within_top_p, lambda x: x, border)


def _largest(
    measure: Callable[[Array], Array], wanted: Array, low: Array, high: Array
) -> Array:
    """The largest float32 from low to high of which `measure`, which falls, is at least
    `wanted`; low where there is none."""

    def set_bit(i, rank):
        candidate = rank | (jnp.uint32(1) << (RANK_BITS - 1 - i).astype(jnp.uint32))
        return jnp.where(measure(_unrank(candidate)) >= wanted, candidate, rank)

    rank = jnp.zeros(low.shape, jnp.uint32)
    rank = lax.fori_loop(np.int32(0), np.int32(RANK_BITS), set_bit, rank)
    return _unrank(jnp.clip(rank, _rank(low), _rank(high)))


def _rank(x: Array) -> Array:
    """uint32 in the order of float32: the bits, negative numbers' turned about."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _unrank(rank: Array) -> Array:
    bits = jnp.where(rank >> 31 == 1, rank & jnp.uint32((1 << 31) - 1), ~rank)
    return lax.bitcast_convert_type(bits, jnp.float32)
