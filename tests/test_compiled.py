"""What the kernel compiles to for an H200, on a machine without a GPU."""

import functools

import aot
import jax
import jax.numpy as jnp
import pytest

import gdn_jax
from gdn_jax.ops.gated_delta import tuning

ROWS = tuning.table("NVIDIA H200")
# In the last ones a lane may hold a head's whole tile.
ODD = [(64, 64), (96, 192), (192, 96), (256, 256), (100, 50)]
ODD += [(8, 1), (4, 1), (1, 1), (4, 3)]


def _shapes(
    N,
    H,
    HV,
    K,
    V,
    state,
    *,
    columns=None,
    packed=False,
    T=1,
    kda=False,
    fresh=False,
    paged=True,
):
    """Arguments of a call as shapes: (state, tokens, keywords)."""
    S, act = jax.ShapeDtypeStruct, jnp.bfloat16
    L = N * T
    kwargs = {"slots": S((N, columns) if columns else (N,), jnp.int32)} if paged else {}
    if fresh:
        kwargs["has_state"] = S((N,), jnp.bool_)
    if columns:
        kwargs["num_accepted"] = S((N,), jnp.int32)
    lead = (L,) if packed or T == 1 else (N, T)
    if packed:
        kwargs["cu_seqlens"] = S((N + 1,), jnp.int32)
    per_k = (K,) if kda else ()
    tokens = (
        S((*lead, H, K), act),
        S((*lead, H, K), act),
        S((*lead, HV, V), act),
        S((HV,), jnp.float32),
        S((*lead, HV, *per_k), act),
        S((*lead, HV), act),
        S((HV, *per_k), act),
    )
    P = N * (columns or 1) + 1 if paged else N
    return S((P, HV, V, K), jnp.dtype(state)), tokens, kwargs


def _update(state, tokens, kwargs, *, implementation="triton", config=None):
    return gdn_jax.fused_update(
        state, *tokens, **kwargs, implementation=implementation, config=config
    )


def _bytes(shape) -> int:
    return shape.size * shape.dtype.itemsize


