"""T tokens in one call against T calls of one token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing
from gdn_jax.ops.gated_delta import arguments
from gdn_jax.ops.gated_delta.call import GateLogits, GateOptions
from gdn_jax.ops.gated_delta.triton import triton

CONFIG = gdn_jax.LaunchConfig(block_v=8, lanes_v=4, tiles=2)
BIT_EXACT = ("interpret", "triton")


def _equal(path, got, want):
    got, want = np.asarray(got), np.asarray(want)
    if path in BIT_EXACT:
        assert np.array_equal(got, want)
    else:
        assert testing.relative_error(got, want) < 1e-6


@functools.partial(jax.jit, static_argnames="path")
def _update(state, tokens, constants, slots, path, **kwargs):
    q, k, v, a, b = tokens
    config = CONFIG if path in BIT_EXACT else None
    A_log, dt_bias = constants
    return gdn_jax.fused_update(
        state, q, k, v, A_log, a, b, dt_bias,
        slots=slots, out_dtype=jnp.float32, implementation=path, config=config,
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("T", "kda"), [(2, False), (4, False), (5, False), (9, False), (5, True)]
)
def test_dense_call_equals_single_steps(path, T, kda):
    case = testing.Case("steps", (T, T), H=4 if kda else 2, K=64, V=32, kda=kda)
    (state, q, k, v, A_log, a, b, dt_bias), kwargs = testing.make(case, 1)
    slots = kwargs["slots"]
    tokens, constants = (q, k, v, a, b), (A_log, dt_bias)
    want, outs = jnp.asarray(state), []
    for t in range(T):
        step = tuple(x[:, t] for x in tokens)
        want, out = _update(want, step, constants, slots, path)
        outs.append(out)
    got, out = _update(state, tokens, constants, slots, path)
    _equal(path, got[slots], want[slots])
    _equal(path, out, jnp.stack(outs, 1))


def test_verify_equals_single_steps(path):
    """Every checkpoint of a ragged verify, and a step from each accepted count."""
    case = testing.Case(
        "verify",
        (4, 9, 2, 3),
        K=64,
        V=32,
        tokens="packed",
        slots="checkpoints",
        columns=9,
    )
    (state, *tokens, dt_bias), kwargs = testing.make(case, 2)
    q, k, v, A_log, a, b = tokens
    got, out = _update(
        state, (q, k, v, a, b), (A_log, dt_bias), kwargs["slots"], path,
        cu_seqlens=kwargs["cu_seqlens"], num_accepted=kwargs["num_accepted"],
    )  # fmt: skip
    for n in range(case.N):
        slot = kwargs["slots"][n, kwargs["num_accepted"][n] - 1]
        single = jnp.asarray(state)
        for t in range(case.lengths[n]):
            at = kwargs["cu_seqlens"][n] + t
            step = tuple(x[at : at + 1] for x in (q, k, v, a, b))
            single, one = _update(single, step, (A_log, dt_bias), slot[None], path)
            _equal(path, got[kwargs["slots"][n, t]], single[slot])
            _equal(path, out[at], one[0])


def test_a_row_has_the_same_bits_alone_and_in_any_batch(path):
    """Under one pinned config, whether the others are there, live or null."""
    case = testing.Case("batch", (1,) * 4, K=64, V=32, tokens="single")
    (state, *tokens, dt_bias), kwargs = testing.make(case, 3)
    q, k, v, A_log, a, b = tokens
    slots = kwargs["slots"]
    others = np.where(np.arange(4) == 2, -1, slots)
    call = functools.partial(_update, path=path)
    everyone, out = call(state, (q, k, v, a, b), (A_log, dt_bias), slots)
    with_null, same = call(state, (q, k, v, a, b), (A_log, dt_bias), others)
    alone, one = call(
        state, tuple(x[1:2] for x in (q, k, v, a, b)), (A_log, dt_bias), slots[1:2]
    )
    for got, row in ((with_null, same[1]), (alone, one[0])):
        _equal(path, got[slots[1]], everyone[slots[1]])
        _equal(path, row, out[1])


@pytest.mark.parametrize(
    "name",
    [
        "decode, nulls",
        "decode, odd dims",
        "decode, K=96 V=192",
        "decode, KDA",
        "checkpoints, T=1",
    ],
)
def test_the_kernel_without_its_loop_agrees_too(name):
    """One token a row takes this path on a GPU; here it is interpreted."""
    [case] = [case for case in testing.CASES if case.name == name]
    (state, *tokens), kwargs = testing.make(case)
    want_state, want_out, written = testing.oracle((state, *tokens), kwargs)
    q, k, v, A_log, a, b, dt_bias = tokens
    x, options, unpack = arguments.pack(
        state, q, k, v,
        arguments.floating_gates(GateLogits, A_log, a, b, dt_bias),
        slots=kwargs["slots"], cu_seqlens=None,
        num_accepted=kwargs.get("num_accepted"), has_state=kwargs.get("has_state"),
        null_slot=None, scale=None, qk_l2norm=True, per_token_states=False,
        out_dtype=jnp.float32, gating=GateOptions(),
    )  # fmt: skip
    new, out = triton(x, options, CONFIG, interpret=True, straight=True)
    assert testing.relative_error(new[written], want_state[written]) < 1e-6
    assert testing.relative_error(unpack(out), want_out) < 1e-6
    untouched = np.asarray(new)[~written]
    assert np.array_equal(untouched, state[~written], equal_nan=True)
