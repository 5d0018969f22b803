"""Rows by their groups' weights against float64, gradients too."""

import aot
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import gdn_jax
from gdn_jax import GroupedDotConfig, testing

# rows, D, F, group sizes
CASES = [
    (37, 24, 20, (3, 0, 17, 0, 5)),  # odd, empty groups, rows of none
    (70, 40, 136, (0, 70, 0)),  # all rows in one group, of several tiles
    (1, 32, 16, (0, 0, 1, 0)),
    (7, 16, 48, (1, 1, 1, 1, 1, 1, 1)),
    (20, 16, 16, (0, 0)),  # none in any
    (37, 16, 16, (1, 17, 1, 17, 0)),  # as many tiles as there can be
]


def _inputs(L, D, F, sizes, dtype="float32", weight_dtype=None, seed=0):
    """Rows of no group are NaN."""
    random = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    x = normal(L, D).at[sum(sizes) :].set(jnp.nan)
    weights = normal(len(sizes), D, F, dtype=weight_dtype or dtype)
    return x, weights, jnp.array(sizes, jnp.int32)


def _rows_of(x, sizes):
    ends = np.cumsum(sizes)
    return np.split(np.asarray(x, np.float64)[: ends[-1]], ends[:-1])


def _exact(x, weights, sizes):
    y = np.zeros((x.shape[0], weights.shape[2]))
    rows, weights = _rows_of(x, sizes), np.asarray(weights, np.float64)
    y[: sum(sizes)] = np.concatenate(
        [r @ w for r, w in zip(rows, weights, strict=True)]
    )
    return y


@pytest.mark.parametrize(
    "case, dtype",
    [*((case, "bfloat16") for case in CASES), (CASES[0], "float32")],
    ids=str,
)
def test_agrees_with_float64(path, case, dtype):
    x, weights, sizes = _inputs(*case, dtype)
    y = gdn_jax.grouped_dot(x, weights, sizes, implementation=path)
    assert y.dtype == x.dtype
    want = _exact(x, weights, case[3])
    assert testing.relative_error(y, want) < testing.TOLERANCE["out", dtype]
    assert not np.asarray(y)[sum(case[3]) :].any()


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "bfloat16"),
    ],
    ids=str,
)
def test_dtypes_mix(path, dtypes):
    dtype, weight_dtype, out_dtype = dtypes
    x, weights, sizes = _inputs(*CASES[0], dtype, weight_dtype)
    y = gdn_jax.grouped_dot(x, weights, sizes, out_dtype=out_dtype, implementation=path)
    assert y.dtype == out_dtype
    want = _exact(x, weights, CASES[0][3])
    assert testing.relative_error(y, want) < testing.TOLERANCE["out", out_dtype]


@pytest.mark.parametrize(
    "case, dtype", [(CASES[0], "float32"), (CASES[1], "bfloat16")], ids=str
)
def test_gradients_agree_with_float64(path, case, dtype):
    x, weights, sizes = _inputs(*case, dtype)
    cotangent, _, _ = _inputs(case[0], case[2], 1, case[3], dtype, seed=1)

    def multiply(x, weights):
        return gdn_jax.grouped_dot(x, weights, sizes, implementation=path)

    _, pull = jax.vjp(multiply, x, weights)
    dx, dw = pull(cotangent)
    assert (dx.dtype, dw.dtype) == (x.dtype, weights.dtype)
    want_dx = _exact(cotangent, jnp.swapaxes(weights, 1, 2), case[3])
    pairs = zip(_rows_of(x, case[3]), _rows_of(cotangent, case[3]), strict=True)
    want_dw = np.stack([rows.T @ pulled for rows, pulled in pairs])
    for got, want in ((dx, want_dx), (dw, want_dw)):
        assert testing.relative_error(got, want) < testing.TOLERANCE["gradient", dtype]
    assert not np.asarray(dx)[sum(case[3]) :].any()


@pytest.mark.parametrize(
    "config",
    [
        GroupedDotConfig(16, 32, 16, num_warps=1, num_stages=1),
        GroupedDotConfig(64, 16, 64, num_stages=2),
    ],
    ids=str,
)
def test_a_pinned_launch_agrees(config):
    kernel = "triton" if jax.default_backend() == "gpu" else "interpret"
    x, weights, sizes = _inputs(*CASES[1], "bfloat16")
    y = gdn_jax.grouped_dot(x, weights, sizes, implementation=kernel, config=config)
    want = _exact(x, weights, CASES[1][3])
    assert testing.relative_error(y, want) < testing.TOLERANCE["out", "bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mean", [16, 32, 64, 128])
