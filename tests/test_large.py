"""Sizes where 32 bits or a launch grid's limits end; on a GPU alone, by their size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing

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
