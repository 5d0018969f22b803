"""What a layer's step compiles to for an H200, without a GPU."""

import functools

import aot
import jax
import jax.numpy as jnp
import pytest

from gdn_jax import ConvState, LayerStepConfig, ReplayState, fused_layer_step
from gdn_jax.ops.layer_step import tuning
from gdn_jax.ops.layer_step.tuning import MAX_PROGRAMS

TAKEN = {  # launches that a layer takes on an H200
    (row.group, row.tokens, row.state_dtype, row.replay, row.config): row
    for row in tuning.table("NVIDIA H200")
    if row.pays
}
LAYOUTS = "flat", "interleaved"
P, H, K, V, W = 70, 16, 128, 128, 4


def compiled(
    N,
    T,
    dtype,
    *,
    layout="flat",
    pair=False,
    packed=False,
    act="bfloat16",
    group=2,
    replay=False,
    implementation="triton",
    **kw,
):
    """(state, what was compiled), of T tokens a row, T - 1 of which are drafts."""

    def array(*shape, dtype=act):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    HV = group * H
    C = 2 * H * K + HV * V
    conv = ConvState(array(P, C, W - 1 + T), array(P, dtype="int32"))
    pool = array(P * T, HV, V, K, dtype=dtype)
    if replay:
        make = functools.partial(ReplayState.zeros, P, H, HV, K, V, dtype=dtype)
        pool = jax.eval_shape(functools.partial(make, key_dtype=act))
    state = conv, pool
    lead = (N * T,) if packed else (N, T)
    heads, rows = array(HV, dtype="float32"), array(N, dtype="int32")
    qkvz, ba = array(*lead, C + HV * V), array(*lead, 2 * HV)
    if pair:
        qkvz, ba = (array(*lead, C), array(*lead, HV * V)), (array(*lead, HV),) * 2
    arrays = dict(conv_weight=array(C, W), A_log=heads, dt_bias=heads)
    arrays |= dict(norm_weight=array(V), slots=rows)
    if T > 1:
        arrays["num_accepted"] = rows
        if not replay:
            arrays |= dict(slots=array(N, T, dtype="int32"), conv_slots=rows)
    if packed:
        arrays["cu_seqlens"] = array(N + 1, dtype="int32")

    def step(state, qkvz, ba, arrays):
        options = dict(layout=layout, implementation=implementation)
        return fused_layer_step(state, qkvz, ba, **options, **kw, **arrays)

    found = aot.compile_for_h200(step, state, qkvz, ba, arrays, donate_argnums=0)
    return state, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "call",
    [
        dict(T=1, pair=True, config=LayerStepConfig(32, 2, 4)),
        dict(T=4, config=LayerStepConfig(128, 2, 16)),
        dict(
            T=4, packed=True, layout="interleaved", config=LayerStepConfig(128, 2, 16)
        ),
    ],
    ids=str,
)
def test_a_step_is_one_launch_in_place_without_spills(call, dtype):
    state, found = compiled(8, dtype=dtype, **call)
    [launch] = found.launches()
    assert aot.KERNEL_CALL in launch
    check_memory(state, found)


@pytest.mark.parametrize(
    ("group", "T", "dtype", "replay", "config", "layout"),
    [
        (*launch, layout)
        for launch in TAKEN
        for layout in LAYOUTS
        if layout == "flat" or launch[0] == 2  # as Qwen3-Next has it
    ],
    ids=str,
)
def test_what_a_layer_takes_is_as_many_launches_as_the_table_says(
    group, T, dtype, replay, config, layout
):
    """Of replay's, two kernels and what scales: beside the states and sums of squares
    there is then what the first leaves for the second.

    Where a call has as many warps for each of 132 multiprocessors, registers leave room
    for two programs of eight, or three of four, as they did where the launch was
    measured: with room for one of eight nothing hides its waits. Replay's two kernels
    have launches of several sizes, and no such bound."""
    HV = group * H
    N = max(1, TAKEN[group, T, dtype, replay, config].programs // HV)
    call = dict(group=group, replay=replay, config=config)
    pair = layout == "flat"
    state, found = compiled(N, T, dtype, layout=layout, pair=pair, **call)
    kernels, scales = 1, replay or config.programs > 1
    beside = N * T * HV * (V + MAX_PROGRAMS) * 4 if scales else 0
    if replay:
        kernels, beside = 2, 11 * 2**20
    calls = [aot.KERNEL_CALL in launch for launch in found.launches()]
    assert calls == [True] * kernels + [False] * scales
    check_memory(state, found, beside)
    if not replay:
        warps = config.num_warps
        of_call = warps * -(-N * HV * config.programs // 132)
        registers = -8 * (-found.resources()["registers"] // 8)  # as they are given out
        assert 2**16 // (32 * warps * registers) * warps >= min(12, of_call)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("launch", [(32, 2, 4, 4), (64, 2, 8, 2), (16, 2, 4, 8)])
def test_two_rows_of_many_heads_do_not_spill(launch, packed):
    """Of two rows a number is a predicate to ptxas, if it is bounded by min: `sass`
    found the first of these wrong."""
    call = dict(group=4, pair=True, packed=packed, config=LayerStepConfig(*launch))
    assert compiled(2, 4, "bfloat16", **call)[1].resources()["spills"] == 0


@pytest.mark.parametrize(
    ("N", "T", "dtype", "act", "layout"),
    [
        (64, 4, "bfloat16", "bfloat16", "interleaved"),
        (8, 7, "float32", "float32", "flat"),
    ],
)
def test_heads_that_programs_share_out_are_scaled_in_a_second_launch(
    N, T, dtype, act, layout
):
    """As the table has it for more rows than a layer takes it for, and the heuristic
    for as many tokens as eight warps take, which hold the most then. Beside the states
    there are out and the programs' sums of squares."""
    state, found = compiled(N, T, dtype, act=act, layout=layout)
    kernel, scaling = found.launches()
    assert aot.KERNEL_CALL in kernel and aot.KERNEL_CALL not in scaling
    check_memory(state, found, beside=N * T * 2 * H * (V + MAX_PROGRAMS) * 4)


@pytest.mark.parametrize(
    ("T", "dtype", "layout"),
    [
        (1, "float32", "interleaved"),
        (4, "float32", "flat"),
        (4, "bfloat16", "interleaved"),
        (8, "bfloat16", "flat"),
    ],
)
def test_a_step_of_replay_is_three_launches_in_place_without_spills(T, dtype, layout):
    """What lies between them is for 8 tokens of 32 rows some 10 MB."""
    state, found = compiled(32, T, dtype, layout=layout, replay=True)
    first, second, scaling = found.launches()
    assert aot.KERNEL_CALL in first and aot.KERNEL_CALL in second
    assert aot.KERNEL_CALL not in scaling
    check_memory(state, found, beside=11 * 2**20)


def test_packed_rows_of_replay_copy_no_states_and_do_not_spill():
    state, found = compiled(32, 4, "float32", packed=True, replay=True)
    large = (leaf for leaf in jax.tree.leaves(state) if leaf.size > 10**5)
    assert not any(aot.copies(found, leaf) for leaf in large)
    assert found.resources()["spills"] == 0


def check_memory(state, found, beside=0):
    """Both states in place, and nothing but `beside` them and the result."""
    leaves = jax.tree.leaves(state)
    assert not any(aot.copies(found, leaf) for leaf in leaves)
    assert found.alias_bytes == sum(x.size * x.dtype.itemsize for x in leaves)
    assert found.temp_bytes <= beside + 4096
    assert found.resources()["spills"] == 0
