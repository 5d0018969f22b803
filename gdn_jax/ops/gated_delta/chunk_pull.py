"""Of the chunked update's gradients, all that needs no walk: two kernels over chunks.

The equations are chunk_backward.py's.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta.call import Inputs, Options
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, dot, join
from gdn_jax.ops.gated_delta.chunk_prepare import (
    BETA,
    DECAY,
    FOLD,
    OF_SCORES,
    QUERY,
    READ,
    Prepared,
)
from gdn_jax.ops.gated_delta.chunk_scores import (
    CHUNK,
    Keys,
    KeyScores,
    QueryScores,
    Tokens,
    diagonal,
    find_chunk,
    load_rows,
    num_chunks,
    padded,
    square,
)
from gdn_jax.ops.gated_delta.tuning import ChunkConfig

V_AT_ONCE = 64
V_OF_SCORES = 128
K_AT_ONCE = 64
STAGES = 2  # a third would leave room for one program only
Pair = tuple[Any, Any]  # two parts


class Walked(NamedTuple):
    """What the walks leave, in two parts.

    entering, leaving: S and dS' of every chunk   [M HV K V]
    u, dy: U and dY                               [L HV V]
    """

    entering: Pair
    u: Pair
    leaving: Pair
    dy: Pair


class Pulled(NamedTuple):
    """Gradients, float32 but for v's.

    q, k: by value head, as if their norms were constant     [L HV K]
    v: [L HV V]
    beta: [L HV]
    log_decay: of the scores, and of every tile of K         [1 + tiles L HV]
    along_q, along_k: q and k times their gradients, summed over K, in the same parts
    """

    q: Any
    k: Any
    v: Any
    beta: Any
    log_decay: Any
    along_q: Any
    along_k: Any


def place_of(row: Rows, step: Array) -> Array:
    """A number of its own for every chunk, below `ragged.most_blocks`: rows that begin
    in the same 64 tokens are told apart by their own numbers."""
    return lax.div(row.begin, np.int32(CHUNK)) + row.number + step


class _Chunk(NamedTuple):
    tokens: Tokens
    head: Array
    key_head: Array
    place: Array

    @classmethod
    def of(cls, x: Any, options: Options, head: Array, number: Array) -> "_Chunk":
        row, step, length = find_chunk(x, options, number)
        tokens = Tokens.of(row.begin + step * CHUNK, length)
        key_head = head // (x.v.shape[1] // x.k.shape[1])
        return cls(tokens, head, key_head, place_of(row, step))

    def factor(self, prepared: Prepared, number: int) -> Array:
        place = prepared.factors.at[number, self.head, self.tokens.token]
        return _triton.load(place, mask=self.tokens.valid, other=0)

    def load(self, refs: Any, head: Array, columns: Array) -> Parts:
        """[C n] of [L heads n]."""
        mask = self.tokens.valid[:, None] & (columns < refs[0].shape[2])[None, :]
        place = (self.tokens.token[:, None], head, columns[None, :])
        return tuple(_triton.load(ref.at[place], mask=mask, other=0) for ref in refs)

    def store(self, ref: Any, columns: Array, value: Array) -> None:
        mask = self.tokens.valid[:, None] & (columns < ref.shape[2])[None, :]
        place = ref.at[self.tokens.token[:, None], self.head, columns[None, :]]
        _triton.store(place, value.astype(ref.dtype), mask=mask)

    def store_sums(self, ref: Any, value: Array, *part: Array | int) -> None:
        """[C] of [L HV], or of a part of [parts L HV]."""
        part = tuple(jnp.full_like(self.head, n) for n in part)
        place = ref.at[(*part, self.tokens.token, self.head)]
        _triton.store(place, value, mask=self.tokens.valid)

    def square(self) -> tuple[Any, Array]:
        column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to(self.tokens.valid[:, None], (CHUNK, CHUNK))
        return (self.head, self.tokens.token[:, None], column), mask

    def store_square(self, refs: Any, parts: Parts) -> None:
        place, mask = self.square()
        for ref, part in zip(refs, parts, strict=True):
            _triton.store(ref.at[place], part, mask=mask)

    def load_square(self, refs: Any) -> Parts:
        place, mask = self.square()
        return tuple(_triton.load(ref.at[place], mask=mask, other=0) for ref in refs)


def scores_kernel(
    inputs: tuple[Any, Keys, Prepared, Any, Walked],
    *outputs: Any,
    options: Options,
    interpret: bool,
) -> None:
    """The gradients through A and B. Grid: (value heads, chunks)."""
    x, keys, prepared, dout, walked = inputs
    chunk = _Chunk.of(x, options, pl.program_id(0), pl.program_id(1))

    @pl.when(chunk.tokens.length > 0)
    def _():
        _pull_scores(
            x, keys, prepared, dout, walked, outputs, options, interpret, chunk
        )


def _pull_scores(
    x, keys, prepared, dout, walked, outputs, options, interpret, chunk
) -> None:
    *squares, dv_ref, dbeta_ref, dlog_decay_ref, along_q_ref, along_k_ref = outputs
    tokens = chunk.tokens
    beta = chunk.factor(prepared, BETA)

    def add(turn, products):
        v = _values(turn, dout[0], V_OF_SCORES)
        do, dy, u = (
            chunk.load(refs, chunk.head, v) for refs in (dout, walked.dy, walked.u)
        )
        chunk.store(dv_ref, v, join(dy) * beta[:, None])
        do_u, dy_u = products
        return do_u + dot(do, u, trans_y=True), dy_u + dot(dy, u, trans_y=True)

    zeros = jnp.zeros((CHUNK, CHUNK))
    do_u, dy_u = _over_values(add, dout[0], V_OF_SCORES, (zeros, zeros))
    safe = jnp.where(beta > 0, beta, 1.0)
    dbeta = jnp.where(beta > 0, diagonal(dy_u) / safe, 0.0)
    k_factor, *G = (chunk.factor(prepared, n) for n in OF_SCORES)
    q, k = (load_rows(refs, tokens, chunk.key_head) for refs in keys)
    A = KeyScores.of(k, tuple(G), beta, tokens, options)
    Z = -dy_u * A.weight  # of k k^T, in A
    chunk.store_square(squares[2:], cut(Z + Z.T))
    in_A = Z * A.products
    B = QueryScores.of(q, k, tuple(G), k_factor, tokens, options)
    W = do_u * B.weight  # of q k^T, in B
    chunk.store_square(squares[:2], cut(W))
    in_B = W * B.products
    in_both = in_A + in_B
    chunk.store_sums(dbeta_ref, dbeta)
    chunk.store_sums(dlog_decay_ref, _sum_straddling(in_both), 0)
    chunk.store_sums(along_q_ref, in_B.sum(axis=1), 0)
    chunk.store_sums(along_k_ref, in_both.sum(axis=0) + in_A.sum(axis=1), 0)


def columns_kernel(
    inputs: tuple[Any, ...],
    dq_ref: Any,
    dk_ref: Any,
    dlog_decay_ref: Any,
    along_q_ref: Any,
    along_k_ref: Any,
    *,
    options: Options,
    interpret: bool,
) -> None:
    """The gradients of some columns of q and k, and what the states and these columns
    have to do with those of the log-decays. Grid: (tiles of K, value heads, chunks)."""
    *_, x, keys, prepared, dout, walked, (W_refs, Z_refs) = inputs
    tile, head, number = (pl.program_id(n) for n in range(3))
    chunk = _Chunk.of(x, options, head, number)

    @pl.when(chunk.tokens.length > 0)
    def _():
        tokens = chunk.tokens
        columns = tile * K_AT_ONCE + jnp.arange(K_AT_ONCE, dtype=jnp.int32)
        asked, read, folded, inner = _through_states(dout, walked, chunk, columns)
        read_by, fold, query, beta = (
            chunk.factor(prepared, n)[:, None] for n in (READ, FOLD, QUERY, BETA)
        )
        asked, read, folded = asked * query, -read * read_by * beta, folded * fold
        q, k = (chunk.load(refs, chunk.key_head, columns) for refs in keys)
        W, Z = chunk.load_square(W_refs), chunk.load_square(Z_refs)
        chunk.store(dq_ref, columns, asked + dot(W, k))
        dk = read + folded + dot(W, q, trans_x=True) + dot(Z, k)
        chunk.store(dk_ref, columns, dk)
        q, k = join(q), join(k)
        asked, read, folded = (
            jnp.sum(x * y, axis=1) for x, y in ((asked, q), (read, k), (folded, k))
        )
        i, m = square()
        held = jnp.where(i >= m, (asked + read)[:, None], folded[:, None])
        left = prepared.factors[DECAY, chunk.head, tokens.begin]
        dlog_decay = jnp.sum(held, axis=0) + inner * left
        chunk.store_sums(dlog_decay_ref, dlog_decay, tile + 1)
        chunk.store_sums(along_q_ref, asked, tile + 1)
        chunk.store_sums(along_k_ref, read + folded, tile + 1)


def _through_states(
    dout: Any, walked: Walked, chunk: _Chunk, columns: Array
) -> tuple[Array, Array, Array, Array]:
    """dO S^T, dY S^T and U dS'^T, and the sum of S dS'."""

    def load(refs, v):
        K, V = refs[0].shape[2:]
        mask = (columns < K)[:, None] & (v < V)[None, :]
        place = (chunk.place, chunk.head, columns[:, None], v[None, :])
        return tuple(_triton.load(ref.at[place], mask=mask, other=0) for ref in refs)

    def add(turn, sums):
        asked, read, folded, inner = sums
        v = _values(turn, dout[0], V_AT_ONCE)
        do, dy, u = (
            chunk.load(refs, chunk.head, v) for refs in (dout, walked.dy, walked.u)
        )
        entering, leaving = load(walked.entering, v), load(walked.leaving, v)
        asked += dot(do, entering, trans_y=True)
        read += dot(dy, entering, trans_y=True)
        folded += dot(u, leaving, trans_y=True)
        inner += jnp.sum(join(entering) * join(leaving))
        return asked, read, folded, inner

    zeros = jnp.zeros((CHUNK, columns.size))
    return _over_values(add, dout[0], V_AT_ONCE, (zeros,) * 3 + (jnp.float32(0),))


def _values(turn: Array, ref: Any, most: int) -> Array:
    size = min(most, padded(ref.shape[2]))
    return turn * size + jnp.arange(size, dtype=jnp.int32)


def _over_values(body: Any, ref: Any, most: int, carry: Any) -> Any:
    """A loop over V, some columns a turn: all of them at once would spill."""
    turns = pl.cdiv(ref.shape[2], most)
    return lax.fori_loop(np.int32(0), np.int32(turns), body, carry)


def _sum_straddling(M: Array) -> Array:
    """For every m the sum of M_ij over j < m <= i: the pairs whose decay G_i - G_j has
    the log-decay of m in it. As a difference of running sums it would cancel."""
    m, i = square()
    until = (jnp.where(i >= m, 1.0, 0.0).astype(jnp.bfloat16),)
    suffix = dot(until, cut(M, 3))  # [m j]
    return jnp.sum(jnp.where(i < m, suffix, 0.0), axis=1)


def pull(
    x: Inputs,
    keys: Keys,
    prepared: Prepared,
    dout: Any,
    walked: Walked,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> Pulled:
    L, HV, K = x.q.shape[0], *x.state.shape[1::2]
    tiles = pl.cdiv(K, K_AT_ONCE)
    chunks = num_chunks(x, options)
    run = functools.partial(
        _triton.launch,
        num_warps=config.prepare_warps,
        num_stages=STAGES,
        interpret=interpret,
    )
    static = dict(options=options, interpret=interpret)
    parts = ((1 + tiles, L, HV), jnp.float32)
    *squares, dv, dbeta, dlog_decay, along_q, along_k = run(
        functools.partial(scores_kernel, **static),
        (x, keys, prepared, dout, walked),
        [((HV, L, CHUNK), jnp.bfloat16)] * 4
        + [(x.v.shape, x.v.dtype), ((L, HV), jnp.float32), parts, parts, parts],
        grid=(HV, chunks),
        aliases={},
    )
    WZ = tuple(squares[:2]), tuple(squares[2:])
    dq, dk, *sums = run(
        functools.partial(columns_kernel, **static),
        (dlog_decay, along_q, along_k, x, keys, prepared, dout, walked, WZ),
        [((L, HV, K), jnp.float32)] * 2 + [parts] * 3,
        grid=(tiles, HV, chunks),
        aliases={0: 2, 1: 3, 2: 4},
    )
    return Pulled(dq, dk, dv, dbeta, *sums)
