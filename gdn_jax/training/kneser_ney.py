"""Interpolated Kneser-Ney models of bytes: the baseline of the held-out figures."""

import dataclasses
from typing import NamedTuple

import numpy as np

from gdn_jax.ops import checks
from gdn_jax.training.text import SEPARATOR

MAX_ORDER = 8  # bytes of a 64-bit integer


class Level(NamedTuple):
    """The n-grams of one length, each a big-endian integer, in ascending order.

    Attributes:
      grams: [M] uint64, seen n-grams.
      kept: [M] float64, the share of its context's count that a gram keeps.
      contexts: [C] uint64, the grams without their last bytes.
      spread: [C] float64, the share that the next shorter level hands out.
    """

    grams: np.ndarray
    kept: np.ndarray
    contexts: np.ndarray
    spread: np.ndarray


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """What `fit` makes: one level for each length 1, 2, ... order."""

    levels: tuple[Level, ...]

    def probabilities(self, windows: np.ndarray) -> np.ndarray:
        """Of the last byte of each window, given those before it; see `fit`.

        Args:
          windows: [L] uint64, `order` bytes each, as `pack` makes them.

        Returns:
          [L] float64.
        """
        p = np.full(windows.shape, 1 / 256)
        for length, level in enumerate(self.levels, 1):
            grams = _last(windows, length)
            spread = _lookup(level.contexts, level.spread, grams >> 8, missing=1.0)
            p = spread * p + _lookup(level.grams, level.kept, grams, missing=0.0)
        return p


def bits_per_byte(
    train: bytes, held_out: bytes, order: int = 6, *, modified: bool = True
) -> float:
    """What a byte of `held_out` costs under the model fit to `train`: the mean of
    -log2 p. Arguments and errors are those of `fit`."""
    model = fit(train, order, modified=modified)
    if not held_out:
        checks.fail("held_out", "none", "one byte or more", "Pass some text.")
    return float(-np.log2(model.probabilities(pack(held_out, order))).mean())


def fit(train: bytes, order: int = 6, *, modified: bool = True) -> KneserNey:
    """Counts the n-grams of `train`.

        p_n(w | h) = (c(h w) - D(c(h w))) / c(h) + spread(h) p_{n-1}(w | h'),
        spread(h) = sum_w D(c(h w)) / c(h),  p_0 = 1 / 256,

    where h' is h without its first byte, and p_n = p_{n-1} where h was never seen. At
    the highest order c counts how often a gram occurs, below it how many bytes occur
    before it. Each order's discounts D come from its counts of counts: one for all
    counts, or, modified, one each for 1, 2, and 3 and more (Chen and Goodman 1998,
    equations 15 to 17).

    Args:
      train: the text. Its first bytes are preceded by separators, as if documents had
        gone before.
      order: bytes of an n-gram, 1 to 8.
      modified: three discounts an order.

    Raises:
      ValueError: no text, or no such order.
    """
    if not 1 <= order <= MAX_ORDER:
        checks.fail("order", order, f"1 to {MAX_ORDER}", "6 is the usual one.")
    if not train:
        checks.fail("train", "none", "one byte or more", "Pass some text.")
    grams, counts = np.unique(pack(train, order), return_counts=True)
    levels = [_level(grams, counts, modified)]
    for length in range(order - 1, 0, -1):
        grams, counts = np.unique(_last(grams, length), return_counts=True)
        levels.append(_level(grams, counts, modified))
    return KneserNey(tuple(reversed(levels)))


def pack(data: bytes, order: int) -> np.ndarray:
    """[L] uint64: each byte of `data`, low, and the order - 1 before it, above."""
    padded = np.frombuffer(SEPARATOR * (order - 1) + data, np.uint8)
    windows = np.zeros(len(data), np.uint64)
    for start in range(order):
        windows = windows << 8 | padded[start : start + len(data)]
    return windows


def discounts(counts: np.ndarray, modified: bool) -> np.ndarray:
    """[4] float64: what a count of 0, 1, 2, and 3 or more gives up; at most itself.

    Where no count, or no count of 1 or 2, tells, it is a half; where one of 3 or 4 is
    missing, one discount serves for all.
    """
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    plain = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    found = np.array([0, plain, plain, plain])
    if modified and n1 and n2 and n3 and n4:
        ratios = np.array([0, n2 / n1, n3 / n2, n4 / n3])
        found = np.arange(4) - np.array([0, 2, 3, 4]) * plain * ratios
    return np.clip(found, 0, np.arange(4))


def _level(grams: np.ndarray, counts: np.ndarray, modified: bool) -> Level:
    contexts, context = np.unique(grams >> 8, return_inverse=True)
    discount = discounts(counts, modified)[np.minimum(counts, 3)]
    total = np.bincount(context, counts)
    spread = np.bincount(context, discount) / total
    return Level(grams, (counts - discount) / total[context], contexts, spread)


def _last(windows: np.ndarray, length: int) -> np.ndarray:
    return windows & np.uint64(2 ** (8 * length) - 1)


def _lookup(
    keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float
) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
