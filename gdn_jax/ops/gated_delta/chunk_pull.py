"""Of the chunked update's gradients, all that needs no walk: a kernel over chunks.

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
from gdn_jax.ops.gated_delta.chunk_parts import Cut, Parts, dot, join
from gdn_jax.ops.gated_delta.chunk_scores import (
    CHUNK,
    Gate,
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
K_AT_ONCE = 32  # more spills
Pair = tuple[Any, Any]  # two parts


class Walked(NamedTuple):
    """What the walks leave for `pull_kernel`, in two parts.

    entering, leaving: S and dS' of every chunk   [M HV K V]
    u, dy: U and dY                               [L HV V]
    """

    entering: Pair
    u: Pair
    leaving: Pair
    dy: Pair


class Pulled(NamedTuple):
    """Gradients of q and k by value head, as if their norms were constant [L HV K], and
    of log_decay and beta [L HV]; float32."""

    q: Any
    k: Any
    log_decay: Any
    beta: Any


def place_of(row: Rows, step: Array) -> Array:
    """A number of its own for every chunk, below `ragged.most_blocks`: rows that begin
    in the same 64 tokens are told apart by their own numbers."""
    return lax.div(row.begin, np.int32(CHUNK)) + row.number + step


def pull_kernel(
    inputs: tuple[Any, Keys, Any, Walked],
    *outputs: Any,
    options: Options,
    interpret: bool,
) -> None:
    """Grid: (value heads, chunks)."""
    x, keys, dout, walked = inputs
    head, number = pl.program_id(0), pl.program_id(1)
    row, step, length = find_chunk(x, options, number)

    @pl.when(length > 0)
    def _():
        tokens = Tokens.of(row.begin + step * CHUNK, length)
        place = place_of(row, step)
        gradients = Pulled(*outputs)
        cut = Cut(interpret)
        _pull_chunk(x, keys, dout, walked, gradients, options, cut, tokens, head, place)


def _pull_chunk(
    x: Any,
    keys: Keys,
    dout: Any,
    walked: Walked,
    pulled: Pulled,
    options: Options,
    cut: Cut,
    tokens: Tokens,
    head: Array,
    place: Array,
) -> None:
    key_head = head // (x.v.shape[1] // x.k.shape[1])
    q, k = (load_rows(refs, tokens, key_head) for refs in keys)
    gate = Gate.of(x, options, tokens, head)
    A = KeyScores.of(k, gate, options)
    B = QueryScores.of(q, k, gate.G, A.k_factor, options)
    do_u, dy_u = _products(dout, walked, tokens, head)
    W = do_u * B.weight  # of q k^T, in B
    Z = -dy_u * A.weight  # of k k^T, in A
    safe = jnp.where(gate.beta > 0, gate.beta, 1.0)
    dbeta = jnp.where(gate.beta > 0, diagonal(dy_u) / safe, 0.0)
    straddling = _sum_straddling(W * B.products + Z * A.products, cut)
    grown, left = gate.grown(), gate.left()
    weights = (
        grown * B.q_factor,
        -grown * A.k_factor * gate.beta,
        gate.rest() * A.k_factor,
    )
    W, Z = cut(W), cut(Z + Z.T)

    def pull_columns(turn, sums):
        before, behind, kept = sums
        columns = _Columns.of(x, turn, head, place)
        q, k = (columns.rows(refs, tokens) for refs in keys)
        *through, inner = columns.through_states(dout, walked, tokens)
        asked, read, folded = (
            y * weight[:, None] for y, weight in zip(through, weights, strict=True)
        )
        columns.store(pulled.q, asked + dot(W, k), tokens)
        dk = read + folded + dot(W, q, trans_x=True) + dot(Z, k)
        columns.store(pulled.k, dk, tokens)
        q, k = join(q), join(k)
        before += jnp.sum(asked * q + read * k, axis=1)
        behind += jnp.sum(folded * k, axis=1)
        return before, behind, kept + inner

    turns = np.int32(pl.cdiv(x.state.shape[3], K_AT_ONCE))
    sums = jnp.zeros(CHUNK), jnp.zeros(CHUNK), jnp.float32(0)
    before, behind, kept = lax.fori_loop(np.int32(0), turns, pull_columns, sums)

    m, i = square()
    dlog_decay = straddling + jnp.sum(jnp.where(i >= m, before[None, :], 0.0), axis=1)
    dlog_decay += jnp.sum(jnp.where(i < m, behind[None, :], 0.0), axis=1) + kept * left
    for ref, value in ((pulled.log_decay, dlog_decay), (pulled.beta, dbeta)):
        _triton.store(ref.at[tokens.token, head], value, mask=tokens.valid)


def _products(
    dout: Any, walked: Walked, tokens: Tokens, head: Array
) -> tuple[Array, Array]:
    """dO U^T and dY U^T."""

    def add(turn, products):
        v = _values(turn, dout[0])
        do, dy, u = (
            _load(refs, tokens, head, v) for refs in (dout, walked.dy, walked.u)
        )
        do_u, dy_u = products
        return do_u + dot(do, u, trans_y=True), dy_u + dot(dy, u, trans_y=True)

    zeros = jnp.zeros((CHUNK, CHUNK))
    return _over_values(add, dout[0], (zeros, zeros))


def _values(turn: Array, ref: Any) -> Array:
    size = min(V_AT_ONCE, padded(ref.shape[2]))
    return turn * size + jnp.arange(size, dtype=jnp.int32)


def _over_values(body: Any, ref: Any, carry: Any) -> Any:
    """A loop over V, some columns a turn: all of them at once would spill."""
    turns = pl.cdiv(ref.shape[2], V_AT_ONCE)
    return lax.fori_loop(np.int32(0), np.int32(turns), body, carry)


def _load(refs: Any, tokens: Tokens, head: Array, columns: Array) -> Parts:
    """[C n] of [L heads n]."""
    mask = tokens.valid[:, None] & (columns < refs[0].shape[2])[None, :]
    place = (tokens.token[:, None], head, columns[None, :])
    return tuple(_triton.load(ref.at[place], mask=mask, other=0) for ref in refs)


def _sum_straddling(M: Array, cut: Cut) -> Array:
    """For every m the sum of M_ij over j < m <= i: the pairs whose decay G_i - G_j has
    the log-decay of m in it. As a difference of running sums it would cancel."""
    m, i = square()
    until = (jnp.where(i >= m, 1.0, 0.0).astype(jnp.bfloat16),)
    suffix = dot(until, cut(M, 3))  # [m j]
    return jnp.sum(jnp.where(i < m, suffix, 0.0), axis=1)


class _Columns(NamedTuple):
    """Some columns along K of a chunk's gradients."""

    k: Array  # [n]
    head: Array
    key_head: Array
    place: Array

    @classmethod
    def of(cls, x: Any, turn: Array, head: Array, place: Array) -> "_Columns":
        size = min(K_AT_ONCE, padded(x.q.shape[2]))
        k = turn * size + jnp.arange(size, dtype=jnp.int32)
        return cls(k, head, head // (x.v.shape[1] // x.k.shape[1]), place)

    def rows(self, refs: Any, tokens: Tokens) -> Parts:
        return _load(refs, tokens, self.key_head, self.k)

    def through_states(
        self, dout: Any, walked: Walked, tokens: Tokens
    ) -> tuple[Array, Array, Array, Array]:
        """dO S^T, dY S^T and U dS'^T, and the sum of S dS'."""

        def add(turn, sums):
            asked, read, folded, inner = sums
            v = _values(turn, dout[0])
            do, dy, u = (
                _load(refs, tokens, self.head, v)
                for refs in (dout, walked.dy, walked.u)
            )
            entering, leaving = (
                self._states(refs, v) for refs in (walked.entering, walked.leaving)
            )
            asked += dot(do, entering, trans_y=True)
            read += dot(dy, entering, trans_y=True)
            folded += dot(u, leaving, trans_y=True)
            inner += jnp.sum(join(entering) * join(leaving))
            return asked, read, folded, inner

        zeros = jnp.zeros((CHUNK, self.k.size))
        return _over_values(add, dout[0], (zeros,) * 3 + (jnp.float32(0),))

    def _states(self, refs: Pair, v: Array) -> Parts:
        """[n V]"""
        K, V = refs[0].shape[2:]
        mask = (self.k < K)[:, None] & (v < V)[None, :]
        place = (self.place, self.head, self.k[:, None], v[None, :])
        return tuple(_triton.load(ref.at[place], mask=mask, other=0) for ref in refs)

    def store(self, ref: Any, value: Array, tokens: Tokens) -> None:
        mask = tokens.valid[:, None] & (self.k < ref.shape[2])[None, :]
        place = ref.at[tokens.token[:, None], self.head, self.k[None, :]]
        _triton.store(place, value, mask=mask)


def pull(
    x: Inputs,
    keys: Keys,
    dout: Any,
    walked: Walked,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> Pulled:
    L, HV, K = x.q.shape[0], *x.state.shape[1::2]
    pulled = _triton.launch(
        functools.partial(pull_kernel, options=options, interpret=interpret),
        (x, keys, dout, walked),
        [((L, HV, K), jnp.float32)] * 2 + [((L, HV), jnp.float32)] * 2,
        grid=(HV, num_chunks(x, options)),
        aliases={},
        num_warps=config.num_warps,
        interpret=interpret,
    )
    return Pulled(*pulled)
