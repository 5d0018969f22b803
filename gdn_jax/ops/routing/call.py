"""One choice of experts in the form every implementation takes."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Float32, Int32


class Inputs(NamedTuple):
    """Attributes:
    scores: [L, E], the router's.
    live: [L]; a token of padding takes no expert. None: all count.
    """

    scores: Float[Array, "L E"]
    live: Bool[Array, " L"] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """k: experts of a token. normalize: whether their weights add up to 1."""

    k: int
    normalize: bool


class Routes(NamedTuple):
    """The pairs of a token and one of its experts, sorted by experts.

    Attributes:
      weights: [L, k], of a token's experts, the largest first.
      place: [L, k], the sorted row of each pair.
      token: [L k], whose x a sorted row is.
      group_sizes: [E], rows of each expert; those of padding are of none, and last.
    """

    weights: Float32[Array, "L k"]
    place: Int32[Array, "L k"]
    token: Int32[Array, " L_k"]
    group_sizes: Int32[Array, " E"]
