"""What a program of replay's first kernel works on, and how it walks along K."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices, inside, load, padded
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_parts import Parts, cut
from gdn_jax.ops.gated_delta.replay_call import Turn
from gdn_jax.ops.gated_delta.tuning import ReplayConfig

EXACT = 3  # parts that leave float32's own error


class Tile(NamedTuple):
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
    def of(cls, x: Any, turn: Turn, options: Options, config: ReplayConfig) -> "Tile":
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


class Old(NamedTuple):
    """The records that stand: where they lie, what is left of each, its key's norm in
    it, and what is left of the checkpoint."""

    column: Array
    stands: Array
    weight: Array
    left: Array

    @classmethod
    def load(cls, x: Any, tile: Tile) -> "Old":
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

    def load_u(self, x: Any, tile: Tile) -> Parts:
        """[BV R], weighted."""
        place = tile.slot, tile.head, self.column[None, :], tile.column
        u = tile.load(x.state.u.at[place], self.stands)
        return cut(u * self.weight[None, :], EXACT)


class Own(NamedTuple):
    """What the tokens bring besides q and k: v [BV T], beta [T], and G [T], the running
    sum of log-decays."""

    v: Array
    beta: Array
    since: rule.Sums

    @classmethod
    def load(cls, x: Any, tile: Tile, options: Options) -> "Own":
        log_decay, beta = gates(x, tile.token, tile.head, tile.valid, options)
        i, j = square(tile.token.size)
        coarse, fine = (
            jnp.sum(jnp.where(j <= i, part[None, :], 0.0), axis=1)
            for part in rule.coarse_and_fine(log_decay)
        )
        v = tile.load(x.v.at[tile.token[None, :], tile.head, tile.column], tile.valid)
        return cls(v.astype(jnp.float32), beta, (coarse, fine))


def gates(x: Any, token: Array, head: Array, valid: Array, options: Options):
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
    log_decay = jnp.maximum(log_decay, rule.NO_DECAY_LEFT)
    beta = rule.beta(b, options.gating, rule.QUICK)
    return jnp.where(valid, log_decay, 0.0), jnp.where(valid, beta, 0.0)


def cut_keys(x: Array) -> Parts:
    """As many as hold every value: float16 has 11 bits, bfloat16 8."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    return cut(x.astype(jnp.float32), 2 if x.dtype == jnp.float16 else EXACT)


class Walk(NamedTuple):
    """Along K, tile by tile."""

    x: Any
    tile: Tile
    old: Old
    config: ReplayConfig

    def run(self, body, carry):
        K, block = self.x.q.shape[2], self.config.block_k

        def step(i, carry):
            k = i * np.int32(block) + indices(block)
            return body(carry, k, inside(k, K))

        return lax.fori_loop(np.int32(0), np.int32(pl.cdiv(K, block)), step, carry)

    def state(self, k: Array, in_k: Array | None, in_v: Array | None) -> Array:
        """Of the checkpoint [BV BK], in its dtype."""
        tile = self.tile
        at, inside = (tile.v, k), (in_v, in_k)
        return load(self.x.state.checkpoint, at, inside, tile.slot, tile.head)

    def keys(self, k: Array, in_k: Array | None) -> Array:
        """Of the records [R BK]."""
        tile, old = self.tile, self.old
        at, inside = (old.column, k), (old.stands, in_k)
        return load(self.x.state.k, at, inside, tile.slot, tile.key_head)

    def tokens(self, k: Array, in_k: Array | None) -> tuple[Array, Array]:
        """q and k [T BK]"""
        tile = self.tile
        mask = jnp.broadcast_to(tile.valid[:, None], (tile.valid.size, k.size))
        mask = mask if in_k is None else mask & in_k[None, :]
        place = tile.token[:, None], tile.key_head, k[None, :]
        q, own = (
            _triton.load(ref.at[place], mask=mask, other=0)
            for ref in (self.x.q, self.x.k)
        )
        return q, own


def cut_state(state: Array, parts: int) -> Parts:
    if state.dtype == jnp.bfloat16:
        return (state,)
    return cut(state.astype(jnp.float32), parts)


def square(n: int) -> tuple[Array, Array]:
    return indices(n)[:, None], indices(n)[None, :]
