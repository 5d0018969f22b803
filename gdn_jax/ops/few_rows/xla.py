"""The products as XLA makes them, one by one."""

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.few_rows.call import Inputs, Options


def xla(inputs: Inputs, options: Options) -> tuple[Array, ...]:
    products = tuple(jnp.dot(inputs.x, matrix) for matrix in inputs.matrices)
    if options.gated:
        gate, up = products
        return (jax.nn.silu(gate) * up,)
    return products
