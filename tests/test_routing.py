"""Choosing experts by the kernels against the plain way."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax.ops.routing.api import route

# tokens, experts, experts of a token
CASES = [(1, 8, 2), (5, 12, 3), (9, 512, 10), (70, 24, 4), (128, 16, 8)]


def make(L, E, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((L, E)), dtype)


def plain(scores, live, k, normalize):
    """In NumPy, pair by pair."""
    scores = np.asarray(scores, np.float64)
    L, E = scores.shape
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    experts = np.argsort(-shares, axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(shares, experts, 1)
    if normalize:
        weights /= weights.sum(1, keepdims=True)
    pairs = sorted(
        (experts[n, i] if live[n] else E, n * k + i) for n in range(L) for i in range(k)
    )
    place = np.zeros(L * k, int)
    for row, (_, pair) in enumerate(pairs):
        place[pair] = row
    sizes = np.bincount([e for e, _ in pairs], minlength=E + 1)[:E]
    return weights, place.reshape(L, k), [pair // k for _, pair in pairs], sizes


@pytest.mark.parametrize("normalize", [True, False], ids=["normal", "as they are"])
@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_numpy(path, case, is_padded, normalize):
    L, E, k = case
    scores, live = make(L, E), np.random.default_rng(1).random(L) < 0.7
    if not is_padded:
        live[:] = True
    given = jnp.asarray(live) if is_padded else None
    found = route(scores, given, k=k, normalize=normalize, implementation=path)
    weights, *tables = plain(scores, live, k, normalize)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
    for got, want in zip(found[1:], tables, strict=True):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(k=9), "k must be 1 to 8, the experts that there are; got 9"),
        (dict(live=jnp.ones(3, bool)), r"live must be \[L\] = \(2,\); got"),
        (dict(implementation="Triton"), "implementation must be None or one of"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    call = dict(scores=jnp.zeros((2, 8)), live=None, k=2, normalize=True)
    with pytest.raises(ValueError, match=text):
        route(**call | change)


def test_equal_scores_are_the_first_experts(path):
    scores = jnp.zeros((3, 10)).at[1, 7].set(1)
    found = route(scores, None, k=3, normalize=True, implementation=path)
    assert found.group_sizes.tolist() == [3, 3, 2, 0, 0, 0, 0, 1, 0, 0]


def test_nan_and_infinity_take_k_experts_each(path):
    """Whose weights are NaN; the other tokens' tables and weights are right."""
    scores = (
        make(4, 9).at[1].set(jnp.nan).at[2, 3].set(-jnp.inf).at[3, 1:].set(-jnp.inf)
    )
    found = route(scores, None, k=4, normalize=True, implementation=path)
    assert found.group_sizes.sum() == 16
    assert sorted(found.place.ravel().tolist()) == list(range(16))
    assert np.isnan(found.weights[1]).all()
    want = route(scores[2:], None, k=4, normalize=True, implementation="xla")
    np.testing.assert_allclose(found.weights[2:], want.weights, rtol=1e-5)


def test_gradients_are_xlas():
    scores, seed = make(6, 16), make(6, 4, seed=2)

    def loss(scores, path):
        found = route(scores, None, k=4, normalize=True, implementation=path)
        return jnp.sum(found.weights * seed)

    got, want = (jax.grad(loss)(scores, path) for path in ("interpret", "xla"))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_many_tokens_are_xlas():
    route(make(129, 8), None, k=2, normalize=True)
    with pytest.raises(NotImplementedError, match="128 tokens; got 129"):
        route(make(129, 8), None, k=2, normalize=True, implementation="interpret")


@pytest.mark.parametrize("tokens", [8, 64])
def test_compiles_to_two_launches(tokens):
    S = jax.ShapeDtypeStruct
    f = functools.partial(
        route, live=None, k=10, normalize=True, implementation="triton"
    )
    compiled = aot.compile_for_h200(f, S((tokens, 512), jnp.bfloat16))
    assert len(compiled.launches()) == 2
    assert compiled.resources()["spills"] == 0
