"""One sum and norm in the form every implementation takes."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float


class Inputs(NamedTuple):
    """Rows of a residual stream, and what a layer adds to them.

    Attributes:
      x: [..., D].
      parts: [S, ..., D], of x's dtype or float32, whose sum is added.
      weight: [D], zero-centred.
    """

    x: Float[Array, "*L D"]
    parts: Float[Array, "S *L D"]
    weight: Float[Array, " D"]


@dataclasses.dataclass(frozen=True)
class Options:
    eps: float
