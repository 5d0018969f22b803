"""The recurrence in chunks as two Pallas kernels (Triton lowering).

chunk_prepare.py's computes what needs no state, for all chunks side by side. The one
here then carries a tile of a value head's state along a row, a chunk a step, as the
transpose [K V]: tokens or K are then the 64 rows and more that a warpgroup's product
needs, and a tile of V can be narrow. The equations are chunk_xla.py's.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta.call import Inputs, Options, find_rows
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, wide_dot
from gdn_jax.ops.gated_delta.chunk_prepare import (
    BETA,
    DECAY,
    FOLD,
    INVERSE,
    QUERY,
    READ,
    SCORES,
    Prepared,
    prepare,
)
from gdn_jax.ops.gated_delta.chunk_scores import (
    CHUNK,
    Keys,
    Tokens,
    load_rows,
    padded,
)
from gdn_jax.ops.gated_delta.clearing import clear, clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile
from gdn_jax.ops.gated_delta.tuning import ChunkConfig

MAX_HEAD_DIM = 256


def walk_kernel(
    inputs: tuple[Any, Keys, Prepared],
    new_ref: Any,
    out_ref: Any,
    *,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> None:
    """Grid: (tiles of V, value heads, rows); with `cu_seqlens` one row more, whose
    programs clear the tokens that belong to no row."""
    x, keys, prepared = inputs
    tile, head, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    is_row = number < x.num_rows
    row = find_rows(x, options, jnp.minimum(number, np.int32(x.num_rows - 1)))
    row = row._replace(live=row.live & is_row, keeps_state=row.keeps_state & is_row)
    V, K = x.state.shape[2:]
    v = tile * config.block_v + jnp.arange(config.block_v, dtype=jnp.int32)[None, :]
    k = jnp.arange(padded(K), dtype=jnp.int32)[:, None]
    # Past the end the last row and column again: nothing reads or keeps them, and no
    # mask has to be kept in registers.
    at = (row.read, head, jnp.minimum(v, V - 1), jnp.minimum(k, K - 1))
    wanted = jnp.broadcast_to(row.keeps_state, (k.size, v.size))
    state = _triton.load(x.state.at[at], mask=wanted, other=0)
    steps = lax.div(row.length + np.int32(CHUNK - 1), np.int32(CHUNK))
    steps = jnp.where(row.live, steps, np.int32(0))
    walk = Walk(x, keys, prepared, row, head, steps)
    advance = functools.partial(_advance, walk, out_ref, v)
    carry = state.astype(jnp.float32), walk.factors(jnp.int32(0))
    state, _ = lax.fori_loop(np.int32(0), steps, advance, carry)
    inside = (v < V) & (k < K) & row.live
    place = new_ref.at[row.read, head, v, k]
    _triton.store(place, state.astype(new_ref.dtype), mask=inside)

    clearing = config.clearing
    length = jnp.where(row.live | ~is_row, 0, row.length)
    tile_of_v = Tile.of(x.state, tile, clearing)
    clear(new_ref, out_ref, row.begin, length, head, tile_of_v, options)
    if x.cu_seqlens is not None:
        program = tile + np.int32(pl.cdiv(V, config.block_v)) * head

        # Boundaries that rise from the first token to past the last own every one.
        everything = x.cu_seqlens[0] <= 0
        everything &= x.cu_seqlens[x.num_rows] >= x.q.shape[0]

        @pl.when(~is_row & ~everything)
        def _():
            clear_unowned(x, new_ref, out_ref, program, clearing, options)


def _advance(
    walk: "Walk",
    out_ref: Any,
    v: Array,
    step: Array,
    carry: tuple[Array, "Factors"],
) -> tuple[Array, "Factors"]:
    """One chunk: its out is stored, and the state behind it returned, [K V]."""
    state, factors = carry
    chunk = walk.chunk(step, factors)
    parts = cut(state)
    error = chunk.find_error(chunk.load(walk.x.v, v), parts)
    out = wide_dot(chunk.q, parts) * factors.query[:, None]
    parts = cut(error, len(chunk.refs))
    out += wide_dot(chunk.square(SCORES), parts)
    chunk.store(out_ref, out, v)
    passed = wide_dot(chunk.square(INVERSE), parts)
    following = walk.factors(step + 1)
    u = (error + passed) * factors.fold[:, None]
    return chunk.fold(state, cut(u, 3)), following


class Factors(NamedTuple):
    """A chunk's own of Prepared.factors. A walk carries those of the next chunk: as
    they enter no product, the compiler would not load them ahead."""

    read: Array  # [C]
    fold: Array
    query: Array
    beta: Array
    decay: Array


class Walk(NamedTuple):
    """Along the chunks of a row, for one value head."""

    x: Any
    keys: Keys
    prepared: Prepared
    row: Rows
    head: Array
    steps: Array

    def tokens(self, step: Array) -> Tokens:
        is_step = (step >= 0) & (step < self.steps)
        length = jnp.where(is_step, self.row.length - step * CHUNK, 0)
        return Tokens.of(self.row.begin + step * CHUNK, length)

    def factors(self, step: Array) -> Factors:
        tokens = self.tokens(step)

        def load(number, token, mask):
            place = self.prepared.factors.at[number, self.head, token]
            return _triton.load(place, mask=mask, other=0)

        vectors = (load(n, *tokens[:2]) for n in (READ, FOLD, QUERY, BETA))
        return Factors(
            *vectors, load(jnp.int32(DECAY), tokens.begin, tokens.length > 0)
        )

    def chunk(self, step: Array, factors: Factors) -> "Chunk":
        tokens = self.tokens(step)
        key_head = self.head // (self.x.v.shape[1] // self.x.k.shape[1])
        q, k = (load_rows(refs, tokens, key_head) for refs in self.keys)
        return Chunk(tokens, self.head, q, k, self.prepared.solved, factors)


class Chunk(NamedTuple):
    """A chunk of a row as a walk meets it."""

    tokens: Tokens
    head: Array
    q: Parts
    k: Parts
    refs: Any
    factors: Factors

    def solved(self) -> Parts:
        """N over B + B N, [2C C]"""
        row = jnp.arange(2 * CHUNK, dtype=jnp.int32)[:, None]
        column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
        token = row % CHUNK
        mask = jnp.broadcast_to(token < self.tokens.length, (2 * CHUNK, CHUNK))
        place = (self.head, row // CHUNK, self.tokens.begin + token, column)
        return self._load_parts(place, mask)

    def square(self, number: int) -> Parts:
        """One of them, [C C]"""
        column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to(self.tokens.valid[:, None], (CHUNK, CHUNK))
        return self._load_parts(
            (self.head, number, self.tokens.token[:, None], column), mask
        )

    def _load_parts(self, place: Any, mask: Array) -> Parts:
        return tuple(
            _triton.load(ref.at[place], mask=mask, other=0) for ref in self.refs
        )

    def load(self, ref, v: Array) -> Array:
        """[C V] of [L HV V]."""
        mask = self.tokens.valid[:, None] & (v < ref.shape[2])
        place = (self.tokens.token[:, None], self.head, v)
        return _triton.load(ref.at[place], mask=mask, other=0)

    def store(self, ref, value: Array, v: Array) -> None:
        mask = self.tokens.valid[:, None] & (v < ref.shape[2])
        place = ref.at[self.tokens.token[:, None], self.head, v]
        _triton.store(place, value.astype(ref.dtype), mask=mask)

    def find_error(self, values: Array, state: Parts) -> Array:
        """E = beta (V - (k exp G) S^T)"""
        error = values.astype(jnp.float32)
        error -= wide_dot(self.k, state) * self.factors.read[:, None]
        return error * self.factors.beta[:, None]

    def fold(self, state: Array, u: Parts) -> Array:
        """exp(G_C) S + k^T (exp(G_C - G) U), all factors in `u` already"""
        return state * self.factors.decay + wide_dot(self.k, u, trans_x=True)


def chunk_triton(
    x: Inputs, options: Options, config: ChunkConfig, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Two launches; the pool is aliased in place."""
    if len(x.gates.per_token[0].shape) == 3:
        raise NotImplementedError(
            "the chunked kernels take one decay a head, not one for each K (KDA); use "
            "implementation='xla' or None."
        )
    if max(x.state.shape[2:]) > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dims up to {MAX_HEAD_DIM} fit a program; got K, V = "
            f"{x.state.shape[3]}, {x.state.shape[2]}. Use implementation='xla'."
        )
    HV, V = x.v.shape[1:]
    keys = Keys.of(x)
    prepared = prepare(x, keys, options, config, interpret)
    rows = x.num_rows + (x.cu_seqlens is not None)
    return _triton.launch(
        functools.partial(
            walk_kernel, options=options, config=config, interpret=interpret
        ),
        (x, keys, prepared),
        ((x.state.shape, x.state.dtype), (x.v.shape, options.out_dtype)),
        grid=(pl.cdiv(V, config.block_v), HV, rows),
        aliases={0: 0},  # the pool is the first leaf
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
