"""`fused_update` in float64 NumPy, one token at a time."""

from typing import Any

import numpy as np


def oracle(args: tuple[Any, ...], kwargs: dict[str, Any]):
    """(states, out, written) of a call, as `cases.make` gives its arguments.

    `states` is the pool, or the per-token states; `written` tells which of its slots a
    live row wrote. Slots that are not written keep the argument's values.
    """
    exact = [np.asarray(x).astype(np.float64) for x in args]
    state, q, k, v, A_log, a, b, dt_bias = exact
    dense = q.ndim == 4
    if dense:
        N, T = q.shape[:2]
        q, k, v, a, b = (x.reshape(N * T, *x.shape[2:]) for x in (q, k, v, a, b))
        bounds = np.arange(N + 1) * T
    else:
        L = q.shape[0]
        bounds = np.clip(kwargs.get("cu_seqlens", np.arange(L + 1)), 0, L)
    per_token = kwargs.get("per_token_states", False)
    P, (HV, V, K) = state.shape[0], state.shape[1:]
    states = np.zeros((len(q), HV, V, K)) if per_token else state.copy()
    written = np.zeros(len(states), bool)
    out = np.zeros((len(q), HV, V))

    def is_live(slot):
        return 0 <= slot < P and slot != kwargs.get("null_slot")

    for n in range(len(bounds) - 1):
        slots = np.atleast_1d(kwargs["slots"][n] if "slots" in kwargs else n)
        accepted = kwargs["num_accepted"][n] if "num_accepted" in kwargs else 1
        length = bounds[n + 1] - bounds[n]
        if not 1 <= accepted <= len(slots) or length <= 0:
            continue
        if not is_live(slots[accepted - 1]):
            continue
        S = state[slots[accepted - 1]].copy()
        if not kwargs.get("has_state", np.ones(n + 1, bool))[n]:
            S[:] = 0.0
        for t in range(length):
            at = bounds[n] + t
            S, out[at] = _oracle_token(
                S, q[at], k[at], v[at], A_log, a[at], b[at], dt_bias, kwargs
            )
            if per_token:
                states[at], written[at] = S, True
            elif "num_accepted" in kwargs:
                if t < len(slots) and is_live(slots[t]):
                    states[slots[t]], written[slots[t]] = S, True
            elif t == length - 1:
                states[slots[0]], written[slots[0]] = S, True
    if dense:
        out = out.reshape(N, T, HV, V)
        if per_token:
            states, written = states.reshape(N, T, HV, V, K), written.reshape(N, T)
    return states, out, written


def _oracle_token(S, q, k, v, A_log, a, b, dt_bias, kwargs):
    K, group = q.shape[1], v.shape[0] // q.shape[0]
    if kwargs.get("qk_l2norm", True):
        q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6)
        k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    scale = kwargs.get("scale")
    q = np.repeat(q * (K**-0.5 if scale is None else scale), group, axis=0)
    k = np.repeat(k, group, axis=0)
    x = a + dt_bias
    A = np.exp(A_log) if x.ndim == 1 else np.exp(A_log)[:, None]
    if kwargs.get("gate_lower_bound") is not None:
        log_decay = kwargs["gate_lower_bound"] / (1 + np.exp(-A * x))
    else:
        beta, threshold = (
            kwargs.get("softplus_beta", 1.0),
            kwargs.get("softplus_threshold", 20.0),
        )
        softplus = np.logaddexp(beta * x, 0) / beta
        log_decay = -A * np.where(beta * x <= threshold, softplus, x)
    decay = np.exp(log_decay)
    beta = (2.0 if kwargs.get("allow_neg_eigval") else 1.0) / (1 + np.exp(-b))
    S = S * (decay[:, None, :] if x.ndim == 2 else decay[:, None, None])
    u = beta[:, None] * (v - np.einsum("hvk,hk->hv", S, k))
    S = S + u[:, :, None] * k[:, None, :]
    return S, np.einsum("hvk,hk->hv", S, q)
