"""What a replay call compiles to for an H200, without a GPU."""

import aot
import jax
import jax.numpy as jnp
import pytest

from gdn_jax import ReplayState, replay_update

P, H, HV, K, V = 40, 16, 32, 128, 128


def compiled(
    N,
    T,
    dtype,
    *,
    window=16,
    act="bfloat16",
    packed=False,
    implementation="triton",
):
    def array(*shape, dtype=act):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    options = dict(dtype=dtype, window=window, key_dtype=act)
    state = jax.eval_shape(lambda: ReplayState.zeros(P, H, HV, K, V, **options))
    lead = (N * T,) if packed else (N, T)
    keys, logits = array(*lead, H, K), array(*lead, HV)
    heads, rows = array(HV, dtype="float32"), array(N, dtype="int32")
    tokens = keys, keys, array(*lead, HV, V), heads, logits, logits, heads
    tables = dict(slots=rows, num_accepted=rows)
    if packed:
        tables["cu_seqlens"] = array(N + 1, dtype="int32")

    def step(state, tokens, tables):
        options = tables | dict(implementation=implementation)
        return replay_update(state, *tokens, **options)

    return state, aot.compile_for_h200(step, state, tokens, tables, donate_argnums=0)


def prepared_bytes(T, R=16):
    """Of a row, what the first kernel leaves to the second; keys are bfloat16."""
    W = max(8, 2 * T)
    of_key_head, of_value_head = 2 * R * K + 4 * R * W, 4 * (R + 1 + 2 * W + W * W)
    return 4 * 6 + H * of_key_head + HV * of_value_head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 4, 8])
def test_a_step_of_dense_rows_is_two_launches_in_place_without_spills(T, dtype):
    state, found = compiled(32, T, dtype)
    assert len(found.launches()) == 2
    assert all(aot.KERNEL_CALL in line for line in found.launches())
    assert not any(aot.copies(found, each) for each in state)
    whole = sum(x.size * x.dtype.itemsize for x in state)
    assert found.alias_bytes == whole
    assert found.temp_bytes < 32 * prepared_bytes(T) + 4096  # which are aligned
    assert found.resources()["spills"] == 0


@pytest.mark.parametrize(
    "call",
    [
        dict(packed=True, implementation=None),
        dict(packed=True, window=32),
        dict(act="float32"),
    ],
    ids=str,
)
def test_no_other_call_copies_states_or_spills(call):
    state, found = compiled(32, 4, "float32", **call)
    kernels = [line for line in found.launches() if aot.KERNEL_CALL in line]
    assert len(kernels) == 2
    large = (each for each in state if each.size > 10**5)
    assert not any(aot.copies(found, each) for each in large)
    assert found.resources()["spills"] == 0


def test_counts_of_plain_numbers_lower():
    """As `jnp.where(drafted, 3, 1)` makes them: of a weak type, to JAX."""

    def step(state, tokens, drafted):
        accepted = jnp.where(drafted, 3, 1)
        return replay_update(
            state, *tokens, num_accepted=accepted, implementation="triton"
        )

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    state = jax.eval_shape(lambda: ReplayState.zeros(3, 1, 2, 32, 32))
    keys, logits, heads = array(3, 4, 1, 32), array(3, 4, 2), array(2)
    tokens = keys, keys, array(3, 4, 2, 32), heads, logits, logits, heads
    drafted = jax.ShapeDtypeStruct((3,), jnp.bool_)
    assert aot.KERNEL_CALL in aot.lower(step, state, tokens, drafted)
