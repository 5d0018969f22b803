"""Where JAX keeps float64 the ops still compute, and loop, in 32 bits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import op_calls
import pytest

import gdn_jax

L, H, HV, K, V, W = 70, 1, 2, 16, 16, 4
BOUNDS = np.array([0, 66, 68], np.int32)


def _normal(*shapes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def _rule(function, path):
    shapes = ((2, HV, V, K), (L, H, K), (L, H, K), (L, HV, V), HV, (L, HV), (L, HV), HV)

    def call(*args):
        state, out = function(*args, cu_seqlens=BOUNDS, implementation=path)
        return jnp.sum(state) + jnp.sum(out)

    return call, _normal(*shapes)


def _conv(path):
    def call(buffer, x, weight):
        state = gdn_jax.ConvState(buffer, jnp.zeros(2, jnp.int32))
        state, y = gdn_jax.causal_conv1d(
            state, x, weight, cu_seqlens=BOUNDS, implementation=path
        )
        return jnp.sum(state.buffer) + jnp.sum(y)

    return call, _normal((2, 8, W), (L, 8), (8, W))


def _grouped_dot(path):
    def call(x, weights):
        sizes = np.array([50, 0, 18], np.int32)
        return jnp.sum(gdn_jax.grouped_dot(x, weights, sizes, implementation=path))

    return call, _normal((L, 24), (3, 24, 16))


CALLS = {
    "fused_update": functools.partial(_rule, gdn_jax.fused_update),
    "chunk_update": functools.partial(_rule, gdn_jax.chunk_update),
    "causal_conv1d": _conv,
    "grouped_dot": _grouped_dot,
}


@pytest.mark.parametrize("op", CALLS)
def test_values_and_gradients_are_those_of_32_bits(op, path):
    call, args = CALLS[op](path)
    step = jax.value_and_grad(call, argnums=tuple(range(len(args))))
    want = step(*args)
    with jax.enable_x64(True):
        got = jax.jit(step)(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", op_calls.OPS)
def test_nothing_is_computed_in_64_bits(name, path):
    call, shapes = op_calls.OPS[name](4, 3, 2, path)
    with jax.enable_x64(True):
        traced = str(jax.make_jaxpr(call)(*shapes))
    assert set(re.findall(r"\bf64\[\d[^\]]*\]", traced)) == set()
