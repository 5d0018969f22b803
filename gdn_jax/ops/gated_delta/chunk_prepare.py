"""Of the recurrence in chunks, all that needs no state: one Pallas kernel over chunks.

The equations are chunk_xla.py's.
"""

import functools
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
from gdn_jax.ops.gated_delta.chunk_parts import MIN_DOT, Cut, Parts, cut_array, dot
from gdn_jax.ops.gated_delta.tuning import ChunkConfig

CHUNK = 64
STEPS = 1024.0

Sums = tuple[Array, Array]


class Keys(NamedTuple):
    """q and k in parts, [L H K] each."""

    q: Parts
    k: Parts

    @classmethod
    def of(cls, x: Inputs) -> "Keys":
        return cls(cut_array(x.q), cut_array(x.k))


class Prepared(NamedTuple):
    """What `prepare_kernel` leaves, as parts; of a chunk row i lies with its token.

    inverse: (I + A)^-1 - I     parts of [HV L C]; apart from I it is small
    scores: B                   parts of [HV L C]
    factors: [5 HV L] float32: of a token's k where it is read, exp(G) / |k|, and where
      it is folded in, exp(G_C - G) / |k|; of its q, exp(G) scale / |q|; exp(G_C); beta
    """

    inverse: tuple[Any, Any]
    scores: tuple[Any, Any]
    factors: Any


READ, FOLD, QUERY, DECAY, BETA = range(5)


def prepare_kernel(
    inputs: tuple[Any, Keys], *outputs: Any, options: Options, interpret: bool
) -> None:
    """Grid: (value heads, chunks)."""
    x, keys = inputs
    out = Prepared(outputs[:2], outputs[2:4], outputs[4])
    head, number = pl.program_id(0), pl.program_id(1)
    row, step, length = find_chunk(x, options, number)
    begin = row.begin + step * CHUNK

    @pl.when(length > 0)
    def _():
        _prepare_chunk(x, keys, out, options, Cut(interpret), begin, length, head)


def _prepare_chunk(
    x: Any, keys: Keys, out: Prepared, options: Options, cut: Cut, begin, length, head
) -> None:
    tokens = Tokens.of(begin, length)
    chunk = Scores.of(x, keys, options, tokens, head)
    _store_square(out.scores, cut(chunk.B), tokens, head)
    _store_square(out.inverse, cut(_invert(chunk.A, cut)), tokens, head)
    coarse, fine = chunk.G
    grown = jnp.exp(coarse + fine)
    rest = jnp.exp((chunk.total[0] - coarse) + (chunk.total[1] - fine))
    left = jnp.full(CHUNK, jnp.exp(chunk.total[0] + chunk.total[1]))
    factors = (
        grown * chunk.k_factor,
        rest * chunk.k_factor,
        grown * chunk.q_factor,
        left,
        chunk.beta,
    )
    for number, factor in enumerate(factors):
        place = out.factors.at[number, head, tokens.token]
        _triton.store(place, factor, mask=tokens.valid)


class Scores(NamedTuple):
    """A chunk's A and B, and what they are made of."""

    q: Parts  # [C K], as they came
    k: Parts
    q_factor: Array  # [C], scale / |q|
    k_factor: Array  # [C], 1 / |k|
    beta: Array
    G: Sums
    total: Sums  # G of the last token
    qk: Array  # [C C], q k^T as they came
    kk: Array
    query_weight: Array  # [C C], what makes B of qk; zero above the diagonal
    key_weight: Array  # what makes A of kk; zero on and above it

    @property
    def A(self) -> Array:
        return self.kk * self.key_weight

    @property
    def B(self) -> Array:
        return self.qk * self.query_weight

    @classmethod
    def of(cls, x: Any, keys: Keys, options: Options, tokens: "Tokens", head):
        key_head = head // (x.v.shape[1] // x.k.shape[1])
        q, k = (load_rows(refs, tokens, key_head) for refs in keys)
        log_decay, beta = _load_gates(x, options, tokens, head)
        G, total = _running_sum(log_decay)
        qk, kk = dot(q, k, trans_y=True), dot(k, k, trans_y=True)
        q_factor, k_factor = jnp.full(CHUNK, options.scale), jnp.ones(CHUNK)
        if options.qk_l2norm:
            k_factor = _inverse_norm(kk)
            q_factor = _inverse_norm(dot(q, q, trans_y=True)) * options.scale
        decay = _decay_between(G) * k_factor[None, :]
        i, j = square()
        return cls(
            q=q,
            k=k,
            q_factor=q_factor,
            k_factor=k_factor,
            beta=beta,
            G=G,
            total=total,
            qk=qk,
            kk=kk,
            query_weight=decay * q_factor[:, None],
            key_weight=jnp.where(i > j, decay * (beta * k_factor)[:, None], 0.0),
        )


class Tokens(NamedTuple):
    """The tokens of a chunk [C], and which of them the row has."""

    token: Array
    valid: Array

    @classmethod
    def of(cls, begin: Array, length: Array) -> "Tokens":
        place = jnp.arange(CHUNK, dtype=jnp.int32)
        return cls(begin + place, place < length)


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


def _decay_between(G: Sums) -> Array:
    """exp(G_i - G_j), zero above the diagonal."""
    coarse, fine = (part[:, None] - part[None, :] for part in G)
    i, j = square()
    return jnp.exp(jnp.where(i >= j, coarse + fine, -jnp.inf))


def _invert(A: Array, cut: Cut) -> Array:
    """(I + A)^-1 - I of a strict lower triangle: in every turn, from the inverses of
    its diagonal blocks those of blocks twice as large. A power series in A would not
    do: where keys repeat, its terms grow to 1e17 and cancel."""
    i, j = square()
    apart = i ^ j

    def double(turn, inverse):
        off = jnp.where(apart >> turn == 1, A, 0.0)
        parts = cut(inverse)
        passed = off + dot(cut(off), parts)
        return inverse - (passed + dot(parts, cut(passed)))

    pairs = jnp.where(apart == 1, -A, 0.0)
    turns = CHUNK.bit_length() - 1
    return lax.fori_loop(np.int32(1), np.int32(turns), double, pairs)


def _store_square(refs, parts: Parts, tokens: Tokens, head: Array) -> None:
    column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(tokens.valid[:, None], (CHUNK, CHUNK))
    for ref, part in zip(refs, parts, strict=True):
        _triton.store(ref.at[head, tokens.token[:, None], column], part, mask=mask)


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


def prepare(
    x: Inputs, keys: Keys, options: Options, config: ChunkConfig, interpret: bool
) -> Prepared:
    L, HV = x.v.shape[:2]
    square_of = ((HV, L, CHUNK), jnp.bfloat16)
    outputs = _triton.launch(
        functools.partial(prepare_kernel, options=options, interpret=interpret),
        (x, keys),
        (*(square_of,) * 4, ((5, HV, L), jnp.float32)),
        grid=(HV, num_chunks(x, options)),
        aliases={},
        num_warps=config.prepare_warps,
        num_stages=1,
        interpret=interpret,
    )
    return Prepared(outputs[:2], outputs[2:4], outputs[4])
