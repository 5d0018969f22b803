"""Sizes where 32 bits or a launch grid's limits end; on a GPU alone, by their size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_calls
import pytest

import gdn_jax
from gdn_jax import ConvState, ReplayState, testing
from gdn_jax.ops.cached_attention.api import cached_attention
from gdn_jax.ops.cached_attention.call import Inputs


def _on_gpu(test):
    return pytest.mark.gpu(pytest.mark.large(test))


def _tokens(rows, H, HV, K, V):
    random = np.random.default_rng(0)
    shapes = ((rows, H, K), (rows, H, K), (rows, HV, V), (HV,), (rows, HV), (rows, HV))
    return [
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in (*shapes, (HV,))
    ]


@_on_gpu
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_slots_past_the_reach_of_32_bits(state):
    """At HV=32, K=V=128 slot 4096 is element 2^31."""
    P, shape = 4160, (32, 128, 128)
    slots = jnp.asarray([4159, 0, 4096, 2048, 4095], jnp.int32)
    few = 0.1 * jax.random.normal(jax.random.key(0), (5, *shape)).astype(state)
    pool = jnp.zeros((P, *shape), state).at[slots].set(few)
    tokens = _tokens(5, 16, 32, 128, 128)
    want, want_out = gdn_jax.fused_update(few, *tokens, implementation="xla")

    def update(pool, tokens, slots):
        return gdn_jax.fused_update(pool, *tokens, slots=slots, implementation="triton")

    pool, out = jax.jit(update, donate_argnums=0)(pool, tokens, slots)
    bar = testing.TOLERANCE["state", state]
    assert testing.relative_error(pool[slots], want) < 2 * bar  # xla rounds as well
    assert testing.relative_error(out, want_out) < 1e-5
    pool = pool.at[slots].set(0)
    assert not jnp.any(pool)


@_on_gpu
def test_replays_slots_past_the_reach_of_32_bits():
    P, shape = 4160, (32, 128, 128)
    slots = jnp.asarray([4159, 0, 4096, 2048, 4095], jnp.int32)
    few = 0.1 * jax.random.normal(jax.random.key(0), (5, *shape))
    want = ReplayState.from_dense(few, num_key_heads=16, key_dtype=jnp.float32)
    zeros = ReplayState.zeros(P, 16, *shape, key_dtype=jnp.float32)
    pool = zeros._replace(checkpoint=zeros.checkpoint.at[slots].set(few))
    del zeros
    tokens = [x[:, None] if x.ndim > 1 else x for x in _tokens(5, 16, 32, 128, 128)]

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def update(state, tokens, slots, implementation):
        return gdn_jax.replay_update(
            state, *tokens, slots=slots, implementation=implementation
        )

    for _ in range(20):  # the ring's columns, and a fold
        pool, out = update(pool, tokens, slots, "triton")
        want, want_out = update(want, tokens, None, "xla")
        assert testing.relative_error(out, want_out) < 1e-4
    for name in ("checkpoint", "u", "log_decay"):
        got, expected = getattr(pool, name)[slots], getattr(want, name)
        assert testing.relative_error(got, expected) < 1e-4
    assert not jnp.any(pool.checkpoint.at[slots].set(0))
    assert not jnp.any(pool.u.at[slots].set(0))


@_on_gpu
def test_more_rows_of_replay_than_a_grid_axis_has_places():
    rows = 70_000
    tokens = [x[:, None] if x.ndim > 1 else x for x in _tokens(rows, 1, 1, 8, 8)]
    pool = 0.1 * jax.random.normal(jax.random.key(0), (rows, 1, 8, 8))
    state = ReplayState.from_dense(pool, num_key_heads=1, key_dtype=jnp.float32)
    results = [
        gdn_jax.replay_update(state, *tokens, implementation=name)
        for name in ("triton", "xla")
    ]
    (got, out), (want, want_out) = results
    assert testing.relative_error(got.u, want.u) < 1e-4
    assert testing.relative_error(out, want_out) < 1e-4
    assert np.array_equal(got.pending, want.pending)


@_on_gpu
def test_more_rows_than_a_grid_axis_has_places():
    rows = 70_000
    tokens = _tokens(rows, 1, 1, 8, 8)
    state = 0.1 * jax.random.normal(jax.random.key(0), (rows, 1, 8, 8))
    results = [
        gdn_jax.fused_update(state, *tokens, implementation=name)
        for name in ("triton", "xla")
    ]
    for got, want in zip(*results, strict=True):
        assert testing.relative_error(got, want) < 1e-6


# P, N, HV at K = V = 128. Of every op a pool past 2^31 values; in the first lines more
# rows than a grid axis has places and more slots than 1e5, too.
SIZES = {
    "fused_update": (150_000, 70_000, 1),
    "replay_update": (150_000, 70_000, 1),
    "fused_layer_step": (150_000, 70_000, 1),
    "causal_conv1d": (1_000_000, 70_000, 3),
    "chunk_update": (150_000, 300, 1),
}
OFTEN = {
    "fused_update": (4160, 2100, 32),
    "fused_layer_step": (4160, 2100, 32),
}


@_on_gpu
@pytest.mark.parametrize("name", SIZES)
def test_many_rows_find_their_slots_in_a_large_pool(name):
    assert _find_their_slots(name, *SIZES[name], "triton") > 2**31


@_on_gpu
@pytest.mark.parametrize("name", OFTEN)
def test_rows_of_many_heads_find_their_slots_in_a_large_pool(name):
    assert _find_their_slots(name, *OFTEN[name], "triton") > 2**31


@pytest.mark.parametrize("name", SIZES)
def test_rows_find_their_slots_in_a_small_pool(name):
    """What the tests above do, on any machine."""
    _find_their_slots(name, 40, 20, 1, "xla")


def _find_their_slots(name, P, N, HV, implementation):
    """The last slot is among those of N rows. Some rows are compared with a call of
    them alone on a pool of their own; what is another slot's is off by its own size.
    All other slots keep their bits. How many values the pool has."""
    call, (state, *tokens, _) = op_calls.OPS[name](P, N, HV, implementation)
    alone, _ = op_calls.OPS[name](P, N, HV, "xla")
    random = np.random.default_rng(0)
    slots = random.permutation(P - 1)[:N].astype(np.int32)
    slots[N // 2] = P - 1
    some = np.unique([0, 1, N // 2, N - 2, N - 1, *np.argsort(slots)[-3:]])
    tokens = [jax.tree.map(_values, x) for x in tokens]
    few = jax.tree.map(lambda x: x[some] if _per_row(x, N) else x, tokens)
    pool = jax.jit(lambda: jax.tree.map(_pattern, state))()
    size = max(x.size for x in jax.tree.leaves(pool))
    before = _sums(pool)
    want_pool = jax.tree.map(lambda x: x[slots[some]], pool)
    order = jnp.arange(len(some), dtype=jnp.int32)
    want_pool, want = jax.jit(alone)(want_pool, *few, order)
    pool, out = jax.jit(call, donate_argnums=0)(pool, *tokens, slots)

    bar = 2 * testing.TOLERANCE["chunked out", "bfloat16"]
    assert testing.relative_error(out[some], want) < bar
    assert np.all(np.asarray(jnp.any(out.reshape(N, -1) != 0, axis=1)))
    got_pool = jax.tree.map(lambda x: x[slots[some]], pool)
    agree = functools.partial(_agree, name)
    jax.tree.map(agree, _in_order(got_pool), _in_order(want_pool))
    others = np.setdiff1d(np.arange(P), slots)
    changed = np.zeros(P, bool)
    for x, y in zip(before, _sums(pool), strict=True):
        assert np.array_equal(x[others], y[others])
        changed |= x != y
    assert np.mean(changed[slots]) > 0.999  # two sums of bits may be equal
    return size


def _in_order(state):
    """A convolution's inputs for its ring, which implementations turn as they like."""

    def dense(x):
        return x.to_dense(op_calls.W) if is_ring(x) else x

    def is_ring(x):
        return isinstance(x, ConvState)

    return jax.tree.map(dense, state, is_leaf=is_ring)


