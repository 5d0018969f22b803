"""A layer's step on replay's states in fused kernels, against the ops in turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_steps import KERNELS
from replay_step_calls import CASES, FRESH, FRESH_AT, N, P, make

from gdn_jax import (
    ConvState,
    fused_layer_step,
    testing,
)

pytestmark = pytest.mark.usefixtures("exact_products")


@functools.cache
def jitted(implementation, case, config=None):
    def run(state, tokens, options):
        options |= dict(implementation=implementation, config=config)
        options |= dict(layout=case.layout, activation=case.activation)
        options |= dict(null_slot=0) if case.null_slot else {}
        return fused_layer_step(state, *tokens, **options)

    # the ops one after another round what they hand on; a GPU's compiler need not
    options = {"xla_allow_excess_precision": False}
    return jax.jit(run, donate_argnums=0, compiler_options=options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_agree_with_the_ops_one_after_another(case, kernel):
    """Null rows, which leave their slots alone, among others, rings round and round;
    one begins afresh where anything lies. Inputs of the convolution exactly."""
    (got, step), (want, _) = make(case), make(case)
    run = jitted(kernel, case, case.config)
    in_turn = jitted("reference", case)
    folds = 0
    for number in range(22):
        pending = np.array(got[1].pending)
        tokens, options, nulls, nobody = step(number, pending)
        if "has_state" in options and number == FRESH_AT:
            got, want = (spoilt(state, options) for state in (got, want))
        before = jax.tree.map(np.array, got)
        got, out = run(got, tokens, options)
        want, wanted = in_turn(want, tokens, options)
        if number == 0:
            slots, own_slots = slots_of(options)
        live = np.setdiff1d(np.arange(N), nulls)
        used, own = slots[live], own_slots[live]
        for name in ("start", "committed", "pending"):
            assert np.array_equal(getattr(got[1], name), getattr(want[1], name))
        rings = [
            ConvState(conv.buffer[own_slots], conv.start[own_slots]).to_dense(
                case.width
            )
            for conv in (got[0], want[0])
        ]
        assert np.array_equal(*rings)
        error = testing.relative_error(
            got[1].to_dense()[used], want[1].to_dense()[used]
        )
        assert error < 2 * testing.TOLERANCE["chunked state", case.state_dtype]
        error = testing.relative_error(out, wanted)
        assert error < 2 * testing.TOLERANCE["chunked out", case.act_dtype]
        assert not np.array(out)[nobody].any()
        unnamed = (np.setdiff1d(np.arange(P), named) for named in (own, used))
        for old, new, others in zip(before, got, unnamed, strict=True):
            for x, y in zip(old, jax.tree.map(np.array, new), strict=True):
                assert np.array_equal(x[others], y[others], equal_nan=True)
        changed = before[1].checkpoint != np.array(got[1].checkpoint)
        folded = changed.any(axis=(1, 2, 3))
        folded[slots[FRESH]] &= number != FRESH_AT
        folds += folded.sum()
    assert folds


def slots_of(options):
    """Of the rule and of the convolution."""
    slots, own = options["slots"], options["conv_slots"]
    return slots, slots if own is None else own


def spoilt(state, options):
    """With anything in the slot of the row that begins afresh."""
    conv, recurrent = state
    slots, own = slots_of(options)
    conv = conv._replace(buffer=conv.buffer.at[own[FRESH]].set(jnp.nan))
    values = {jnp.dtype("int32"): 77}
    recurrent = jax.tree.map(
        lambda x: x.at[slots[FRESH]].set(values.get(x.dtype, jnp.nan)), recurrent
    )
    return conv, recurrent
