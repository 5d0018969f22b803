"""Options against dull NumPy, draws by chi-squared, and the keys of positions."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from chi_squared import surprise
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gdn_jax.generation import sampling

INF = float("inf")
probabilities = jax.jit(sampling.probabilities)
sample = jax.jit(sampling.sample)
position_keys = jax.jit(sampling.position_keys)


def _options(temperature, top_p, top_k):
    return sampling.Options(
        jnp.array(temperature, jnp.float32),
        jnp.array(top_p, jnp.float32),
        jnp.array(top_k, jnp.int32),
    )


def _plain(P):
    return _options([1.0] * P, [1.0] * P, [0] * P)


def _seeds(P, seed=0):
    return jax.random.split(jax.random.key(seed), P)


def _dull(logits, temperature, top_p, top_k):
    """One distribution by a sort, in float64, and how far top_p is from any sum."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(logits.size)[np.argmax(logits)], INF
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_k:
        p[logits < np.sort(logits)[::-1][:top_k][-1]] = 0
        p /= p.sum()
    if top_p == 1:
        return p, INF
    levels = np.unique(logits[p > 0])[::-1]  # a tie is one level
    reached = np.array([p[logits >= level].sum() for level in levels])
    enough = reached >= top_p
    last = levels[np.argmax(enough) if enough.any() else -1]
    p = np.where(logits >= last, p, 0)
    return p / p.sum(), np.abs(reached - top_p).min()


P, T, A = 3, 2, 7
SIZE = P * T * A
REAL = st.floats(-80, 80, width=32, allow_subnormal=False)
LOGIT = st.integers(-6, 6).map(lambda n: n / 2) | st.just(-INF) | REAL


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    logits=st.lists(LOGIT, min_size=SIZE, max_size=SIZE),
    options=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 2.5]),
            st.sampled_from([0.05, 0.5, 0.9, 1.0]),
            st.sampled_from([0, 1, 2, 5, 9]),
        ),
        min_size=P,
        max_size=P,
    ),
)
def test_probabilities_are_those_of_a_sort(logits, options):
    logits = np.array(logits, np.float32).reshape(P, T, A)
    assume(np.isfinite(logits).any(-1).all())
    options = np.array(options, np.float32)
    dull = [
        [_dull(x, *of_row[:2], int(of_row[2])) for x in row]
        for row, of_row in zip(logits, options, strict=True)
    ]
    want = np.array([[p for p, _ in row] for row in dull])
    assume(min(margin for row in dull for _, margin in row) > 1e-5)
    got = np.asarray(probabilities(logits, _options(*options.T)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert (got[want > 1e-37] > 0).all() and not got[want == 0].any()
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "options", "want"),
    [
        ([1, 3, 3, 2], (0, 0.1, 2), [0, 1, 0, 0]),
        ([1, 3, 3, 2], (1, 1, 1), [0, 0.5, 0.5, 0]),
        ([1, 3, 3, 2], (1, 0.1, 0), [0, 0.5, 0.5, 0]),
        ([0.0, -0.0, -1, -1], (1, 1, 1), [0.5, 0.5, 0, 0]),
        ([0, 0, 0, 0], (2, 0.3, 0), [0.25] * 4),
        ([-INF, 5, -INF, 5], (1, 0.99, 3), [0, 0.5, 0, 0.5]),
        ([-INF, -INF, -INF, 5], (1, 1, 0), [0, 0, 0, 1]),
        ([-3e38, 3e38, 0, 0], (1e-30, 1, 0), [0, 1, 0, 0]),
        ([-1e-3, -2e-3, -9, -9], (1, 0.4, 2), [1, 0, 0, 0]),
        ([0, 1, 2, 3], (1, 1e-30, 0), [0, 0, 0, 1]),
        # top_p is a share of what top_k keeps: 0.7 is past the first of two alone
        ([2, 1, 1, 0], (1, 0.55, 1), [1, 0, 0, 0]),
        ([np.log(4), np.log(2), 0, -0.1], (1, 0.65, 2), [1, 0, 0, 0]),
        ([0, np.nan, 1, 2], (1, 0.5, 2), [np.nan] * 4),
        ([0, np.nan, 1, 2], (0, 1, 0), [np.nan] * 4),
        ([0, INF, 1, 2], (1, 0.5, 0), [np.nan] * 4),
        ([0, INF, 1, 2], (1, 1, 2), [np.nan] * 4),
        ([-INF] * 4, (1, 0.5, 2), [np.nan] * 4),
        ([-INF] * 4, (0, 1, 0), [np.nan] * 4),
    ],
    ids=str,
)
def test_ties_infinities_and_nan(logits, options, want):
    """Beside a plain row, which they reach in no way."""
    both = np.array([logits, [0, 1, 2, 3]], np.float32)
    rows = np.array([options, (1, 1, 0)], np.float32)
    got, other = probabilities(both, _options(*rows.T))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.asarray(got) == 0).tolist() == [x == 0 for x in want]
    np.testing.assert_allclose(other, _dull([0, 1, 2, 3], 1, 1, 0)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_vocabulary(dtype):
    """Where sums of float32 leave doubt: as few tokens as they can tell, no fewer."""
    A, error = 150_001, 1e-5
    options = _options([1, 0.7, 1], [0.9, 0.999, 0.5], [0, 0, 1000])
    logits = 3 * jax.random.normal(jax.random.key(0), (3, A), dtype)
    got = np.asarray(probabilities(logits, options))
    exact = np.asarray(logits, np.float64)
    for p, x, temperature, top_p, top_k in zip(got, exact, *options, strict=True):
        whole = _dull(x, temperature, 1, top_k)[0]
        kept = p > 0
        assert x[kept].min() > x[~kept].max()
        least = x == x[kept].min()
        assert whole[kept].sum() > top_p - error
        assert whole[kept & ~least].sum() < top_p + error
        np.testing.assert_allclose(p[kept], (whole / whole[kept].sum())[kept], 1e-4)


def _primitives(jaxpr, conditional=True):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr") and (
                conditional or eqn.primitive.name != "cond"
            ):
                yield from _primitives(inner.jaxpr, conditional)


