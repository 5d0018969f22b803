"""The gates on their own: one half of the unfused pair."""

import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.gated_delta import arguments, rule


def gates(
    A_log: Array,
    a: Array,
    b: Array,
    dt_bias: Array,
    *,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    allow_neg_eigval: bool = False,
    gate_lower_bound: float | None = None,
) -> tuple[Array, Array]:
    """(log_decay, beta) of the gated delta rule: float32, as `recurrent_update` takes.

        log_decay = -exp(A_log) * softplus(a + dt_bias)             beta = sigmoid(b)

    Args:
      A_log: [HV].
      a, b: [..., HV] logits; per-K decay (KDA): a is [..., HV, K].
      dt_bias: [HV]; KDA: [HV, K].
      softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound: as in
        `fused_update`.

    Returns:
      log_decay of a's shape, <= 0, and beta of b's, in (0, 1), or (0, 2) with
      `allow_neg_eigval`. XLA makes one kernel of it, so it has no `implementation`.

    Raises:
      ValueError: a shape or a parameter is wrong.
    """
    options = arguments.gate_options(
        softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
    )
    A_log, a, b, dt_bias = arguments.check_gate_logits(A_log, a, b, dt_bias)
    A_log, a, b, dt_bias = (x.astype(jnp.float32) for x in (A_log, a, b, dt_bias))
    if a.ndim > b.ndim:
        A_log = A_log[:, None]
    return rule.gate(A_log, a, b, dt_bias, options)
