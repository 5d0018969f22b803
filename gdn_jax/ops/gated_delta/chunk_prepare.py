"""Of the recurrence in chunks, all that needs no state: two kernels over chunks.

With the letters of chunk_xla.py and N = (I + A)^-1 - I, one makes N of the keys, and
one of the queries B + B N, with which out is (q exp G) S^T + (B + B N) E for the errors
E = beta (V - (k exp G) S^T), beside U = E + N E.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.call import Inputs, Options
from gdn_jax.ops.gated_delta.chunk_inverse import Square, invert
from gdn_jax.ops.gated_delta.chunk_memory import (
    CHUNK,
    Chunk,
    Keys,
    num_chunks,
    parts_of,
)
from gdn_jax.ops.gated_delta.chunk_parts import cut, dot
from gdn_jax.ops.gated_delta.chunk_scores import (
    Gate,
    inverse_norm,
    key_weight,
    query_weight,
    square,
)
from gdn_jax.ops.gated_delta.tuning import ChunkConfig


class Factors(NamedTuple):
    """Of every token, float32 [HV L] each."""

    read: Any  # exp(G) / |k|, for k where it reads the state
    fold: Any  # exp(G_C - G) / |k|, where it is folded in
    decay: Any  # exp(G_C)
    beta: Any
    k_factor: Any  # 1 / |k|
    coarse: Any  # G is their sum, see chunk_scores.py
    fine: Any


class Prepared(NamedTuple):
    """What the kernels leave; of a chunk row i lies with its token."""

    inverse: Any  # N, in parts of [HV L C]
    scores: Any  # B + B N, so too
    factors: Factors
    q_factor: Any  # scale / |q|    [HV L]
    query: Any  # exp(G) scale / |q|, for q where it asks the state    [HV L]


def key_kernel(
    inputs: tuple[Any, Keys], *outputs: Any, options: Options, interpret: bool
) -> None:
    """Grid: (value heads, chunks)."""
    x, keys = inputs
    parts = parts_of(options)
    inverse, factors, work = outputs[:parts], Factors(*outputs[parts:-1]), outputs[-1]
    chunk = Chunk.find(x, options, pl.program_id(0), pl.program_id(1))

    @pl.when(chunk.length > 0)
    def _():
        gate = Gate.of(x, options, chunk)
        k = chunk.load_keys(keys.k)
        products = dot(k, k, trans_y=True)
        k_factor = inverse_norm(products, options)
        found = Factors(
            gate.grown() * k_factor,
            gate.rest() * k_factor,
            jnp.full(CHUNK, gate.left()),
            gate.beta,
            k_factor,
            *gate.G,
        )
        for ref, factor in zip(factors, found, strict=True):
            chunk.store_factor(ref, factor)
        place = Square(work, chunk, interpret)
        A = products * key_weight(gate.G, k_factor, gate.beta, chunk)
        place.store(*square(), A)
        invert(place, parts)
        chunk.store_square(inverse, cut(place.load(*square()), parts))


def query_kernel(
    inputs: tuple[Any, Keys, Any, Factors], *outputs: Any, options: Options
) -> None:
    """Grid: (value heads, chunks)."""
    x, keys, inverse, factors = inputs
    *scores_refs, q_ref, query_ref = outputs
    parts = parts_of(options)
    chunk = Chunk.find(x, options, pl.program_id(0), pl.program_id(1))

    @pl.when(chunk.length > 0)
    def _():
        k_factor = chunk.load_factor(factors.k_factor)
        G = chunk.load_factor(factors.coarse), chunk.load_factor(factors.fine)
        q, k = (chunk.load_keys(refs) for refs in keys)
        q_factor = inverse_norm(dot(q, q, trans_y=True), options) * options.scale
        chunk.store_factor(q_ref, q_factor)
        chunk.store_factor(query_ref, jnp.exp2(G[0] + G[1]) * q_factor)
        scores = dot(q, k, trans_y=True)
        scores *= query_weight(G, k_factor, q_factor, chunk)
        scores += dot(cut(scores, parts), chunk.load_square(inverse))
        chunk.store_square(scores_refs, cut(scores, parts))


def prepare(
    x: Inputs, keys: Keys, options: Options, config: ChunkConfig, interpret: bool
) -> Prepared:
    L, HV = x.v.shape[:2]
    squares = [((HV, L, CHUNK), jnp.bfloat16)] * parts_of(options)
    factor = ((HV, L), jnp.float32)
    run = functools.partial(
        _triton.launch,
        grid=(HV, num_chunks(x, options)),
        aliases={},
        num_warps=config.prepare_warps,
        interpret=interpret,
    )
    *outputs, _ = run(
        functools.partial(key_kernel, options=options, interpret=interpret),
        (x, keys),
        [*squares, *[factor] * len(Factors._fields), ((HV, L, CHUNK), jnp.float32)],
    )
    inverse = tuple(outputs[: len(squares)])
    factors = Factors(*outputs[len(squares) :])
    *scores, q_factor, query = run(
        functools.partial(query_kernel, options=options),
        (x, keys, inverse, factors),
        [*squares, factor, factor],
    )
    return Prepared(inverse, tuple(scores), factors, q_factor, query)
