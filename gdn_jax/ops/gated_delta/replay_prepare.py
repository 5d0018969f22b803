"""Replay's first kernel: all that a row's keys say, without checkpoints and u.

A program owns a key head of a row, and the value heads that share it. It prepares what
they need to meet their states, and appends the tokens' keys, norms and log-decays to
the records; not the counters, which all programs of a row read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import MIN_DOT, both, indices, load
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.chunk_parts import dot
from gdn_jax.ops.gated_delta.replay_call import Turn, find_turn
from gdn_jax.ops.gated_delta.replay_tiles import (
    Columns,
    Prepared,
    blocks_of,
    cut_keys,
)
from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig


def prepare_kernel(
    x: Any,
    *refs: Any,
    options: Options,
    config: ReplayConfig,
    interpret: bool,
) -> None:
    """`refs` are of `Prepared`, and x's k, k_scale and log_decay. Grid: (key heads,
    rows)."""
    key, number = pl.program_id(0), pl.program_id(1)
    turn = find_turn(x, options, number)
    prepare(x, turn, key, refs, options, config, interpret)


def prepare(
    x: Any,
    turn: Turn,
    key: Array,
    refs: tuple[Any, ...],
    options: Options,
    config: ReplayConfig,
    interpret: bool,
    in_logits: Callable[[Any], tuple[Any, Any]] = lambda head: (head, head),
) -> None:
    """`in_logits`: which column is a head's in those of a, and of b."""
    prepared, appended = Prepared(*refs[:-3]), refs[-3:]
    # Of null rows too, and before anything else: so memory is waited for once.
    group = _Group.load(x, turn, key, options, config, in_logits)

    @pl.when(key == 0)
    def _():
        prepared.store_turn(turn)

    @pl.when(turn.rows.live)
    def _():
        group.prepare_records(turn, prepared)
        group.prepare_system(turn, prepared, options)
        pl.when(turn.folds)(lambda: group.keep(x, turn, prepared, config))
        if not interpret:
            _triton.barrier()  # all of the program's warps have read the old records
        group.append(x, turn, config, *appended)