def test_nothing_is_sorted_and_passes_are_conditional():
    jaxpr = jax.make_jaxpr(sampling.probabilities)(jnp.zeros((2, 9)), _plain(2)).jaxpr
    every, always = set(_primitives(jaxpr)), set(_primitives(jaxpr, conditional=False))
    assert {"cond"} < always and not every & {"sort", "top_k"}
    assert every & {"while", "scan"} and not always & {"while", "scan"}


def test_log_probability_is_the_raw_logits():
    logits = np.array([[1, -INF, 2], [80, 0, -80]], np.float32)
    tokens = jnp.array([[0, 1], [2, 0]], jnp.int32)
    got = jax.vmap(sampling.log_probability, (None, 1), 1)(jnp.array(logits), tokens)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, np.take_along_axis(exact, tokens, 1), rtol=1e-6)


def _draw(p, count, seed=0):
    """Counts of `count` tokens of one distribution."""
    p = jnp.asarray(p, jnp.float32)
    tokens = sample(_seeds(count, seed), jnp.broadcast_to(p, (count, p.size)))
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=p.size)


@pytest.mark.parametrize("A", [4, 5, 16, 31])
def test_tokens_are_drawn_as_often_as_they_are_likely(A):
    p = np.random.default_rng(A).dirichlet(np.ones(A)) + 0.5 / A
    p[1::5] = 0
    p /= p.sum()
    counts = _draw(p, 40_000)
    assert surprise(counts, p) < 1
    off = p * np.where(np.arange(A) % 2, 0.9, 1.1)
    assert surprise(counts, off / off.sum()) > 2


def test_weights_need_not_sum_to_one():
    p = np.array([0.1, 0.2, 0.7])
    np.testing.assert_array_equal(_draw(1e-6 * p, 2000), _draw(p, 2000))


