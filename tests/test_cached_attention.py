"""Attention to a cache, by its kernel, against float64."""

import dataclasses
import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax import testing
from gdn_jax.ops.cached_attention.api import cached_attention, why_not
from gdn_jax.ops.cached_attention.call import Inputs
from gdn_jax.ops.cached_attention.tuning import AttentionConfig, heuristic

P, M = 5, 104  # no multiple of a block's positions
# heads, key heads, head_dim, tokens, tokens before them
CASES = {
    "decode": (8, 2, 32, 1, (40, 0, 95)),
    "one head": (1, 1, 16, 1, (7, 31, 32)),
    "verify": (6, 2, 32, 4, (0, 29, 92)),  # 12 queries of a key head
    "many": (16, 2, 16, 4, (63, 64, 5)),  # 32
}


def make(case, dtype="bfloat16", in_rows=True, seed=0):
    """Positions that nothing reaches are NaN in k and huge in v."""
    heads, kv_heads, dim, T, start = CASES[case]
    N = len(start)
    draw = np.random.default_rng(seed).standard_normal
    rows = np.array([3, 0, 4])
    k, v = (draw((P, kv_heads, M, dim)).astype(np.float32) for _ in range(2))
    for n, row in enumerate(rows):
        k[row, :, start[n] + T :], v[row, :, start[n] + T :] = np.nan, 1e30
    q = draw((N, T, heads, dim))
    if not in_rows:
        k, v, rows = k[rows], v[rows], None
    arrays = (jnp.asarray(x, dtype) for x in (q, k, v))
    rows = None if rows is None else jnp.asarray(rows, jnp.int32)
    return Inputs(*arrays, rows, jnp.asarray(start, jnp.int32))


def exact(x):
    q, k, v = (np.asarray(y, np.float64) for y in (x.q, x.k, x.v))
    N, T, heads, dim = q.shape
    out = np.zeros(q.shape)
    for n in range(N):
        row = n if x.rows is None else int(x.rows[n])
        for t in range(T):
            end = int(x.start[n]) + t + 1
            for h in range(heads):
                kv = h // (heads // k.shape[1])
                logits = k[row, kv, :end] @ q[n, t, h] / np.sqrt(dim)
                weights = np.exp(logits - logits.max())
                out[n, t, h] = weights @ v[row, kv, :end] / weights.sum()
    return out


@pytest.mark.parametrize("in_rows", [True, False], ids=["rows", "all"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(path, case, in_rows):
    x = make(case, in_rows=in_rows)
    out = cached_attention(x, implementation=path)
    assert out.dtype == x.q.dtype
    # weights, too, are rounded to 16 bits
    tolerance = 2 * testing.TOLERANCE["out", "bfloat16"]
    assert testing.relative_error(out, exact(x)) < tolerance


@pytest.mark.parametrize(
    "kernel", ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_parts_are_put_together(kernel, splits):
    """Also where most of them have nothing to read."""
    x, config = make("verify"), AttentionConfig(splits, block_m=16)
    out = cached_attention(x, implementation=kernel, config=config)
    tolerance = 2 * testing.TOLERANCE["out", "bfloat16"]
    assert testing.relative_error(out, exact(x)) < tolerance


def test_tokens_past_the_cache_attend_to_all_of_it(path):
    x = make("verify")
    x = x._replace(start=jnp.array([M - 2, M, M + 3], jnp.int32))
    x = x._replace(k=jnp.nan_to_num(x.k), v=jnp.clip(x.v, -3, 3))
    out = cached_attention(x, implementation=path)
    tolerance = 2 * testing.TOLERANCE["out", "bfloat16"]
    assert testing.relative_error(out, exact(x)) < tolerance


@pytest.mark.parametrize("axis", ["tokens", "sequences", "positions"])
def test_an_empty_call_is_xlas(axis):
    x = make("decode", in_rows=False)
    if axis == "tokens":
        x = x._replace(q=x.q[:, :0])
    elif axis == "sequences":
        x = Inputs(x.q[:0], x.k[:0], x.v[:0], None, x.start[:0])
    else:
        x = x._replace(k=x.k[:, :, :0], v=x.v[:, :, :0])
    assert why_not(x) == "an axis is empty"
    assert cached_attention(x).shape == x.q.shape


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x._replace(v=x.v[:, :1]), "k and v must be"),
        (lambda x: x._replace(q=x.q[:, :, :7]), "q's heads must be a multiple of"),
        (lambda x: x._replace(rows=None), "k must be of P = N = 3 where rows is None"),
        (lambda x: x._replace(start=x.start[:2]), r"start must be \[N\] = \(3,\)"),
    ],
)
def test_a_wrong_call_is_told(change, text):
    with pytest.raises(ValueError, match=text):
        cached_attention(change(make("decode")))


def test_a_nan_is_its_own_sequences(path):
    x = make("decode")
    spoiled = x._replace(k=x.k.at[int(x.rows[0]), :, 2].set(jnp.nan))
    out, want = (
        np.asarray(cached_attention(y, implementation=path), np.float32)
        for y in (spoiled, x)
    )
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1:], want[1:])


def test_a_sequence_of_nothing_gives_zeros():
    x = make("decode")
    x = x._replace(start=jnp.array([-1, 3, 5], jnp.int32))
    out = cached_attention(x, implementation="interpret")
    assert not np.asarray(out[0], np.float32).any()


def test_gradients_are_xlas():
    x = make("decode")
    x = x._replace(k=jnp.nan_to_num(x.k), v=jnp.minimum(x.v, 1))
    seed = jax.random.normal(jax.random.key(1), x.q.shape, x.q.dtype)
    got, want = (
        jax.vjp(
            lambda q, path=path: cached_attention(x._replace(q=q), implementation=path),
            x.q,
        )[1](seed)[0]
        for path in ("interpret", "xla")
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda x: x._replace(q=x.q.astype(jnp.float32)), "bfloat16 or float16"),
        (lambda x: x._replace(q=jnp.tile(x.q, (1, 40, 1, 1))), "64 queries"),
        (lambda x: Inputs(*(y[..., :24] for y in x[:3]), *x[3:]), "head_dim"),
    ],
)
def test_what_the_kernel_cannot_take_is_xlas(change, reason):
    x = change(make("decode"))
    assert reason in why_not(x)
    with pytest.raises(NotImplementedError, match=reason):
        cached_attention(x, implementation="interpret")


@pytest.mark.parametrize("N, T", [(1, 1), (8, 4), (64, 1)])
def test_compiles_without_spills(N, T):
    """A launch, a second where positions are shared, and no copy of the caches."""
    S = jax.ShapeDtypeStruct
    cache = S((N, 4, 2048, 256), jnp.bfloat16)
    x = Inputs(S((N, T, 16, 256), jnp.bfloat16), cache, cache, None, S((N,), jnp.int32))
    f = functools.partial(cached_attention, implementation="triton")
    compiled = aot.compile_for_h200(
        lambda *x: f(Inputs(*x[:3], None, x[3])), *x[:3], x[4]
    )
    found = compiled.launches()
    splits = heuristic(N, 4, 2048).splits
    assert len(found) == (1 if splits == 1 else 2), found
    assert compiled.resources()["spills"] == 0


def test_launches_fill_the_gpu():
    assert heuristic(1, 4, 2048) == AttentionConfig(splits=32)
    assert heuristic(64, 4, 2048).splits == 1
    assert heuristic(1, 4, 64).splits == 2  # no more than there are steps
    with pytest.raises(ValueError, match="splits"):
        dataclasses.replace(heuristic(1, 4, 64), splits=3)
