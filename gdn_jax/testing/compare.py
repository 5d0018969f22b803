"""How far a result may be from the oracle's."""

import math
from typing import Any

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
