"""The sum and its norm as they are written."""

import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.add_norm.call import Inputs, Options
from gdn_jax.ops.few_rows.call import total


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Float32, whatever x is."""
    x = x.astype(jnp.float32)
    squares = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(squares + eps) * (1 + weight.astype(jnp.float32))


def xla(inputs: Inputs, options: Options) -> tuple[Array, Array]:
    x = inputs.x + total(inputs.parts, inputs.x.dtype)
    return x, rms_norm(x, inputs.weight, options.eps).astype(x.dtype)
