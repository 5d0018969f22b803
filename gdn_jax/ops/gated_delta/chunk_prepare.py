"""Of the recurrence in chunks, all that needs no state: two kernels over chunks.

With the letters of chunk_xla.py and N = (I + A)^-1 - I, one makes N of the keys, and
one of the queries B + B N, with which out is (q exp G) S^T + (B + B N) E for the errors
E = beta (V - (k exp G) S^T), beside U = E + N E.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.gated_delta.call import Inputs, Options
from gdn_jax.ops.gated_delta.chunk_inverse import Square, invert
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, dot
from gdn_jax.ops.gated_delta.chunk_scores import (
    CHUNK,
    Gate,
    Keys,
    KeyScores,
    QueryScores,
    Tokens,
    find_chunk,
    load_rows,
    num_chunks,
    square,
)
from gdn_jax.ops.gated_delta.tuning import ChunkConfig


class Prepared(NamedTuple):
    """What the kernels leave; of a chunk row i lies with its token.

    solved: N and B + B N, in `parts_of` parts of [HV 2 L C]
    factors: [5 HV L] float32: of a token's k where it is read, exp(G) / |k|, and where
      it is folded in, exp(G_C - G) / |k|; of its q, exp(G) scale / |q|; exp(G_C); beta
    """

    solved: tuple[Any, ...]
    factors: Any


def parts_of(options: Options) -> int:
    """Of N, and what it meets: with beta up to 2 and nothing forgotten a third keeps
    the state from errors of 1e-4."""
    return 3 if options.gating.allow_neg_eigval else 2


INVERSE, SCORES = range(2)
READ, FOLD, QUERY, DECAY, BETA, *OF_SCORES = range(8)


def key_kernel(
    inputs: tuple[Any, Keys],
    *outputs: Any,
    options: Options,
    interpret: bool,
) -> None:
    """Grid: (value heads, chunks)."""
    x, keys = inputs
    *solved, factors, work = outputs
    chunk = _Chunk.of(x, options)

    @pl.when(chunk.length > 0)
    def _():
        tokens = chunk.tokens
        gate = Gate.of(x, options, tokens, chunk.head)
        k = load_rows(keys.k, tokens, chunk.key_head)
        A = KeyScores.of(k, gate.G, gate.beta, tokens, options)
        chunk.store_factors(
            factors,
            {
                READ: gate.grown() * A.k_factor,
                FOLD: gate.rest() * A.k_factor,
                DECAY: jnp.full(CHUNK, gate.left()),
                BETA: gate.beta,
            }
            | dict(zip(OF_SCORES, (A.k_factor, *gate.G), strict=True)),
        )
        place = Square(work, chunk.head, chunk.begin, chunk.length, interpret)
        place.store(*square(), A.products * A.weight)
        parts = parts_of(options)
        invert(place, parts)
        chunk.store_square(solved, INVERSE, cut(place.load(*square()), parts))


def query_kernel(
    inputs: tuple[Any, Any, Keys],
    *outputs: Any,
    options: Options,
    interpret: bool,
) -> None:
    """Grid: (value heads, chunks)."""
    _, x, keys = inputs
    *solved, factors = outputs
    chunk = _Chunk.of(x, options)

    @pl.when(chunk.length > 0)
    def _():
        tokens = chunk.tokens
        k_factor, *G = (chunk.load_factor(factors, n) for n in OF_SCORES)
        q, k = (load_rows(refs, tokens, chunk.key_head) for refs in keys)
        B = QueryScores.of(q, k, tuple(G), k_factor, tokens, options)
        chunk.store_factors(factors, {QUERY: jnp.exp2(G[0] + G[1]) * B.q_factor})
        scores = B.products * B.weight
        parts = parts_of(options)
        scores += dot(cut(scores, parts), chunk.load_square(solved, INVERSE))
        chunk.store_square(solved, SCORES, cut(scores, parts))


class _Chunk(NamedTuple):
    head: Array
    key_head: Array
    begin: Array
    length: Array
    tokens: Tokens

    @classmethod
    def of(cls, x: Any, options: Options) -> "_Chunk":
        head = pl.program_id(0)
        row, step, length = find_chunk(x, options, pl.program_id(1))
        begin = row.begin + step * CHUNK
        key_head = head // (x.v.shape[1] // x.k.shape[1])
        return cls(head, key_head, begin, length, Tokens.of(begin, length))

    def store_factors(self, ref: Any, factors: dict[int, Array]) -> None:
        for number, factor in factors.items():
            place = ref.at[number, self.head, self.tokens.token]
            _triton.store(place, factor, mask=self.tokens.valid)

    def load_factor(self, ref: Any, number: int) -> Array:
        place = ref.at[number, self.head, self.tokens.token]
        return _triton.load(place, mask=self.tokens.valid, other=0)

    def store_square(self, refs: Any, number: int, parts: Parts) -> None:
        place, mask = self._square(number)
        for ref, part in zip(refs, parts, strict=True):
            _triton.store(ref.at[place], part, mask=mask)

    def load_square(self, refs: Any, number: int) -> Parts:
        place, mask = self._square(number)
        return tuple(_triton.load(ref.at[place], mask=mask, other=0) for ref in refs)

    def _square(self, number: int) -> tuple[Any, Array]:
        column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to(self.tokens.valid[:, None], (CHUNK, CHUNK))
        return (self.head, number, self.tokens.token[:, None], column), mask


def prepare(
    x: Inputs, keys: Keys, options: Options, config: ChunkConfig, interpret: bool
) -> Prepared:
    L, HV = x.v.shape[:2]
    solved = (((HV, 2, L, CHUNK), jnp.bfloat16),) * parts_of(options)
    factors = ((5 + len(OF_SCORES), HV, L), jnp.float32)
    run = functools.partial(
        _triton.launch,
        grid=(HV, num_chunks(x, options)),
        num_warps=config.prepare_warps,
        interpret=interpret,
    )
    static = dict(options=options, interpret=interpret)
    *outputs, _ = run(
        functools.partial(key_kernel, **static),
        (x, keys),
        (*solved, factors, ((HV, L, CHUNK), jnp.float32)),
        aliases={},
    )
    *parts, filled = run(
        functools.partial(query_kernel, **static),
        (tuple(outputs), x, keys),
        (*solved, factors),
        aliases={n: n for n in range(len(outputs))},
    )
    return Prepared(tuple(parts), filled)
