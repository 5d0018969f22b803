"""States rounded at random: right on the average, alike in every implementation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing
from gdn_jax.ops.gated_delta import rounding

DTYPES = ("bfloat16", "float16")
N, H, HV, P = 3, 2, 4, 7
KEY = jax.random.key(5)
PLACES = dict(bfloat16=(8, -126), float16=(11, -14))  # digits, least exponent


def _by(key=KEY):
    return dict(state_rounding="stochastic", rounding_key=key)


def _inputs(T=1, K=16, V=24, dtype="bfloat16", columns=0):
    """Of `recurrent_update`: empty states that a token is written to without decay or
    norms, so that float32's own roundings are the same in any order."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k = normal(2, N, T, H, K)
    gates = jnp.zeros((N, T, HV)), jnp.full((N, T, HV), 0.7)
    state = normal(P, HV, V, K).astype(dtype)
    slots = [5, -1, 2]
    keywords = dict(has_state=jnp.zeros(N, bool), qk_l2norm=False)
    if columns:
        slots = [[5, 4], [-1, 6], [2, 0]]
        keywords |= dict(num_accepted=jnp.ones(N, jnp.int32))
    keywords |= dict(slots=jnp.array(slots, jnp.int32))
    return (state, q, k, normal(N, T, HV, V), *gates), keywords