def test_a_large_vocabulary_is_drawn_to_its_end():
    """Each token of the tail is less than a step of one uniform, 2^-23."""
    A, tail, rows = 150_001, 0.017, 2048
    p = np.full(A, tail / (A - 1), np.float32)
    p[0] = 1 - tail
    draw = jax.jit(lambda keys: sampling.sample(keys, jnp.broadcast_to(p, (8, A))))
    tokens = np.concatenate([draw(keys) for keys in _seeds(rows).reshape(-1, 8)])
    counts = np.histogram(tokens, [0, 1, A // 3, 2 * A // 3, A])[0]
    assert surprise(counts, [1 - tail, tail / 3, tail / 3, tail / 3]) < 1


@pytest.mark.parametrize("A", [1, 6, 100, 1023])
def test_one_hot_gives_its_token_always(A):
    one_hot = jnp.eye(A)
    for seed in range(20):
        tokens = sample(_seeds(A, seed), one_hot)
        np.testing.assert_array_equal(tokens, np.arange(A))


def test_no_probability_is_no_token_outside():
    tokens = sample(_seeds(2), jnp.stack([jnp.zeros(10), jnp.full(10, jnp.nan)]))
    assert ((tokens >= 0) & (tokens < 10)).all()


def test_keys_differ_by_request_position_and_stream_alone():
    seeds = _seeds(3)
    positions = jnp.array([[0, 1, 2], [5, 6, 7], [0, 1, 2**31 - 1]], jnp.int32)
    keys = position_keys(seeds, positions)
    data = np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k in keys])
    assert len(np.unique(data, axis=0)) == 27
    for row, column in np.ndindex(3, 3):
        alone = position_keys(seeds[row : row + 1], positions[row : row + 1, column])
        for one, all_ in zip(alone, keys, strict=True):
            assert one[0] == all_[row, column]


def test_a_row_draws_the_same_in_any_batch():
    p = probabilities(jax.random.normal(jax.random.key(1), (6, 50)), _plain(6))
    keys = position_keys(_seeds(6), jnp.arange(6, dtype=jnp.int32)).next
    tokens = sample(keys, p)
    for rows in ([3] * 6, [5, 0, 4, 3, 1, 2], [5]):
        at = jnp.array(rows)
        np.testing.assert_array_equal(sample(keys[at], p[at]), tokens[at])


def _called(function, **good):
    return lambda **change: function(**good | change)


PROBABILITIES = _called(
    sampling.probabilities, logits=jnp.zeros((2, 5)), options=_plain(2)
)
SAMPLE = _called(sampling.sample, keys=_seeds(2), probabilities=jnp.ones((2, 5)))
POSITIONS = _called(
    sampling.position_keys, seeds=_seeds(2), positions=jnp.zeros((2, 3), jnp.int32)
)
LOG = _called(
    sampling.log_probability,
    logits=jnp.zeros((2, 5)),
    tokens=jnp.zeros(2, jnp.int32),
)


@pytest.mark.parametrize(
    ("call", "change", "text"),
    [
        (PROBABILITIES, dict(logits=jnp.zeros(5)), r"logits must be \[P, ..., A\]"),
        (PROBABILITIES, dict(logits=jnp.zeros((2, 0))), "with A >= 1; got"),
        (PROBABILITIES, dict(logits=jnp.zeros((2, 5), int)), "logits must be one of"),
        (PROBABILITIES, dict(options=_plain(3)), r"temperature must be \[P\] = \(2,\)"),
        (
            PROBABILITIES,
            dict(options=_plain(2)._replace(top_k=jnp.zeros(2))),
            "top_k must be int32; got float32",
        ),
        (SAMPLE, dict(keys=jnp.zeros(2, jnp.uint32)), "keys must be typed keys; got"),
        (SAMPLE, dict(probabilities=jnp.ones((3, 5))), "probabilities must be .*keys'"),
        (
            SAMPLE,
            dict(probabilities=jnp.ones((2, 0))),
            "probabilities must be .*A >= 1",
        ),
        (POSITIONS, dict(seeds=[1, 2]), "seeds must be typed keys; got list"),
        (
            POSITIONS,
            dict(seeds=jax.random.split(jax.random.key(0, impl="rbg"), 2)),
            "seeds must be keys of threefry2x32; got rbg",
        ),
        (POSITIONS, dict(positions=jnp.zeros(3, jnp.int32)), "positions must be"),
        (POSITIONS, dict(positions=jnp.zeros(2)), "positions must be int32"),
        (LOG, dict(tokens=jnp.zeros(3, jnp.int32)), "tokens must be logits' leading"),
    ],
)
def test_a_wrong_call_is_told(call, change, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=text):
        call(**change)


def test_64_bit_jax_changes_nothing():
    logits = np.random.default_rng(0).standard_normal((4, 3, 40)).astype("float32")
    options = _options([0, 0.7, 1, 1], [1, 0.9, 0.5, 1], [0, 0, 7, 3])
    positions = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)

    def step(logits):
        p = sampling.probabilities(logits, options)
        keys = sampling.position_keys(_seeds(4), positions)
        tokens = sampling.sample(keys.next, p)
        return p, tokens, sampling.log_probability(logits, tokens)

    want = jax.jit(step)(logits)
    with jax.enable_x64(True):
        got = jax.jit(step)(logits)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)
