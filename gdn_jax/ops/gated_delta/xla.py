"""The recurrence batched over rows in plain JAX: one gather, a loop over the tokens of
the longest row, one scatter."""

import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.gated_delta import rounding, rule
from gdn_jax.ops.gated_delta.call import (
    Gates,
    Inputs,
    Options,
    Rows,
    find_rows,
    write_slots,
)


def xla(x: Inputs, options: Options) -> tuple[Array, Array]:
    num_tokens = x.q.shape[0]
    rows = find_rows(x, options)
    length = jnp.where(rows.live, rows.length, 0)
    state = _select(rows.keeps_state, x.state[rows.read]).astype(jnp.float32)

    def body(step, carry):
        state, stored, out = carry
        live = step < length
        token = jnp.where(live, rows.begin + step, 0)
        prepared, decay, beta, v = _token(x, options, live, token)
        (new,), now = rule.update((state,), prepared, decay, beta, v, ARITHMETIC)
        state = jnp.where(live[:, None, None, None], new, state)
        token = jnp.where(live, token, num_tokens)
        out = out.at[token].set(now[..., 0].astype(out.dtype), mode="drop")
        if stored is not None:
            place = token if options.per_token_states else step
            kept = state.astype(stored.dtype)
            if options.per_token_states:
                kept = rounding.stored(state, x.rounding, token, stored.dtype)
            stored = stored.at[place].set(kept, mode="drop")
        return state, stored, out

    carry = (
        state,
        _storage(x, options, state),
        _zeros(x.v.shape, options.out_dtype, state),
    )
    if options.tokens_per_row == 1:
        carry = body(0, carry)
    else:
        longest = options.tokens_per_row or jnp.max(length, initial=0)
        carry = lax.fori_loop(0, longest, body, carry)
    state, stored, out = carry
    if stored is not None and options.per_token_states:
        return stored, out
    return _scatter(x, options, rows, state, stored), out


def _token(x: Inputs, options: Options, live: Array, token: Array):
    """One token of every row, shaped to broadcast against [N HV V K], its decay, beta
    and v; zeros where a row has no such token."""

    def take(y):
        return _select(live, y[token]).astype(jnp.float32)

    group = x.v.shape[1] // x.k.shape[1]
    q, k = (jnp.repeat(take(y), group, axis=1)[:, :, None, :] for y in (x.q, x.k))
    v = take(x.v)[..., None]
    a, b = (take(y) for y in x.gates.per_token)
    heads = x.v.shape[1]
    per_k = a.ndim == 3  # KDA
    a = a.reshape(-1, heads, 1, a.shape[2] if per_k else 1)
    b = b[..., None, None]
    if isinstance(x.gates, Gates):
        log_decay, beta = a, b
    else:
        A_log = x.gates.A_log.astype(jnp.float32).reshape(heads, 1, 1)
        dt_bias = x.gates.dt_bias.astype(jnp.float32).reshape(heads, 1, -1)
        log_decay = rule.log_decay(A_log, a, dt_bias, options.gating)
        beta = rule.beta(b, options.gating)
    decay = jnp.exp(log_decay)
    prepared = rule.prepare(
        (q,),
        (k,),
        ARITHMETIC,
        scale=options.scale,
        qk_l2norm=options.qk_l2norm,
    )
    return prepared, (decay,) if per_k else decay, beta, v


ARITHMETIC = rule.Arithmetic(
    sum_k=lambda x: jnp.sum(x, axis=-1, keepdims=True),
    multiply_add=lambda x, y, z: x * y + z,  # XLA fuses
)


def _storage(x: Inputs, options: Options, state: Array) -> Array | None:
    """Room for the states between tokens, where the call asks for them."""
    if options.per_token_states:
        return _zeros((x.q.shape[0], *state.shape[1:]), x.state.dtype, state)
    if x.slots is not None and x.slots.ndim == 2:
        # rounded at random they are where they have their slots
        dtype = x.state.dtype if x.rounding is None else jnp.float32
        return _zeros((x.slots.shape[1], *state.shape), dtype, state)
    return None


def _scatter(
    x: Inputs, options: Options, rows: Rows, state: Array, stored: Array | None
) -> Array:
    row = jnp.arange(x.num_rows, dtype=jnp.int32)
    step = rows.length - 1
    if stored is not None:
        row, step = row[None, :], jnp.arange(stored.shape[0])[:, None]  # [S N]
        state = stored
    slot = write_slots(x, options, rows, row, step)
    stored = rounding.stored(state, x.rounding, slot, x.state.dtype)
    return x.state.at[slot].set(stored, mode="drop")


def _select(condition: Array, chosen: Array) -> Array:
    """`chosen` or zero, the condition on the leading axis."""
    condition = condition.reshape(condition.shape + (1,) * (chosen.ndim - 1))
    return jnp.where(condition, chosen, jnp.zeros((), chosen.dtype))


def _zeros(shape, dtype, like: Array) -> Array:
    """Zeros that vary over the mesh axes `like` varies over, as a loop carry must."""
    return lax.full_like(like, 0, dtype, shape)
