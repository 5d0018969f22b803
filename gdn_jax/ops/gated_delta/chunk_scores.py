"""A chunk's tokens, gates and scores, as the kernels before and behind the walk form
them; the equations are chunk_xla.py's."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops import ragged
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Inputs, Options, find_rows
from gdn_jax.ops.gated_delta.chunk_parts import MIN_DOT, Parts, cut_array, dot

CHUNK = 64
STEPS = 1024.0
LOG2_E = np.float32(np.log2(np.e))

Sums = tuple[Array, Array]


class Keys(NamedTuple):
    """q and k in parts, [L H K] each."""

    q: Parts
    k: Parts

    @classmethod
    def of(cls, x: Inputs) -> "Keys":
        return cls(cut_array(x.q), cut_array(x.k))


class Tokens(NamedTuple):
    """The tokens of a chunk [C], and which of them the row has."""

    token: Array
    valid: Array
    begin: Array  # the first
    length: Array

    @classmethod
    def of(cls, begin: Array, length: Array) -> "Tokens":
        place = jnp.arange(CHUNK, dtype=jnp.int32)
        return cls(begin + place, place < length, begin, length)


class Gate(NamedTuple):
    """A chunk's beta [C] and G, both 0 where there is no token; G is in units of log 2,
    so that exp is exp2 of it."""

    beta: Array
    G: Sums
    total: Sums  # G of the last token

    @classmethod
    def of(cls, x: Any, options: Options, tokens: Tokens, head) -> "Gate":
        log_decay, beta = _load_gates(x, options, tokens, head)
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


class KeyScores(NamedTuple):
    products: Array  # [C C], k k^T as they came
    weight: Array  # what makes A of them; zero on and above the diagonal
    k_factor: Array  # [C], 1 / |k|

    @classmethod
    def of(
        cls, k: Parts, G: Sums, beta: Array, tokens: Tokens, options: Options
    ) -> "KeyScores":
        products, k_factor = dot(k, k, trans_y=True), jnp.ones(CHUNK)
        if options.qk_l2norm:
            k_factor = _inverse_norm(products)
        i, j = square()
        weight = decay_between(G, (i > j) & tokens.valid[:, None]) * k_factor[None, :]
        return cls(products, weight * (beta * k_factor)[:, None], k_factor)


class QueryScores(NamedTuple):
    products: Array  # [C C], q k^T as they came
    weight: Array  # what makes B of them; zero above the diagonal
    q_factor: Array  # [C], scale / |q|

    @classmethod
    def of(
        cls,
        q: Parts,
        k: Parts,
        G: Sums,
        k_factor: Array,
        tokens: Tokens,
        options: Options,
    ) -> "QueryScores":
        q_factor = jnp.full(CHUNK, options.scale)
        if options.qk_l2norm:
            q_factor *= _inverse_norm(dot(q, q, trans_y=True))
        products = dot(q, k, trans_y=True)
        i, j = square()
        weight = decay_between(G, (i >= j) & tokens.valid[:, None]) * k_factor[None, :]
        return cls(products, weight * q_factor[:, None], q_factor)


def decay_between(G: Sums, inside: Array) -> Array:
    """exp(G_i - G_j) inside a triangle of tokens, zero outside: there it may be
    infinite."""
    coarse, fine = (part[:, None] - part[None, :] for part in G)
    return jnp.exp2(jnp.where(inside, coarse + fine, -jnp.inf))


def square() -> tuple[Array, Array]:
    """Row and column numbers of a chunk's triangle."""
    place = jnp.arange(CHUNK, dtype=jnp.int32)
    return place[:, None], place[None, :]


def padded(K: int) -> int:
    return max(MIN_DOT, pl.next_power_of_2(K))


def load_rows(refs: Any, tokens: Tokens, head: Array) -> Parts:
    """[C K] of [L H K]."""
    K = refs[0].shape[2]
    k = jnp.arange(padded(K), dtype=jnp.int32)[None, :]
    mask = tokens.valid[:, None] & (k < K)
    return tuple(
        _triton.load(ref.at[tokens.token[:, None], head, k], mask=mask, other=0)
        for ref in refs
    )


def diagonal(products: Array) -> Array:
    i, j = square()
    return jnp.sum(jnp.where(i == j, products, 0.0), axis=1)


def _inverse_norm(products: Array) -> Array:
    """1 / |x_i| of x x^T, whose diagonal has the squares."""
    return lax.rsqrt(diagonal(products) + rule.EPSILON)


def _running_sum(log_decay: Array) -> tuple[Sums, Sums]:
    """G and its last value as coarse + fine: multiples of 1/1024, which float32 adds
    without rounding, and a rest that stays small. In one part the sum would lose,
    behind a token that forgets everything (-100 and less), the small decays between
    its followers."""
    coarse = jnp.floor(log_decay * STEPS) / STEPS
    fine = log_decay - coarse
    return (jnp.cumsum(coarse), jnp.cumsum(fine)), (jnp.sum(coarse), jnp.sum(fine))


def _load_gates(x: Any, options: Options, tokens: Tokens, head) -> tuple[Array, Array]:
    """log_decay and beta [C]; 0 where there is no token."""
    a, b = (
        _triton.load(ref.at[tokens.token, head], mask=tokens.valid, other=0)
        for ref in x.gates.per_token
    )
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    A_log, dt_bias = (
        ref[head].astype(jnp.float32) for ref in (x.gates.A_log, x.gates.dt_bias)
    )
    log_decay = rule.log_decay(A_log, a, dt_bias, options.gating)
    beta = rule.beta(b, options.gating)
    log_decay = jnp.maximum(log_decay, rule.NO_DECAY_LEFT)
    valid = tokens.valid
    return jnp.where(valid, log_decay, 0.0), jnp.where(valid, beta, 0.0)


def num_chunks(x: Any, options: Options) -> int:
    """As many as there can be."""
    if options.tokens_per_row is not None:
        return x.num_rows * pl.cdiv(options.tokens_per_row, CHUNK)
    return ragged.most_blocks(x.q.shape[0], x.num_rows, CHUNK)


def find_chunk(x: Any, options: Options, number: Array) -> tuple[Rows, Array, Array]:
    """A chunk's row, its place there, and its number of tokens; 0 past the last."""
    if options.tokens_per_row is not None:
        steps = np.int32(pl.cdiv(options.tokens_per_row, CHUNK))
        row, step = lax.div(number, steps), lax.rem(number, steps)
    else:
        row, step = ragged.find_block(x.cu_seqlens, x.q.shape[0], CHUNK, number)
    found = find_rows(x, options, jnp.minimum(row, np.int32(x.num_rows - 1)))
    left = jnp.clip(found.length - step * CHUNK, 0, CHUNK)
    is_live = (row < x.num_rows) & found.live
    return found, step, jnp.where(is_live, left, 0)
