"""Replay as two Pallas kernels (Triton lowering), and their launches.

The first meets the states. A program owns a tile of V of one value head of a row, walks
its checkpoint along K once, and has the products S k and S q of all tokens by tensor
cores; what the records add is a product of their own, or, in a row that folds, part of
the state that is written. The tokens among each other are a triangular system of T
unknowns (replay_xla.py has the equations).

The second appends the keys, their norms, the log-decays and the counters, which all
programs of a row read: none may be written before the last has read them.

Float32 operands are cut into bfloat16 parts (chunk_parts.py): the state into
`config.parts` where it is read, and into three what is folded into it.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices, inside, padded
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, dot
from gdn_jax.ops.gated_delta.replay_call import (
    Inputs,
    Turn,
    find_turn,
    spread,
    tokens_of,
)
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.gated_delta.tuning import ReplayConfig

EXACT = 3  # parts that leave float32's own error


def replay_triton(
    x: Inputs, options: Options, config: ReplayConfig, interpret: bool
) -> tuple[ReplayState, Array]:
    V, K = x.state.checkpoint.shape[2:]
    config = config.fitted(V, K)
    of_call = dict(options=options, interpret=interpret)
    state, heads = x.state, x.v.shape[1]
    checkpoint, u, out = _triton.launch(
        functools.partial(meet_kernel, config=config, **of_call),
        x,
        (
            (state.checkpoint.shape, state.checkpoint.dtype),
            (state.u.shape, state.u.dtype),
            (x.v.shape, options.out_dtype),
        ),
        grid=(pl.cdiv(V, config.block_v), heads, x.num_rows),
        aliases={0: 0, 1: 1},  # the first leaves of Inputs
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    # with the new u, though the kernel does not look at it: so it runs behind the first
    x = x._replace(state=state._replace(checkpoint=checkpoint, u=u))
    appended = "k", "k_scale", "log_decay", "start", "committed", "pending"
    arrays = [getattr(state, name) for name in appended]
    found = _triton.launch(
        functools.partial(append_kernel, **of_call),
        x,
        [(y.shape, y.dtype) for y in arrays],
        grid=(x.num_rows,),
        aliases={2 + i: i for i in range(len(appended))},
        num_warps=config.append_warps,
        interpret=interpret,
    )
    new = x.state._replace(**dict(zip(appended, found, strict=True)))
    if options.tokens_per_row is None:  # the kernel writes rows' tokens alone
        turn = find_turn(x, options)
        token, live = tokens_of(x, options, turn)
        owned = spread(x, token, live, live)
        out = jnp.where(owned[:, None, None], out, jnp.zeros((), out.dtype))
    return new, out


def meet_kernel(
    x: Any,
    checkpoint_ref,
    u_ref,
    out_ref,
    *,
    options: Options,
    config: ReplayConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references; the others are its checkpoint and u, and out.

    Grid: (tiles of V, value heads, rows).
    """
    turn = find_turn(x, options, pl.program_id(2))
    tile = _Tile.of(x, turn, options, config)

    @pl.when(turn.rows.live)
    def _():
        old = _Old.load(x, tile)
        products = lax.cond(
            turn.folds,
            lambda: _fold(x, tile, old, checkpoint_ref, config),
            lambda: _read(x, tile, old, config),
        )
        own = _Own.load(x, tile, options)
        u, out = _solve(tile, own, products, options)
        if not interpret:
            _triton.barrier()  # all of the program's warps have read the old u
        tile.store(u_ref.at[tile.slot, tile.head, tile.new[None, :], tile.column], u)
        out = out.astype(out_ref.dtype)
        tile.store(out_ref.at[tile.token[None, :], tile.head, tile.column], out)

    if options.tokens_per_row is not None:

        @pl.when(~turn.rows.live)
        def _():
            nothing = jnp.zeros((tile.v.size, tile.token.size), out_ref.dtype)
            place = out_ref.at[tile.token[None, :], tile.head, tile.column]
            tile.store(place, nothing)


