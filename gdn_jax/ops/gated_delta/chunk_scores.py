"""A chunk's gates and scores, as the kernels before and behind the walks form them.

The equations are chunk_xla.py's.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gdn_jax import _triton
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_memory import CHUNK, Chunk

LOG2_E = np.float32(np.log2(np.e))

Sums = rule.Sums


class Gate(NamedTuple):
    """A chunk's beta [C] and G, both 0 where there is no token; G is in units of log 2,
    so that exp is exp2 of it."""

    beta: Array
    G: Sums
    total: Sums  # G of the last token

    @classmethod
    def of(cls, x: Any, options: Options, chunk: Chunk) -> "Gate":
        log_decay, beta = _load_gates(x, options, chunk)
        return cls(beta, *_running_sum(log_decay * LOG2_E))

    def grown(self) -> Array:
        """exp(G)"""
        coarse, fine = self.G
        return jnp.exp2(coarse + fine)

    def rest(self) -> Array:
        """exp(G_C - G)"""
        (coarse, fine), (last, last_fine) = self.G, self.total
        return jnp.exp2((last - coarse) + (last_fine - fine))

    def left(self) -> Array:
        """exp(G_C)"""
        return jnp.exp2(self.total[0] + self.total[1])


def key_weight(G: Sums, k_factor: Array, beta: Array, chunk: Chunk) -> Array:
    """What makes A of k k^T; zero on and above the diagonal."""
    i, j = square()
    weight = _decay_between(G, (i > j) & chunk.valid[:, None]) * k_factor[None, :]
    return weight * (beta * k_factor)[:, None]


def query_weight(G: Sums, k_factor: Array, q_factor: Array, chunk: Chunk) -> Array:
    """What makes B of q k^T; zero above the diagonal."""
    i, j = square()
    weight = _decay_between(G, (i >= j) & chunk.valid[:, None]) * k_factor[None, :]
    return weight * q_factor[:, None]


def inverse_norm(products: Array, options: Options) -> Array:
    """1 / |x_i| of x x^T, whose diagonal has the squares; 1 where none is asked for."""
    if not options.qk_l2norm:
        return jnp.ones(CHUNK, jnp.float32)
    return lax.rsqrt(diagonal(products) + rule.EPSILON)


def _decay_between(G: Sums, inside: Array) -> Array:
    """exp(G_i - G_j) inside a triangle of tokens, zero outside: there it may be
    infinite."""
    coarse, fine = (part[:, None] - part[None, :] for part in G)
    return jnp.exp2(jnp.where(inside, coarse + fine, -jnp.inf))


def square() -> tuple[Array, Array]:
    """Row and column numbers of a chunk's triangle."""
    place = jnp.arange(CHUNK, dtype=jnp.int32)
    return place[:, None], place[None, :]


def diagonal(products: Array) -> Array:
    i, j = square()
    return jnp.sum(jnp.where(i == j, products, 0.0), axis=1)


def _running_sum(log_decay: Array) -> tuple[Sums, Sums]:
    """G and its last value."""
    coarse, fine = rule.coarse_and_fine(log_decay)
    return (jnp.cumsum(coarse), jnp.cumsum(fine)), (jnp.sum(coarse), jnp.sum(fine))


def _load_gates(x: Any, options: Options, chunk: Chunk) -> tuple[Array, Array]:
    """log_decay and beta [C]; 0 where there is no token."""
    a, b = (
        _triton.load(ref.at[chunk.token, chunk.head], mask=chunk.valid, other=0)
        for ref in x.gates.per_token
    )
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    A_log, dt_bias = (
        ref[chunk.head].astype(jnp.float32) for ref in (x.gates.A_log, x.gates.dt_bias)
    )
    log_decay = rule.log_decay(A_log, a, dt_bias, options.gating)
    beta = rule.beta(b, options.gating)
    log_decay = jnp.maximum(log_decay, rule.NO_DECAY_LEFT)
    return jnp.where(chunk.valid, log_decay, 0.0), jnp.where(chunk.valid, beta, 0.0)
