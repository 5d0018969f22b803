"""The recurrence in chunks as two Pallas kernels (Triton lowering).

Of chunk_xla.py's equations, `prepare_kernel` computes what needs no state, for all
chunks side by side: the triangle's inverse, the scores and the factors of each token.
`walk_kernel` then carries a tile of a value head's state along a row, a chunk a step.
It works on transposes, [V C] and [V K]: what it makes then enters the next product from
registers, and only what it loads goes through shared memory.

Products are of bfloat16 parts with float32 sums: a bfloat16 operand is one part, others
are cut into two, which leaves an error of 2^-17; see `_parts`.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Gates, Inputs, Options, find_rows
from gdn_jax.ops.gated_delta.clearing import clear, clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile
from gdn_jax.ops.gated_delta.tuning import ChunkConfig

CHUNK = 64
MAX_HEAD_DIM = 256
ROWS_AT_ONCE = 512  # of cu_seqlens, in registers
NO_DECAY_LEFT = -105.0  # exp of it is 0 in float32
STEPS = 1024.0

Parts = tuple[Array, ...]


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


class _Cut(NamedTuple):
    """Cuts an operand into parts; the interpreter must not fuse the rounding away."""

    interpret: bool

    def __call__(self, x: Array, parts: int = 2) -> Parts:
        if x.dtype == jnp.bfloat16:
            return (x,)
        x = x.astype(jnp.float32)
        cut = []
        for _ in range(parts):
            part = lax.reduce_precision(x, 8, 7) if self.interpret else x
            cut.append(part.astype(jnp.bfloat16))
            x = x - cut[-1].astype(jnp.float32)
        return tuple(cut)


def _dot(x: Parts, y: Parts, *, trans_y: bool = False) -> Array:
    """x y, or x y^T; products below the error of the finer operand are left out."""
    most = max(len(x), len(y))
    pairs = [(x_part, y_part) for i, x_part in enumerate(x) for y_part in y[: most - i]]
    products = (_triton.dot(*pair, trans_b=trans_y) for pair in reversed(pairs))
    return functools.reduce(jnp.add, products)


def _wide_dot(x: Parts, y: Parts, *, trans_x: bool = False) -> Array:
    """x y or x^T y, with two parts of y side by side in one product: a warpgroup waits
    for a product before it starts the next, so few and wide ones are fast."""
    if len(y) == 1:
        return functools.reduce(
            jnp.add, (_triton.dot(part, y[0], trans_a=trans_x) for part in x)
        )
    both, *finer = x
    both = _triton.dot(both, _beside(*y[:2]), trans_a=trans_x)
    total = jnp.sum(both.reshape(both.shape[0], 2, both.shape[1] // 2), axis=1)
    for x_part in finer:
        total += _triton.dot(x_part, y[0], trans_a=trans_x)
    for y_part in y[2:]:
        total += _triton.dot(x[0], y_part, trans_a=trans_x)
    return total


def _beside(x: Array, y: Array) -> Array:
    """[m 2n]"""
    pairs = jnp.stack([x, y], axis=-1).transpose(0, 2, 1)
    return pairs.reshape(x.shape[0], 2 * x.shape[1])


def prepare_kernel(x: Any, *outputs: Any, options: Options, interpret: bool) -> None:
    """Grid: (value heads, chunks)."""
    out = Prepared(outputs[:2], outputs[2:4], outputs[4])
    head, number = pl.program_id(0), pl.program_id(1)
    begin, length = _find_chunk(x, options, number)

    @pl.when(length > 0)
    def _():
        _prepare_chunk(x, out, options, _Cut(interpret), begin, length, head)


def _prepare_chunk(
    x: Any, out: Prepared, options: Options, cut: _Cut, begin, length, head
) -> None:
    key_head = head // (x.v.shape[1] // x.k.shape[1])
    place = jnp.arange(CHUNK, dtype=jnp.int32)
    tokens = _Tokens(begin + place, place < length)
    q, k = (cut(_load_rows(ref, tokens, key_head)) for ref in (x.q, x.k))
    log_decay, beta = _load_gates(x, options, tokens, head)
    G, total = _running_sum(log_decay)
    decay = _decay_between(G, place)

    kk = _dot(k, k, trans_y=True)
    q_factor, k_factor = jnp.full(CHUNK, options.scale), jnp.ones(CHUNK)
    if options.qk_l2norm:
        k_factor = _inverse_norm(kk, place)
        q_factor = _inverse_norm(_dot(q, q, trans_y=True), place) * options.scale
    decay = decay * k_factor[None, :]
    scores = _dot(q, k, trans_y=True) * decay * q_factor[:, None]
    _store_square(out.scores, cut(scores), tokens, head)
    A = kk * decay * (beta * k_factor)[:, None]
    A = jnp.where(place[:, None] > place[None, :], A, 0.0)
    _store_square(out.inverse, cut(_invert(A, place, cut)), tokens, head)

    grown = jnp.exp(G[0] + G[1])
    rest = jnp.exp((total[0] - G[0]) + (total[1] - G[1]))
    left = jnp.full(CHUNK, jnp.exp(total[0] + total[1]))
    factors = (grown * k_factor, rest * k_factor, grown * q_factor, left, beta)
    for number, factor in enumerate(factors):
        place = out.factors.at[number, head, tokens.token]
        _triton.store(place, factor, mask=tokens.valid)


class _Tokens(NamedTuple):
    """The tokens of a chunk [C], and which of them the row has."""

    token: Array
    valid: Array


def _load_rows(ref: Any, tokens: _Tokens, head: Array) -> Array:
    """[C K] of [L H K]."""
    K = ref.shape[2]
    k = jnp.arange(pl.next_power_of_2(K), dtype=jnp.int32)[None, :]
    mask = tokens.valid[:, None] & (k < K)
    return _triton.load(ref.at[tokens.token[:, None], head, k], mask=mask, other=0)


def _inverse_norm(products: Array, place: Array) -> Array:
    """1 / |x_i| of x x^T, whose diagonal has the squares."""
    diagonal = place[:, None] == place[None, :]
    squares = jnp.sum(jnp.where(diagonal, products, 0.0), axis=1)
    return lax.rsqrt(squares + rule.EPSILON)


Sums = tuple[Array, Array]


def _running_sum(log_decay: Array) -> tuple[Sums, Sums]:
    """G and its last value as coarse + fine: multiples of 1/1024, which float32 adds
    without rounding, and a rest that stays small. In one part the sum would lose,
    behind a token that forgets everything (-100 and less), the small decays between
    its followers."""
    coarse = jnp.floor(log_decay * STEPS) / STEPS
    fine = log_decay - coarse
    return (jnp.cumsum(coarse), jnp.cumsum(fine)), (jnp.sum(coarse), jnp.sum(fine))


def _decay_between(G: Sums, place: Array) -> Array:
    """exp(G_i - G_j), zero above the diagonal."""
    coarse, fine = (part[:, None] - part[None, :] for part in G)
    lower = place[:, None] >= place[None, :]
    return jnp.exp(jnp.where(lower, coarse + fine, -jnp.inf))


def _invert(A: Array, place: Array, cut: _Cut) -> Array:
    """(I + A)^-1 - I of a strict lower triangle: in every turn, from the inverses of
    its diagonal blocks those of blocks twice as large. A power series in A would not
    do: where keys repeat, its terms grow to 1e17 and cancel."""
    apart = place[:, None] ^ place[None, :]

    def double(turn, inverse):
        off = jnp.where(apart >> turn == 1, A, 0.0)
        parts = cut(inverse)
        passed = off + _dot(cut(off), parts)
        return inverse - (passed + _dot(parts, cut(passed)))

    pairs = jnp.where(apart == 1, -A, 0.0)
    turns = CHUNK.bit_length() - 1
    return lax.fori_loop(np.int32(1), np.int32(turns), double, pairs)


def _store_square(refs, parts: Parts, tokens: _Tokens, head: Array) -> None:
    column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(tokens.valid[:, None], (CHUNK, CHUNK))
    for ref, part in zip(refs, parts, strict=True):
        _triton.store(ref.at[head, tokens.token[:, None], column], part, mask=mask)


def _load_gates(x: Any, options: Options, tokens: _Tokens, head) -> Sums:
    """log_decay and beta [C]; 0 where there is no token."""
    a, b = (
        _triton.load(ref.at[tokens.token, head], mask=tokens.valid, other=0)
        for ref in x.gates.per_token
    )
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if isinstance(x.gates, Gates):
        log_decay, beta = a, b
    else:
        A_log, dt_bias = (
            ref[head].astype(jnp.float32) for ref in (x.gates.A_log, x.gates.dt_bias)
        )
        log_decay = rule.log_decay(A_log, a, dt_bias, options.gating)
        beta = rule.beta(b, options.gating)
    log_decay = jnp.maximum(log_decay, NO_DECAY_LEFT)
    valid = tokens.valid
    return jnp.where(valid, log_decay, 0.0), jnp.where(valid, beta, 0.0)


def _find_chunk(x: Any, options: Options, number: Array) -> tuple[Array, Array]:
    """The first token of a chunk and how many it has; none past the last."""
    if options.tokens_per_row is not None:
        steps = np.int32(pl.cdiv(options.tokens_per_row, CHUNK))
        row, step = lax.div(number, steps), lax.rem(number, steps)
    else:
        row, before = _find_row(x, number)
        step = number - before
    exists = row < x.num_rows
    found = find_rows(x, options, jnp.minimum(row, np.int32(x.num_rows - 1)))
    left = found.length - step * CHUNK
    length = jnp.where(exists & found.live, jnp.clip(left, 0, CHUNK), 0)
    return found.begin + step * CHUNK, length


def _num_chunks(length: Array) -> Array:
    return lax.div(length + np.int32(CHUNK - 1), np.int32(CHUNK))


def _find_row(x: Any, number: Array) -> tuple[Array, Array]:
    """The row that a chunk of packed tokens belongs to, and the chunks of the rows
    before it."""
    block = min(pl.next_power_of_2(x.num_rows), ROWS_AT_ONCE)
    num_tokens = x.q.shape[0]

    def look(turn, carry):
        row, before, total = carry
        at = turn * block + jnp.arange(block, dtype=jnp.int32)
        inside = at < x.num_rows
        begin, end = (
            jnp.clip(
                _triton.load(x.cu_seqlens.at[y], mask=inside, other=0), 0, num_tokens
            )
            for y in (at, at + 1)
        )
        counts = lax.div(
            jnp.maximum(end - begin, 0) + np.int32(CHUNK - 1), np.int32(CHUNK)
        )
        passed = inside & (total + jnp.cumsum(counts) <= number)
        row += jnp.sum(passed.astype(jnp.int32))
        before += jnp.sum(jnp.where(passed, counts, 0))
        return row, before, total + jnp.sum(counts)

    zero = jnp.int32(0)
    turns = np.int32(pl.cdiv(x.num_rows, block))
    row, before, _ = lax.fori_loop(np.int32(0), turns, look, (zero, zero, zero))
    return row, before


def walk_kernel(
    inputs: tuple[Any, Prepared],
    new_ref: Any,
    out_ref: Any,
    *,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> None:
    """Grid: (tiles of V, value heads, rows); with `cu_seqlens` one row more, whose
    programs clear the tokens that belong to no row."""
    x, prepared = inputs
    tile, head, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    is_row = number < x.num_rows
    row = find_rows(x, options, jnp.minimum(number, np.int32(x.num_rows - 1)))
    row = row._replace(live=row.live & is_row, keeps_state=row.keeps_state & is_row)
    V, K = x.state.shape[2:]
    v = tile * config.block_v + jnp.arange(config.block_v, dtype=jnp.int32)[None, :]
    k = jnp.arange(pl.next_power_of_2(K), dtype=jnp.int32)[:, None]
    inside = (v < V) & (k < K)
    at = (row.read, head, v, k)

    state = _triton.load(x.state.at[at], mask=inside & row.keeps_state, other=0)
    steps = jnp.where(row.live, _num_chunks(row.length), 0)
    advance = functools.partial(
        _advance, x, prepared, out_ref, row, head, v, _Cut(interpret)
    )
    state = lax.fori_loop(np.int32(0), steps, advance, state.astype(jnp.float32))
    _triton.store(new_ref.at[at], state.astype(new_ref.dtype), mask=inside & row.live)

    clearing = config.clearing
    length = jnp.where(row.live | ~is_row, 0, row.length)
    tile_of_v = Tile.of(x.state, tile, clearing)
    clear(new_ref, out_ref, row.begin, length, head, tile_of_v, options)
    if x.cu_seqlens is not None:
        program = tile + np.int32(pl.cdiv(V, config.block_v)) * head

        @pl.when(~is_row)
        def _():
            clear_unowned(x, new_ref, out_ref, program, clearing, options)


def _advance(
    x: Any,
    prepared: Prepared,
    out_ref: Any,
    row: Rows,
    head: Array,
    v: Array,
    cut: _Cut,
    step: Array,
    state: Array,
) -> Array:
    """One chunk: its out is stored, and the state behind it returned, [K V]."""
    place = step * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
    tokens = _Tokens(row.begin + place, place < row.length)
    token, valid = tokens
    key_head = head // (x.v.shape[1] // x.k.shape[1])
    k, q = (cut(_load_rows(ref, tokens, key_head)) for ref in (x.k, x.q))
    in_v = valid[:, None] & (v < x.v.shape[2])
    values = _triton.load(x.v.at[token[:, None], head, v], mask=in_v, other=0)
    column = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]
    square = jnp.broadcast_to(valid[:, None], (CHUNK, CHUNK))

    def load(refs) -> Parts:
        return tuple(
            _triton.load(ref.at[head, token[:, None], column], mask=square, other=0)
            for ref in refs
        )

    def factor(number: int) -> Array:
        at = prepared.factors.at[number, head, token]
        return _triton.load(at, mask=valid, other=0)[:, None]

    decay = prepared.factors[DECAY, head, row.begin + step * CHUNK]
    query = factor(
        QUERY
    )  # loaded early: it enters no product, so nothing prefetches it
    parts = cut(state)
    error = values.astype(jnp.float32) - _wide_dot(k, parts) * factor(READ)
    error = error * factor(BETA)
    u = error + _wide_dot(load(prepared.inverse), cut(error))  # [C V]
    out = _wide_dot(q, parts) * query + _wide_dot(load(prepared.scores), cut(u))
    _triton.store(
        out_ref.at[token[:, None], head, v], out.astype(out_ref.dtype), mask=in_v
    )
    return state * decay + _wide_dot(k, cut(u * factor(FOLD), 3), trans_x=True)


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
    prepared = _prepare(x, options, config, interpret)
    rows = x.num_rows + (x.cu_seqlens is not None)
    return _triton.launch(
        functools.partial(
            walk_kernel, options=options, config=config, interpret=interpret
        ),
        (x, prepared),
        ((x.state.shape, x.state.dtype), (x.v.shape, options.out_dtype)),
        grid=(pl.cdiv(V, config.block_v), HV, rows),
        aliases={0: 0},  # the pool is the first leaf
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )


def _prepare(
    x: Inputs, options: Options, config: ChunkConfig, interpret: bool
) -> Prepared:
    L, HV = x.v.shape[:2]
    if options.tokens_per_row is not None:
        chunks = x.num_rows * pl.cdiv(options.tokens_per_row, CHUNK)
    else:
        chunks = L // CHUNK + x.num_rows
    square = ((HV, L, CHUNK), jnp.bfloat16)
    outputs = _triton.launch(
        functools.partial(prepare_kernel, options=options, interpret=interpret),
        x,
        (*(square,) * 4, ((5, HV, L), jnp.float32)),
        grid=(HV, chunks),
        aliases={},
        num_warps=config.prepare_warps,
        num_stages=1,
        interpret=interpret,
    )
    return Prepared(outputs[:2], outputs[2:4], outputs[4])