class _Tile(NamedTuple):
    """What a program works on: rows `v` of a value head's state, a row's tokens."""

    turn: Turn
    head: Array
    key_head: Array
    v: Array  # [BV]
    in_v: Array | None
    token: Array  # [T], where in L; those that are not valid lie anywhere
    valid: Array
    new: Array  # [T], the columns of their records

    @classmethod
    def of(cls, x: Any, turn: Turn, options: Options, config: ReplayConfig) -> "_Tile":
        head = pl.program_id(1)
        v = pl.program_id(0) * config.block_v + indices(config.block_v)
        step = indices(padded(x.longest(options)))
        rows, R = turn.rows, x.state.window
        return cls(
            turn,
            head,
            lax.div(head, np.int32(x.v.shape[1] // x.k.shape[1])),
            v,
            inside(v, x.v.shape[2]),
            rows.begin + step,
            step < rows.length,
            turn.column(turn.history + step, R),
        )

    @property
    def slot(self) -> Array:
        return self.turn.rows.read

    @property
    def column(self) -> Array:
        return self.v[:, None]

    def mask(self, along: Array) -> Array:
        """[BV n]"""
        mask = jnp.broadcast_to(along[None, :], (self.v.size, along.size))
        return mask if self.in_v is None else mask & self.in_v[:, None]

    def load(self, place: Any, along: Array) -> Array:
        return _triton.load(place, mask=self.mask(along), other=0)

    def store(self, place: Any, value: Array) -> None:
        _triton.store(place, value, mask=self.mask(self.valid))


class _Old(NamedTuple):
    """The records that stand: where they lie, what is left of each, its key's norm in
    it, and what is left of the checkpoint."""

    column: Array
    stands: Array
    weight: Array
    left: Array

    @classmethod
    def load(cls, x: Any, tile: _Tile) -> "_Old":
        state, slot = x.state, tile.slot
        place = indices(state.window)
        stands = place < tile.turn.history
        column = tile.turn.column(place, state.window)

        def record(ref: Any, head: Array) -> Array:
            return _triton.load(ref.at[slot, head, column], mask=stands, other=0)

        log_decay = record(state.log_decay, tile.head)
        later = place[None, :] > place[:, None]
        after = jnp.sum(jnp.where(later, log_decay[None, :], 0.0), axis=1)
        weight = jnp.exp(after) * record(state.k_scale, tile.key_head)
        left = jnp.where(tile.turn.rows.keeps_state, jnp.exp(jnp.sum(log_decay)), 0.0)
        return cls(column, stands, jnp.where(stands, weight, 0.0), left)

    def load_u(self, x: Any, tile: _Tile) -> Parts:
        """[BV R], weighted."""
        place = tile.slot, tile.head, self.column[None, :], tile.column
        u = tile.load(x.state.u.at[place], self.stands)
        return cut(u * self.weight[None, :], EXACT)


class _Own(NamedTuple):
    """What the tokens bring besides q and k: v [BV T], beta [T], and G [T], the running
    sum of log-decays."""

    v: Array
    beta: Array
    since: Array

    @classmethod
    def load(cls, x: Any, tile: _Tile, options: Options) -> "_Own":
        log_decay, beta = _gates(x, tile.token, tile.head, tile.valid, options)
        i, j = _square(tile.token.size)
        since = jnp.sum(jnp.where(j <= i, log_decay[None, :], 0.0), axis=1)
        v = tile.load(x.v.at[tile.token[None, :], tile.head, tile.column], tile.valid)
        return cls(v.astype(jnp.float32), beta, since)


def _gates(x: Any, token: Array, head: Array, valid: Array, options: Options):
    """(log_decay, beta) of tokens and heads that broadcast; 0 where not valid."""
    a, b = (
        _triton.load(ref.at[token, head], mask=valid, other=0).astype(jnp.float32)
        for ref in x.gates.per_token
    )
    A_log, dt_bias = (
        _triton.load(ref.at[head]).astype(jnp.float32)
        for ref in (x.gates.A_log, x.gates.dt_bias)
    )
    log_decay = rule.log_decay(A_log, a, dt_bias, options.gating, rule.QUICK)
    beta = rule.beta(b, options.gating, rule.QUICK)
    return jnp.where(valid, log_decay, 0.0), jnp.where(valid, beta, 0.0)


class _Products(NamedTuple):
    """Of the state that the tokens find, and of the tokens among each other, q and k
    as they came: S k and S q [BV T], k k and q k [T T], q q [T]."""

    Sk: Array
    Sq: Array
    kk: Array
    qk: Array
    qq: Array

    @classmethod
    def zeros(cls, tile: _Tile) -> "_Products":
        T, f32 = tile.token.size, jnp.float32
        wide, square = jnp.zeros((tile.v.size, T), f32), jnp.zeros((T, T), f32)
        return cls(wide, wide, square, square, jnp.zeros(T, f32))

    def add(self, state: Parts, q: Array, k: Array) -> "_Products":
        q_parts, k_parts = _parts(q), _parts(k)
        q = q.astype(jnp.float32)
        return _Products(
            self.Sk + dot(state, k_parts, trans_y=True),
            self.Sq + dot(state, q_parts, trans_y=True),
            self.kk + dot(k_parts, k_parts, trans_y=True),
            self.qk + dot(q_parts, k_parts, trans_y=True),
            self.qq + jnp.sum(q * q, axis=1),
        )


def _parts(x: Array) -> Parts:
    """As many as hold every value: float16 has 11 bits, bfloat16 8."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    return cut(x.astype(jnp.float32), 2 if x.dtype == jnp.float16 else EXACT)


class _Walk(NamedTuple):
    """Along K, tile by tile."""

    x: Any
    tile: _Tile
    old: _Old
    config: ReplayConfig

    def run(self, body, carry):
        K, block = self.x.q.shape[2], self.config.block_k

        def step(i, carry):
            k = i * np.int32(block) + indices(block)
            return body(carry, k, inside(k, K))

        return lax.fori_loop(np.int32(0), np.int32(pl.cdiv(K, block)), step, carry)

    def state(self, k: Array, in_k: Array | None) -> tuple[Any, Array | None]:
        """Where a tile of the checkpoint lies, and its mask."""
        tile = self.tile
        place = tile.slot, tile.head, tile.column, k[None, :]
        masks = [
            jnp.broadcast_to(mask, (tile.v.size, k.size))
            for mask in (
                None if tile.in_v is None else tile.in_v[:, None],
                None if in_k is None else in_k[None, :],
            )
            if mask is not None
        ]
        return place, functools.reduce(jnp.logical_and, masks) if masks else None

    def tokens(self, k: Array, in_k: Array | None) -> tuple[Array, Array]:
        """q and k [T BK]"""
        lead = self.tile.token[:, None], self.tile.key_head
        q = self._rows(self.x.q, lead, self.tile.valid, k, in_k)
        return q, self._rows(self.x.k, lead, self.tile.valid, k, in_k)

    def keys(self, k: Array, in_k: Array | None) -> Array:
        """Of the records [R BK]."""
        tile, old = self.tile, self.old
        lead = tile.slot, tile.key_head, old.column[:, None]
        return self._rows(self.x.state.k, lead, old.stands, k, in_k)

    def _rows(self, ref, lead, valid: Array, k: Array, in_k: Array | None) -> Array:
        mask = jnp.broadcast_to(valid[:, None], (valid.size, k.size))
        mask = mask if in_k is None else mask & in_k[None, :]
        return _triton.load(ref.at[(*lead, k[None, :])], mask=mask, other=0)


def _read(x: Any, tile: _Tile, old: _Old, config: ReplayConfig) -> _Products:
    """The records' part is small: k and q of all tokens with all keys, then with u."""
    walk = _Walk(x, tile, old, config)
    T, R = tile.token.size, x.state.window
    parts = config.parts_of(x.state.checkpoint.dtype)

    def body(carry, k, in_k):
        products, old_k, old_q = carry
        place, mask = walk.state(k, in_k)
        state = _load(x.state.checkpoint, place, mask)
        own_q, own_k = walk.tokens(k, in_k)
        keys = _parts(walk.keys(k, in_k))
        old_k += dot(keys, _parts(own_k), trans_y=True)
        old_q += dot(keys, _parts(own_q), trans_y=True)
        return products.add(_state_parts(state, parts), own_q, own_k), old_k, old_q

    nothing = jnp.zeros((R, T), jnp.float32)
    carry = _Products.zeros(tile), nothing, nothing
    products, old_k, old_q = walk.run(body, carry)
    u = old.load_u(x, tile)  # not before the walk, which has no registers for it
    Sk, Sq = (
        old.left * product + dot(u, cut(y, EXACT))
        for product, y in ((products.Sk, old_k), (products.Sq, old_q))
    )
    return products._replace(Sk=Sk, Sq=Sq)


def _fold(
    x: Any, tile: _Tile, old: _Old, checkpoint_ref, config: ReplayConfig
) -> _Products:
    """The tokens find what is stored."""
    walk = _Walk(x, tile, old, config)
    parts = config.parts_of(x.state.checkpoint.dtype)
    keeps = tile.turn.rows.keeps_state
    u = old.load_u(x, tile)

    def body(products, k, in_k):
        place, mask = walk.state(k, in_k)
        reads = jnp.broadcast_to(keeps, (tile.v.size, k.size))
        reads = reads if mask is None else mask & reads
        state = _load(x.state.checkpoint, place, reads).astype(jnp.float32)
        state = old.left * state + dot(u, _parts(walk.keys(k, in_k)))
        state = state.astype(checkpoint_ref.dtype)
        _triton.store(checkpoint_ref.at[place], state, mask=mask)
        return products.add(_state_parts(state, parts), *walk.tokens(k, in_k))

    return walk.run(body, _Products.zeros(tile))


def _load(ref: Any, place: Any, mask: Array | None) -> Array:
    if mask is None:
        return _triton.load(ref.at[place])
    return _triton.load(ref.at[place], mask=mask, other=0)


def _state_parts(state: Array, parts: int) -> Parts:
    if state.dtype == jnp.bfloat16:
        return (state,)
    return cut(state.astype(jnp.float32), parts)


def _solve(
    tile: _Tile, own: _Own, products: _Products, options: Options
) -> tuple[Array, Array]:
    """u and out [BV T]."""
    T = tile.token.size
    i, j = _square(T)
    k_scale = jnp.ones(T, jnp.float32)
    q_scale = jnp.full(T, options.scale, jnp.float32)
    if options.qk_l2norm:
        squares = jnp.sum(jnp.where(i == j, products.kk, 0.0), axis=1)
        k_scale = lax.rsqrt(squares + rule.EPSILON)
        q_scale *= lax.rsqrt(products.qq + rule.EPSILON)
    between = own.since[:, None] - own.since[None, :]
    decay = jnp.exp(jnp.where(j <= i, between, -jnp.inf)) * k_scale[None, :]
    A = jnp.where(j < i, products.kk * decay, 0.0) * (own.beta * k_scale)[:, None]
    B = products.qk * decay * q_scale[:, None]
    grown = jnp.exp(own.since)
    u = own.beta[None, :] * (own.v - (grown * k_scale)[None, :] * products.Sk)
    if options.tokens_per_row != 1:
        inverse = _inverse(A, options.tokens_per_row or T)
        u = dot(cut(u, EXACT), cut(inverse, EXACT), trans_y=True)
    out = dot(cut(u, EXACT), cut(B, EXACT), trans_y=True)
    return u, out + (grown * q_scale)[None, :] * products.Sq


def _inverse(A: Array, T: int) -> Array:
    """(I + A)^-1 of a strict lower triangle, row by row, each from those before."""
    i, j = _square(A.shape[0])

    def substitute(step, inverse):
        of_row = jnp.sum(jnp.where(i == step, A, 0.0), axis=0)
        row = jnp.sum(of_row[:, None] * inverse, axis=0)
        return jnp.where(i == step, inverse - row[None, :], inverse)

    identity = jnp.where(i == j, np.float32(1), np.float32(0))
    return lax.fori_loop(np.int32(1), np.int32(T), substitute, identity)


def _square(n: int) -> tuple[Array, Array]:
    return indices(n)[:, None], indices(n)[None, :]


def append_kernel(
    x: Any,
    k_ref,
    k_scale_ref,
    log_decay_ref,
    start_ref,
    committed_ref,
    pending_ref,
    *,
    options: Options,
    interpret: bool,
) -> None:
    """The records' other parts, and the counters. Grid: (rows)."""
    turn = find_turn(x, options, pl.program_id(0))
    rows, R = turn.rows, x.state.window
    (H, K), HV = x.k.shape[1:], x.v.shape[1]
    key_head, k = indices(pl.next_power_of_2(H)), indices(pl.next_power_of_2(K))
    in_keys = jnp.broadcast_to((key_head < H)[:, None], (key_head.size, k.size))
    in_keys &= (k < K)[None, :]
    head = indices(pl.next_power_of_2(HV))

    def append(step, _):
        at = rows.begin + step
        column = turn.column(turn.history + step, R)
        keys = x.k.at[at, key_head[:, None], k[None, :]]
        keys = _triton.load(keys, mask=in_keys, other=0)
        place = k_ref.at[rows.read, key_head[:, None], column, k[None, :]]
        _triton.store(place, keys.astype(k_ref.dtype), mask=in_keys)
        scale = jnp.ones(key_head.size, jnp.float32)
        if options.qk_l2norm:
            keys = keys.astype(jnp.float32)
            scale = lax.rsqrt(jnp.sum(keys * keys, axis=1) + rule.EPSILON)
        place = k_scale_ref.at[rows.read, key_head, column]
        _triton.store(place, scale, mask=key_head < H)
        inner = jnp.minimum(head, np.int32(HV - 1))
        log_decay, _ = _gates(x, at, inner, head < HV, options)
        place = log_decay_ref.at[rows.read, head, column]
        _triton.store(place, log_decay, mask=head < HV)

    @pl.when(rows.live)
    def _():
        lax.fori_loop(np.int32(0), rows.length, append, None)
        if not interpret:
            _triton.barrier()  # all warps have read the counters
        moved = turn.column(turn.history, R)
        start_ref[rows.read] = jnp.where(turn.folds, moved, turn.start)
        committed_ref[rows.read] = jnp.where(turn.folds, 0, turn.history)
        pending_ref[rows.read] = rows.length
