"""Replay in plain JAX: the state is met once, in products with all of a row's tokens.

With S the state that the tokens find, c_t the running sum of their log-decays and
E_tj = exp(c_t - c_j),

    u_t = beta_t (v_t - exp(c_t) S k_t - sum over j < t of E_tj (k_j . k_t) u_j)
    o_t = exp(c_t) S q_t + sum over j <= t of E_tj (k_j . q_t) u_j

so the u of a row are the solution of a triangular system. Decays per K (KDA) go into
the products over K instead.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Options
from gdn_jax.ops.gated_delta.replay_call import (
    Inputs,
    Made,
    find_turn,
    record,
    spread,
    tokens_of,
)
from gdn_jax.ops.gated_delta.replay_state import ReplayState, folded, in_order


def replay_xla(x: Inputs, options: Options) -> tuple[ReplayState, Array]:
    turn = find_turn(x, options)
    rows = turn.rows
    keeps = rows.keeps_state[:, None, None, None]
    state = jnp.where(keeps, x.state.checkpoint[rows.read], 0).astype(jnp.float32)
    state = folded(state, in_order(x.state, rows.read, turn.start), turn.history)
    stored = state.astype(x.state.checkpoint.dtype)
    folds = turn.folds[:, None, None, None]
    state = jnp.where(folds, stored.astype(jnp.float32), state)

    token, live = tokens_of(x, options, turn)
    own = _own(x, options, token, live)
    u, out = _solve(state, own)
    per_k = x.gates.a.ndim == 3
    log_decay = own.log_decay if per_k else own.log_decay[..., 0]
    made = Made(u, own.raw_k, own.k_scale, log_decay)
    out = out.swapaxes(1, 2).astype(options.out_dtype)
    out = jnp.where(live[:, :, None, None], out, jnp.zeros((), out.dtype))
    return record(x, turn, made, stored), spread(x, token, live, out)


class _Own(NamedTuple):
    """What rows' tokens bring, [N HV T ..], zeros past a row's last: float32, q and k
    normalised, q scaled; log_decay with an axis of K or 1."""

    q: Array
    k: Array
    v: Array
    log_decay: Array
    beta: Array
    raw_k: Array  # [N H T K], as it came
    k_scale: Array  # [N H T]


def _own(x: Inputs, options: Options, token: Array, live: Array) -> _Own:
    def take(y: Array) -> Array:
        mask = live.reshape(*live.shape, *[1] * (y.ndim - 1))
        return jnp.where(mask, y[token], jnp.zeros((), y.dtype)).swapaxes(1, 2)

    raw_q, raw_k = take(x.q), take(x.k)
    q, k = raw_q.astype(jnp.float32), raw_k.astype(jnp.float32)
    q_scale, k_scale = (jnp.ones(y.shape[:-1], jnp.float32) for y in (q, k))
    if options.qk_l2norm:
        q_scale, k_scale = (
            lax.rsqrt(jnp.sum(y * y, axis=-1) + rule.EPSILON) for y in (q, k)
        )
    group = x.v.shape[1] // x.k.shape[1]
    q, k = (
        jnp.repeat(y * scale[..., None], group, axis=1)
        for y, scale in ((q, options.scale * q_scale), (k, k_scale))
    )
    a, b = (take(y).astype(jnp.float32) for y in x.gates.per_token)
    a = a if a.ndim == 4 else a[..., None]
    A_log = x.gates.A_log.astype(jnp.float32)[:, None, None]
    dt_bias = x.gates.dt_bias.astype(jnp.float32).reshape(x.v.shape[1], 1, -1)
    log_decay = rule.log_decay(A_log, a, dt_bias, options.gating)
    log_decay = jnp.maximum(log_decay, rule.NO_DECAY_LEFT)
    log_decay = jnp.where(live[:, None, :, None], log_decay, 0.0)
    beta = rule.beta(b, options.gating)
    v = take(x.v).astype(jnp.float32)
    return _Own(q, k, v, log_decay, beta, raw_k, k_scale)


def _solve(state: Array, own: _Own) -> tuple[Array, Array]:
    """u and out, [N HV T V] float32."""
    since = rule.running_sum(own.log_decay, axis=2)  # c
    grown = jnp.exp(sum(since))
    predicted = _multiply("nhvk,nhtk->nhtv", state, grown * own.k)
    recalled = _multiply("nhvk,nhtk->nhtv", state, grown * own.q)
    beta, T = own.beta[..., None], own.v.shape[2]
    place = jnp.arange(T)
    before, upto = place[:, None] > place, place[:, None] >= place
    A = beta * _scores(own.k, own.k, since, before)
    u = beta * (own.v - predicted)
    if T > 1:
        u = solve_triangular(A, u, lower=True, unit_diagonal=True)
    B = _scores(own.q, own.k, since, upto)
    return u, recalled + _multiply("nhtj,nhjv->nhtv", B, u)


def _scores(x: Array, y: Array, since: rule.Sums, inside: Array) -> Array:
    """E_tj (y_j . x_t) where `inside`, [N HV T T]."""
    between = sum(c[:, :, :, None] - c[:, :, None] for c in since)  # [N HV T T K or 1]
    decay = jnp.exp(jnp.where(inside[..., None], between, -jnp.inf))
    if decay.shape[-1] == 1:
        return _multiply("nhtk,nhjk->nhtj", x, y) * decay[..., 0]
    return _multiply("nhtk,nhjk,nhtjk->nhtj", x, y, decay)


def _multiply(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST)
