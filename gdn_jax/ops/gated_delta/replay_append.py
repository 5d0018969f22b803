"""Replay's second kernel: the records' keys, norms and decays, and the counters."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.replay_call import find_turn
from gdn_jax.ops.gated_delta.replay_tiles import gates


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
        log_decay, _ = gates(x, at, inner, head < HV, options)
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
