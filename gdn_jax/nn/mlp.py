"""The gated feed-forward layer of a token."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gdn_jax.nn.initializers import Initializer
from gdn_jax.nn.projections import Matrices, multiply
from gdn_jax.ops.few_rows.call import total


class GatedMLP(nn.Module):
    """Two projections multiplied, one of them through silu, and one back.

        y = down(silu(gate(x)) * up(x))

    Attributes:
      hidden_size: D, of x and y [..., D].
      intermediate_size: of gate and up.
      dtype: of the projections and of y.
      param_dtype: of parameters.
      kernel_init: of the projections.

    Parameters carry the logical axis names "embed" (D) and "mlp".
    """

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

    def __call__(self, x: Array, implementation: str | None = None) -> Array:
        """implementation: of the products, as in `fused_update`; the kernel takes up to
        128 tokens of a 16-bit dtype, and the others are XLA's."""
        return total(self.parts(x, implementation), self.dtype)

    def parts(self, x: Array, implementation: str | None = None) -> Array:
        """As the call, but y in parts [S ..] whose sum it is, for what sums anyway."""
        [hidden] = multiply(
            x, self.gate, self.up, gated=True, implementation=implementation
        )
        return self.down.parts(hidden, implementation)
