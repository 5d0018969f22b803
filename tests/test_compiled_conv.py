"""What the convolution's kernel compiles to for an H200, on a machine without a GPU."""

import functools
import re

import aot
import jax
import jax.numpy as jnp
import pytest

import gdn_jax
from gdn_jax import ConvState

S = jax.ShapeDtypeStruct
QWEN3_NEXT = 2 * 16 * 128 + 32 * 128


def _shapes(
    N,
    T=1,
    *,
    C=QWEN3_NEXT,
    W=4,
    columns=1,
    tokens=None,
    fresh=False,
    dtype=jnp.bfloat16,
):
    """(state, x, weight, keywords); `tokens`, in all, makes the rows ragged."""
    buffer = S((N + 1, C, W - 1 + columns), dtype)
    kwargs = {"slots": S((N,), jnp.int32)}
    if tokens is not None:
        kwargs["cu_seqlens"] = S((N + 1,), jnp.int32)
    if columns > 1:
        kwargs["num_accepted"] = S((N,), jnp.int32)
    if fresh:
        kwargs["has_state"] = S((N,), jnp.bool_)
    x = S((N, T, C) if tokens is None else (tokens, C), dtype)
    return ConvState(buffer, S((N + 1,), jnp.int32)), x, S((C, W), dtype), kwargs


def _convolve(state, x, weight, kwargs, *, implementation="triton"):
    return gdn_jax.causal_conv1d(
        state, x, weight, **kwargs, implementation=implementation
    )


def _compile(shapes) -> aot.Compiled:
    """Checked for one launch, both parts of the state in place, no copies or spills."""
    compiled = aot.compile_for_h200(_convolve, *shapes, donate_argnums=0)
    [launch] = compiled.launches()
    assert aot.KERNEL_CALL in launch
    state_bytes = sum(x.size * x.dtype.itemsize for x in shapes[0])
    assert compiled.alias_bytes == state_bytes
    assert compiled.temp_bytes <= 64  # a tuple of pointers, not a copy
    assert compiled.resources()["spills"] == 0
    return compiled


def _widths(compiled: aot.Compiled, what: str) -> set[str]:
    return set(re.findall(rf"{what}\.global\.(\S+)", "".join(compiled.ptx)))


@pytest.mark.parametrize("N", [1, 8, 64, 256])
def test_decode_reads_and_writes_whole_rings(N):
    compiled = _compile(_shapes(N))
    assert compiled.resources()["registers"] <= 48
    assert "shared" not in "".join(compiled.ptx)
    for what in ("ld", "st"):  # a channel's ring is one access
        assert "v2.b32" in _widths(compiled, what)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("N", [8, 64])
def test_verify(N, ragged):
    compiled = _compile(_shapes(N, 4, columns=4, tokens=4 * N if ragged else None))
    assert compiled.resources()["registers"] <= 80


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "shape", [dict(N=1, T=8192), dict(N=64, tokens=8192, fresh=True)], ids=str
)
def test_prefill_accesses_tokens_by_16_bytes(shape, dtype):
    compiled = _compile(_shapes(**shape, dtype=dtype))
    assert compiled.resources()["registers"] <= 144  # 14 warps on an SM
    for what in ("ld", "st"):
        assert "v4.b32" in _widths(compiled, what)
        assert not {"b16"} & _widths(compiled, what)


@pytest.mark.parametrize(
    "shape",
    [
        dict(N=3, T=9, C=100, W=3),
        dict(N=5, tokens=300, C=72, W=2, columns=3),
        dict(N=2, T=700, C=96, W=1, dtype=jnp.float16),
        dict(N=4096, tokens=4096, C=256, fresh=True),
        dict(N=70000, C=128),
    ],
    ids=str,
)
def test_any_shape_is_one_launch_in_place(shape):
    _compile(_shapes(**shape))


def test_the_state_stays_in_place_as_a_scan_carry():
    state, x, weight, kwargs = _shapes(2)

    def run(state, xs, weight, kwargs):
        def step(state, x):
            return _convolve(state, x, weight, kwargs)

        return jax.lax.scan(step, state, xs)

    xs = S((3, *x.shape), x.dtype)
    compiled = aot.compile_for_h200(run, state, xs, weight, kwargs, donate_argnums=0)
    assert compiled.hlo.count(f'custom_call_target="{aot.KERNEL_CALL}"') == 1
    shape = "[3,8192,4]"
    copies = [
        line
        for line in compiled.hlo.splitlines()
        if " copy" in line.split("(")[0] and shape in line.split("(")[0]
    ]
    assert not copies


def test_none_picks_triton_where_there_is_a_gpu():
    default = functools.partial(_convolve, implementation=None)
    assert aot.KERNEL_CALL in aot.lower(default, *_shapes(2, C=64))
