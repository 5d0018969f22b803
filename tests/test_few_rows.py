"""Products of few rows against float64."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from gdn_jax import _triton, testing
from gdn_jax.ops.few_rows.api import products
from gdn_jax.ops.few_rows.tuning import FewRowsConfig, heuristic, shared_memory

# rows, D, columns
CASES = [
    (1, 64, (48,)),
    (5, 72, (40, 16, 1)),  # odd sizes, several matrices
    (17, 256, (200,)),
    (64, 100, (24, 130)),
    (3, 2048, (64,)),  # parts of sums
]


def make(rows, D, columns, dtype="bfloat16", seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * random.standard_normal(shape), dtype)

    return normal(rows, D), [normal(D, F, scale=D**-0.5) for F in columns]


def exact(x, matrices):
    x = np.asarray(x, np.float64)
    return [x @ np.asarray(matrix, np.float64) for matrix in matrices]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(path, case):
    x, matrices = make(*case)
    found = products(x, matrices, implementation=path)
    for y, want in zip(found, exact(x, matrices), strict=True):
        assert y.dtype == x.dtype
        assert testing.relative_error(y, want) < testing.TOLERANCE["out", "bfloat16"]


@pytest.mark.parametrize("rows", [1, 20, 64])
def test_gated(path, rows):
    """Gate, up and their product are rounded each."""
    x, matrices = make(rows, 144, (72, 72))
    [y] = products(x, matrices, gated=True, implementation=path)
    gate, up = exact(x, matrices)
    tolerance = 3 * testing.TOLERANCE["out", "bfloat16"]
    assert testing.relative_error(y, gate / (1 + np.exp(-gate)) * up) < tolerance


@pytest.mark.parametrize(
    "kernel", ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_launches_agree(kernel):
    x, matrices = make(9, 320, (96, 40))
    want = exact(x, matrices)
    for config in (
        FewRowsConfig(16, 16),
        FewRowsConfig(64, 128, splits=2),
        FewRowsConfig(32, 64, splits=8, num_warps=2, num_stages=2),
    ):
        found = products(x, matrices, implementation=kernel, config=config)
        for y, exactly in zip(found, want, strict=True):
            error = testing.relative_error(y, exactly)
            assert error < testing.TOLERANCE["out", "bfloat16"]


def test_leading_axes_and_rows_of_their_own(path):
    x, matrices = make(6, 64, (32,))
    [flat] = products(x, matrices, implementation=path)
    spoiled = x.at[2].set(jnp.nan).reshape(2, 3, 64)
    [y] = products(spoiled, matrices, implementation=path)
    y = np.asarray(y, np.float32).reshape(6, 32)
    assert np.isnan(y[2]).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[others], np.asarray(flat, np.float32)[others])


def test_rows_that_do_not_count_are_zeros(path):
    """NaN in them reaches nothing, gradients included."""
    x, matrices = make(6, 64, (32, 16))
    live = np.array([True, False, True, True, False, True])
    spoiled = jnp.where(live[:, None], x, jnp.nan)

    def run(x, live):
        f = functools.partial(products, live=live, implementation=path)
        y, pull = jax.vjp(f, x, matrices)
        dx, dmatrices = pull(jax.tree.map(jnp.ones_like, y))
        return dx, [*y, *dmatrices]

    want_dx, wanted = run(jnp.where(live[:, None], x, 0), None)
    dx, found = run(spoiled, jnp.asarray(live))
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(dx[live], want_dx[live])
    assert not np.asarray(dx[~live], np.float32).any()


def test_gradients_are_xlas():
    x, matrices = make(4, 64, (32, 16))
    seeds = products(x, matrices, implementation="xla")

    def pull(path):
        f = functools.partial(products, implementation=path)
        return jax.vjp(f, x, matrices)[1](seeds)

    pulled = (jax.tree.leaves(pull(path)) for path in ("interpret", "xla"))
    for got, want in zip(*pulled, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(rows=129), "128 rows; got 129"),
        (dict(dtype="float32"), "bfloat16 or float16; got float32"),
        (dict(columns=(8, 0)), "an axis is empty"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_take_is_xlas(change, reason):
    x, matrices = make(**dict(rows=2, D=32, columns=(8,)) | change)
    products(x, matrices)
    with pytest.raises(NotImplementedError, match=reason):
        products(x, matrices, implementation="interpret")


# of Qwen3.5-9B: [q k v], z, a and b; out; gate and up
MATRICES = {
    "in": (4096, (8192, 4096, 32, 32), False),
    "out": (4096, (4096,), False),
    "gated": (4096, (12288, 12288), True),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rows", [1, 32, 64, 128])
def test_compiles_without_spills(rows, name):
    """One launch of the kernel, one where parts of sums are added up."""
    D, columns, gated = MATRICES[name]
    S = jax.ShapeDtypeStruct
    x, matrices = S((rows, D), jnp.bfloat16), [S((D, F), jnp.bfloat16) for F in columns]
    f = functools.partial(products, gated=gated, implementation="triton")
    compiled = aot.compile_for_h200(f, x, matrices)
    splits = heuristic(rows, D, columns, 163, gated=gated).splits
    assert (splits > 1) == (name == "out")
    assert len(compiled.launches()) == (1 if splits == 1 else 2)
    resources = compiled.resources()
    assert resources["spills"] == 0, resources


@pytest.mark.parametrize("rows", [1, 64, 128])
@pytest.mark.parametrize("name", MATRICES)
def test_launches_fit_little_shared_memory(name, rows):
    D, columns, gated = MATRICES[name]
    config = heuristic(rows, D, columns, 99, gated=gated)
    assert shared_memory(config, rows, gated=gated) <= 99
    assert config.num_stages >= 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(matrices=[jnp.zeros((32, 8))]),
            r"matrices\[0\] must be \[D, F\] with D = 6",
        ),
        (dict(gated=True), "matrices must be two of one shape"),
        (
            dict(gated=True, matrices=[jnp.zeros((64, 8)), jnp.zeros((64, 9))]),
            "matrices must be two of one shape",
        ),
        (
            dict(
                gated=True,
                matrices=[jnp.zeros((64, 8))] * 2,
                config=FewRowsConfig(64, 64, splits=2),
            ),
            "config.splits must be 1 with gated; got 2",
        ),
        (
            dict(config=FewRowsConfig(64, 64), implementation="xla"),
            "config must be None there",
        ),
        (dict(implementation="Triton"), "implementation must be None or one of"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    call = dict(x=jnp.zeros((2, 64)), matrices=[jnp.zeros((64, 8))])
    with pytest.raises(ValueError, match=text):
        products(**call | change)


def test_a_mesh_that_xla_shards_over_is_xlas():
    """Of GPUs that are not here; one device in a mesh is whole."""
    h200 = AbstractDevice("NVIDIA H200", 1, "cuda")
    seen = []
    for size in (2, 1):
        mesh = AbstractMesh((size,), ("x",), abstract_device=h200)
        with jax.sharding.use_abstract_mesh(mesh):
            seen.append(_triton.is_whole())
    assert seen == [False, True]


def test_several_devices_are_xlas():
    """Which may hold a part of a matrix each; a kernel would have XLA gather it."""
    seen = []

    def f(x):
        seen.append(_triton.is_whole())
        return x

    mesh = jax.make_mesh((2,), ("x",))
    jax.jit(f)(jnp.zeros(2))
    jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P()))(jnp.zeros(2))
    assert jax.device_count() > 1
    assert seen == [False, True]
