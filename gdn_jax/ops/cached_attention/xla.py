"""Attention to a cache by JAX's own product, which reads every position there is."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.cached_attention.call import Inputs, Options


def xla(x: Inputs, options: Options) -> Array:
    held = (x.k, x.v) if x.rows is None else (x.k[x.rows], x.v[x.rows])
    k, v = (jnp.swapaxes(side, 1, 2) for side in held)
    new = jnp.arange(x.q.shape[1], dtype=jnp.int32)
    position = jnp.arange(k.shape[1], dtype=jnp.int32)
    reached = position <= (x.start[:, None] + new)[..., None]
    attention: Any = options.attention
    if attention == "cudnn":  # which adds its mask: NaN of a former sequence would stay
        k = jnp.where(reached.any(axis=1)[:, :, None, None], k, 0)

    def attend(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=reached[:, None], implementation=attention
        )

    def attend_in_float32(*qkv: Array) -> Array:
        return attend(*(x.astype(jnp.float32) for x in qkv)).astype(x.q.dtype)

    if x.q.dtype == jnp.float16 and attention != "cudnn":
        # of which a CPU has no products with float32 sums
        return lax.platform_dependent(x.q, k, v, cpu=attend_in_float32, default=attend)
    return attend(x.q, k, v)
