"""Sizes where 32 bits or a launch grid's limits end, compiled for an H200, without a
GPU; test_large.py runs some of them on one."""

import functools
import re

import aot
import jax
import jax.numpy as jnp
import pytest

import gdn_jax
from gdn_jax import ConvState, ReplayState

H, K, V, W = 1, 128, 128, 4
GRID_LIMIT = 65535  # of CUDA, along y and z


def _array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _slots(N):
    return _array(N, dtype="int32")


def _pool(P, HV):
    return _array(P, HV, V, K, dtype="float32")


def _rule(op, P, N, HV, T=1):
    function = getattr(gdn_jax, op)
    state = _pool(P, HV)
    if op == "replay_update":
        state = jax.eval_shape(lambda: ReplayState.zeros(P, H, HV, K, V))
    key, gate, head = _array(N, T, H, K), _array(N, T, HV), _array(HV)
    tokens = key, key, _array(N, T, HV, V), head, gate, gate, head

    def call(state, tokens, slots):
        return function(state, *tokens, slots=slots, implementation="triton")

    return call, (state, tokens, _slots(N))


def _ring(P, HV):
    C = 2 * H * K + HV * V
    return ConvState(_array(P, C, W), _array(P, dtype="int32")), C


def _conv(P, N, HV):
    state, C = _ring(P, HV)

    def call(state, x, weight, slots):
        return gdn_jax.causal_conv1d(
            state, x, weight, slots=slots, implementation="triton"
        )

    return call, (state, _array(N, 1, C), _array(C, W), _slots(N))


def _layer_step(P, N, HV):
    conv, C = _ring(P, HV)
    weights = dict(
        conv_weight=_array(C, W),
        A_log=_array(HV),
        dt_bias=_array(HV),
        norm_weight=_array(V),
    )

    def call(state, qkvz, ba, weights, slots):
        return gdn_jax.fused_layer_step(
            state, qkvz, ba, slots=slots, implementation="triton", **weights
        )

    state, z = (conv, _pool(P, HV)), HV * V
    return call, (state, _array(N, 1, C + z), _array(N, 1, 2 * HV), weights, _slots(N))


OPS = {
    "fused_update": functools.partial(_rule, "fused_update"),
    "chunk_update": functools.partial(_rule, "chunk_update", T=70),
    "replay_update": functools.partial(_rule, "replay_update"),
    "causal_conv1d": _conv,
    "fused_layer_step": _layer_step,
}


@pytest.mark.parametrize("name", OPS)
def test_a_slot_past_32_bits_is_multiplied_in_64(name):
    """By the elements or the bytes that a slot has."""
    P, HV = 1_000_000 if name == "causal_conv1d" else 50_000, 3
    call, shapes = OPS[name](P, 5, HV)
    pools = [x for x in jax.tree.leaves(shapes[0]) if x.size > 2**31]
    assert pools
    ptx = "".join(aot.compile_for_h200(call, *shapes, donate_argnums=0).ptx)
    for pool in pools:
        stride = pool.size // P
        narrow = re.findall(rf"m(?:ul|ad)\.lo\.\w32.*, {stride}\b.*", ptx)
        assert not narrow, narrow
        size = stride * pool.dtype.itemsize
        assert re.search(rf"m(?:ul|ad)\.wide\.\w32.*, ({stride}|{size})\b", ptx)


@pytest.mark.parametrize(("N", "HV"), [(1024, 64), (70_000, 1)])
@pytest.mark.parametrize("name", OPS)
def test_many_rows_and_heads_stay_within_a_launch_grid(name, N, HV):
    call, shapes = OPS[name](N, N, HV)
    grids = re.findall(r"grid_[yz] = (\d+)", aot.lower(call, *shapes))
    assert grids and max(map(int, grids)) <= GRID_LIMIT
