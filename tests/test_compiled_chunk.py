"""What prefill and the whole layer compile to for an H200, without a GPU."""

import functools

import aot
import jax
import jax.numpy as jnp
import pytest

import gdn_jax
from gdn_jax import nn


def _shapes(N, T, H, HV, K, V, state="float32", act="bfloat16", *, packed=False):
    """Arguments of a call as shapes: (state, tokens, keywords)."""
    S, act = jax.ShapeDtypeStruct, jnp.dtype(act)
    lead = (N * T,) if packed else (N, T)
    kwargs = {"slots": S((N,), jnp.int32), "has_state": S((N,), jnp.bool_)}
    if packed:
        kwargs["cu_seqlens"] = S((N + 1,), jnp.int32)
    tokens = (
        S((*lead, H, K), act),
        S((*lead, H, K), act),
        S((*lead, HV, V), act),
        S((HV,), jnp.float32),
        S((*lead, HV), act),
        S((*lead, HV), act),
        S((HV,), act),
    )
    return S((N + 1, HV, V, K), jnp.dtype(state)), tokens, kwargs


def _update(state, tokens, kwargs):
    return gdn_jax.chunk_update(state, *tokens, **kwargs, implementation="triton")


@pytest.mark.parametrize(
    "shapes",
    [
        _shapes(1, 8192, 16, 32, 128, 128),
        _shapes(4, 2048, 16, 32, 128, 128, "bfloat16"),
        _shapes(8, 1024, 16, 32, 128, 128, packed=True),
        _shapes(2, 100, 30, 30, 96, 192),
        _shapes(2, 100, 2, 4, 64, 64),
        _shapes(2, 100, 2, 4, 8, 6, packed=True),
        _shapes(2, 100, 2, 4, 256, 256),
    ],
    ids=lambda shapes: "-".join(map(str, (*shapes[0].shape, len(shapes[2])))),
)
def test_a_prefill_is_three_launches_in_place_without_spills(shapes):
    """Keys and queries are prepared, then walked along."""
    compiled = aot.compile_for_h200(_update, *shapes, donate_argnums=0)
    launches = compiled.launches()
    assert len(launches) == 3
    assert all(aot.KERNEL_CALL in launch for launch in launches)
    assert compiled.alias_bytes == shapes[0].size * shapes[0].dtype.itemsize
    if shapes[0].shape[3] <= 128:
        assert compiled.resources()["spills"] == 0


@pytest.mark.parametrize("K", [64, 128, 256])
def test_float32_activations_are_cut_before(K):
    shapes = _shapes(2, 100, 2, 4, K, K, act="float32")
    compiled = aot.compile_for_h200(_update, *shapes, donate_argnums=0)
    kernels = [launch for launch in compiled.launches() if aot.KERNEL_CALL in launch]
    assert len(kernels) == 3
    assert compiled.alias_bytes == shapes[0].size * 4
    if K <= 128:
        assert compiled.resources()["spills"] == 0


@pytest.mark.parametrize("K", [8, 128])
def test_the_backward_is_six_kernels(K):
    """To prepare two, a walk forward and one backward, and two that pull."""
    state, tokens, _ = _shapes(2, 130, 2, 4, K, K)
    state = jax.ShapeDtypeStruct((2, *state.shape[1:]), state.dtype)

    def pull_back(state, tokens, cotangents):
        def update(state, *tokens):
            return gdn_jax.chunk_update(state, *tokens, implementation="triton")

        return jax.vjp(update, state, *tokens)[1](cotangents)

    compiled = aot.compile_for_h200(pull_back, state, tokens, (state, tokens[2]))
    kernels = [launch for launch in compiled.launches() if aot.KERNEL_CALL in launch]
    assert len(kernels) == 6


@pytest.mark.parametrize(
    ("tokens", "kernels"), [(1, 4), (1000, 4)], ids=["decode", "prefill"]
)
def test_the_layer_keeps_its_state_in_place(tokens, kernels):
    """Kernels of ours: the convolution, and one for the rule, three in chunks; of one
    token also the projections to and from them."""
    layer = nn.GatedDeltaNet(256, 2, 4, 64, 64, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, tokens, 256), jnp.bfloat16)
    state = jax.eval_shape(functools.partial(layer.init_state, 9, columns=1))
    slots = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, 256)))

    def step(state, params, x, slots):
        y, state = layer.apply(params, x, state, slots=slots)
        return state, y

    compiled = aot.compile_for_h200(step, state, params, x, slots, donate_argnums=0)
    calls = f'custom_call_target="{aot.KERNEL_CALL}"'
    assert compiled.hlo.count(calls) == kernels
    pools = jax.tree.leaves(state)
    assert compiled.alias_bytes == sum(x.size * x.dtype.itemsize for x in pools)
    for pool in (state.conv.buffer, state.recurrent):
        assert not aot.copies(compiled, pool)
