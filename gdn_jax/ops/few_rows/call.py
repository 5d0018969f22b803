"""One call of products of few rows in the form every implementation takes."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float


class Inputs(NamedTuple):
    """Rows, and the matrices that each is multiplied by.

    Attributes:
      x: [..., D]; [L, D] for a kernel.
      matrices: [D, F], of one dtype with x; F may differ.
    """

    x: Float[Array, "*L D"]
    matrices: tuple[Float[Array, "D _"], ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """gated: silu(first product) * second, instead of both."""

    gated: bool = False
