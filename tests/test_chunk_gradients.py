"""Gradients of the chunked update against the oracle's, and under transformations."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chunks import PATHS, Case, made, split

import gdn_jax
from gdn_jax import testing

NAMES = ("state", "q", "k", "v", "A_log", "a", "b", "dt_bias")
GRADIENTS = (
    Case(
        "two tiles of K, of V",
        (70, 0, 9),
        tokens="packed",
        H=1,
        HV=3,
        K=72,
        V=100,
        act_dtype="float32",
    ),
    Case("float32", (100,) * 2, slots="none", act_dtype="float32", fresh=(1,)),
    Case("bfloat16", (100,) * 2, null_rows=(1,)),
    Case("float16", (70,), act_dtype="float16", H=1, HV=2, K=16),
    Case(
        "ragged, doubled beta",
        (70, 0, 65, 1, 33),
        tokens="packed",
        null_rows=(4,),
        padding=3,
        act_dtype="float32",
        options=(("allow_neg_eigval", True),),
    ),
    Case("plain q, k", (70,), options=(("qk_l2norm", False),), K=16, gate_spread=0.1),
    Case("extreme gates", (130,), gate_spread=40.0, act_dtype="float32"),
)


def _pull_back(case, function, path, dtype=None, **jit_options):
    args, kwargs, (states, out, _) = made(case)
    static, arrays = split(kwargs)
    args = [x if dtype is None else x.astype(dtype) for x in args]

    def call(*args):
        state, out = function(*args, **arrays, **static, implementation=path)
        return state.astype(jnp.float32), out.astype(jnp.float32)

    random = np.random.default_rng(1)
    cotangents = [
        jnp.asarray(random.standard_normal(x.shape), case.act_dtype)  # as they arrive
        for x in (states, out)
    ]
    cotangents = [x.astype(jnp.float32) for x in cotangents]

    def pulled(args, cotangents):
        return jax.vjp(call, *args)[1](tuple(cotangents))

    return jax.jit(pulled, **jit_options)(args, cotangents)


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_gradients_are_the_oracles(case, implementation):
    _gradients_are_the_oracles(case, implementation)


@pytest.mark.parametrize(
    "case",
    [
        Case("KDA", (70,) * 2, kda=True, act_dtype="float32"),
        Case(
            "KDA, ragged nulls",
            (66, 2, 0, 65, 3),
            tokens="packed",
            kda=True,
            H=4,
            K=8,
            V=8,
            null_rows=(1,),
            fresh=(3,),
            padding=2,
            act_dtype="float32",
        ),
    ],
    ids=lambda case: case.name,
)
def test_gradients_of_kda(case):
    _gradients_are_the_oracles(case, "xla")


@functools.cache
def _wanted(case):
    """Optimized: token by token it runs for longer than it compiles."""
    options = dict(compiler_options=aot.OPTIMIZED)
    return _pull_back(case, gdn_jax.fused_update, "reference", np.float32, **options)


def _gradients_are_the_oracles(case, implementation):
    got = _pull_back(case, gdn_jax.chunk_update, implementation)
    for name, g, w in zip(NAMES, got, _wanted(case), strict=True):
        assert np.isfinite(np.asarray(g, np.float32)).all(), name
        bar = testing.TOLERANCE["gradient", g.dtype.name]
        assert testing.relative_error(g, w) < bar, name


@pytest.mark.parametrize("implementation", PATHS)
def test_gradients_of_null_rows_are_zero(implementation):
    case = Case("nulls", (70,) * 2, null_rows=(0,))
    args, _, _ = made(case)
    for name, g in zip(
        NAMES, _pull_back(case, gdn_jax.chunk_update, implementation), strict=True
    ):
        if name in ("q", "k", "v", "a", "b"):
            assert np.isnan(np.asarray(args[NAMES.index(name)][0], np.float32)).any()
            assert not np.asarray(g[0], np.float32).any(), name


@functools.cache
def _two_layers():
    """Inputs of a call, and the oracle's gradients of the sums of two in a row."""
    case = Case("rows", (65,) * 2, slots="none", act_dtype="float32", K=16, V=16)
    args, _ = testing.make(case)

    def loss(state, *rest):
        def layer(state, _):
            new, out = gdn_jax.fused_update(state, *rest, implementation="reference")
            return new, out.sum()

        state, sums = jax.lax.scan(layer, state, None, length=2)
        return sums.sum() + state.sum()

    return args, jax.jit(jax.grad(loss, argnums=range(8)))(*args)


@pytest.mark.parametrize("implementation", PATHS)
def test_it_works_under_checkpoint_vmap_and_scan(implementation):
    args, want = _two_layers()

    def loss(state, *rest):
        def layer(state, _):
            new, out = gdn_jax.chunk_update(state, *rest, implementation=implementation)
            return new, out.sum()

        state, sums = jax.lax.scan(jax.checkpoint(layer), state, None, length=2)
        return sums.sum() + state.sum()

    batch = [jnp.stack([jnp.zeros_like(x), x]) for x in args]
    got = jax.jit(jax.vmap(jax.grad(loss, argnums=range(8))))(*batch)
    bar = testing.TOLERANCE["gradient", "float32"]
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert testing.relative_error(g[1], w) < bar, name
