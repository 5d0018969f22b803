"""Gradients of the chunked update as three Pallas kernels behind `prepare`.

With the letters of chunk_xla.py, dX the cotangent of X, N = (I + A)^-1 - I and
Y = beta (V - (k exp G) S^T):

    dU = B^T dO + (k exp(G_C - G)) dS'^T              dY = dU + N^T dU
    dS = exp(G_C) dS' + dO^T (q exp G) - (beta dY)^T (k exp G)
    dV = beta dY        dB = dO U^T        dA = -dY U^T        beta dbeta = dY . U

`enter_kernel` walks a row forward for the states that enter its chunks and U,
`leave_kernel` backward for the cotangents of the states that leave them and dY. Then
`pull_kernel` has all that it needs of every chunk, side by side. The norms' gradients
and those of the gates' own arguments, elementwise, are XLA's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops import ragged
from gdn_jax.ops.batch import Rows, find_owners
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    Gates,
    Inputs,
    Options,
    find_rows,
)
from gdn_jax.ops.gated_delta.chunk_parts import Cut, Parts, cut_array, dot, wide_dot
from gdn_jax.ops.gated_delta.chunk_prepare import (
    BETA,
    CHUNK,
    FOLD,
    QUERY,
    READ,
    Keys,
    Prepared,
    Scores,
    Tokens,
    diagonal,
    find_chunk,
    num_chunks,
    padded,
    prepare,
    square,
)
from gdn_jax.ops.gated_delta.chunk_triton import Chunk
from gdn_jax.ops.gated_delta.tuning import ChunkConfig

V_AT_ONCE = 64
K_AT_ONCE = 32
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


class _Place(NamedTuple):
    """A tile of V of one value head's state for a row's walk."""

    row: Rows
    head: Array
    v: Array  # [1 V]
    k: Array  # [K 1]
    steps: Array

    @classmethod
    def of(cls, x: Any, options: Options, config: ChunkConfig) -> "_Place":
        tile, head = pl.program_id(0), pl.program_id(1)
        row = find_rows(x, options, pl.program_id(2))
        v = tile * config.block_v + jnp.arange(config.block_v, dtype=jnp.int32)
        k = jnp.arange(padded(x.state.shape[3]), dtype=jnp.int32)
        steps = lax.div(row.length + np.int32(CHUNK - 1), np.int32(CHUNK))
        steps = jnp.where(row.live, steps, np.int32(0))
        return cls(row, head, v[None, :], k[:, None], steps)

    def load(self, pool: Any, wanted: Array) -> Array:
        inside = (self.v < pool.shape[2]) & (self.k < pool.shape[3]) & wanted
        place = pool.at[self.row.read, self.head, self.v, self.k]
        return _triton.load(place, mask=inside, other=0).astype(jnp.float32)

    def store(self, pool: Any, state: Array) -> None:
        inside = (self.v < pool.shape[2]) & (self.k < pool.shape[3]) & self.row.live
        place = pool.at[self.row.read, self.head, self.v, self.k]
        _triton.store(place, state.astype(pool.dtype), mask=inside)

    def store_state(self, refs: Pair, parts: Parts, step: Array) -> None:
        """Of a chunk; [M HV K V]."""
        number = place_of(self.row, step)
        inside = (self.v < refs[0].shape[3]) & (self.k < refs[0].shape[2])
        for ref, part in zip(refs, parts, strict=True):
            place = ref.at[number, self.head, self.k, self.v]
            _triton.store(place, part, mask=inside)


def place_of(row: Rows, step: Array) -> Array:
    """A number of its own for every chunk, below `ragged.most_blocks`: rows that begin
    in the same 64 tokens are told apart by their own numbers."""
    return lax.div(row.begin, np.int32(CHUNK)) + row.number + step


def enter_kernel(
    inputs: tuple[Any, Keys, Prepared],
    *outputs: Any,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> None:
    """Grid: (tiles of V, value heads, rows)."""
    x, keys, prepared = inputs
    entering, u_refs, cut = outputs[:2], outputs[2:], Cut(interpret)
    place = _Place.of(x, options, config)

    def advance(step, state):
        chunk = Chunk.of(x, keys, prepared, place.row, place.head, step)
        parts = cut(state)
        place.store_state(entering, parts, step)
        u = chunk.find_u(chunk.load(x.v, place.v), parts, cut)
        for ref, part in zip(u_refs, cut(u), strict=True):
            chunk.store(ref, part, place.v)
        return chunk.fold(state, u, cut)

    state = place.load(x.state, place.row.keeps_state)
    lax.fori_loop(np.int32(0), place.steps, advance, state)


def leave_kernel(
    inputs: tuple[Any, Any, Keys, Prepared, Any],
    dstate_ref: Any,
    dv_ref: Any,
    *outputs: Any,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> None:
    """Grid: (tiles of V, value heads, rows). The pool's cotangent is updated in place:
    of the slots that rows wrote it becomes that of the state they started from."""
    dnew, x, keys, prepared, dout = inputs
    leaving, dy_refs, cut = outputs[:2], outputs[2:], Cut(interpret)
    place = _Place.of(x, options, config)

    def retreat(turn, dstate):
        step = place.steps - 1 - turn
        chunk = Chunk.of(x, keys, prepared, place.row, place.head, step)
        parts = cut(dstate)
        place.store_state(leaving, parts, step)
        do = tuple(chunk.load(ref, place.v) for ref in dout)
        du = wide_dot(chunk.square(prepared.scores), do, trans_x=True)
        du += wide_dot(chunk.k, parts) * chunk.factor(FOLD)
        inverse = chunk.square(prepared.inverse)
        dy = du + wide_dot(inverse, cut(du), trans_x=True)
        for ref, part in zip(dy_refs, cut(dy), strict=True):
            chunk.store(ref, part, place.v)
        dr = dy * chunk.factor(BETA)
        chunk.store(dv_ref, dr, place.v)
        read = cut(dr * chunk.factor(READ), 3)
        asked = cut(_join(do) * chunk.factor(QUERY), 3)
        dstate = dstate * chunk.decay() + wide_dot(chunk.q, asked, trans_x=True)
        return dstate - wide_dot(chunk.k, read, trans_x=True)

    dstate = place.load(dnew, place.row.live)
    dstate = lax.fori_loop(np.int32(0), place.steps, retreat, dstate)
    place.store(dstate_ref, jnp.where(place.row.keeps_state, dstate, 0.0))


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
    chunk = Scores.of(x, keys, options, tokens, head)
    do_u, dy_u = _products(dout, walked, tokens, head)
    W = do_u * chunk.query_weight  # of q k^T, in B
    Z = -dy_u * chunk.key_weight  # of k k^T, in A
    safe = jnp.where(chunk.beta > 0, chunk.beta, 1.0)
    dbeta = jnp.where(chunk.beta > 0, diagonal(dy_u) / safe, 0.0)
    straddling = _sum_straddling(W * chunk.qk + Z * chunk.kk, cut)

    coarse, fine = chunk.G
    grown = jnp.exp(coarse + fine)
    left = jnp.exp(chunk.total[0] + chunk.total[1])
    rest = jnp.exp((chunk.total[0] - coarse) + (chunk.total[1] - fine))
    weights = (
        grown * chunk.q_factor,
        -grown * chunk.k_factor * chunk.beta,
        rest * chunk.k_factor,
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
        q, k = _join(q), _join(k)
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


def _join(parts: Parts) -> Array:
    return functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))


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
            inner += jnp.sum(_join(entering) * _join(leaving))
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


def chunk_backward(
    x: Inputs,
    options: Options,
    config: ChunkConfig,
    cotangents: tuple[Array, Array],
    *,
    interpret: bool = False,
) -> Inputs:
    """Cotangents of the inputs. The states that enter chunks are computed again: kept
    from the forward pass they would be a state for every 64 tokens."""
    dnew, dout = cotangents
    keys, dout = Keys.of(x), cut_array(dout)
    prepared = prepare(x, keys, options, config, interpret)
    dstate, dv, walked = _walk(
        x, keys, prepared, dnew, dout, options, config, interpret
    )
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
    return _assemble(x, options, dstate, dv, Pulled(*pulled))


def _walk(
    x: Inputs,
    keys: Keys,
    prepared: Prepared,
    dnew: Array,
    dout: Any,
    options: Options,
    config: ChunkConfig,
    interpret: bool,
) -> tuple[Array, Array, Walked]:
    (L, HV, V), K = x.v.shape, x.state.shape[3]
    chunks = ragged.most_blocks(L, x.num_rows, CHUNK)
    states = [((chunks, HV, K, V), jnp.bfloat16)] * 2
    values = [((L, HV, V), jnp.bfloat16)] * 2
    run = functools.partial(
        _triton.launch,
        grid=(pl.cdiv(V, config.block_v), HV, x.num_rows),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    static = dict(options=options, config=config, interpret=interpret)
    entered = run(
        functools.partial(enter_kernel, **static),
        (x, keys, prepared),
        states + values,
        aliases={},
    )
    dstate, dv, *left = run(
        functools.partial(leave_kernel, **static),
        (dnew, x, keys, prepared, dout),
        [(dnew.shape, dnew.dtype), (x.v.shape, x.v.dtype), *states, *values],
        aliases={0: 0},
    )
    pairs = (tuple(y) for y in (entered[:2], entered[2:], left[:2], left[2:]))
    return dstate, dv, Walked(*pairs)


def _assemble(
    x: Inputs, options: Options, dstate: Array, dv: Array, pulled: Pulled
) -> Inputs:
    """What the kernels left for tokens of live rows alone, through norms and gates."""
    rows = find_rows(x, options)
    *_, live = find_owners(rows, x.q.shape[0], options.tokens_per_row)

    def select(y: Array) -> Array:
        return jnp.where(live.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)

    def of_key(y: Array, gradient: Array) -> Array:
        """Through y / |y|, of all value heads that read it."""
        by_head = select(gradient).reshape(*y.shape[:2], -1, y.shape[2])
        gradient, exact = by_head.sum(axis=2), select(y).astype(jnp.float32)
        if options.qk_l2norm:
            square = jnp.sum(exact * exact, axis=-1, keepdims=True) + rule.EPSILON
            along = jnp.sum(exact * gradient, axis=-1, keepdims=True)
            gradient = gradient - exact * (along / square)
        return gradient.astype(y.dtype)

    gates = x.gates._replace(
        **{name: select(getattr(x.gates, name)) for name in x.gates.PER_TOKEN}
    )
    cotangents = Gates(select(pulled.log_decay), select(pulled.beta))
    _, pull = jax.vjp(functools.partial(_gates, options=options), gates)
    [dgates] = pull(cotangents)
    zeros = (None,) * 4
    return Inputs(
        dstate,
        of_key(x.q, pulled.q),
        of_key(x.k, pulled.k),
        select(dv),
        dgates,
        *zeros,
    )


def _gates(logits: GateLogits, *, options: Options) -> Gates:
    A_log, a, b, dt_bias = (y.astype(jnp.float32) for y in logits)
    return Gates(
        rule.log_decay(A_log, a, dt_bias, options.gating), rule.beta(b, options.gating)
    )
