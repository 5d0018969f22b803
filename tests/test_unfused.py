"""The unfused pair: gates against float64, and the pair against the fused update."""

import functools

import jax
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing

OPTIONS = (
    {},
    {"softplus_beta": 2.0, "softplus_threshold": 3.0},
    {"allow_neg_eigval": True},
    {"gate_lower_bound": -5.0},
)


def _exact(A_log, a, b, dt_bias, options):
    x = a + dt_bias
    A = np.exp(A_log) if a.ndim == b.ndim else np.exp(A_log)[:, None]
    if "gate_lower_bound" in options:
        log_decay = options["gate_lower_bound"] / (1 + np.exp(-A * x))
    else:
        beta = options.get("softplus_beta", 1.0)
        linear = beta * x > options.get("softplus_threshold", 20.0)
        log_decay = -A * np.where(linear, x, np.logaddexp(beta * x, 0) / beta)
    doubled = 2.0 if options.get("allow_neg_eigval") else 1.0
    return log_decay, doubled / (1 + np.exp(-b))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("per_k", [(), (24,)], ids=["one decay", "KDA"])
def test_gates_agree_with_float64(path, options, per_k):
    random = np.random.default_rng(0)
    heads = 6
    A_log = np.log(random.uniform(1, 16, heads))
    a = 4 * random.standard_normal((2, 3, heads, *per_k))
    b = 4 * random.standard_normal((2, 3, heads))
    dt_bias = random.standard_normal((heads, *per_k))
    given = [x.astype(np.float32) for x in (A_log, a, b, dt_bias)]
    got = gdn_jax.gates(*given, **options, implementation=path)
    want = _exact(*(x.astype(np.float64) for x in given), options)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == np.float32
        assert testing.relative_error(x, y) < 1e-6


def test_beta_is_not_rounded_to_the_activations(path):
    """A bfloat16 sigmoid(0.5) would be 0.62109375, and its error adds up over steps."""
    zero, half = (
        np.zeros(1, jax.numpy.bfloat16),
        np.full((1, 1), 0.5, jax.numpy.bfloat16),
    )
    A_log = np.zeros(1, np.float32)
    _, beta = gdn_jax.gates(A_log, half, half, zero, implementation=path)
    assert abs(float(beta[0, 0]) - 0.62245935) < 1e-6


@pytest.mark.parametrize("name", ["checkpoints, nulls", "dense, KDA"])
def test_the_pair_equals_the_fused_update(path, name):
    [case] = [case for case in testing.CASES if case.name == name]
    (state, q, k, v, A_log, a, b, dt_bias), kwargs = testing.make(case)
    kwargs |= dict(implementation=path, out_dtype=np.float32)
    gates = gdn_jax.gates(A_log, a, b, dt_bias, implementation=path)
    got = gdn_jax.recurrent_update(state, q, k, v, *gates, **kwargs)
    want = gdn_jax.fused_update(state, q, k, v, A_log, a, b, dt_bias, **kwargs)
    for x, y in zip(got, want, strict=True):
        x, y = (np.asarray(z).astype(np.float32) for z in (x, y))
        same = np.isnan(y)
        assert np.array_equal(np.isnan(x), same)
        assert testing.relative_error(x[~same], y[~same]) < 1e-6


@functools.cache
def _nulls():
    """A call with a null row, and the fused update's gradients of its logits."""
    case = testing.Case("nulls", (2,) * 3, null_rows=(1,), act_dtype="float32")
    (state, q, k, v, *logits), kwargs = testing.make(case)
    tokens = np.nan_to_num(state), q, k, v

    def fused(*logits):
        _, out = gdn_jax.fused_update(
            *tokens, *logits, **kwargs, implementation="reference"
        )
        return jax.numpy.sum(out**2)

    return tokens, logits, kwargs, jax.jit(jax.grad(fused, range(4)))(*logits)


def test_nan_in_a_null_rows_logits_reaches_no_gradient(path):
    tokens, logits, kwargs, want = _nulls()

    def pair(A_log, a, b, dt_bias):
        gates = gdn_jax.gates(A_log, a, b, dt_bias, implementation=path)
        _, out = gdn_jax.recurrent_update(
            *tokens, *gates, **kwargs, implementation=path
        )
        return jax.numpy.sum(out**2)

    got = jax.jit(jax.grad(pair, range(4)))(*logits)
    for x, y in zip(got, want, strict=True):
        assert testing.relative_error(x, y) < 1e-5
