"""One call of products of few rows in the form every implementation takes."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


class Inputs(NamedTuple):
    """Rows, and the matrices that each is multiplied by.

    Attributes:
      x: [..., D]; [L, D] for a kernel.
      matrices: [D, F], of one dtype with x; F may differ.
      live: [...], not 0 where a row counts; the others are zeros, whatever x has there.
        None: all count.
    """

    x: Float[Array, "*L D"]
    matrices: tuple[Float[Array, "D _"], ...]
    live: Int32[Array, "*L"] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """gated: silu(first product) * second, instead of both."""

    gated: bool = False


def total(parts: Array, dtype: Any) -> Array:
    """The sum of parts [S, ...], in `dtype`."""
    if parts.shape[0] == 1:
        return parts[0].astype(dtype)
    return jnp.sum(parts, axis=0).astype(dtype)
