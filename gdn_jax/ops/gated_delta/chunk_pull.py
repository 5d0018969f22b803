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
from gdn_jax.ops.blocks import padded
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_memory import CHUNK, Chunk, Keys, num_chunks
from gdn_jax.ops.gated_delta.chunk_parts import cut, dot, join
from gdn_jax.ops.gated_delta.chunk_prepare import Prepared
from gdn_jax.ops.gated_delta.chunk_scores import (
    diagonal,
    key_weight,
    query_weight,
    square,
)
from gdn_jax.ops.gated_delta.tuning import ChunkConfig

# On an H200, 1x8192 tokens and K = V = 128, half of any was slower, as was 128 of V in
# scores_kernel.
V_OF_SCORES = 64
V_OF_COLUMNS = 64
K_OF_COLUMNS = 64
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


class Given(NamedTuple):
    """What both kernels are given."""

    x: Any
    keys: Keys
    prepared: Prepared
    dout: Any  # parts of [L HV V]
    walked: Walked


class Pulled(NamedTuple):
    """Gradients, float32 but for v's.

    q, k: by value head, as if their norms were constant     [L HV K]
    v: [L HV V]
    beta: [HV L]
    log_decay: of the scores, and of every tile of K         [1 + tiles HV L]
    along_q, along_k: q and k times their gradients, summed over K, in the same parts
    """

    q: Any
    k: Any
    v: Any
    beta: Any
    log_decay: Any
    along_q: Any
    along_k: Any


class Scored(NamedTuple):
    """What `scores_kernel` leaves: gradients in `Pulled`'s words, and of the scores."""

    W: Pair  # of q k^T, in B    [HV L C]
    Z: Pair  # of k k^T, in A, and its transpose
    v: Any
    beta: Any
    log_decay: Any
    along_q: Any
    along_k: Any

    @classmethod
    def of(cls, outputs: Any) -> "Scored":
        return cls(tuple(outputs[:2]), tuple(outputs[2:4]), *outputs[4:])


def scores_kernel(given: Given, *outputs: Any, options: Options) -> None:
    """The gradients through A and B. Grid: (value heads, chunks)."""
    chunk = Chunk.find(given.x, options, pl.program_id(0), pl.program_id(1))

    @pl.when(chunk.length > 0)
    def _():
        _pull_scores(given, chunk, Scored.of(outputs))


def _pull_scores(given: Given, chunk: Chunk, out: Scored) -> None:
    factors, walked = given.prepared.factors, given.walked
    beta = chunk.load_factor(factors.beta)

    def add(turn, products):
        v = _values(turn, given, V_OF_SCORES)
        do, dy, u = (
            chunk.load_parts(refs, v) for refs in (given.dout, walked.dy, walked.u)
        )
        chunk.store(out.v, v, join(dy) * beta[:, None])
        do_u, dy_u = products
        return do_u + dot(do, u, trans_y=True), dy_u + dot(dy, u, trans_y=True)

    zeros = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    do_u, dy_u = _over_values(add, given, V_OF_SCORES, (zeros, zeros))
    safe = jnp.where(beta > 0, beta, 1.0)
    dbeta = jnp.where(beta > 0, diagonal(dy_u) / safe, 0.0)
    G = chunk.load_factor(factors.coarse), chunk.load_factor(factors.fine)
    k_factor = chunk.load_factor(factors.k_factor)
    q_factor = chunk.load_factor(given.prepared.q_factor)
    q, k = (chunk.load_keys(refs) for refs in given.keys)
    Z = -dy_u * key_weight(G, k_factor, beta, chunk)  # of k k^T, in A
    chunk.store_square(out.Z, cut(Z + Z.T))
    in_A = Z * dot(k, k, trans_y=True)
    W = do_u * query_weight(G, k_factor, q_factor, chunk)  # of q k^T, in B
    chunk.store_square(out.W, cut(W))
    in_B = W * dot(q, k, trans_y=True)
    dlog_decay, columns = _sum_below(in_A + in_B)
    sums = (dlog_decay, in_B.sum(axis=1), columns + in_A.sum(axis=1))
    part = jnp.zeros_like(chunk.head)
    for ref, value in zip(out[-3:], sums, strict=True):
        chunk.store_factor(ref, value, part)
    chunk.store_factor(out.beta, dbeta)


