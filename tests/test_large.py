"""Sizes where 32 bits or a launch grid's limits end; on a GPU alone, by their size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import ReplayState, testing

pytestmark = pytest.mark.gpu


def _tokens(rows, H, HV, K, V):
    random = np.random.default_rng(0)
    shapes = ((rows, H, K), (rows, H, K), (rows, HV, V), (HV,), (rows, HV), (rows, HV))
    return [
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in (*shapes, (HV,))
    ]


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