def _agree(name, got, want):
    """Both round: twice what one may."""
    if jnp.issubdtype(got.dtype, jnp.integer):
        np.testing.assert_array_equal(got, want)
        return
    kind = "chunked state" if name in ("chunk_update", "replay_update") else "state"
    # a step's q, k and v are rounded to the tokens' dtype on their way
    dtype = "bfloat16" if name == "fused_layer_step" else got.dtype.name
    assert testing.relative_error(got, want) < 2 * testing.TOLERANCE[kind, dtype]


def _per_row(x, N):
    return x.ndim > 2 and x.shape[0] == N


def _values(x):
    key = jax.random.key(x.size % 1000)
    return jax.random.normal(key, x.shape).astype(x.dtype)


def _pattern(x):
    """Others in every slot; counters are 0."""
    if x.dtype == jnp.int32:
        return jnp.zeros(x.shape, x.dtype)
    index = [jax.lax.broadcasted_iota(jnp.int32, x.shape, d) for d in range(x.ndim)]
    mixed = sum(i % 1009 * p for i, p in zip(index, (613, 89, 37, 17), strict=False))
    return (0.2 * jnp.cos(mixed.astype(jnp.float32))).astype(x.dtype)


def _sums(pool):
    """Of each slot's bits, of each array."""

    @jax.jit
    def total(x):
        width = x.dtype.itemsize * 8
        bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
        places = jnp.arange(bits[0].size, dtype=jnp.uint32).reshape(bits.shape[1:])
        return jnp.sum(bits * (2 * places + 1), axis=tuple(range(1, bits.ndim)))

    return [np.asarray(total(x)) for x in jax.tree.leaves(pool)]


@_on_gpu
def test_rows_of_a_cache_past_the_reach_of_32_bits():
    P, heads, positions, dim = 140, 4, 16_384, 256
    rows = jnp.asarray([P - 1, 0, 128], jnp.int32)
    start = jnp.asarray([16_300, 5000, 16_000], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 1, 16, dim), jnp.bfloat16)
    own = [
        jax.random.normal(key, (3, heads, positions, dim), jnp.bfloat16)
        for key in keys[1:]
    ]
    whole = jnp.zeros((P, heads, positions, dim), jnp.bfloat16)
    assert whole.size > 2**31
    k, v = (whole.at[rows].set(x) for x in own)
    del whole
    got = cached_attention(Inputs(q, k, v, rows, start), implementation="triton")
    want = cached_attention(Inputs(q, *own, None, start), implementation="xla")
    assert testing.relative_error(got, want) < 1e-2
