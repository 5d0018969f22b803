"""Any ragged speculative batch, nonsense included, against the oracle."""

import functools
import itertools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import gdn_jax
from gdn_jax import testing

# Values are drawn, shapes are not: each path compiles once.
N, S, L, P, NULL_SLOT = 4, 3, 10, 16, 0
CASE = testing.Case(
    "any", (1,) * L, tokens="single", H=1, HV=2, K=16, V=8, act_dtype="float32"
)


@functools.cache
def _update(path):
    return jax.jit(
        functools.partial(
            gdn_jax.fused_update, null_slot=NULL_SLOT, implementation=path
        )
    )


def _ranges(cu_seqlens):
    """The tokens of each row."""
    bounds = np.clip(cu_seqlens, 0, L)
    return [range(b, e) for b, e in itertools.pairwise(bounds)]


def _no_token_has_two_rows(cu_seqlens):
    tokens = [t for row in _ranges(cu_seqlens) for t in row]
    return len(tokens) == len(set(tokens))


def _many(size, values):
    return st.lists(values, min_size=size, max_size=size)


@st.composite
def batches(draw):
    """(arguments, keywords) with NaN wherever nothing may be read."""
    bounds = _many(N + 1, st.integers(-3, L + 3))
    falling = bounds.filter(_no_token_has_two_rows)
    cu_seqlens = draw(bounds.map(sorted) | falling)
    accepted = draw(_many(N, st.integers(1, S) | st.integers(-1, S + 2)))
    has_state = draw(_many(N, st.booleans()))
    own = np.array(draw(st.permutations(range(P)))[: N * S], np.int32).reshape(N, S)
    for at in draw(st.sets(st.sampled_from(list(np.ndindex(N, S))), max_size=5)):
        own[at] = draw(st.sampled_from((-1, NULL_SLOT, P, P + 7)))

    slots = np.roll(own, 1, axis=0)  # what a row does not use names another row's slot
    dead_slots, dead_tokens = np.ones(P, bool), np.ones(L, bool)
    for n, tokens in enumerate(_ranges(cu_seqlens)):
        column = accepted[n] - 1
        if not tokens or not 0 <= column < S:
            continue
        slots[n, column] = read = own[n, column]
        if 0 <= read < P and read != NULL_SLOT:
            slots[n, : len(tokens)] = own[n, : len(tokens)]
            dead_slots[read] = not has_state[n]
            dead_tokens[tokens] = False

    (_, q, k, v, A_log, a, b, dt_bias), _ = testing.make(CASE)
    q, k, v, a, b = (x.copy() for x in (q, k, v, a, b))
    state = np.random.default_rng(0).standard_normal((P, CASE.HV, CASE.V, CASE.K))
    state[dead_slots] = np.nan
    for x in (q, k, v, a, b):
        x[dead_tokens] = np.nan
    return (state.astype(np.float32), q, k, v, A_log, a, b, dt_bias), dict(
        slots=slots,
        cu_seqlens=np.array(cu_seqlens, np.int32),
        num_accepted=np.array(accepted, np.int32),
        has_state=np.array(has_state),
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(batch=batches())
def test_any_speculative_batch_agrees_with_the_oracle(path, batch):
    args, kwargs = batch
    want_state, want_out, written = testing.oracle(
        args, kwargs | dict(null_slot=NULL_SLOT)
    )
    state, out = map(np.asarray, _update(path)(*args, **kwargs))

    tolerance = testing.TOLERANCE["state", "float32"]
    assert testing.relative_error(state[written], want_state[written]) < tolerance
    tolerance = testing.TOLERANCE["out", "float32"]
    assert testing.relative_error(out, want_out) < tolerance
    assert not out[want_out == 0].any()
    untouched = args[0][~written]
    assert np.array_equal(state[~written].view(np.int32), untouched.view(np.int32))