def columns_kernel(
    inputs: tuple[Any, Given, Pair, Pair],
    dq_ref: Any,
    dk_ref: Any,
    *sum_refs: Any,
    options: Options,
) -> None:
    """The gradients of some columns of q and k, and what the states and these columns
    have to do with those of the log-decays. Grid: (tiles of K, value heads, chunks)."""
    _, given, W_refs, Z_refs = inputs
    tile, head, turn = (pl.program_id(n) for n in range(3))
    chunk = Chunk.find(given.x, options, head, turn)
    factors = given.prepared.factors

    @pl.when(chunk.length > 0)
    def _():
        columns = tile * K_OF_COLUMNS + jnp.arange(K_OF_COLUMNS, dtype=jnp.int32)
        asked, read, folded, inner = _through_states(given, chunk, columns)
        asked *= chunk.load_factor(given.prepared.query)[:, None]
        read *= -chunk.load_factor(factors.read)[:, None]
        read *= chunk.load_factor(factors.beta)[:, None]
        folded *= chunk.load_factor(factors.fold)[:, None]
        q, k = (chunk.load_parts(refs, columns, chunk.key_head) for refs in given.keys)
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
        left = factors.decay[chunk.head, chunk.begin]
        dlog_decay = jnp.sum(held, axis=0) + inner * left
        sums = (dlog_decay, asked, read + folded)
        for ref, value in zip(sum_refs, sums, strict=True):
            chunk.store_factor(ref, value, tile + 1)


def _through_states(
    given: Given, chunk: Chunk, columns: Array
) -> tuple[Array, Array, Array, Array]:
    """dO S^T, dY S^T and U dS'^T, and the sum of S dS'."""
    walked = given.walked

    def load(refs, v):
        K, V = refs[0].shape[2:]
        inside = (columns < K)[:, None] & (v < V)[None, :]
        at = (chunk.number, chunk.head, columns[:, None], v[None, :])
        return tuple(_triton.load(ref.at[at], mask=inside, other=0) for ref in refs)

    def add(turn, sums):
        asked, read, folded, inner = sums
        v = _values(turn, given, V_OF_COLUMNS)
        do, dy, u = (
            chunk.load_parts(refs, v) for refs in (given.dout, walked.dy, walked.u)
        )
        entering, leaving = load(walked.entering, v), load(walked.leaving, v)
        asked += dot(do, entering, trans_y=True)
        read += dot(dy, entering, trans_y=True)
        folded += dot(u, leaving, trans_y=True)
        inner += jnp.sum(join(entering) * join(leaving))
        return asked, read, folded, inner

    zeros = jnp.zeros((CHUNK, columns.size), jnp.float32)
    return _over_values(add, given, V_OF_COLUMNS, (zeros,) * 3 + (jnp.float32(0),))


def _values(turn: Array, given: Given, most: int) -> Array:
    size = min(most, padded(given.x.v.shape[2]))
    return turn * size + jnp.arange(size, dtype=jnp.int32)


def _over_values(body: Any, given: Given, most: int, carry: Any) -> Any:
    """A loop over V, some columns a turn: all of them at once would spill."""
    turns = pl.cdiv(given.x.v.shape[2], most)
    return lax.fori_loop(np.int32(0), np.int32(turns), body, carry)


def _sum_below(M: Array) -> tuple[Array, Array]:
    """Of a lower triangle, for every m the sum of M_ij over j < m <= i, the pairs whose
    decay G_i - G_j has the log-decay of m in it; and the sums of its columns. As a
    difference of running sums the first would cancel."""
    m, i = square()
    until = ((i >= m).astype(jnp.bfloat16),)
    suffix = dot(until, cut(M))  # [m j]
    return jnp.sum(jnp.where(i < m, suffix, 0.0), axis=1), diagonal(suffix)


def pull(
    given: Given, options: Options, config: ChunkConfig, interpret: bool
) -> Pulled:
    x = given.x
    (L, HV), K = x.v.shape[:2], x.q.shape[2]
    tiles = pl.cdiv(K, K_OF_COLUMNS)
    chunks = num_chunks(x, options)
    run = functools.partial(
        _triton.launch,
        num_warps=config.prepare_warps,
        num_stages=STAGES,
        interpret=interpret,
    )
    squares = [((HV, L, CHUNK), jnp.bfloat16)] * 4
    sums = [((1 + tiles, HV, L), jnp.float32)] * 3
    outputs = run(
        functools.partial(scores_kernel, options=options),
        given,
        [*squares, (x.v.shape, x.v.dtype), ((HV, L), jnp.float32), *sums],
        grid=(HV, chunks),
        aliases={},
    )
    scored = Scored.of(outputs)
    dq, dk, *sums = run(
        functools.partial(columns_kernel, options=options),
        (scored[-3:], given, scored.W, scored.Z),
        [((L, HV, K), jnp.float32)] * 2 + sums,
        grid=(tiles, HV, chunks),
        aliases={0: 2, 1: 3, 2: 4},
    )
    return Pulled(dq, dk, scored.v, scored.beta, *sums)
