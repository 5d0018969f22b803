"""The gated MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.nn.initializers import Initializer
from gdn_jax.nn.projections import Matrices


class GatedMLP(nn.Module):
    """y = down(silu(gate(x)) * up(x)), without biases."""

    hidden_size: int
    intermediate_size: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    def setup(self):
        matrices = Matrices(self.dtype, self.param_dtype, self.kernel_init)
        self.gate = matrices.dense(self.intermediate_size, "embed", "mlp")
        self.up = matrices.dense(self.intermediate_size, "embed", "mlp")
        self.down = matrices.dense(self.hidden_size, "mlp", "embed")

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
