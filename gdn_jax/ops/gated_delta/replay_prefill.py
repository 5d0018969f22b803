"""Many tokens at once into a replay state: `chunk_update` on the checkpoints."""

from __future__ import annotations  # so that help() names types and expands none

from typing import Any

import jax.numpy as jnp
from jax import Array

from gdn_jax.ops import checks
from gdn_jax.ops.batch import Rows
from gdn_jax.ops.gated_delta.chunk_api import chunk_update
from gdn_jax.ops.gated_delta.replay_state import ReplayState, folded, in_order


def chunk_replay(
    state: ReplayState, *tokens: Any, rows: Rows, **keywords: Any
) -> tuple[ReplayState, Array]:
    """(state, out) of `chunk_update(state, *tokens, **keywords)`, whose live rows are
    `rows`: their records go into their checkpoints before it, of those that are pending
    the first, and none is left."""
    H, wanted = tokens[1].shape[-2], state.k.shape[1]
    if wanted != H:
        remedy = "It is num_key_heads of the ReplayState."
        checks.fail("k", f"{H} key heads", f"of H = {wanted}", remedy)
    state = _settled(state, rows)
    checkpoint, out = chunk_update(state.checkpoint, *tokens, **keywords)
    return state._replace(checkpoint=checkpoint), out


def _settled(state: ReplayState, rows: Rows) -> ReplayState:
    num_slots, slot = state.start.shape[0], rows.read
    found = state.checkpoint[slot].astype(jnp.float32)
    records = in_order(state, slot, state.start[slot])
    stands = state.committed[slot] + jnp.minimum(state.pending[slot], 1)
    found = folded(found, records, stands)
    found = found.astype(state.checkpoint.dtype)
    keeps = jnp.where(rows.live & rows.keeps_state, slot, num_slots)
    live = jnp.where(rows.live, slot, num_slots)
    return state._replace(
        checkpoint=state.checkpoint.at[keeps].set(found, mode="drop"),
        committed=state.committed.at[live].set(0, mode="drop"),
        pending=state.pending.at[live].set(0, mode="drop"),
    )
