"""Kneser-Ney models: probabilities, against a dull one in dicts, and what bits cost."""

import collections
import math
import random

import numpy as np
import pytest

from gdn_jax.training import kneser_ney
from gdn_jax.training.text import SEPARATOR

pytestmark = pytest.mark.once


def _chain(length, seed):
    """Text of a Markov chain: each byte is likely to be one of two after the last."""
    draw, data = random.Random(seed), bytearray(b"a")
    for _ in range(length):
        after = (3 * data[-1] + draw.choice((0, 0, 0, 1, 1, 7))) % 26
        data.append(97 + after)
    return bytes(data)


TEXT = _chain(600, seed=0)
OTHER = _chain(80, seed=1) + b"\xff\0unseen" + TEXT[:30]

ORDERS = pytest.mark.parametrize("order", range(1, 7))
DISCOUNTS = pytest.mark.parametrize("modified", [False, True])


class Dull:
    """The definition, a dict and a recursion."""

    def __init__(self, train, order, modified):
        padded = SEPARATOR * (order - 1) + train
        grams = [padded[i : i + order] for i in range(len(train))]
        self.counts = {order: collections.Counter(grams)}
        for length in range(order - 1, 0, -1):
            longer = self.counts[length + 1]
            self.counts[length] = collections.Counter(gram[1:] for gram in longer)
        self.modified = modified

    def discount(self, length, count):
        n = collections.Counter(self.counts[length].values())
        if not n[1] or not n[2]:
            return 0.5
        y = n[1] / (n[1] + 2 * n[2])
        if not self.modified or not n[3] or not n[4]:
            return y
        c = min(count, 3)
        return min(max(c - (c + 1) * y * n[c + 1] / n[c], 0), c)

    def probability(self, context, byte):
        if context is None:
            return 1 / 256
        length = len(context) + 1
        counts = self.counts[length]
        after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == context}
        shorter = self.probability(context[1:] if context else None, byte)
        if not after:
            return shorter
        taken = {w: self.discount(length, c) for w, c in after.items()}
        kept = after.get(byte, 0) - taken.get(byte, 0)
        return (kept + sum(taken.values()) * shorter) / sum(after.values())


@DISCOUNTS
@ORDERS
def test_it_is_the_dull_one(order, modified):
    dull = Dull(TEXT, order, modified)
    model = kneser_ney.fit(TEXT, order, modified=modified)
    padded = SEPARATOR * (order - 1) + OTHER
    want = [
        dull.probability(padded[i : i + order - 1], byte)
        for i, byte in enumerate(OTHER)
    ]
    got = model.probabilities(kneser_ney.pack(OTHER, order))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    bits = kneser_ney.bits_per_byte(TEXT, OTHER, order, modified=modified)
    assert bits == pytest.approx(-sum(map(math.log2, want)) / len(OTHER))


@DISCOUNTS
@pytest.mark.parametrize("order", [1, 2, 6, 8])
def test_probabilities_sum_to_one(order, modified):
    model = kneser_ney.fit(TEXT, order, modified=modified)
    contexts = kneser_ney.pack(OTHER, order) << 8  # seen, seen in part, unseen
    windows = contexts[:, None] | np.arange(256, dtype=np.uint64)
    p = model.probabilities(windows.ravel()).reshape(windows.shape)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)


def test_the_discounts_differ():
    """So that the tests of either kind are of two kinds."""
    plain, modified = (
        kneser_ney.bits_per_byte(TEXT, OTHER, 2, modified=modified)
        for modified in (False, True)
    )
    assert abs(plain - modified) > 1e-3


def test_modified_discounts_are_those_of_the_equations():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 12, 6, 3, 5])
    y = 40 / (40 + 2 * 12)
    want = [0, 1 - 2 * y * 12 / 40, 2 - 3 * y * 6 / 12, 3 - 4 * y * 3 / 6]
    np.testing.assert_allclose(kneser_ney.discounts(counts, True), want)
    np.testing.assert_allclose(kneser_ney.discounts(counts, False), [0, y, y, y])


@DISCOUNTS
def test_more_text_costs_fewer_bits(modified):
    whole, held_out = _chain(32000, seed=2), _chain(4000, seed=3)
    bits = [
        kneser_ney.bits_per_byte(whole[:length], held_out, 3, modified=modified)
        for length in (500, 4000, 32000)
    ]
    entropy = -(math.log2(1 / 2) / 2 + math.log2(1 / 3) / 3 + math.log2(1 / 6) / 6)
    assert bits[0] > bits[1] + 0.1
    assert bits[1] > bits[2] + 0.02
    assert abs(bits[2] - entropy) < 0.02


@DISCOUNTS
def test_a_period_costs_next_to_nothing(modified):
    period = b"0123456789abcdef"
    bits = kneser_ney.bits_per_byte(200 * period, 20 * period, modified=modified)
    assert 0 < bits < 0.05


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ((b"", b"a"), "train must be one byte or more"),
        ((b"a", b""), "held_out must be one byte or more"),
        ((b"a", b"a", 0), "order must be 1 to 8; got 0"),
        ((b"a", b"a", 9), "order must be 1 to 8; got 9"),
    ],
)
def test_a_wrong_call_is_told(call, text):
    with pytest.raises(ValueError, match=text):
        kneser_ney.bits_per_byte(*call)
