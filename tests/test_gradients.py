"""Gradients on every path against finite differences of the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing

# The chunked update's reference is that of the fused one.
CHUNKED = ("xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu))
NAMES = ("state", "q", "k", "v", "A_log", "a", "b", "dt_bias")


def _case(name, lengths, **kwargs):
    """Small: the oracle runs twice for each number among the inputs."""
    small = dict(H=1, HV=2, K=4, V=3, act_dtype="float32")
    return testing.Case(name, lengths, **small | kwargs)


CASES = (
    _case("dense", (2,) * 3, null_rows=(2,), fresh=(1,)),
    _case(
        "packed",
        (2, 0, 3, 1, 1),
        tokens="packed",
        null_rows=(3,),
        fresh=(4,),
        padding=2,
    ),
    _case(
        "checkpoints",
        (2, 4, 2),
        tokens="packed",
        slots="checkpoints",
        columns=3,
        null_columns=((0, 1),),
        bad_accepted=(2,),
        fresh=(1,),
        padding=1,
    ),
    _case("states", (2,) * 3, null_rows=(1,), options=(("per_token_states", True),)),
    _case("KDA", (3,) * 2, slots="none", kda=True),
)
SINGLE = _case(
    "decode",
    (1,) * 3,
    tokens="single",
    options=(
        ("softplus_beta", 2.0),
        ("softplus_threshold", 0.5),
        ("allow_neg_eigval", True),
        ("qk_l2norm", False),
        ("scale", 0.3),
    ),
)
LOWER_BOUND = _case(
    "lower bound", (1,) * 2, kda=True, options=(("gate_lower_bound", -5.0),)
)


@functools.cache
def _cotangents(case):
    """Random ones of (state, out)."""
    states, out, _ = testing.oracle(*testing.make(case))
    random = np.random.default_rng(1)
    return tuple(random.standard_normal(x.shape) for x in (states, out))


@functools.cache
def _finite_differences(case):
    args, kwargs = testing.make(case)
    # What must not be read is NaN here too, and NaN - NaN tells nothing.
    args = tuple(np.nan_to_num(x.astype(np.float64)) for x in args)

    def loss():
        states, out, _ = testing.oracle(args, kwargs)
        pairs = zip((states, out), _cotangents(case), strict=True)
        return sum(np.vdot(x, cotangent) for x, cotangent in pairs)

    def gradient(x, step=1e-5):
        found = np.empty(x.shape)
        for i in np.ndindex(x.shape):
            exact = x[i]
            x[i] = exact + step
            above = loss()
            x[i] = exact - step
            found[i] = (above - loss()) / (2 * step)
            x[i] = exact
        return found

    return [gradient(x) for x in args]


def _gradients(case, update, wrap=lambda call: call):
    """Of each positional argument of `update`, which takes fused_update's."""
    args, kwargs = testing.make(case)
    arrays = {k: v for k, v in kwargs.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in kwargs.items() if k not in arrays}

    @jax.jit
    def pull(args, arrays, cotangents):
        call = wrap(lambda *args: update(*args, **arrays, **static))
        results, pullback = jax.vjp(call, *args)
        pairs = zip(cotangents, results, strict=True)
        return pullback(tuple(x.astype(y.dtype) for x, y in pairs))

    return pull(args, arrays, _cotangents(case))


def _equal(got, case):
    """In value, and exactly zero where an input reaches nothing."""
    for name, x, want in zip(NAMES, got, _finite_differences(case), strict=True):
        assert testing.relative_error(x, want) < 1e-5, name
        assert not np.asarray(x)[want == 0].any(), name


def _update(path):
    return functools.partial(gdn_jax.fused_update, implementation=path)


def _unfused(path):
    gating = ("softplus_beta", "softplus_threshold", "allow_neg_eigval")

    def update(state, q, k, v, A_log, a, b, dt_bias, **kwargs):
        given = {name: kwargs.pop(name) for name in gating if name in kwargs}
        log_decay, beta = gdn_jax.gates(
            A_log, a, b, dt_bias, implementation=path, **given
        )
        return gdn_jax.recurrent_update(
            state, q, k, v, log_decay, beta, implementation=path, **kwargs
        )

    return update


@pytest.mark.parametrize(
    "case", [*CASES, SINGLE, LOWER_BOUND], ids=lambda case: case.name
)
def test_gradients_equal_finite_differences(case):
    _equal(_gradients(case, _update("reference")), case)


@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: case.name)
def test_every_path_has_the_references_gradients(case, path):
    _equal(_gradients(case, _update(path)), case)


def test_gradients_pass_through_checkpoint(path):
    """jax.checkpoint, which runs the forward pass a second time."""
    _equal(_gradients(SINGLE, _update(path), jax.checkpoint), SINGLE)


def test_the_unfused_pair_has_the_same_gradients(path):
    _equal(_gradients(SINGLE, _unfused(path)), SINGLE)


def test_cotangents_have_their_inputs_dtypes(path):
    case = _case("bfloat16", (1,) * 2, act_dtype="bfloat16", state_dtype="bfloat16")
    args, kwargs = jax.tree.map(jnp.asarray, testing.make(case))

    def loss(*args):
        state, out = _update(path)(*args, **kwargs)
        return jnp.sum(state) + jnp.sum(out)

    got = jax.eval_shape(jax.grad(loss, argnums=tuple(range(8))), *args)
    assert [x.dtype for x in got] == [x.dtype for x in args]


def test_bfloat16_parameters_gather_their_gradients_in_float32():
    """One number for all tokens: its gradient is a sum over them."""
    case = _case("long", (256,), slots="none", K=8, act_dtype="bfloat16")
    args, kwargs = jax.tree.map(jnp.asarray, testing.make(case))

    @jax.jit
    def gradients(A_log, dt_bias):
        def loss(A_log, dt_bias):
            given = (*args[:4], A_log, *args[5:7], dt_bias)
            return jnp.sum(_update("reference")(*given, **kwargs)[1], dtype=jnp.float32)

        return jax.grad(loss, argnums=(0, 1))(A_log, dt_bias)

    parameters = [x.astype(jnp.bfloat16) for x in (args[4], args[7])]
    got = gradients(*parameters)
    want = gradients(*(x.astype(jnp.float32) for x in parameters))
    for x, y in zip(got, want, strict=True):
        assert testing.relative_error(x, y) < testing.TOLERANCE["out", "bfloat16"]


def _chunked(path):
    return functools.partial(gdn_jax.chunk_update, implementation=path)


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_gradients_in_chunks_equal_finite_differences(case, implementation):
    gradients = _gradients(case, _chunked(implementation))
    for name, x, want in zip(NAMES, gradients, _finite_differences(case), strict=True):
        bar = testing.TOLERANCE["gradient", "float32"]
        assert testing.relative_error(x, want) < bar, name
        assert not np.asarray(x)[want == 0].any(), name


@pytest.mark.parametrize("update", [_update, _unfused])
def test_a_gradient_has_a_gradient(update, path):
    _has_a_second_gradient(update(path))


@pytest.mark.parametrize("implementation", CHUNKED)
def test_a_gradient_in_chunks_has_a_gradient(implementation):
    _has_a_second_gradient(_chunked(implementation))


def _has_a_second_gradient(update):
    case = _case("decode", (1,) * 2, slots="none")
    args, _ = jax.tree.map(jnp.asarray, testing.make(case))

    def loss(args):
        return jnp.sum(update(*args)[1] ** 2)

    def size(args):
        return sum(jnp.sum(x**2) for x in jax.grad(loss)(args))

    assert all(jnp.isfinite(x).all() for x in jax.jit(jax.grad(size))(args))
