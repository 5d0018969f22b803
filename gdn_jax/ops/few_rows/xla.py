"""The products as XLA makes them, one by one."""

import jax
import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.few_rows.call import Inputs, Options


def xla(inputs: Inputs, options: Options) -> tuple[Array, ...]:
    x, matrices, live = inputs
    x = x if live is None else jnp.where(live[..., None] != 0, x, 0)
    products = tuple(jnp.dot(x, matrix) for matrix in matrices)
    if options.gated:
        gate, up = products
        return (jax.nn.silu(gate) * up,)
    return products