def test_every_launch_of_the_heuristic_agrees(mean, dtype):
    """Values and gradients, as compiled: from 64 rows on other instructions."""
    sizes = (mean // 2, 2 * mean, 0, mean + 3)
    case = 4 * mean, 512, 256, sizes
    x, weights, sizes = _inputs(*case, dtype)
    cotangent, _, _ = _inputs(case[0], case[2], 1, case[3], dtype, seed=1)

    def run(path):
        def multiply(x, weights):
            return gdn_jax.grouped_dot(x, weights, sizes, implementation=path)

        y, pull = jax.vjp(multiply, x, weights)
        return y, *pull(cotangent)

    for got, want in zip(run("triton"), run("reference"), strict=True):
        assert testing.relative_error(got, want) < testing.TOLERANCE["gradient", dtype]


def test_nan_in_a_row_reaches_no_other(path):
    x, weights, sizes = _inputs(*CASES[0])
    want = gdn_jax.grouped_dot(x, weights, sizes, implementation=path)
    y = gdn_jax.grouped_dot(x.at[4].set(jnp.nan), weights, sizes, implementation=path)
    others = np.arange(x.shape[0]) != 4
    np.testing.assert_array_equal(np.asarray(y)[others], np.asarray(want)[others])
    assert np.isnan(np.asarray(y)[4]).all()


@pytest.mark.parametrize("name", ["triton", "interpret", "xla", "reference", None])
@pytest.mark.parametrize("empty", ["L", "D", "E", "F"])
def test_nothing_to_multiply(empty, name):
    L, D, F, E = (0 if empty == axis else 3 for axis in "LDFE")
    y = gdn_jax.grouped_dot(
        jnp.ones((L, D)),
        jnp.ones((E, D, F)),
        jnp.zeros(E, jnp.int32),
        implementation=name,
    )
    assert y.shape == (L, F) and not y.any()


def test_vmap_over_rows_and_weights(path):
    stacked = [_inputs(*CASES[3], seed=seed) for seed in range(2)]
    x, weights, sizes = (jnp.stack(arrays) for arrays in zip(*stacked, strict=True))
    sizes = sizes.at[1].set(jnp.array([3, 0, 0, 2, 2, 0, 0], jnp.int32))

    def multiply(*given):
        return gdn_jax.grouped_dot(*given, implementation=path)

    y = jax.vmap(multiply)(x, weights, sizes)
    for i in range(2):
        want = _exact(x[i], weights[i], sizes[i])
        assert testing.relative_error(y[i], want) < testing.TOLERANCE["out", "float32"]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_launch_is_not_dropped_in_silence(implementation):
    (x, weights, sizes), config = (
        _inputs(*CASES[3]),
        gdn_jax.GroupedDotConfig(16, 64, 32),
    )
    with pytest.raises(ValueError, match="config"):
        gdn_jax.grouped_dot(
            x, weights, sizes, implementation=implementation, config=config
        )


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_shards_equal_the_whole(split, path):
    """Of rows, each device with groups of its own; or of the weights' columns."""
    devices = min(2, jax.device_count())
    stacked = [_inputs(*CASES[3], seed=seed)[0] for seed in range(devices)]
    (_, weights, sizes), x = _inputs(*CASES[3]), jnp.concatenate(stacked)
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(AxisType.Auto,))
    by_rows = split == "rows"

    def loss(x, weights):
        y = gdn_jax.grouped_dot(x, weights, sizes, implementation=path)
        return jnp.sum(y**2)[None]

    specs = (P("i"), P()) if by_rows else (P(), P(None, None, "i"))
    # Pallas' interpreter fails the check, whatever the kernel
    checks = path != "interpret"
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=specs, out_specs=P("i"), check_vma=checks
    )
    x = x if by_rows else x[: x.shape[0] // devices]

    def whole(x, weights):
        return sum(
            loss(rows, weights) for rows in jnp.split(x, devices if by_rows else 1)
        )

    def gradient(f):
        return jax.jit(jax.grad(lambda *given: jnp.sum(f(*given)), (0, 1)))(x, weights)

    for got, want in zip(gradient(sharded), gradient(whole), strict=True):
        assert testing.relative_error(got, want) < testing.TOLERANCE["out", "float32"]


def test_the_kernel_lowers_for_cuda_under_vmap_and_shard_map():
    def multiply(*given):
        return gdn_jax.grouped_dot(*given, implementation="triton")

    x, weights, sizes = (jnp.stack([part] * 4) for part in _inputs(*CASES[3]))
    assert aot.KERNEL_CALL in aot.lower(jax.vmap(multiply), x, weights, sizes)
    mesh = AbstractMesh(
        (4,),
        ("i",),
        axis_types=(AxisType.Auto,),
        abstract_device=aot.ABSTRACT_H200.abstract_device,
    )

    def of_all(x, weights, sizes):
        return jax.grad(lambda w: jnp.sum(multiply(x[0], w, sizes[0])))(weights)

    specs = P("i"), P(), P("i")
    sharded = jax.shard_map(of_all, mesh=mesh, in_specs=specs, out_specs=P())
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(sharded).trace(x, weights[0], sizes)
        assert aot.KERNEL_CALL in traced.lower(lowering_platforms=("cuda",)).as_text()


WRONG = [
    (dict(x=jnp.ones((2, 3, 4))), "x must be [L, D]; got (2, 3, 4)"),
    (dict(weights=jnp.ones((2, 5, 4))), "weights must be [E, D, F] with D = 4"),
    (dict(weights=jnp.ones((4, 5))), "weights must be [E, D, F] with D = 4"),
    (dict(group_sizes=jnp.ones(3, jnp.int32)), "group_sizes must be [E] = (2,)"),
    (dict(group_sizes=jnp.ones(2)), "group_sizes must be int32; got float32"),
    (dict(x=jnp.ones((6, 4), jnp.int32)), "x must be one of float32"),
    (dict(out_dtype="int8"), "out_dtype must be one of float32"),
    (dict(config=3), "config must be a GroupedDotConfig or None; got 3"),
    (dict(implementation="cuda"), "implementation must be None or one of"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_a_wrong_call_says_what_to_do(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = dict(
        x=jnp.ones((6, 4)),
        weights=jnp.ones((2, 4, 5)),
        group_sizes=jnp.ones(2, jnp.int32),
    )
    with pytest.raises(ValueError) as error:
        gdn_jax.grouped_dot(**(given | change))
    assert message in str(error.value)