def _wide(x):
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), [(16, 24), (15, 5), (20, 8)])
def test_every_implementation_has_the_same_bits(dtype, K, V, path):
    inputs, keywords = _inputs(K=K, V=V, dtype=dtype)
    got, _ = gdn_jax.recurrent_update(*inputs, **keywords, **_by(), implementation=path)
    _, _, k, v, _, beta = inputs
    k = jnp.repeat(k[:, 0], HV // H, axis=1)
    new = (beta[:, 0, :, None] * v[:, 0])[..., None] * k[:, :, None, :]
    words, places = jax.random.key_data(KEY), keywords["slots"]
    want = rounding.stored(new, words, places, jnp.dtype(dtype))
    for row in (0, 2):
        np.testing.assert_array_equal(_wide(got[places[row]]), _wide(want[row]))
    assert 0.2 < np.mean(np.asarray(want != new.astype(dtype))) < 0.3  # to odds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tokens", "columns", "each token"])
def test_several_tokens_round_each_where_it_is_stored(dtype, kind, path):
    """Values differ in float32's last place between implementations, so that a few in
    a thousand are rounded to the other side."""
    inputs, keywords = _inputs(T=2, dtype=dtype, columns=2 * (kind == "columns"))
    inputs = *inputs[:2], 0.2 * inputs[2], *inputs[3:]  # without norms it grows
    keywords |= dict(per_token_states=kind == "each token")
    got, want = (
        gdn_jax.recurrent_update(*inputs, **keywords, **_by(), implementation=name)[0]
        for name in (path, "reference")
    )
    nearest, _ = gdn_jax.recurrent_update(*inputs, **keywords, implementation=path)
    assert np.mean(np.asarray(got != want)) < 3e-3
    assert np.mean(np.asarray(got != nearest)) > 0.05
    error = testing.relative_error(_wide(got), _wide(nearest))
    assert error < 2 * 2.0 ** -PLACES[dtype][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_is_the_float32_value(dtype):
    """Over many keys, in float16 also below its least normal value; each is one of the
    two neighbours, to odds of their distances, and neighbours' bits are their own."""
    rng = np.random.default_rng(1)
    digits, least = PLACES[dtype]
    scales = 2.0 ** rng.integers(max(least - 8, -100), 14, 64)
    x = (rng.normal(size=64) * scales).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 4096)
    states = jnp.asarray(x.reshape(1, 8, 8))

    def rounded(key):
        words = jax.random.key_data(key)
        return rounding.stored(states, words, jnp.int32(3), jnp.dtype(dtype))

    found = _wide(jax.jit(jax.vmap(rounded))(keys)).astype(np.float64)
    found, x = found.reshape(len(keys), -1), x.astype(np.float64)
    place = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(x))), least) - digits + 1)
    below = np.trunc(x / place) * place
    share = np.abs(x - below) / place
    up = np.abs(found - below) / place
    assert set(np.unique(up).tolist()) == {0.0, 1.0}
    z = (up.mean(0) - share) / (np.sqrt(share * (1 - share) / len(keys)) + 1e-4)
    assert np.abs(z).max() < 5 and abs(z.mean()) < 0.6 and 0.5 < z.std() < 1.4
    correlation = np.corrcoef(up[:, (share > 0.2) & (share < 0.8)].T)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / np.sqrt(len(keys))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_has_stays(dtype):
    limits = jnp.finfo(dtype)
    most, least = float(limits.max), float(limits.tiny)
    values = [0.0, 1.0, 1.5, most, least, np.inf]
    if dtype == "float16":  # a CPU flushes those of bfloat16, which are float32's
        values.append(float(limits.smallest_subnormal))
    x = np.array([*values, *(-y for y in values), np.nan], np.float32)
    for bits in (0, 1, 2**15, 2**16 - 1):
        of_all = jnp.full(x.shape, bits, jnp.uint32)
        got = rounding.stochastic(jnp.asarray(x), of_all, jnp.dtype(dtype))
        np.testing.assert_array_equal(_wide(got.astype(dtype)), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_the_keys_the_slots_and_the_heads(dtype, path):
    inputs, keywords = _inputs(dtype=dtype)
    state, q, k, v, *gates = inputs
    # the same values in every row and head
    q, k, v = (jnp.broadcast_to(x[:1, :, :1], x.shape) for x in (q, k, v))
    keywords |= dict(slots=jnp.array([5, 0, 2], jnp.int32))

    @jax.jit
    def run(state, key):
        tokens = state, q, k, v, *gates
        return gdn_jax.recurrent_update(
            *tokens, **keywords, **_by(key), implementation=path
        )[0]

    one, again = (_wide(run(state, KEY)) for _ in range(2))
    other = _wide(run(state, jax.random.fold_in(KEY, 1)))
    np.testing.assert_array_equal(one, again)
    states = [one[5, 0], one[5, 1], one[0, 0], one[2, 0], other[5, 0]]
    for i, x in enumerate(states):
        for y in states[:i]:
            assert 0.25 < np.mean(x != y) < 0.42  # a third, of any odds
    others = [1, 3, 4, 6]
    np.testing.assert_array_equal(one[others], _wide(state)[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_null_rows_are_left_alone(dtype, path):
    inputs, keywords = _inputs(dtype=dtype)
    state = inputs[0].at[6].set(jnp.nan)
    keywords |= dict(slots=jnp.array([-1, P, 1], jnp.int32))
    got, out = gdn_jax.recurrent_update(
        state, *inputs[1:], **keywords, **_by(), implementation=path
    )
    others = [0, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(_wide(got)[others], _wide(state)[others])
    assert not np.asarray(out[:2]).any() and np.asarray(out[2]).all()


def test_gradients_are_those_of_the_values(path):
    inputs, keywords = _inputs()

    def loss(v, options):
        state, out = gdn_jax.recurrent_update(
            *(*inputs[:3], v, *inputs[4:]), **keywords, **options, implementation=path
        )
        return jnp.sum(state[5].astype(jnp.float32)) + jnp.sum(out)

    got, want = (jax.grad(loss)(inputs[3], options) for options in (_by(), {}))
    np.testing.assert_array_equal(got, want)
    assert np.asarray(got).any()


def test_a_slow_head_forgets_on_the_average():
    """By less than half a last place a step: rounded to nearest it keeps all for
    good."""
    steps, decay, K, V = 2000, 1 - 2.0**-11, 16, 24
    state = jnp.linspace(0.5, 0.99, HV * V * K).reshape(1, HV, V, K)
    state = state.astype(jnp.bfloat16)
    tokens = *jnp.zeros((2, 1, 1, H, K)), jnp.zeros((1, 1, HV, V))
    gates = jnp.full((1, 1, HV), np.log(decay)), jnp.zeros((1, 1, HV))

    def run(options_of):
        def step(state, i):
            return gdn_jax.recurrent_update(state, *tokens, *gates, **options_of(i))

        return _wide(jax.lax.scan(step, state, jnp.arange(steps))[0])

    np.testing.assert_array_equal(run(lambda i: {}), _wide(state))
    got = run(lambda i: _by(jax.random.fold_in(KEY, i)))
    assert abs(got.mean() / (_wide(state).mean() * decay**steps) - 1) < 0.01


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(state_rounding="up", rounding_key=None),
            "state_rounding must be one of nearest, stochastic; got 'up'",
        ),
        (
            dict(state_rounding="nearest"),
            "rounding_key must be None where state_rounding is 'nearest'; got a key",
        ),
        (
            dict(rounding_key=None),
            "a typed key where state_rounding is 'stochastic'; got None. Give each "
            "call another one: jax.random.fold_in",
        ),
        (dict(rounding_key=jax.random.split(KEY)), "must be one key; got keys (2,)"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    inputs, keywords = _inputs()
    with pytest.raises(ValueError, match=re.escape(text)):
        gdn_jax.recurrent_update(*inputs, **keywords, **_by() | change)


def test_a_float32_state_is_not_rounded():
    inputs, keywords = _inputs(dtype="float32")
    text = "state_rounding must be 'nearest' of it; got 'stochastic' of a float32 state"
    with pytest.raises(ValueError, match=re.escape(text)):
        gdn_jax.recurrent_update(*inputs, **keywords, **_by())


def test_fused_update_takes_it_too(path):
    inputs, keywords = _inputs()
    state, q, k, v, a, b = inputs
    A_log = dt_bias = jnp.zeros(HV)
    tokens = state, q, k, v, A_log, a, b, dt_bias
    got, want = (
        gdn_jax.fused_update(*tokens, **keywords, **_by(), implementation=name)[0]
        for name in (path, "reference")
    )
    assert np.mean(np.asarray(got != want)) < 3e-3
