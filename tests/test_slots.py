"""One null rule for every op that keeps states in slots: the sentinels that callers pad
their batches with, counts that no step can have, and slots like any other."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import ConvState, ReplayState

P, T, S, H, HV, K, V, W = 9, 2, 3, 1, 2, 16, 16, 4
C = 2 * H * K + HV * V


def _normal(*shape, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


PER_HEAD = dict(A_log=_normal(HV, seed=1), dt_bias=_normal(HV, seed=2))
FILTER = _normal(C, W, seed=3)
POOL = 0.1 * _normal(P, HV, V, K, seed=4)
RING = ConvState(_normal(P, C, W - 1 + S, seed=5), jnp.arange(P, dtype=jnp.int32) % W)


def _rule(function):
    def call(state, tokens, **keywords):
        q, k, v, a, b = tokens
        return function(state, q, k, v, a=a, b=b, **PER_HEAD, **keywords)

    return call


def _conv(state, tokens, **keywords):
    return gdn_jax.causal_conv1d(state, *tokens, FILTER, **keywords)


def _layer_step(state, tokens, **keywords):
    weights = dict(conv_weight=FILTER, norm_weight=jnp.ones(V), **PER_HEAD)
    weights |= dict(layout="interleaved")
    return gdn_jax.fused_layer_step(state, *tokens, **weights, **keywords)


@dataclasses.dataclass(frozen=True)
class Op:
    """`tokens`: shapes of what it reads of one. `counts`: it has `num_accepted`, and
    `table`: with that a slot for each of S tokens."""

    state: Any
    tokens: tuple[tuple[int, ...], ...]
    call: Callable
    counts: bool = True
    table: bool = False


RULE = (H, K), (H, K), (HV, V), (HV,), (HV,)
OPS = {
    "fused_update": Op(POOL, RULE, _rule(gdn_jax.fused_update), table=True),
    "chunk_update": Op(POOL, RULE, _rule(gdn_jax.chunk_update), counts=False),
    "replay_update": Op(
        ReplayState.from_dense(POOL, num_key_heads=H, key_dtype=jnp.float32),
        RULE,
        _rule(gdn_jax.replay_update),
    ),
    "causal_conv1d": Op(RING, ((C,),), _conv),
    "fused_layer_step": Op(
        (RING, POOL), ((C + HV * V,), (2 * HV,)), _layer_step, table=True
    ),
}
EVERY_OP = pytest.mark.parametrize("name", OPS)


@functools.partial(jax.jit, static_argnames=("name", "path", "null_slot"))
def _run(state, tokens, tables, *, name, path, null_slot=None):
    options = dict(implementation=path, null_slot=null_slot)
    return OPS[name].call(state, tokens, **tables, **options)


def _tokens(name, rows, count, dead=(), seed=0):
    """Of `dead` rows NaN."""
    shapes = OPS[name].tokens
    made = (_normal(rows, count, *x, seed=seed + i) for i, x in enumerate(shapes))
    return [x.at[jnp.array(dead, int)].set(jnp.nan) for x in made]


def _spoiled(state, slots):
    """NaN in slots whose values nothing may read."""
    return jax.tree.map(
        lambda x: x.at[jnp.array(slots)].set(jnp.nan) if x.ndim > 1 else x, state
    )


def _check_rows(out, live, dead):
    out = np.asarray(out)
    assert np.isfinite(out).all() and not out[dead].any()
    assert all(row.any() for row in out[live])


def _check_bits(before, after, slots=slice(None)):
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        x, y = (np.ascontiguousarray(np.asarray(z)[slots]) for z in (x, y))
        assert np.array_equal(x.view(np.uint8), y.view(np.uint8))


@EVERY_OP
def test_a_reserved_slot_and_numbers_of_no_slot_are_null_alike(name, path):
    """Callers pad with 0, with -1 and with what lies past the pool, in one batch too;
    by their remainders some of these would be the slots of live rows."""
    run = functools.partial(_run, name=name, path=path)
    slots = np.array([3, 0, -1, 5, P, 3 - P, 5 + P, -(2**31)], np.int32)
    live, dead = [0, 3], [1, 2, 4, 5, 6, 7]
    others = np.setdiff1d(np.arange(P), slots[live])
    state = _spoiled(OPS[name].state, others)
    tokens = _tokens(name, len(slots), T, dead)
    new, out = run(state, tokens, dict(slots=slots), null_slot=0)
    _check_rows(out, live, dead)
    _check_bits(state, new, others)

    slots[dead] = -1
    wanted = run(state, tokens, dict(slots=slots), null_slot=0)
    _check_bits((new, out), wanted)


@EVERY_OP
@pytest.mark.parametrize("live", [[5], []], ids=["one live", "none live"])
def test_rows_that_fill_a_batch_may_outnumber_the_slots(name, path, live):
    """As where a program that was compiled for many rows serves few, or waits."""
    N = 2 * P
    state = _spoiled(OPS[name].state, np.setdiff1d(np.arange(P), [P - 1][: len(live)]))
    slots, dead = np.full(N, -1, np.int32), np.setdiff1d(np.arange(N), live)
    slots[live] = P - 1
    tokens = _tokens(name, N, T, dead)
    new, out = _run(state, tokens, dict(slots=slots), name=name, path=path)
    _check_rows(out, live, dead)
    others = np.arange(P - len(live))
    _check_bits(state, new, others)


@EVERY_OP
def test_slot_0_is_one_like_any_other_where_none_is_reserved(name, path):
    """And so is the pool's last."""
    run = functools.partial(_run, name=name, path=path)
    first, second = np.array([0, P - 1], np.int32), np.array([4, 2], np.int32)
    state, tokens = OPS[name].state, _tokens(name, 2, T)
    moved = jax.tree.map(lambda x: x.at[second].set(x[first]), state)
    new, out = run(state, tokens, dict(slots=first))
    want_state, want = run(moved, tokens, dict(slots=second))
    _check_rows(out, [0, 1], [])
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(want_state), strict=True)
    assert np.array_equal(out, want)
    assert all(np.array_equal(x[first], y[second]) for x, y in pairs)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.counts])
def test_a_count_that_no_step_can_have_makes_a_row_null(name, path):
    run = functools.partial(_run, name=name, path=path)
    counts = np.array([1, 0, S, S + 1, -1, 2**31 - 1], np.int32)
    live, dead = [0, 2], [1, 3, 4, 5]
    op, N = OPS[name], len(counts)
    slots = np.random.default_rng(0).permutation(N * S).astype(np.int32).reshape(N, S)
    slots = slots if op.table else slots[:, 0]
    state = jax.tree.map(lambda x: jnp.concatenate([x, x]), op.state)
    if name == "replay_update":  # so that S tokens are pending
        state, _ = run(state, _tokens(name, N, S, seed=7), dict(slots=slots))
    others = np.setdiff1d(np.arange(2 * P), slots[live])
    state, tokens = _spoiled(state, others), _tokens(name, N, S, dead)
    new, out = run(state, tokens, dict(slots=slots, num_accepted=counts))
    _check_rows(out, live, dead)
    _check_bits(state, new, others)

    slots[dead], counts[dead] = -1, 1
    wanted = run(state, tokens, dict(slots=slots, num_accepted=counts))
    _check_bits((new, out), wanted)
