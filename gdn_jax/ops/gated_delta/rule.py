"""The arithmetic of one token as functions of values, for every fast implementation.

All float32. They index nothing and know no layout: arguments broadcast, and `sum_k` is
the caller's sum over K. So the kernel, the XLA path and a later backend share them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.gated_delta.call import GateOptions

EPSILON = 1e-6  # inside the root, on the sum of squares: vLLM's and FLA's kernels

SumK = Callable[[Array], Array]


def softplus(x: Array, beta: float, threshold: float) -> Array:
    """log(1 + exp(beta x)) / beta, and x itself where beta x > threshold."""
    scaled = beta * x
    stable = jnp.maximum(scaled, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(scaled)))
    return jnp.where(scaled <= threshold, stable / beta, x)


def gate(
    A_log: Array, a: Array, b: Array, dt_bias: Array, options: GateOptions
) -> tuple[Array, Array]:
    """(log_decay, beta) of logits that broadcast against each other."""
    x = a + dt_bias
    if options.gate_lower_bound is None:
        steps = softplus(x, options.softplus_beta, options.softplus_threshold)
        log_decay = -jnp.exp(A_log) * steps
    else:
        log_decay = options.gate_lower_bound * jax.nn.sigmoid(jnp.exp(A_log) * x)
    beta = jax.nn.sigmoid(b)
    return log_decay, 2.0 * beta if options.allow_neg_eigval else beta


class Token(NamedTuple):
    """What a token brings before it meets a state: all that no row of V changes."""

    q: Array
    k: Array
    qk: Array
    decay: Array
    beta: Array


def prepare(
    q: Array,
    k: Array,
    log_decay: Array,
    beta: Array,
    sum_k: SumK,
    *,
    scale: float,
    qk_l2norm: bool,
) -> Token:
    if qk_l2norm:
        q, k = (y * lax.rsqrt(sum_k(y * y) + EPSILON) for y in (q, k))
    q = q * scale
    return Token(q, k, sum_k(q * k), jnp.exp(log_decay), beta)


def update(state: Array, token: Token, v: Array, sum_k: SumK) -> tuple[Array, Array]:
    """(state, out) after one token. `sum_k` keeps the axes it sums: out has v's shape.

    The rule S' = decay S, u = beta (v - S' k), S = S' + u k^T, o = S q, with both
    products taken from the state as it was read: S q = S' q + u (k . q). The two sums
    over K then do not wait for each other.
    """
    u = token.beta * (v - _recall(state, token.decay, token.k, sum_k))
    out = _recall(state, token.decay, token.q, sum_k) + u * token.qk
    return token.decay * state + u * token.k, out


def _recall(state: Array, decay: Array, key: Array, sum_k: SumK) -> Array:
    per_k = decay.ndim > 0 and decay.shape[-1] > 1
    return sum_k(state * (decay * key)) if per_k else decay * sum_k(state * key)
