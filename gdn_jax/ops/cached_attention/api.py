"""Attention of new tokens to a cache: which implementation runs."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _dispatch
from gdn_jax.ops import vjp
from gdn_jax.ops.cached_attention.call import Inputs, Options
from gdn_jax.ops.cached_attention.triton import triton
from gdn_jax.ops.cached_attention.tuning import (
    MAX_QUERIES,
    AttentionConfig,
    heuristic,
)
from gdn_jax.ops.cached_attention.xla import xla
from gdn_jax.ops.gated_delta.chunk_parts import MIN_DOT

MAX_DIM = 256
NARROW = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}


def cached_attention(
    x: Inputs,
    *,
    attention: str | None = None,
    implementation: str | None = None,
    config: AttentionConfig | None = None,
) -> Array:
    """Each new token attends to the cache up to itself.

        out[n, t] = softmax(q[n, t] k^T / sqrt(head_dim)) v
                    over the positions 0 .. start[n] + t of row rows[n]

    Args:
      x: the new tokens' keys and values are in the cache. Every v in it is finite;
        what else is in unreached positions is not looked at.
      attention: `implementation` of `jax.nn.dot_product_attention` where it runs.
      implementation: "triton" (reads the positions that there are; a few tokens of a
        16-bit dtype), "interpret", "xla" or "reference" (both
        `jax.nn.dot_product_attention`, which reads all of the cache); None: triton
        where it can run, `attention` does not ask for another and a process has one
        device, else xla.
      config: the kernel's launch; None takes a heuristic of the sizes.

    Returns:
      [N, T, heads, head_dim] in q's dtype.

    Raises:
      NotImplementedError: the implementation asked for cannot run this call here.
    """
    options = Options(attention)

    def kernel(interpret: bool) -> Array:
        launch = config or heuristic(x.q.shape[0], *x.k.shape[1:3])
        return _launched(INTERPRETED if interpret else COMPILED, options, launch, x)

    return _dispatch.run_kernel_or_xla(
        implementation,
        arrays=x,
        why_not=why_not(x, attention),
        kernel=kernel,
        xla=lambda: xla(x, options),
    )


def why_not(x: Inputs, attention: str | None = None) -> str | None:
    """Why the kernel cannot run a call, whatever the device; None where it can."""
    T, num_heads, dim = x.q.shape[1:]
    queries = T * num_heads // x.k.shape[1]
    dtypes = {x.q.dtype, x.k.dtype, x.v.dtype}
    if attention is not None:
        return f"attention = {attention!r} asks for another implementation"
    if queries > MAX_QUERIES:
        return f"it takes {MAX_QUERIES} queries of a key head; got {queries}"
    if pl.next_power_of_2(dim) != dim or not MIN_DOT <= dim <= MAX_DIM:
        return f"head_dim must be a power of two, {MIN_DOT} to {MAX_DIM}; got {dim}"
    if len(dtypes) > 1 or not dtypes <= NARROW:
        return f"it takes bfloat16 or float16; got {', '.join(map(str, dtypes))}"
    return None


COMPILED = vjp.Path(triton, vjp.backward_of(xla))
INTERPRETED = vjp.Path(functools.partial(triton, interpret=True), COMPILED.backward)

_launched = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
