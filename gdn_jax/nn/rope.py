"""Rotary position embedding."""

import jax.numpy as jnp
from jax import Array


def rotate(x: Array, positions: Array, *, size: int, theta: float) -> Array:
    """Turns the first `size` features of each head by the token's position.

        (x[i], x[i + size/2]) as a complex number,
            times exp(1j * position * theta^(-2 i / size))

    The rest of the features stand. Angles and products in float32.

    Args:
      x: [N, T, heads, features].
      positions: [N, T] or [1, T] integers.
      size: even, at most x.shape[-1].
      theta: the base of the wavelengths.

    Returns:
      Like x.

    Source: Su et al., "RoFormer" (arXiv:2104.09864), in the half-split layout of
    transformers' Qwen models.
    """
    half = size // 2
    rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * rates  # [N T 1 half]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x, [half, size], axis=-1)
    real, imaginary = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)
