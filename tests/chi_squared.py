"""How far counts are from a distribution."""

import numpy as np


def surprise(counts, want):
    """Chi-squared over the value that a right sampler exceeds for one seed in 10,000
    (Wilson and Hilferty's): below 1 is right, far above is wrong."""
    counts, want = np.ravel(counts), np.ravel(want).astype(np.float64)
    possible = want > 0
    assert not counts[~possible].any()
    counts, expected = counts[possible], counts.sum() * want[possible]
    assert expected.min() > 5
    degrees = counts.size - 1
    spread = 2 / (9 * degrees)
    limit = degrees * (1 - spread + 3.72 * spread**0.5) ** 3
    return np.sum((counts - expected) ** 2 / expected) / limit
