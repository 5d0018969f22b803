"""A call of every op that keeps states in slots, as shapes: to compile and to run."""

import functools

import jax
import jax.numpy as jnp

import gdn_jax
from gdn_jax import ConvState, ReplayState

H, K, V, W = 1, 128, 128, 4


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _slots(N):
    return array(N, dtype="int32")


def _pool(P, HV):
    return array(P, HV, V, K, dtype="float32")


def _rule(op, P, N, HV, implementation="triton", T=1):
    function = getattr(gdn_jax, op)
    state = _pool(P, HV)
    if op == "replay_update":
        state = jax.eval_shape(lambda: ReplayState.zeros(P, H, HV, K, V))
    key, gate, head = array(N, T, H, K), array(N, T, HV), array(HV)
    tokens = key, key, array(N, T, HV, V), head, gate, gate, head

    def call(state, tokens, slots):
        return function(state, *tokens, slots=slots, implementation=implementation)

    return call, (state, tokens, _slots(N))


def _ring(P, HV):
    C = 2 * H * K + HV * V
    return ConvState(array(P, C, W), array(P, dtype="int32")), C


def _conv(P, N, HV, implementation="triton"):
    state, C = _ring(P, HV)

    def call(state, x, weight, slots):
        return gdn_jax.causal_conv1d(
            state, x, weight, slots=slots, implementation=implementation
        )

    return call, (state, array(N, 1, C), array(C, W), _slots(N))


def _layer_step(P, N, HV, implementation="triton"):
    conv, C = _ring(P, HV)
    weights = dict(
        conv_weight=array(C, W),
        A_log=array(HV),
        dt_bias=array(HV),
        norm_weight=array(V),
    )

    def call(state, qkvz, ba, weights, slots):
        return gdn_jax.fused_layer_step(
            *(state, qkvz, ba),
            layout="flat",
            slots=slots,
            implementation=implementation,
            **weights,
        )

    state, z = (conv, _pool(P, HV)), HV * V
    return call, (state, array(N, 1, C + z), array(N, 1, 2 * HV), weights, _slots(N))


# (P, N, HV, implementation) -> (a call, what it takes: the state first, slots last)
OPS = {
    "fused_update": functools.partial(_rule, "fused_update"),
    "chunk_update": functools.partial(_rule, "chunk_update", T=70),
    "replay_update": functools.partial(_rule, "replay_update"),
    "causal_conv1d": _conv,
    "fused_layer_step": _layer_step,
}