def _one_launch_in_place(compiled: aot.Compiled, pool_bytes: int) -> None:
    [launch] = compiled.launches()
    assert aot.KERNEL_CALL in launch
    assert compiled.alias_bytes == pool_bytes
    assert compiled.temp_bytes <= 64  # a tuple of pointers, not a copy
    assert compiled.resources()["spills"] == 0


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r.K}-{r.V}-{r.state_dtype}-{r.walk}-{r.heads}"
)
def test_a_tuned_row_is_one_launch_in_place_without_spills(row):
    HV = 32 if row.K == 128 else 30
    modes = {} if row.walk == "one" else {"T": 4, "columns": 4}
    modes |= {"packed": True} if row.walk == "any" else {}
    H = HV // 2 if row.K == 128 else HV
    shapes = _shapes(row.heads // HV, H, HV, row.K, row.V, row.state_dtype, **modes)
    update = functools.partial(_update, config=row.config)
    assert aot.KERNEL_CALL in aot.lower(update, *shapes)
    compiled = aot.compile_for_h200(update, *shapes, donate_argnums=0)
    _one_launch_in_place(compiled, _bytes(shapes[0]))
    if row.heads > 32:  # one sequence leaves most of an SM empty anyway
        assert compiled.resources()["registers"] <= 128  # 16 warps on an SM


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize(("K", "V"), ODD)
def test_an_untuned_shape_compiles_without_spills(K, V, state):
    shapes = _shapes(3, 2, 6, K, V, state, T=3)
    compiled = aot.compile_for_h200(_update, *shapes, donate_argnums=0)
    _one_launch_in_place(compiled, _bytes(shapes[0]))


@pytest.mark.parametrize(
    "modes",
    [
        {"kda": True},
        {"kda": True, "T": 4, "columns": 4, "packed": True},
        {"T": 2, "columns": 4},
        {"T": 5, "packed": True},
        {"fresh": True},
        {"paged": False},
    ],
    ids=str,
)
def test_every_mode_is_one_launch_in_place(modes):
    H = 4 if modes.get("kda") else 2
    shapes = _shapes(3, H, 4, 128, 128, "float32", **modes)
    compiled = aot.compile_for_h200(_update, *shapes, donate_argnums=0)
    _one_launch_in_place(compiled, _bytes(shapes[0]))


def test_a_long_batch_needs_no_more_registers():
    """The programs that clear tokens of no row read `cu_seqlens` piece by piece."""
    shapes = _shapes(16384, 1, 1, 128, 128, "float32", T=2, packed=True)
    compiled = aot.compile_for_h200(_update, *shapes, donate_argnums=0)
    _one_launch_in_place(compiled, _bytes(shapes[0]))


def test_none_picks_triton_where_there_is_a_gpu():
    shapes = _shapes(2, 1, 2, 64, 64, "float32")
    default = functools.partial(_update, implementation=None)
    assert aot.KERNEL_CALL in aot.lower(default, *shapes)


def test_the_unfused_pair_is_two_launches():
    state, tokens, kwargs = _shapes(8, 2, 4, 128, 128, "float32")

    def pair(state, tokens, kwargs):
        q, k, v, A_log, a, b, dt_bias = tokens
        gates = gdn_jax.gates(A_log, a, b, dt_bias, implementation="triton")
        return gdn_jax.recurrent_update(
            state, q, k, v, *gates, **kwargs, implementation="triton"
        )

    compiled = aot.compile_for_h200(pair, state, tokens, kwargs, donate_argnums=0)
    assert len(compiled.launches()) == 2
    assert compiled.alias_bytes == _bytes(state)


@pytest.mark.parametrize("per_k", [(), (128,)], ids=["one decay", "KDA"])
def test_the_gates_are_one_launch_without_spills(per_k):
    S, act, HV = jax.ShapeDtypeStruct, jnp.bfloat16, 32
    shapes = (
        S((HV,), jnp.float32),
        S((8, HV, *per_k), act),
        S((8, HV), act),
        S((HV, *per_k), act),
    )
    gates = functools.partial(gdn_jax.gates, implementation="triton")
    compiled = aot.compile_for_h200(gates, *shapes)
    [launch] = compiled.launches()
    assert aot.KERNEL_CALL in launch
    assert compiled.resources()["spills"] == 0


def test_the_pool_stays_in_place_as_a_scan_carry():
    state, tokens, kwargs = _shapes(2, 2, 4, 128, 128, "float32")
    steps = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), tokens)
    constants = (tokens[3], tokens[6])

    def run(state, steps, constants, kwargs):
        def step(state, tokens):
            q, k, v, _, a, b, _ = tokens
            A_log, dt_bias = constants
            return _update(state, (q, k, v, A_log, a, b, dt_bias), kwargs)

        return jax.lax.scan(step, state, steps)

    compiled = aot.compile_for_h200(
        run, state, steps, constants, kwargs, donate_argnums=0
    )
    assert compiled.hlo.count(f'custom_call_target="{aot.KERNEL_CALL}"') == 1
    assert compiled.alias_bytes == _bytes(state)
    assert not aot.copies(compiled, state)


def test_every_layer_of_a_tuple_stays_in_place():
    state, tokens, kwargs = _shapes(2, 2, 4, 128, 128, "bfloat16")

    def layers(states, tokens, kwargs):
        new = []
        for state in states:
            state, out = _update(state, tokens, kwargs)
            tokens = (*tokens[:2], out, *tokens[3:])
            new.append(state)
        return tuple(new), out

    compiled = aot.compile_for_h200(
        layers, (state,) * 3, tokens, kwargs, donate_argnums=0
    )
    assert len(compiled.launches()) == 3
    assert compiled.alias_bytes == 3 * _bytes(state)
    assert not aot.copies(compiled, state)


def test_a_pool_that_is_not_donated_is_copied_once():
    """The cost that the docstring warns of; if XLA loses it, the warning can go."""
    shapes = _shapes(2, 2, 4, 128, 128, "float32")
    compiled = aot.compile_for_h200(_update, *shapes)
    assert len(aot.copies(compiled, shapes[0])) == 1


@pytest.mark.parametrize("state", ["bfloat16", "float16"])
@pytest.mark.parametrize("modes", [{}, {"T": 4, "columns": 4}, {"kda": True}], ids=str)
def test_rounding_at_random_is_of_the_same_launch(modes, state):
    def update(state, tokens, kwargs, words):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        keywords = dict(state_rounding="stochastic", rounding_key=key)
        return _update(state, tokens, kwargs | keywords)

    H = 32 if modes.get("kda") else 16
    shapes = _shapes(64, H, 32, 128, 128, state, **modes)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)
    compiled = aot.compile_for_h200(update, *shapes, words, donate_argnums=0)
    _one_launch_in_place(compiled, _bytes(shapes[0]))
