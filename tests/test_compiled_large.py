"""Sizes where 32 bits or a launch grid's limits end, compiled for an H200, without a
GPU; test_large.py runs some of them on one."""

import re

import aot
import jax
import pytest
from op_calls import OPS, array

from gdn_jax.ops.cached_attention.api import cached_attention
from gdn_jax.ops.cached_attention.call import Inputs

GRID_LIMIT = 65535  # of CUDA, along y and z


@pytest.mark.parametrize("name", OPS)
def test_a_slot_past_32_bits_is_multiplied_in_64(name):
    """By the elements or the bytes that a slot has."""
    P, HV = 1_000_000 if name == "causal_conv1d" else 50_000, 3
    call, shapes = OPS[name](P, 5, HV)
    pools = [x for x in jax.tree.leaves(shapes[0]) if x.size > 2**31]
    assert pools
    _check_is_wide(aot.compile_for_h200(call, *shapes, donate_argnums=0), pools)


def _check_is_wide(compiled, pools):
    """A pool's stride is multiplied in 64 bits, and never in 32."""
    ptx = "".join(compiled.ptx)
    for pool in pools:
        stride = pool.size // pool.shape[0]
        narrow = re.findall(rf"m(?:ul|ad)\.lo\.\w32.*, {stride}\b.*", ptx)
        assert not narrow, narrow
        size = stride * pool.dtype.itemsize
        assert re.search(rf"m(?:ul|ad)\.wide\.\w32.*, ({stride}|{size})\b", ptx)


def test_a_row_of_a_cache_past_32_bits_is_multiplied_in_64():
    q, cache = array(3, 1, 6, 128), array(2000, 3, 4001, 128)
    assert cache.size > 2**31
    rows = array(3, dtype="int32")

    def attend(q, k, v, rows, start):
        x = Inputs(q, k, v, rows, start)
        return cached_attention(x, implementation="triton")

    compiled = aot.compile_for_h200(attend, q, cache, cache, rows, rows)
    _check_is_wide(compiled, [cache])


@pytest.mark.parametrize(("N", "HV"), [(1024, 64), (70_000, 1)])
@pytest.mark.parametrize("name", OPS)
def test_many_rows_and_heads_stay_within_a_launch_grid(name, N, HV):
    call, shapes = OPS[name](N, N, HV)
    grids = re.findall(r"grid_[yz] = (\d+)", aot.lower(call, *shapes))
    assert grids and max(map(int, grids)) <= GRID_LIMIT
