"""Zero-centred RMS norm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), over the last axis, in float32.

    The weight begins at zero and weight decay pulls the factor to one: the form of
    Qwen3-Next and Qwen3.5 (transformers 5.23), unlike that of `gated_rms_norm`.

    Attributes:
      size: of the last axis.
      eps: inside the root.
      dtype: of y.
      param_dtype: of the weight.
    """

    size: int
    eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        weight = self.param("weight", init, (self.size,), self.param_dtype)
        x = x.astype(jnp.float32)
        squares = jnp.mean(x * x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(squares + self.eps)
        return (y * (1 + jnp.asarray(weight, jnp.float32))).astype(self.dtype)
