"""The arithmetic of one token as functions of values, for every fast implementation.

All float32. They index nothing and know no layout: arguments broadcast, and the caller
brings its `Arithmetic`. So the kernel, the XLA path and a later backend share them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.gated_delta.call import GateOptions

EPSILON = 1e-6  # inside the root, on the sum of squares: vLLM's and FLA's kernels
NO_DECAY_LEFT = -105.0  # a log-decay whose exp is 0 in float32, as that of any below

Chunks = tuple[Array, ...]
MultiplyAdd: TypeAlias = Callable[[Array, Array, Array], Array]  # x * y + z


class Functions(NamedTuple):
    """Those of the gates. log1p is of 0 to 1."""

    exp: Callable[[Array], Array] = jnp.exp
    log1p: Callable[[Array], Array] = jnp.log1p
    sigmoid: Callable[[Array], Array] = jax.nn.sigmoid


PRECISE = Functions()
# Of x^1 and up, least largest relative error on 0 to 1: 5e-9, and 2e-7 in float32.
LOG1P = (
    1.0,
    -0.4999990165233612,
    0.33329957723617554,
    -0.24954107403755188,
    0.19675837457180023,
    -0.1530536413192749,
    0.10603354126214981,
    -0.05695724859833717,
    0.01985055021941662,
    -0.003243881743401289,
)


def _exp(x: Array) -> Array:
    return jnp.exp2(x * math.log2(math.e))


def _log1p(x: Array) -> Array:
    return x * functools.reduce(lambda total, c: total * x + c, LOG1P[::-1])


# For a kernel whose every program computes the gates of its tokens: two thirds of the
# instructions of a GPU's own functions, to 2e-7. Without gradients.
QUICK = Functions(_exp, _log1p, lambda x: 1.0 / (1.0 + _exp(-x)))


def softplus(
    x: Array, beta: float, threshold: float, functions: Functions = PRECISE
) -> Array:
    """log(1 + exp(beta x)) / beta, and x itself where beta x > threshold."""
    scaled = beta * x
    stable = functions.log1p(functions.exp(-jnp.abs(scaled)))
    stable += jnp.maximum(scaled, 0.0)
    return jnp.where(scaled <= threshold, stable / beta, x)


def log_decay(
    A_log: Array,
    a: Array,
    dt_bias: Array,
    options: GateOptions,
    functions: Functions = PRECISE,
) -> Array:
    x, rate = a + dt_bias, jnp.exp(A_log)
    if options.gate_lower_bound is not None:
        return options.gate_lower_bound * functions.sigmoid(rate * x)
    beta, threshold = options.softplus_beta, options.softplus_threshold
    return -rate * softplus(x, beta, threshold, functions)


Sums = tuple[Array, Array]
STEPS = 1024.0


def coarse_and_fine(log_decay: Array) -> Sums:
    """Multiples of 1/1024, which float32 adds without rounding, and a rest that stays
    small. In one part a running sum would lose, behind a token that forgets everything
    (-100 and less), the small decays between its followers."""
    coarse = jnp.floor(log_decay * STEPS) / STEPS
    return coarse, log_decay - coarse


def running_sum(log_decay: Array, axis: int) -> Sums:
    coarse, fine = coarse_and_fine(log_decay)
    return jnp.cumsum(coarse, axis), jnp.cumsum(fine, axis)


def beta(b: Array, options: GateOptions, functions: Functions = PRECISE) -> Array:
    return functions.sigmoid(b) * (2.0 if options.allow_neg_eigval else 1.0)


class Arithmetic(NamedTuple):
    """How an implementation sums over K and multiplies and adds.

    K may be cut into chunks: values along K are tuples of arrays. `sum_k` sums a
    chunk's own K axes and keeps them.
    """

    sum_k: Callable[[Array], Array]
    multiply_add: MultiplyAdd

    def dot(self, x: Chunks, y: Chunks) -> Array:
        total = x[0] * y[0]
        for x_chunk, y_chunk in zip(x[1:], y[1:], strict=True):
            total = self.multiply_add(x_chunk, y_chunk, total)
        return self.sum_k(total)


class Token(NamedTuple):
    """What q and k bring before they meet a state.

    They stay as they came; their norms and the scale are factors of the sums they
    enter.
    """

    q: Chunks
    k: Chunks
    q_factor: Array
    k_factor: Array
    qk: Array


def prepare(
    q: Chunks,
    k: Chunks,
    arithmetic: Arithmetic,
    *,
    scale: float,
    qk_l2norm: bool,
) -> Token:
    qk = arithmetic.dot(q, k)
    q_factor, k_factor = jnp.full_like(qk, scale), jnp.ones_like(qk)
    if qk_l2norm:
        q_factor = lax.rsqrt(arithmetic.dot(q, q) + EPSILON) * scale
        k_factor = lax.rsqrt(arithmetic.dot(k, k) + EPSILON)
    return Token(q, k, q_factor, k_factor, qk * q_factor * k_factor)


def update(
    state: Chunks,
    token: Token,
    decay: Array | Chunks,
    beta: Array,
    v: Array,
    arithmetic: Arithmetic,
) -> tuple[Chunks, Array]:
    """(state, out) after one token; everything broadcasts, and out has v's shape.
    `decay` is one array for all of K, or chunks like q and k (KDA).

    The rule S' = decay S, u = beta (v - S' k), S = S' + u k^T, o = S q, with both
    products taken from the state as it was read: S q = S' q + u (k . q). The two sums
    over K then do not wait for each other.
    """
    predicted = _recall(state, decay, token.k, arithmetic) * token.k_factor
    recalled = _recall(state, decay, token.q, arithmetic) * token.q_factor
    u = beta * (v - predicted)
    out = arithmetic.multiply_add(u, token.qk, recalled)
    decays = decay if isinstance(decay, tuple) else (decay,) * len(state)
    scaled = u * token.k_factor
    new = tuple(
        arithmetic.multiply_add(scaled, k, d * s)
        for s, k, d in zip(state, token.k, decays, strict=True)
    )
    return new, out


def _recall(
    state: Chunks, decay: Array | Chunks, key: Chunks, arithmetic: Arithmetic
) -> Array:
    """decay(state) key; a decay that all of K shares comes out of the sum."""
    if isinstance(decay, tuple):
        key = tuple(d * y for d, y in zip(decay, key, strict=True))
        return arithmetic.dot(state, key)
    return arithmetic.dot(state, key) * decay
