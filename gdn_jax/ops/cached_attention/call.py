"""One call of attention to a cache in the form every implementation takes."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class Inputs(NamedTuple):
    """T new tokens of N sequences, and the caches that they are written in already.

    Attributes:
      q: [N, T, heads, head_dim].
      k, v: [P, kv_heads, M, head_dim].
      rows: [N], each sequence's row of the cache.
      start: [N], how many tokens are before a sequence's first new one.
    """

    q: Float[Array, "N T heads dim"]
    k: Float[Array, "P kv_heads M dim"]
    v: Float[Array, "P kv_heads M dim"]
    rows: Int32[Array, " N"] | None
    start: Int32[Array, " N"]


@dataclasses.dataclass(frozen=True)
class Options:
    """`attention`: `implementation` of `jax.nn.dot_product_attention`, where it is
    called."""

    attention: str | None = None
