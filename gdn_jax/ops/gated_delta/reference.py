"""The oracle: the gated delta rule one token at a time, in the paper's order.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464)
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.batch import find_owners
from gdn_jax.ops.gated_delta import rounding
from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    GateOptions,
    Gates,
    Inputs,
    Options,
    find_rows,
    write_slots,
)


def reference(x: Inputs, options: Options) -> tuple[Array, Array]:
    """A scan over tokens: dense rows side by side, packed tokens one after another."""
    num_slots = x.state.shape[0]
    rows = find_rows(x, options)
    num_tokens, tokens_per_row = x.q.shape[0], options.tokens_per_row
    row, step, live = find_owners(rows, num_tokens, tokens_per_row)
    write = jnp.where(live, write_slots(x, options, rows, row, step), num_slots)
    # Cast here: the scan sums the gradients of A_log and dt_bias in the dtype it sees.
    gates = jax.tree.map(lambda y: y.astype(jnp.float32), x.gates)
    # A dead token's inputs are replaced before they meet arithmetic: a NaN there would
    # reach the gradients through a later select.
    tokens = (x.q, x.k, x.v, *gates.per_token)
    tokens = jax.tree.map(lambda y: where(live, y, 0.0), tokens)
    start = where(rows.keeps_state, x.state[rows.read], 0.0).astype(jnp.float32)

    lanes = 1 if options.tokens_per_row is None else x.num_rows
    timeline = jax.tree.map(
        lambda y: y.reshape(lanes, -1, *y.shape[1:]).swapaxes(0, 1),
        (tokens, row, step, live, write, _places(x, options, write)),
    )

    def body(carry, now):
        pool, state, last = carry
        (q, k, v, a, b), row, step, live, write, place = now
        state = where((step == 0) | (row != last), start[row], state)
        if isinstance(gates, Gates):
            log_decay, beta = a, b
        else:
            log_decay, beta = reference_gates(gates, a, b, options.gating)
        new, out, *_ = rule(state, q, k, v, log_decay, beta, options)
        state = where(live, new, state)
        stored = rounding.stored(state, x.rounding, place, x.state.dtype)
        pool = pool.at[write].set(stored, mode="drop")
        out = where(live, out, 0.0).astype(options.out_dtype)
        kept = where(live, stored, 0.0) if options.per_token_states else None
        return (pool, state, row), (out, kept)

    if options.per_token_states:
        nowhere = jnp.full_like(timeline[4], num_slots)
        timeline = (*timeline[:4], nowhere, timeline[5])
    state = where(jnp.zeros(lanes, bool), start[:lanes], 0.0)
    carry = (x.state, state, jnp.full_like(timeline[1][0], -1))
    (pool, *_), (out, kept) = lax.scan(body, carry, timeline)
    out, kept = jax.tree.map(
        lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:]), (out, kept)
    )
    return (kept if options.per_token_states else pool), out


def _places(x: Inputs, options: Options, write: Array) -> Array | None:
    """Where the state after each token is stored, which rounding depends on."""
    if x.rounding is None:
        return None
    if options.per_token_states:
        return jnp.arange(x.q.shape[0], dtype=jnp.int32)
    return write


def reference_gates(logits: GateLogits, a: Array, b: Array, gating: GateOptions):
    """log_decay [.. HV] or [.. HV K] and beta [.. HV] of tokens' logits a and b."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    A = jnp.exp(logits.A_log.astype(jnp.float32))
    A = A if a.ndim == b.ndim else A[:, None]
    x = a + logits.dt_bias.astype(jnp.float32)
    if gating.gate_lower_bound is not None:
        log_decay = gating.gate_lower_bound * jax.nn.sigmoid(A * x)
    else:
        y = gating.softplus_beta * x
        softplus = jax.nn.softplus(y) / gating.softplus_beta
        log_decay = -A * jnp.where(y <= gating.softplus_threshold, softplus, x)
    beta = jax.nn.sigmoid(b)
    return log_decay, 2.0 * beta if gating.allow_neg_eigval else beta


def rule(state, q, k, v, log_decay, beta, options: Options) -> tuple[Array, ...]:
    """(state, out) after one token, what it corrected [.. HV V], and k's factor."""
    q, k, v = (y.astype(jnp.float32) for y in (q, k, v))
    k_scale = jnp.ones(k.shape[:-1], jnp.float32)
    if options.qk_l2norm:
        q = q * lax.rsqrt(jnp.sum(q * q, -1, keepdims=True) + 1e-6)
        k_scale = lax.rsqrt(jnp.sum(k * k, -1) + 1e-6)
        k = k * k_scale[..., None]
    group = v.shape[-2] // k.shape[-2]
    q = jnp.repeat(q * options.scale, group, axis=-2)  # [.. HV K]
    k = jnp.repeat(k, group, axis=-2)
    decay = jnp.exp(log_decay)
    per_k = decay.ndim == k.ndim
    state = (decay[..., None, :] if per_k else decay[..., None, None]) * state
    u = beta[..., None] * (v - _recall(state, k))
    state = state + u[..., :, None] * k[..., None, :]
    return state, _recall(state, q), u, k_scale


def _recall(state: Array, key: Array) -> Array:
    return jnp.einsum("...vk,...k->...v", state, key, precision=lax.Precision.HIGHEST)


def where(condition: Array, chosen: Array, other) -> Array:
    """`jnp.where` with the condition on the leading axes."""
    extra = jnp.ndim(chosen) - condition.ndim
    condition = condition.reshape(condition.shape + (1,) * extra)
    return jnp.where(condition, chosen, jnp.asarray(other, chosen.dtype))
