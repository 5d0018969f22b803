"""The recurrence in chunks: the Pallas kernel (Triton lowering) that walks along rows.

chunk_prepare.py's two compute what needs no state, for all chunks side by side. The one
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
from gdn_jax.ops import ragged
from gdn_jax.ops.batch import Rows, in_call
from gdn_jax.ops.blocks import padded
from gdn_jax.ops.gated_delta.call import Inputs, Options, find_rows
from gdn_jax.ops.gated_delta.chunk_memory import CHUNK, Chunk, Keys
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, wide_dot
from gdn_jax.ops.gated_delta.chunk_prepare import Prepared, prepare
from gdn_jax.ops.gated_delta.clearing import clear, clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile
from gdn_jax.ops.gated_delta.tuning import MAX_HEAD_DIM, ChunkConfig


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
    is_packed = x.cu_seqlens is not None
    row = find_rows(x, options, in_call(number, x.num_rows, is_packed))
    row = row._replace(live=row.live & is_row, keeps_state=row.keeps_state & is_row)
    V, K = x.state.shape[2:]
    v = tile * config.block_v + jnp.arange(config.block_v, dtype=jnp.int32)
    k = jnp.arange(padded(K), dtype=jnp.int32)
    # Past the end the last row and column again: nothing reads or keeps them, and no
    # mask has to be kept in registers.
    at = (jnp.minimum(v, V - 1)[None, :], jnp.minimum(k, K - 1)[:, None])
    wanted = jnp.broadcast_to(row.keeps_state, (k.size, v.size))
    state = _triton.load(x.state.at[row.read, head, *at], mask=wanted, other=0)
    walk = Walk.of(x, keys, prepared, row, head)
    advance = functools.partial(_advance, walk, out_ref, v)
    carry = state.astype(jnp.float32), walk.factors(jnp.int32(0))
    state, _ = lax.fori_loop(np.int32(0), walk.steps, advance, carry)
    v, k = v[None, :], k[:, None]
    inside = (v < V) & (k < K) & row.live
    place = new_ref.at[row.read, head, v, k]
    _triton.store(place, state.astype(new_ref.dtype), mask=inside)

    clearing = config.clearing
    length = jnp.where(row.live | ~is_row, 0, row.length)
    tile_of_v = Tile.of(x.state, tile, clearing)
    clear(new_ref, out_ref, row.begin, length, head, tile_of_v, options)
    if x.cu_seqlens is not None:
        tiles = pl.cdiv(V, config.block_v)
        program, programs = tile + np.int32(tiles) * head, tiles * x.v.shape[1]
        L = x.q.shape[0]
        surely_owned = ragged.surely_owned(x.cu_seqlens, L, L, 0)

        @pl.when(~is_row & ~surely_owned)
        def _():
            clear_unowned(x, new_ref, out_ref, program, programs, clearing, options)


def _advance(
    walk: "Walk", out_ref: Any, v: Array, step: Array, carry: tuple[Array, "Ahead"]
) -> tuple[Array, "Ahead"]:
    """One chunk: its out is stored, and the state behind it returned, [K V]."""
    state, factors = carry
    chunk, (q, k) = walk.chunk(step)
    parts = cut(state)
    error = find_error(chunk.load(walk.x.v, v), k, parts, factors)
    out = wide_dot(q, parts) * factors.query[:, None]
    parts = cut(error, len(walk.prepared.inverse))
    out += wide_dot(chunk.load_square(walk.prepared.scores), parts)
    chunk.store(out_ref, v, out)
    u = error + wide_dot(chunk.load_square(walk.prepared.inverse), parts)
    following = walk.factors(step + 1)
    folded = wide_dot(k, cut(u * factors.fold[:, None], 3), trans_x=True)
    return state * factors.decay + folded, following


def find_error(values: Array, k: Parts, state: Parts, factors: "Ahead") -> Array:
    """E = beta (V - (k exp G) S^T)"""
    read = wide_dot(k, state) * factors.read[:, None]
    return (values.astype(jnp.float32) - read) * factors.beta[:, None]


class Ahead(NamedTuple):
    """A chunk's factors, [C] and of decay one. A walk carries those of the next chunk:
    as they enter no product, the compiler would not load them ahead."""

    read: Array
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

    @classmethod
    def of(cls, x: Any, keys: Keys, prepared: Prepared, row: Rows, head) -> "Walk":
        steps = lax.div(row.length + np.int32(CHUNK - 1), np.int32(CHUNK))
        steps = jnp.where(row.live, steps, np.int32(0))
        return cls(x, keys, prepared, row, head, steps)

    def chunk(self, step: Array) -> tuple[Chunk, Keys]:
        """With its q and k."""
        chunk = self._place(step)
        return chunk, Keys(*(chunk.load_keys(refs) for refs in self.keys))

    def factors(self, step: Array) -> Ahead:
        """Past the ends of no meaning."""
        chunk, factors = self._place(step), self.prepared.factors
        # never past the array, so without a mask, on which the next product would wait
        begin = jnp.clip(chunk.begin, 0, factors.decay.shape[1] - 1)
        return Ahead(
            chunk.load_factor(factors.read),
            chunk.load_factor(factors.fold),
            chunk.load_factor(self.prepared.query),
            chunk.load_factor(factors.beta),
            factors.decay[self.head, begin],
        )

    def _place(self, step: Array) -> Chunk:
        is_step = (step >= 0) & (step < self.steps)
        length = jnp.where(is_step, self.row.length - step * CHUNK, 0)
        return Chunk.of(self.x, self.row, step, self.head, length)


def chunk_triton(
    x: Inputs, options: Options, config: ChunkConfig, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Three launches; the pool is aliased in place."""
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
    keys = Keys.of(x, options)
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
