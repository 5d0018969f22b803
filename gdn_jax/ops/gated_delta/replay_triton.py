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
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut, dot
from gdn_jax.ops.gated_delta.replay_append import append_kernel
from gdn_jax.ops.gated_delta.replay_call import (
    Inputs,
    find_turn,
    spread,
    tokens_of,
)
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.gated_delta.replay_tiles import (
    EXACT,
    Old,
    Own,
    Tile,
    Walk,
    cut_keys,
    cut_state,
    square,
)
from gdn_jax.ops.gated_delta.tuning import ReplayConfig


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
    tile = Tile.of(x, turn, options, config)

    @pl.when(turn.rows.live)
    def _():
        old = Old.load(x, tile)
        products = lax.cond(
            turn.folds,
            lambda: _fold(x, tile, old, checkpoint_ref, config),
            lambda: _read(x, tile, old, config),
        )
        own = Own.load(x, tile, options)
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


class _Products(NamedTuple):
    """Of the state that the tokens find, and of the tokens among each other, q and k
    as they came: S k and S q [BV T], k k and q k [T T], q q [T]."""

    Sk: Array
    Sq: Array
    kk: Array
    qk: Array
    qq: Array

    @classmethod
    def zeros(cls, tile: Tile) -> "_Products":
        T, f32 = tile.token.size, jnp.float32
        wide, own = jnp.zeros((tile.v.size, T), f32), jnp.zeros((T, T), f32)
        return cls(wide, wide, own, own, jnp.zeros(T, f32))

    def add(self, state: Parts, q: Array, k: Array) -> "_Products":
        q_parts, k_parts = cut_keys(q), cut_keys(k)
        q = q.astype(jnp.float32)
        return _Products(
            self.Sk + dot(state, k_parts, trans_y=True),
            self.Sq + dot(state, q_parts, trans_y=True),
            self.kk + dot(k_parts, k_parts, trans_y=True),
            self.qk + dot(q_parts, k_parts, trans_y=True),
            self.qq + jnp.sum(q * q, axis=1),
        )


def _read(x: Any, tile: Tile, old: Old, config: ReplayConfig) -> _Products:
    """The records' part is small: k and q of all tokens with all keys, then with u."""
    walk = Walk(x, tile, old, config)
    T, R = tile.token.size, x.state.window
    parts = config.parts_of(x.state.checkpoint.dtype)

    def body(carry, k, in_k):
        products, old_k, old_q = carry
        state = walk.state(k, in_k, tile.in_v)
        own_q, own_k = walk.tokens(k, in_k)
        keys = cut_keys(walk.keys(k, in_k))
        old_k += dot(keys, cut_keys(own_k), trans_y=True)
        old_q += dot(keys, cut_keys(own_q), trans_y=True)
        return products.add(cut_state(state, parts), own_q, own_k), old_k, old_q

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
    x: Any, tile: Tile, old: Old, checkpoint_ref, config: ReplayConfig
) -> _Products:
    """The tokens find what is stored."""
    walk = Walk(x, tile, old, config)
    parts = config.parts_of(x.state.checkpoint.dtype)
    reads = jnp.broadcast_to(tile.turn.rows.keeps_state, tile.v.shape)
    reads = reads if tile.in_v is None else reads & tile.in_v
    u = old.load_u(x, tile)

    def body(products, k, in_k):
        state = walk.state(k, in_k, reads).astype(jnp.float32)
        state = old.left * state + dot(u, cut_keys(walk.keys(k, in_k)))
        state = state.astype(checkpoint_ref.dtype)
        place = checkpoint_ref.at[tile.slot, tile.head, tile.column, k[None, :]]
        in_row = jnp.ones(k.size, bool) if in_k is None else in_k
        _triton.store(place, state, mask=tile.mask(in_row))
        return products.add(cut_state(state, parts), *walk.tokens(k, in_k))

    return walk.run(body, _Products.zeros(tile))


def _solve(
    tile: Tile, own: Own, products: _Products, options: Options
) -> tuple[Array, Array]:
    """u and out [BV T]."""
    T = tile.token.size
    i, j = square(T)
    k_scale = jnp.ones(T, jnp.float32)
    q_scale = jnp.full(T, options.scale, jnp.float32)
    if options.qk_l2norm:
        squares = jnp.sum(jnp.where(i == j, products.kk, 0.0), axis=1)
        k_scale = lax.rsqrt(squares + rule.EPSILON)
        q_scale *= lax.rsqrt(products.qq + rule.EPSILON)
    between = sum(part[:, None] - part[None, :] for part in own.since)
    decay = jnp.exp(jnp.where(j <= i, between, -jnp.inf)) * k_scale[None, :]
    A = jnp.where(j < i, products.kk * decay, 0.0) * (own.beta * k_scale)[:, None]
    B = products.qk * decay * q_scale[:, None]
    grown = jnp.exp(sum(own.since))
    u = own.beta[None, :] * (own.v - (grown * k_scale)[None, :] * products.Sk)
    if options.tokens_per_row != 1:
        inverse = _inverse(A, options.tokens_per_row or T)
        u = dot(cut(u, EXACT), cut(inverse, EXACT), trans_y=True)
    out = dot(cut(u, EXACT), cut(B, EXACT), trans_y=True)
    return u, out + (grown * q_scale)[None, :] * products.Sq


def _inverse(A: Array, T: int) -> Array:
    """(I + A)^-1 of a strict lower triangle, row by row, each from those before."""
    i, j = square(A.shape[0])

    def substitute(step, inverse):
        of_row = jnp.sum(jnp.where(i == step, A, 0.0), axis=0)
        row = jnp.sum(of_row[:, None] * inverse, axis=0)
        return jnp.where(i == step, inverse - row[None, :], inverse)

    identity = jnp.where(i == j, np.float32(1), np.float32(0))
    return lax.fori_loop(np.int32(1), np.int32(T), substitute, identity)
