"""A call of every op that keeps states in slots, as shapes, to be compiled."""

import functools

import jax
import jax.numpy as jnp

import gdn_jax
from gdn_jax import ConvState, ReplayState

H, K, V, W = 1, 128, 128, 4


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
