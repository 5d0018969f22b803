"""Calls that cannot run here name the way out; None takes what can run; a call of
nothing runs anywhere."""

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from good_calls import (
    DENSE,
    DRAFTS,
    HV,
    PACKED,
    POOL,
    ROWS,
    H,
    K,
    N,
    T,
    V,
    fused,
    gates,
    ints,
    recurrent,
    tokens,
    zeros,
)

import gdn_jax


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_a_config_may_be_given_where_it_may_count(implementation):
    """And under None also where `xla` runs in the end."""
    config = gdn_jax.LaunchConfig(8, 4)
    call = ROWS | dict(config=config, implementation=implementation)
    assert jax.eval_shape(lambda: fused(call))[1].shape == (N, T, HV, V)


@pytest.fixture
def on_cpu():
    """Arrays made here lie on a CPU, on a machine with a GPU as well."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.parametrize("function", [fused, recurrent, gates])
def test_triton_without_a_gpu_names_the_way_out(function, on_cpu):
    with pytest.raises(NotImplementedError, match=r"GPU.*implementation='xla'"):
        function(DENSE | dict(implementation="triton"))


WIDE = ROWS | dict(
    state=zeros(N, HV, V, 512), q=zeros(N, T, H, 512), k=zeros(N, T, H, 512)
)


@pytest.mark.parametrize("implementation", ["triton", "interpret"])
def test_a_head_too_wide_for_the_kernel_names_the_way_out(implementation):
    with (
        jax.sharding.use_abstract_mesh(aot.ABSTRACT_H200),
        pytest.raises(NotImplementedError, match=r"K=512.*implementation='xla'"),
    ):
        jax.eval_shape(lambda: fused(WIDE | dict(implementation=implementation)))


@pytest.mark.parametrize(("call", "has_kernel"), [(ROWS, True), (WIDE, False)])
def test_none_takes_the_kernel_where_it_can_run(call, has_kernel):
    assert (aot.KERNEL_CALL in aot.lower(lambda: fused(call))) is has_kernel


def test_none_is_xla_on_a_cpu(on_cpu):
    call = jax.tree.map(jnp.ones_like, ROWS)
    got, want = (fused(call | dict(implementation=x)) for x in (None, "xla"))
    for x, y in zip(got, want, strict=True):
        assert np.array_equal(x, y)


EMPTY = {
    "no tokens, dense": ROWS | tokens(N, 0),
    "no tokens, packed": PACKED | tokens(0),
    "no tokens, single": POOL | tokens(0) | dict(slots=ints(0)),
    "no rows, dense": DENSE | tokens(0, T) | dict(slots=ints(0)),
    "no rows, packed": PACKED | dict(slots=ints(0), cu_seqlens=ints(1)),
    "no slots": PACKED | dict(state=zeros(0, HV, V, K)),
    "no slots, drafts": DRAFTS | dict(state=zeros(0, HV, V, K)),
}


@pytest.mark.parametrize("call", EMPTY.values(), ids=EMPTY)
def test_an_empty_call_gives_zeros_and_the_state_back(call, path):
    call = {k: np.ones_like(x) if k in ("state", "v") else x for k, x in call.items()}
    state, out = fused(call | dict(implementation=path))
    assert np.array_equal(state, call["state"])
    assert out.shape == call["v"].shape
    assert not out.any()


@pytest.mark.parametrize("call", EMPTY.values(), ids=EMPTY)
def test_an_empty_call_gives_a_zero_state_for_each_token(call, path):
    states, out = fused(call | dict(implementation=path, per_token_states=True))
    assert states.shape == (*call["v"].shape[:-1], V, K)
    assert not states.any()
    assert not out.any()
