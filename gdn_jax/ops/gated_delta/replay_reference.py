"""Replay's oracle: the records, then the tokens, one after another."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.reference import reference_gates, rule, where
from gdn_jax.ops.gated_delta.replay_call import (
    Inputs,
    Made,
    Turn,
    find_turn,
    record,
    spread,
    tokens_of,
)
from gdn_jax.ops.gated_delta.replay_state import ReplayState, in_order


def replay_reference(x: Inputs, options: Options) -> tuple[ReplayState, Array]:
    turn = find_turn(x, options)
    rows = turn.rows
    state = where(rows.keeps_state, x.state.checkpoint[rows.read], 0.0)
    state = _replayed(x, turn, state.astype(jnp.float32))
    # a row that folds goes on from what it stores
    stored = state.astype(x.state.checkpoint.dtype).astype(jnp.float32)
    state = where(turn.folds, stored, state)

    token, live = tokens_of(x, options, turn)
    gates = jax.tree.map(lambda y: y.astype(jnp.float32), x.gates)
    tokens = x.q, x.k, x.v, *gates.per_token
    tokens = jax.tree.map(lambda y: where(live, y[token], 0.0), tokens)

    def body(state, now):
        (q, k, v, a, b), live = now
        log_decay, beta = reference_gates(gates, a, b, options.gating)
        new, out, u, k_scale = rule(state, q, k, v, log_decay, beta, options)
        made = Made(u, k, k_scale, log_decay)  # of which those of live tokens are kept
        return where(live, new, state), (made, where(live, out, 0.0))

    timeline = jax.tree.map(lambda y: y.swapaxes(0, 1), (tokens, live))
    _, (made, out) = lax.scan(body, state, timeline)
    made = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2), made)
    out = out.swapaxes(0, 1).astype(options.out_dtype)
    return record(x, turn, made, stored), spread(x, token, live, out)


def _replayed(x: Inputs, turn: Turn, state: Array) -> Array:
    records = in_order(x.state, turn.rows.read, turn.start)
    place = jnp.arange(x.state.window)

    def body(state, now):
        u, k, log_decay, place = now
        decay = jnp.exp(log_decay)
        decay = decay[..., None, None] if decay.ndim == 2 else decay[..., None, :]
        new = decay * state + u[..., :, None] * k[..., None, :]
        return where(place < turn.history, new, state), None

    in_turn = jax.tree.map(lambda y: jnp.moveaxis(y, 2, 0), records)
    return lax.scan(body, state, (*in_turn, place))[0]