class _Group(NamedTuple):
    """A key head of a row, and the G value heads that share it: what memory has of
    them, and the products of the columns with each other and with the records' keys,
    which are anything where a record does not stand."""

    key: Array
    heads: Array
    valid: Array
    columns: Columns
    log_decay: Array  # [G W]
    beta: Array
    old_scale: Array  # [R]
    old_decay: Array  # [G R]
    products: Array  # [W W]
    scale: Array  # [W], 1 / norm of the columns; 1 without `qk_l2norm`
    met: Array  # [R W]

    @classmethod
    def load(
        cls,
        x: Any,
        turn: Turn,
        key: Array,
        options: Options,
        config: ReplayConfig,
        in_logits: Callable[[Any], tuple[Any, Any]],
    ) -> "_Group":
        (H, K), HV, slot = x.k.shape[1:], x.v.shape[1], turn.rows.read
        columns = Columns.of(x, turn.rows.number, options)
        R, W = x.state.window, columns.step.size
        times = max(1, MIN_DOT // W)  # each column, for a product has that many rows
        record, member = indices(R), indices(pl.next_power_of_2(HV // H))
        heads, valid = key * np.int32(HV // H) + member, member < HV // H
        inner = jnp.minimum(heads, np.int32(HV - 1))[:, None]
        old_scale = _triton.load(x.state.k_scale.at[slot, key, record])
        old_decay = _triton.load(x.state.log_decay.at[slot, inner, record[None, :]])
        mask = valid[:, None] & columns.valid[None, :]
        at = [(columns.token[None, :], column) for column in in_logits(inner)]
        log_decay, beta = gates(x, at, inner, mask, options)
        products, met = jnp.zeros((W, W), jnp.float32), jnp.zeros((R, W), jnp.float32)
        for k, in_k in blocks_of(K, config.prepare_k):
            old = load(x.state.k, (record, k), (None, in_k), slot, key)
            own = cut_keys(columns.load(x, key, k, in_k))
            rows = tuple(repeated(part, times) for part in own)
            product = dot(rows, own, trans_y=True).reshape(times, W, W)
            products += jnp.sum(product, axis=0) * np.float32(1 / times)
            met += dot(cut_keys(old), own, trans_y=True)
        scale = jnp.ones(W, jnp.float32)
        if options.qk_l2norm:
            diagonal = indices(W)[:, None] == indices(W)[None, :]
            squares = jnp.sum(jnp.where(diagonal, products, 0.0), axis=0)
            scale = lax.rsqrt(squares + rule.EPSILON)
        own, of_records = (log_decay, beta), (old_scale, old_decay)
        found = products, scale, met
        return cls(key, heads, valid, columns, *own, *of_records, *found)

    def store(self, ref: Any, lead: Array, value: Array, *inner: Array) -> None:
        """[G ..] at ref[lead, heads, ..]."""
        ones = (1,) * (value.ndim - 1)
        along = (
            x.reshape((1,) * axis + (-1,) + (1,) * (value.ndim - 1 - axis))
            for axis, x in enumerate(inner, 1)
        )
        place = ref.at[lead, self.heads.reshape(-1, *ones), *along]
        mask = jnp.broadcast_to(self.valid.reshape(-1, *ones), value.shape)
        _triton.store(place, value, mask=mask)

    def prepare_records(self, turn: Turn, prepared: Any) -> None:
        """What is left of each, and what the columns have of their keys."""
        number, (R, W) = turn.rows.number, self.met.shape
        record = indices(R)
        place = turn.place(record, R)
        stands = place < turn.history
        at = prepared.met.at[number, self.key, record[:, None], indices(W)[None, :]]
        _triton.store(at, jnp.where(stands[:, None], self.met, 0.0))
        log_decay = jnp.where(stands[None, :], self.old_decay, 0.0)
        after = sums(place[:, None] > place[None, :], log_decay)
        weight = jnp.exp(after) * self.old_scale[None, :]
        weight = jnp.where(stands[None, :], weight, 0.0)
        left = jnp.exp(jnp.sum(log_decay, axis=1))
        left = jnp.where(turn.rows.keeps_state, left, 0.0)
        self.store(prepared.weight, number, weight, record)
        self.store(prepared.left, number, left)

    def prepare_system(self, turn: Turn, prepared: Any, options: Options) -> None:
        """(I + A) x = right, A the strict lower triangle of columns."""
        writes, step = self.columns.writes, self.columns.step
        place, number = indices(step.size), turn.rows.number
        scale = self.scale * jnp.where(writes, 1.0, np.float32(options.scale))
        upto = writes[:, None] & (step[:, None] <= step[None, :])
        parts = rule.coarse_and_fine(self.log_decay)
        coarse, fine = (sums(upto, part) for part in parts)
        between = coarse[:, :, None] - coarse[:, None, :]
        between += fine[:, :, None] - fine[:, None, :]
        upto = writes[None, :] & (step[None, :] <= step[:, None])
        earlier = upto & ~(writes[:, None] & (step[None, :] == step[:, None]))
        weight = jnp.where(writes[None, :], self.beta, -1.0) * scale[None, :]
        A = jnp.exp(jnp.where(earlier[None], between, -jnp.inf))
        A *= (self.products * scale[None, :])[None] * weight[:, :, None]
        A = jnp.where(earlier[None], A, 0.0)

        def eliminate(j, inverse):
            """From all that come behind column j what they have of it."""
            of_j = jnp.sum(jnp.where((place == j)[None, None, :], A, 0.0), axis=2)
            row = jnp.sum(jnp.where((place == j)[None, :, None], inverse, 0.0), axis=1)
            return inverse - of_j[:, :, None] * row[:, None, :]

        inverse = jnp.where(place[:, None] == place[None, :], np.float32(1), 0.0)
        steps = options.tokens_per_row or step.size // 2
        if steps == 1:
            inverse = inverse[None] - A
        else:
            inverse = jnp.broadcast_to(inverse[None], A.shape)
            first, last = np.int32(0), np.int32(steps)
            inverse = lax.fori_loop(first, last, eliminate, inverse)
        self.store(prepared.inverse, number, inverse, place, place)
        v_factor = jnp.where(writes[None, :], self.beta, 0.0)
        self.store(prepared.v_factor, number, v_factor, place)
        found_factor = -weight * jnp.exp(coarse + fine)
        self.store(prepared.found_factor, number, found_factor, place)

    def keep(self, x: Any, turn: Turn, prepared: Any, config: ReplayConfig) -> None:
        """The records' keys for the second kernel, since others take their places."""
        number, slot, R = turn.rows.number, turn.rows.read, self.old_scale.size
        record = indices(R)
        stands = turn.place(record, R) < turn.history
        for k, in_k in blocks_of(x.k.shape[2], config.prepare_k):
            keys = load(x.state.k, (record, k), (stands, in_k), slot, self.key)
            at = prepared.keys.at[number, self.key, record[:, None], k[None, :]]
            _triton.store(at, keys, mask=both(None, in_k, shape=keys.shape))

    def append(
        self,
        x: Any,
        turn: Turn,
        config: ReplayConfig,
        k_ref,
        k_scale_ref,
        log_decay_ref,
    ) -> None:
        slot, key, columns = turn.rows.read, self.key, self.columns
        new = columns.records(turn, self.old_scale.size)
        for k, in_k in blocks_of(x.k.shape[2], config.prepare_k):
            keys = columns.load_keys(x, key, k, in_k).astype(k_ref.dtype)
            mask = both(columns.keys, in_k, shape=keys.shape)
            _triton.store(
                k_ref.at[slot, key, new[:, None], k[None, :]], keys, mask=mask
            )
        at = k_scale_ref.at[slot, key, new]
        _triton.store(at, self.scale, mask=columns.keys)
        mask = both(self.valid, columns.keys, shape=self.log_decay.shape)
        at = log_decay_ref.at[slot, self.heads[:, None], new[None, :]]
        _triton.store(at, self.log_decay, mask=mask)


def sums(counts: Array, x: Array) -> Array:
    """[G C] of x [G B]: of each c those b that `counts` [B C]. What is summed over
    comes first, where a lane has all of it."""
    return jnp.sum(jnp.where(counts[:, None, :], x.T[:, :, None], 0.0), axis=0)


def repeated(x: Array, times: int) -> Array:
    """[W K], as often one after another."""
    if times == 1:
        return x
    return jnp.broadcast_to(x[None], (times, *x.shape)).reshape(-1, x.shape[1])


def gates(x: Any, places: Any, head: Array, valid: Array, options: Options):
    """(log_decay, beta) of a and b at these two places, and of their heads; 0 where not
    valid."""
    a, b = (
        _triton.load(ref.at[place], mask=valid, other=0).astype(jnp.float32)
        for ref, place in zip(x.gates.per_token, places, strict=True)
    )
    A_log, dt_bias = (
        _triton.load(ref.at[head]).astype(jnp.float32)
        for ref in (x.gates.A_log, x.gates.dt_bias)
    )
    log_decay = rule.log_decay(A_log, a, dt_bias, options.gating, rule.QUICK)
    log_decay = jnp.maximum(log_decay, rule.NO_DECAY_LEFT)
    beta = rule.beta(b, options.gating, rule.QUICK)
    return jnp.where(valid, log_decay, 0.0), jnp.where(valid, beta, 0.0)
