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
    """Gradients of q and k by value head, as if their norms were constant [L HV K], of
    v, of log_decay, a part for each tile of K and one more [tiles + 1 L HV], and of
    beta [L HV]; float32 but for v's."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    beta: Any


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
        _pull_scores(x, keys, prepared, dout, walked, outputs, options, interpret, chunk)


def _pull_scores(
    x, keys, prepared, dout, walked, outputs, options, interpret, chunk
) -> None:
    *squares, dv_ref, dlog_decay_ref, dbeta_ref = outputs
    tokens = chunk.tokens
    beta = chunk.factor(prepared, BETA)

    def add(turn, products):
        v = _values(turn, dout[0])
        do, dy, u = (
            chunk.load(refs, chunk.head, v) for refs in (dout, walked.dy, walked.u)
        )
        chunk.store(dv_ref, v, join(dy) * beta[:, None])
        do_u, dy_u = products
        return do_u + dot(do, u, trans_y=True), dy_u + dot(dy, u, trans_y=True)

    zeros = jnp.zeros((CHUNK, CHUNK))
    do_u, dy_u = _over_values(add, dout[0], (zeros, zeros))
    safe = jnp.where(beta > 0, beta, 1.0)
    dbeta = jnp.where(beta > 0, diagonal(dy_u) / safe, 0.0)
    k_factor, *G = (chunk.factor(prepared, n) for n in OF_SCORES)
    q, k = (load_rows(refs, tokens, chunk.key_head) for refs in keys)
    A = KeyScores.of(k, tuple(G), beta, tokens, options)
    Z = -dy_u * A.weight  # of k k^T, in A
    chunk.store_square(squares[2:], cut(Z + Z.T))
    straddling = Z * A.products
    B = QueryScores.of(q, k, tuple(G), k_factor, tokens, options)
    W = do_u * B.weight  # of q k^T, in B
    chunk.store_square(squares[:2], cut(W))
    straddling = _sum_straddling(straddling + W * B.products)
    place = (tokens.token, chunk.head)
    _triton.store(dlog_decay_ref.at[(jnp.zeros_like(chunk.head), *place)], straddling, mask=tokens.valid)
    _triton.store(dbeta_ref.at[place], dbeta, mask=tokens.valid)


def columns_kernel(
    inputs: tuple[Any, Any, Keys, Prepared, Any, Walked, tuple[Pair, Pair]],
    dq_ref: Any,
    dk_ref: Any,
    dlog_decay_ref: Any,
    *,
    options: Options,
    interpret: bool,
) -> None:
    """The gradients of some columns of q and k, and what the states and these columns
    have to do with those of the log-decays. Grid: (tiles of K, value heads, chunks)."""
    _, x, keys, prepared, dout, walked, (W_refs, Z_refs) = inputs
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
        before = jnp.sum(asked * q + read * k, axis=1)
        behind = jnp.sum(folded * k, axis=1)
        i, m = square()
        held = jnp.where(i >= m, before[:, None], behind[:, None])
        dlog_decay = jnp.sum(held, axis=0)
        left = prepared.factors[DECAY, chunk.head, tokens.begin]
        place = dlog_decay_ref.at[tile + 1, tokens.token, chunk.head]
        _triton.store(place, dlog_decay + inner * left, mask=tokens.valid)


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
        v = _values(turn, dout[0])
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
    return _over_values(add, dout[0], (zeros,) * 3 + (jnp.float32(0),))


def _values(turn: Array, ref: Any) -> Array:
    size = min(V_AT_ONCE, padded(ref.shape[2]))
    return turn * size + jnp.arange(size, dtype=jnp.int32)


def _over_values(body: Any, ref: Any, carry: Any) -> Any:
    """A loop over V, some columns a turn: all of them at once would spill."""
    turns = pl.cdiv(ref.shape[2], V_AT_ONCE)
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
    per_token = ((L, HV), jnp.float32)
    parts = ((1 + tiles, L, HV), jnp.float32)
    *squares, dv, dlog_decay, dbeta = run(
        functools.partial(scores_kernel, **static),
        (x, keys, prepared, dout, walked),
        [((HV, L, CHUNK), jnp.bfloat16)] * 4 + [(x.v.shape, x.v.dtype), parts, per_token],
        grid=(HV, chunks),
        aliases={},
    )
    WZ = tuple(squares[:2]), tuple(squares[2:])
    dq, dk, dlog_decay = run(
        functools.partial(columns_kernel, **static),
        (dlog_decay, x, keys, prepared, dout, walked, WZ),
        [((L, HV, K), jnp.float32)] * 2 + [parts],
        grid=(tiles, HV, chunks),
        aliases={0: 2},
    )
    return Pulled(dq, dk, dv, dlog_decay, dbeta)
