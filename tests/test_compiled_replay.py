"""What a replay call compiles to for an H200, without a GPU."""

import aot
import jax
import jax.numpy as jnp
import pytest

from gdn_jax import ReplayState, replay_update

P, H, HV, K, V = 40, 16, 32, 128, 128


def compiled(N, T, dtype):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    state = jax.eval_shape(lambda: ReplayState.zeros(P, H, HV, K, V, dtype=dtype))
    keys, logits = array(N, T, H, K), array(N, T, HV)
    heads, rows = array(HV, dtype=jnp.float32), array(N, dtype=jnp.int32)
    tokens = keys, keys, array(N, T, HV, V), heads, logits, logits, heads

    def step(state, tokens, slots, num_accepted):
        tables = dict(slots=slots, num_accepted=num_accepted)
        return replay_update(state, *tokens, **tables, implementation="triton")

    return state, aot.compile_for_h200(
        step, state, tokens, rows, rows, donate_argnums=0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 4, 8])
def test_a_step_is_two_launches_in_place_without_spills(T, dtype):
    state, found = compiled(32, T, dtype)
    assert len(found.launches()) == 2
    assert all(aot.KERNEL_CALL in line for line in found.launches())
    assert not any(aot.copies(found, each) for each in state)
    whole = sum(x.size * x.dtype.itemsize for x in state)
    assert found.alias_bytes == whole
    assert found.temp_bytes < 1024
    assert found.resources()["spills"] == 0
