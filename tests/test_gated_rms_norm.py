"""The gated norm against float64, its gradient, and wrong calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing


def _inputs(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    x, gate = (random.standard_normal(shape).astype(dtype) for _ in range(2))
    return x, gate, random.standard_normal(shape[-1]).astype(np.float32)


def _exact(x, gate, weight, eps, activation):
    x, gate, weight = (y.astype(np.float64) for y in (x, gate, weight))
    normed = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight
    sigmoid = 1 / (1 + np.exp(-gate))
    return normed * sigmoid * (gate if activation == "silu" else 1)


@pytest.mark.parametrize("name", ["xla", "reference", None])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 2, 128), (5, 96), (2048,), (0, 4)], ids=str)
def test_agrees_with_float64(shape, dtype, activation, name):
    x, gate, weight = _inputs(shape, jnp.dtype(dtype))
    y = gdn_jax.gated_rms_norm(
        x, gate, weight, eps=1e-5, activation=activation, implementation=name
    )
    want = _exact(x, gate, weight, 1e-5, activation)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert testing.relative_error(y, want) < testing.TOLERANCE["out", dtype]


def test_the_gradient_equals_finite_differences():
    given = _inputs((3, 8), np.float32)
    change = _inputs((3, 8), np.float32, seed=1)

    def loss(*given):
        return jnp.sum(jnp.sin(gdn_jax.gated_rms_norm(*given)))

    gradients = jax.grad(loss, argnums=(0, 1, 2))(*given)
    total = sum(float(np.sum(g * d)) for g, d in zip(gradients, change, strict=True))
    up, down = (
        loss(*(x + s * 1e-3 * d for x, d in zip(given, change, strict=True)))
        for s in (1, -1)
    )
    assert abs((up - down) / 2e-3 - total) < 1e-2 * max(1, abs(total))


def test_nan_in_a_row_stays_there():
    x, gate, weight = _inputs((3, 8), np.float32)
    x[1] = np.nan

    def loss(x, gate):
        return jnp.sum(gdn_jax.gated_rms_norm(x, gate, weight)[::2])

    assert jnp.isfinite(gdn_jax.gated_rms_norm(x, gate, weight)[::2]).all()
    for gradient in jax.grad(loss, argnums=(0, 1))(x, gate):
        assert jnp.isfinite(gradient[::2]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(x=np.zeros((2, 0))), r"x must be one of float32.*got float64"),
        (dict(x=jnp.zeros((2, 0))), r"x must be \[\.\.\., V\].*; got \(2, 0\)"),
        (dict(gate=jnp.zeros((3, 4))), r"gate must be of x's shape.*; got \(3, 4\)"),
        (dict(weight=jnp.zeros(3)), r"weight must be \[V\] = \(4,\); got \(3,\)"),
        (dict(activation="relu"), "activation must be one of silu, sigmoid; got"),
        (dict(eps=0.0), "eps must be a finite number > 0; got 0.0"),
        (dict(implementation="cuda"), "implementation must be None or one of"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    good = dict(x=jnp.zeros((2, 4)), gate=jnp.zeros((2, 4)), weight=jnp.zeros(4))
    with pytest.raises(ValueError, match=text):
        gdn_jax.gated_rms_norm(**good | change)
