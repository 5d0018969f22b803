"""How far a result may be from the oracle's."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Relative RMS error against float64, by what is compared and its dtype. A 16-bit value
# sits at its own rounding; float32 at a few units in the last place.
TOLERANCE = {
    ("state", "float32"): 1e-6,
    ("state", "bfloat16"): 2e-3,
    ("state", "float16"): 2.5e-4,
    ("out", "float32"): 1e-6,
    ("out", "bfloat16"): 2e-3,
    ("out", "float16"): 2.5e-4,
    # in chunks: products of bfloat16 parts, sums in another order
    ("chunked state", "float32"): 1e-5,
    ("chunked state", "bfloat16"): 2e-3,
    ("chunked state", "float16"): 2.5e-4,
    ("chunked out", "float32"): 1e-5,
    ("chunked out", "bfloat16"): 2e-3,
    ("chunked out", "float16"): 2.5e-4,
    # of the chunked update, against the oracle's in float32; a gradient can be all in a
    # few values, so its rounding is allowed the most that one value's can be
    ("gradient", "float32"): 1e-4,
    ("gradient", "bfloat16"): 4e-3,
    ("gradient", "float16"): 5e-4,
}


def relative_error(got: Any, want: Any) -> float:
    """|got - want| / |want| in float64; infinite where `got` is not finite."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: got {got.shape}, want {want.shape}")
    difference = np.linalg.norm((got - want).ravel())
    if not np.isfinite(difference):
        return math.inf
    return float(difference / max(np.linalg.norm(want.ravel()), 1e-30))


class Deviation(NamedTuple):
    """How far values are from those wanted.

    Attributes:
      rms: relative RMS error.
      worst: the largest difference of one value, 1 being what it may be: so many halves
        of its last place as the two were rounded, and FLOOR of the values' size.
      carried: by how many values the norm is; of few, RMS says less than `worst`.
    """

    rms: float
    worst: float
    carried: float

    def is_within(
        self, what: str, dtype: str, roundings: int = 1, more: float = 0.0
    ) -> bool:
        """`more`: what the other side may be off by, beside its rounding."""
        many = self.carried >= MANY
        rms = self.rms if many or not math.isfinite(self.rms) else 0.0
        return rms <= roundings * TOLERANCE[what, dtype] + more and self.worst <= 1


MANY = 200
# One value in a hundred thousand may hold all of an error of 1e-6 or less, which is no
# fault; a value of another row's, or one that was not written, is off by its own size.
FLOOR = 1e-4
# Sums of values of size 1 cancel, and where they do their error does not.
SMALLEST_SIZE = 0.1


def deviation(got: Any, want: Any, dtype: Any, roundings: int = 1) -> Deviation:
    """Of float64 arrays that have values, NumPy's or a GPU's torch tensors, which are
    compared there. `roundings`: 1 where one of the two was rounded to `dtype`, else 2.
    """
    difference, squares = abs(got - want), want * want
    total = float(squares.sum())
    size = math.sqrt(total / math.prod(want.shape))
    rms = math.sqrt(float((difference * difference).sum()) / max(total, 1e-60))
    place = float(jnp.finfo(dtype).eps) / 2
    allowed = roundings * place * abs(want) + FLOOR * max(size, SMALLEST_SIZE)
    carried = total**2 / max(float((squares * squares).sum()), 1e-60)
    return Deviation(rms, float((difference / allowed).max()), carried)
