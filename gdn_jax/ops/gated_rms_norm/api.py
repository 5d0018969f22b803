"""The norm behind the rule: RMS over a head's values, then the output gate."""

from __future__ import annotations  # so that help() names types and expands none

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from gdn_jax import _dispatch
from gdn_jax.ops import checks

ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def gated_rms_norm(
    x: ArrayLike,
    gate: ArrayLike,
    weight: ArrayLike,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    implementation: str | None = None,
) -> Array:
    """Normalises each value head, scales it and gates it; float32 inside.

        y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)

    The norm stands before the gate, as in transformers' Qwen3NextRMSNormGated.

    Args:
      x, gate: [..., V].
      weight: [V].
      eps: added to the mean of squares, > 0.
      activation: "silu" (Qwen3-Next, Qwen3.5, OLMo-hybrid) or "sigmoid" (Kimi's KDA).
      implementation: "xla" or "reference", here one and the same: XLA makes one kernel
        of it. None: xla.

    Returns:
      y: of x's shape and dtype. Every row is its own: NaN in one reaches no other, nor
        the others' gradients.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for does not exist here.
    """
    _dispatch.check_name(implementation)
    x, gate, weight = (
        checks.floating(name, value)
        for name, value in dict(x=x, gate=gate, weight=weight).items()
    )
    if x.ndim == 0 or x.shape[-1] == 0:
        checks.fail(
            "x", x.shape, "[..., V] with V >= 1", "Norms are over the last axis."
        )
    if gate.shape != x.shape:
        checks.fail("gate", gate.shape, f"of x's shape {x.shape}", "One gate a value.")
    if weight.shape != x.shape[-1:]:
        checks.fail("weight", weight.shape, f"[V] = {x.shape[-1:]}", "One a value.")
    eps = check_options(eps, activation)

    def no_kernel():
        raise NotImplementedError(
            "gated_rms_norm has no kernel; use implementation='xla' or None."
        )

    def run():
        return _norm(eps, activation, x, gate, weight)

    paths = {
        "triton": no_kernel,
        "interpret": no_kernel,
        "xla": run,
        "reference": run,
    }
    return _dispatch.run(paths, implementation)


def check_options(eps: Any, activation: Any) -> float:
    if activation not in ACTIVATIONS:
        wanted = f"one of {', '.join(ACTIVATIONS)}"
        checks.fail("activation", repr(activation), wanted, "See the docstring.")
    eps = checks.number("eps", eps)
    if not 0 < eps < math.inf:
        remedy = "A row of zeros would divide by zero."
        checks.fail("eps", eps, "a finite number > 0", remedy)
    return eps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norm(eps: float, activation: str, x: Array, gate: Array, weight: Array) -> Array:
    exact, gate, weight = (y.astype(jnp.float32) for y in (x, gate, weight))
    mean = jnp.mean(exact * exact, axis=-1, keepdims=True)
    normed = exact * lax.rsqrt(mean + eps) * weight
    return (normed * ACTIVATIONS[activation](gate)).astype(x.dtype)
