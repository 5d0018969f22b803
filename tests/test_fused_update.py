"""Every implementation against the float64 oracle, over the table of cases."""

import functools

import jax
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing


@functools.cache
def _made(case: testing.Case):
    args, kwargs = testing.make(case, seed=len(case.name))
    return args, kwargs, testing.oracle(args, kwargs)


def _call(args, kwargs, path, **more):
    """Under jit with the pool donated, as the library is meant to be used."""
    static = {k: v for k, v in kwargs.items() if not isinstance(v, np.ndarray)}
    arrays = {k: v for k, v in kwargs.items() if isinstance(v, np.ndarray)}

    donated = () if kwargs.get("per_token_states") else (0,)

    @functools.partial(jax.jit, donate_argnums=donated)
    def update(state, rest, arrays):
        return gdn_jax.fused_update(
            state, *rest, **arrays, **static, implementation=path, **more
        )

    return jax.tree.map(np.asarray, update(jax.numpy.array(args[0]), args[1:], arrays))


def _bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_agrees_with_the_oracle(case, path):
    args, kwargs, (want_state, want_out, written) = _made(case)
    state, out = _call(args, kwargs, path)

    what = testing.TOLERANCE["out", out.dtype.name]
    assert testing.relative_error(out, want_out) < what
    what = testing.TOLERANCE["state", case.state_dtype]
    assert testing.relative_error(state[written], want_state[written]) < what

    assert not out[want_out == 0].any()
    if kwargs.get("per_token_states"):
        assert not state[~written].any()
    else:  # slots that no live row writes keep their bits
        assert np.array_equal(_bits(state[~written]), _bits(args[0][~written]))


def test_a_thousand_tokens_add_up_no_rounding(path):
    """A beta, decay or key that is rounded to bfloat16 on its way leaves 1e-3 in the
    state, and so would a state that is rounded between tokens."""
    case = testing.Case("long", (1000,), H=1, HV=2, K=16, V=16)
    args, kwargs, (want_state, want_out, written) = _made(case)
    state, out = _call(args, kwargs, path, out_dtype=np.float32)
    bar = testing.TOLERANCE["state", "float32"]
    assert testing.relative_error(state[written], want_state[written]) < bar
    assert testing.relative_error(out, want_out) < bar


def test_a_null_slot_outside_the_pool_names_none(path):
    paged, kwargs = testing.make(testing.Case("paged", (1,) * 2))
    _, out = _call(paged, kwargs | {"null_slot": 2**40}, path)
    assert out.any()
