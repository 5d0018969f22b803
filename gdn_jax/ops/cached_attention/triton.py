"""Attention of a few tokens to a cache as a Pallas kernel (Triton lowering).

A program has the queries of one key head and a part of the sequence's positions, of
which it reads those that there are: how many that is says `start`, on the device. Where
parts are several, a second launch puts their sums together.

    m = max of logits;  l = sum of exp2(logit - m);  acc = sum of exp2(logit - m) v
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.blocks import indices, padded
from gdn_jax.ops.cached_attention.call import Inputs, Options
from gdn_jax.ops.cached_attention.tuning import AttentionConfig


class Sums(NamedTuple):
    m: Array
    l: Array  # noqa: E741, the field's letter
    acc: Array


def attend_kernel(inputs: Any, *outputs: Any, config: AttentionConfig) -> None:
    """Grid: (parts, key heads, sequences)."""
    q_ref, k_ref, v_ref, rows, starts = inputs
    _, T, num_heads, dim = q_ref.shape
    num_kv_heads, num_positions = k_ref.shape[1:3]
    last = np.int32(k_ref.shape[0] - 1)
    part, head, n = (pl.program_id(axis) for axis in range(3))
    row = n if rows is None else jnp.clip(_triton.load(rows.at[n]), 0, last)
    start = _triton.load(starts.at[n])
    group = num_heads // num_kv_heads
    query = indices(padded(T * group))
    token, features = query // np.int32(group), indices(dim)
    is_query = jnp.broadcast_to((token < T)[:, None], (query.size, dim))

    def of_queries(ref: Any) -> Any:
        own = head * group + query % np.int32(group)
        return ref.at[n, token[:, None], own[:, None], features[None, :]]

    q = _triton.load(of_queries(q_ref), mask=is_query, other=0)

    end = jnp.clip(start + np.int32(T), 0, np.int32(num_positions))
    begin, steps = _own_positions(part, end, config)

    def load(ref: Any, position: Array) -> Array:
        place = ref.at[row, head, position[:, None], features[None, :]]
        mask = jnp.broadcast_to((position < end)[:, None], (config.block_m, dim))
        return _triton.load(place, mask=mask, other=0)

    def step(i: Array, sums: Sums) -> Sums:
        position = begin + i * np.int32(config.block_m) + indices(config.block_m)
        logits = _triton.dot(q, load(k_ref, position), trans_b=True)
        logits = logits * np.float32(math.log2(math.e) / math.sqrt(dim))
        reached = position[None, :] <= (start + token)[:, None]
        reached &= (position < end)[None, :]
        logits = jnp.where(reached, logits, np.float32(-np.inf))
        m = jnp.maximum(sums.m, jnp.max(logits, axis=1))
        # no position reached yet: exp2(-inf - -inf) would be NaN
        shift = jnp.where(m == -jnp.inf, jnp.float32(0), m)
        weights = jnp.exp2(logits - shift[:, None])
        decay = jnp.exp2(sums.m - shift)
        value = load(v_ref, position)
        acc = _triton.dot(weights.astype(value.dtype), value)
        return Sums(
            m,
            sums.l * decay + jnp.sum(weights, axis=1),
            sums.acc * decay[:, None] + acc,
        )

    sums = Sums(
        jnp.full(query.shape, -jnp.inf, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros((query.size, dim), jnp.float32),
    )
    sums = lax.fori_loop(np.int32(0), steps, step, sums)
    if config.splits == 1:
        [out_ref] = outputs
        out = sums.acc / _where_any(sums.l)[:, None]
        place = of_queries(out_ref)
        _triton.store(place, out.astype(out_ref.dtype), mask=is_query)
        return
    refs: Any = Sums(*outputs)
    at = n, head, part
    _triton.store(refs.m.at[(*at, query)], sums.m)
    _triton.store(refs.l.at[(*at, query)], sums.l)
    place = refs.acc.at[(*at, query[:, None], features[None, :])]
    _triton.store(place, sums.acc)


def _own_positions(
    part: Array, end: Array, config: AttentionConfig
) -> tuple[Array, Array]:
    """Of those before `end`, a program's first one and its steps."""
    size = np.int32(config.block_m)
    steps = _ceil_div(_ceil_div(end, size), np.int32(config.splits))
    begin = part * steps * size
    return begin, jnp.clip(_ceil_div(end - begin, size), 0, steps)


def combine_kernel(sums: Any, out_ref: Any) -> None:
    """Grid: (queries of a key head, key heads, sequences)."""
    query, head, n = (pl.program_id(axis) for axis in range(3))
    parts, features = indices(sums.m.shape[2]), indices(sums.acc.shape[4])
    m = _triton.load(sums.m.at[n, head, parts, query])
    top = jnp.max(m, axis=0)
    weights = jnp.exp2(m - jnp.where(top == -jnp.inf, jnp.float32(0), top))
    total = jnp.sum(weights * _triton.load(sums.l.at[n, head, parts, query]), axis=0)
    place = sums.acc.at[n, head, parts[:, None], query, features[None, :]]
    out = jnp.sum(weights[:, None] * _triton.load(place), axis=0) / _where_any(total)
    group = out_ref.shape[2] // sums.m.shape[1]
    token, own = query // np.int32(group), query % np.int32(group)
    place = out_ref.at[n, token, head * group + own, features]
    _triton.store(place, out.astype(out_ref.dtype))


def _where_any(total: Array) -> Array:
    """A sum to divide by; a sequence that has reached nothing gives zeros."""
    return jnp.where(total == 0, jnp.float32(1), total)


def _ceil_div(x: Array, y: np.int32) -> Array:
    return lax.div(x + (y - np.int32(1)), y)


def triton(
    x: Inputs, options: Options, config: AttentionConfig, *, interpret: bool = False
) -> Array:
    del options
    N, T, num_heads, dim = x.q.shape
    num_kv_heads = x.k.shape[1]
    queries = T * num_heads // num_kv_heads
    out = ((N, T, num_heads, dim), x.q.dtype)
    launch = functools.partial(
        _triton.launch, aliases={}, num_warps=config.num_warps, interpret=interpret
    )
    kernel = functools.partial(attend_kernel, config=config)
    grid = (config.splits, num_kv_heads, N)
    if config.splits == 1:
        [y] = launch(kernel, x, (out,), grid=grid, num_stages=config.num_stages)
        return y
    parts = (N, num_kv_heads, config.splits, padded(queries))
    shapes = (parts, jnp.float32), (parts, jnp.float32), ((*parts, dim), jnp.float32)
    sums = launch(kernel, x, shapes, grid=grid, num_stages=config.num_stages)
    [y] = launch(combine_kernel, Sums(*sums), (out,), grid=(queries, num_kv_heads, N))
    return y
