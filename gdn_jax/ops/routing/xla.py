"""Experts chosen and pairs sorted as XLA does it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gdn_jax.ops.routing.call import Inputs, Options, Routes


def xla(inputs: Inputs, options: Options) -> Routes:
    scores, live = inputs
    L, E = scores.shape
    shares = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(shares, options.k)
    if options.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if live is not None:
        experts = jnp.where(live[:, None], experts, E)
    chosen = experts.ravel()
    pair = jnp.arange(chosen.size, dtype=jnp.int32)
    _, order = lax.sort_key_val(chosen, pair)  # stable: a token's place is its own
    place = jnp.zeros_like(pair).at[order].set(pair, unique_indices=True)
    sizes = jnp.zeros(E, jnp.int32).at[chosen].add(1, mode="drop")
    token = order // np.int32(options.k)
    return Routes(weights, place.reshape(L, options.k), token, sizes)
