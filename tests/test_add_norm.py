"""What a layer adds and the norm before the next, against float64."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax import testing
from gdn_jax.ops.add_norm.api import add_norm

EPS = 1e-6
SHAPES = [(1, 64), (5, 40), (2, 3, 96)]  # powers of two and not


def make(shape, parts=1, dtype="bfloat16", parts_dtype=None):
    random = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape), dtype)

    x = normal(*shape)
    weight = normal(shape[-1])
    return x, normal(parts, *shape, dtype=parts_dtype or dtype), weight


def exact(x, parts, weight):
    """Rounded where the layers of a model round."""
    y = np.asarray(parts, np.float64).sum(0)
    y = np.asarray(jnp.asarray(y, x.dtype), np.float64)
    x = np.asarray(jnp.asarray(np.asarray(x, np.float64) + y, x.dtype), np.float64)
    norm = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x, norm * (1 + np.asarray(weight, np.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "parts, dtype, parts_dtype",
    [
        (1, "bfloat16", "bfloat16"),
        (4, "bfloat16", "float32"),
        (2, "float32", "float32"),
    ],
)
def test_agrees_with_float64(path, shape, parts, dtype, parts_dtype):
    given = make(shape, parts, dtype, parts_dtype)
    for got, want in zip(
        add_norm(*given, eps=EPS, implementation=path), exact(*given), strict=True
    ):
        assert got.shape == shape and got.dtype == dtype
        assert testing.relative_error(got, want) < testing.TOLERANCE["out", dtype]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(parts=jnp.zeros((1, 3, 64))), r"parts must be \[S, ..., D\]"),
        (dict(parts=jnp.zeros((0, 2, 64))), r"parts must be \[S, ..., D\] with S >= 1"),
        (dict(weight=jnp.zeros(32)), r"weight must be \[D\] = \(64,\)"),
        (dict(implementation="Triton"), "implementation must be None or one of"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    call = dict(x=jnp.zeros((2, 64)), parts=jnp.zeros((1, 2, 64)))
    call |= dict(weight=jnp.zeros(64), eps=EPS)
    with pytest.raises(ValueError, match=text):
        add_norm(**call | change)


def test_rows_are_their_own(path):
    x, parts, weight = make((4, 64), 2, "bfloat16", "float32")
    add = functools.partial(add_norm, eps=EPS, implementation=path)
    spoiled, want = add(x.at[1].set(jnp.nan), parts, weight), add(x, parts, weight)
    for got, wanted in zip(spoiled, want, strict=True):
        assert np.isnan(np.asarray(got[1], np.float32)).all()
        np.testing.assert_array_equal(got[0], wanted[0])
        np.testing.assert_array_equal(got[2:], wanted[2:])


def test_gradients_are_xlas():
    given = make((3, 40), 2, "float32")

    def pull(path):
        f = functools.partial(add_norm, eps=EPS, implementation=path)
        y, back = jax.vjp(f, *given)
        return back(jax.tree.map(jnp.ones_like, y))

    for got, want in zip(pull("interpret"), pull("xla"), strict=True):
        np.testing.assert_array_equal(got, want)


def test_many_rows_are_xlas():
    given = make((257, 16))
    add_norm(*given, eps=EPS)
    with pytest.raises(NotImplementedError, match="256 rows; got 257"):
        add_norm(*given, eps=EPS, implementation="interpret")


@pytest.mark.parametrize("D", [2560, 4096])
def test_compiles_to_one_launch(D):
    S = jax.ShapeDtypeStruct
    x, parts = S((8, D), jnp.bfloat16), S((4, 8, D), jnp.float32)
    f = functools.partial(add_norm, eps=EPS, implementation="triton")
    compiled = aot.compile_for_h200(f, x, parts, S((D,), jnp.bfloat16))
    assert len(compiled.launches()) == 1
    assert compiled.resources()["spills"] == 0
