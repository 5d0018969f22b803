"""Null rows of the layer: y is zero, neither state changes, NaN reaches nothing."""

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from layers import agree, apply, tokens

S = 3


def _same_bits(before, after, slots):
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.array_equal(np.asarray(a)[slots], np.asarray(b)[slots], True)


@pytest.mark.parametrize(
    ("model", "lead"),
    [
        *((model, (4, 3)) for model in layers.MODELS),
        *(("Qwen3.5", lead) for lead in ((4,), (4, 18))),
        ("Kimi-Linear", (4, 18)),
    ],
)
def test_a_null_row_is_zero_and_changes_nothing(lead, model):
    layer, params = layers.make(model)
    pool = layers.poisoned(layer.init_state(6), jnp.array([0, 1, 3, 5]))
    x = tokens(*lead).at[jnp.array([1, 3])].set(jnp.nan)
    slots = jnp.array([2, -1, 4, 0], jnp.int32)
    y, state = apply(layer, params, x, pool, slots=slots, null_slot=0)
    want, _ = apply(layer, params, x[::2], layer.init_state(2), path="fused")
    assert agree(y[::2], want, "chunk" if lead == (4, 18) else "fused")
    assert not np.asarray(y[1::2]).any()
    _same_bits(pool, state, [0, 1, 3, 5])


@pytest.mark.parametrize("columns", ["one slot", "a table"])
def test_a_row_without_a_slot_for_one_state_is_null_in_both(columns):
    layer, params = layers.make()
    pool = layer.init_state(9, columns=S, num_conv_slots=4)
    pool = jax.tree.map(lambda leaf: leaf + (leaf.ndim > 1), pool)
    conv_slots = jnp.array([0, 4, 2], jnp.int32)
    slots, more = jnp.array([0, 3, -1], jnp.int32), {}
    if columns == "a table":
        slots = jnp.array([[0, 1, 2], [3, 4, 5], [6, -1, 8]], jnp.int32)
        more = dict(num_accepted=jnp.array([1, 1, 2], jnp.int32))
    x = tokens(3, S).at[1:].set(jnp.nan)
    y, state = apply(layer, params, x, pool, slots=slots, conv_slots=conv_slots, **more)
    assert np.asarray(y[0]).any() and np.isfinite(y[0]).all()
    assert not np.asarray(y[1:]).any()
    _same_bits(pool.conv, state.conv, [1, 2, 3])
    _same_bits(pool.recurrent, state.recurrent, list(range(3, 9)))


@pytest.mark.parametrize("accepted", [0, S + 1])
def test_a_count_out_of_range_is_null_in_both_states(accepted):
    """The convolution's ring may have room for more columns than the table has."""
    layer, params = layers.make()
    pool = layer.init_state(2 * S, columns=S + 2)
    table = jnp.arange(2 * S, dtype=jnp.int32).reshape(2, S)
    counts = jnp.array([1, accepted], jnp.int32)
    y, state = apply(
        layer, params, tokens(2, S), pool, slots=table, num_accepted=counts
    )
    assert np.asarray(y[0]).any() and not np.asarray(y[1]).any()
    _same_bits(pool, state, [3, 4, 5])


def test_column_0_is_a_rows_slot_in_the_convolution():
    layer, params = layers.make()
    pool = layer.init_state(2 * S, columns=S)
    table = jnp.array([[0, 1, 2], [-1, 4, 5]], jnp.int32)
    counts = jnp.array([1, 2], jnp.int32)
    y, state = apply(
        layer, params, tokens(2, S), pool, slots=table, num_accepted=counts
    )
    assert np.asarray(y[0]).any() and not np.asarray(y[1]).any()
    _same_bits(pool, state, [3, 4, 5])


@pytest.mark.parametrize("T", [4, 18], ids=["fused", "in chunks"])
def test_nan_of_null_rows_stays_out_of_gradients(T):
    layer, params = layers.make()
    x = tokens(3, T).at[1].set(jnp.nan)
    slots = jnp.array([0, -1, 1], jnp.int32)
    pool = layer.init_state(2)

    def loss(params, x):
        return jnp.sum(layer.apply(params, x, pool, slots=slots)[0] ** 2)

    gradients, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.isfinite(of_x).all() and not np.asarray(of_x[1]).any()
