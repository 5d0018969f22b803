"""What the experts' products compile to for an H200, on a machine without a GPU."""

import re

import aot
import jax
import jax.numpy as jnp
import pytest
from flax.linen import meta

import gdn_jax
from gdn_jax import nn

S = jax.ShapeDtypeStruct
D, F = 2048, 512
EXPERTS = {512: 10, 256: 8}  # of a layer: of a token (Qwen3-Next, Qwen3.5-MoE)
PRODUCTS = {"gate_up": (D, 2 * F), "down": (F, D)}


def _shapes(rows, num_groups, columns, dtype=jnp.bfloat16):
    weights = S((num_groups, *columns), dtype)
    return S((rows, columns[0]), dtype), weights, S((num_groups,), jnp.int32)


def _multiply(x, weights, sizes):
    return gdn_jax.grouped_dot(x, weights, sizes, implementation="triton")


def _check(compiled: aot.Compiled, launches: int) -> None:
    """Kernels and nothing else: no copy of the weights, and no dense expansion."""
    found = compiled.launches()
    assert len(found) == launches
    assert all(aot.KERNEL_CALL in launch for launch in found)
    assert compiled.temp_bytes <= 64
    assert compiled.resources()["spills"] == 0


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_decode_streams_the_weights(tokens, num_experts, product):
    rows = tokens * EXPERTS[num_experts]
    shapes = _shapes(rows, num_experts, PRODUCTS[product])
    compiled = aot.compile_for_h200(_multiply, *shapes)
    _check(compiled, launches=1)
    assert compiled.resources()["registers"] <= 64
    [ptx] = compiled.ptx
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes each, past L1, ahead of use
    assert "cp.async.ca" not in ptx


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tokens, rows_at_once", [(1024, 16), (2048, 64), (4096, 64)])
def test_prefill_multiplies_on_tensor_cores(tokens, rows_at_once, product):
    """From 64 rows of a group on by warpgroups."""
    shapes = _shapes(10 * tokens, 512, PRODUCTS[product])
    compiled = aot.compile_for_h200(_multiply, *shapes)
    _check(compiled, launches=1)
    assert compiled.resources()["registers"] <= 128
    [ptx] = compiled.ptx
    kind = "wgmma.mma_async.sync.aligned.m" if rows_at_once == 64 else "aligned.m"
    assert f"{kind}{rows_at_once}n" in ptx


@pytest.mark.parametrize(
    "shapes",
    [
        _shapes(2560, 512, PRODUCTS["gate_up"]),
        _shapes(40960, 512, PRODUCTS["down"]),
        _shapes(640, 512, PRODUCTS["gate_up"], jnp.float32),
        _shapes(100, 5, (41, 23)),
        _shapes(100, 5, (40, 24), jnp.float16),
    ],
    ids=str,
)
def test_a_gradient_is_two_launches_and_reads_the_weights_in_place(shapes):
    x, weights, _ = shapes

    def pull(x, weights, sizes, dy):
        _, pull = jax.vjp(lambda *given: _multiply(*given, sizes), x, weights)
        return pull(dy)

    dy = S((x.shape[0], weights.shape[2]), x.dtype)
    _check(aot.compile_for_h200(pull, *shapes, dy), launches=2)
    _check(aot.compile_for_h200(_multiply, *shapes), launches=1)


@pytest.mark.parametrize("tokens", [1, 256])
def test_the_layer_neither_copies_experts_nor_expands_tokens(tokens):
    layer = nn.MixtureOfExperts(
        D,
        512,
        10,
        F,
        F,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        implementation="triton",
    )
    x = S((tokens, D), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(aot.ABSTRACT_H200):
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
    compiled = aot.compile_for_h200(layer.apply, meta.unbox(params), x)
    kernels = [line for line in compiled.launches() if '"dot_kernel"' in line]
    assert len(kernels) == 2
    results = re.findall(r"= \(?\w+\[512,(\d+)[,\d]*\]", "\n".join(compiled.launches()))
    assert set(results) <= {str(D)}  # XLA's product of one token with the shared expert
    assert compiled.temp_bytes < 20 * 2**20
