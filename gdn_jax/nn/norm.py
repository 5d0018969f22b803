"""Zero-centred RMS norm."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gdn_jax._dispatch import where_it_can
from gdn_jax.ops.add_norm.api import add_norm, why_not
from gdn_jax.ops.add_norm.xla import rms_norm


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

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        self.weight: Any = self.param("weight", init, (self.size,), self.param_dtype)

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, jnp.asarray(self.weight), self.eps).astype(self.dtype)

    def add(
        self, x: Array, parts: Array, implementation: str | None = None
    ) -> tuple[Array, Array]:
        """(x + y, the norm of that) of y's parts [S ..]; in decoding, by one launch.

        implementation: as in `fused_update`. What the kernel cannot take is XLA's.
        """
        return add_norm(
            x.astype(self.dtype),
            parts,
            jnp.asarray(self.weight),
            eps=self.eps,
            implementation=where_it_can(implementation, x, lambda: why_not(x)),
        )
