"""Launches other than the interpreter's own: warps, several tiles, tails; the table."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing
from gdn_jax.ops.gated_delta import tuning
from gdn_jax.ops.gated_delta.tile import Tile
from gdn_jax.ops.gated_delta.triton import group_at

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"

CONFIGS = [
    gdn_jax.LaunchConfig(block_v=8, lanes_v=4, tiles=2, num_warps=2),
    gdn_jax.LaunchConfig(block_v=4, lanes_v=2, tiles=3),
    gdn_jax.LaunchConfig(block_v=32, lanes_v=2, num_warps=4),
]
NAMES = [
    "decode, nulls",
    "decode, odd dims",
    "dense, KDA",
    "packed, K=96 V=192",
    "checkpoints, nulls",
    "states, packed",
]
CASES = [case for case in testing.CASES if case.name in NAMES]


def _launches():
    """All of them compiled; interpreted, where warps are nothing, half of them."""
    for i, case in enumerate(CASES):
        for j, config in enumerate(CONFIGS):
            name = f"{case.name}-{config}"
            marks = pytest.mark.gpu
            yield pytest.param(case, config, "triton", marks=marks, id=f"{name}-triton")
            if (i + j) % 2 == 0:
                yield pytest.param(case, config, "interpret", id=name)


@pytest.mark.parametrize(("case", "config", "kernel"), list(_launches()))
def test_a_pinned_launch_agrees_with_the_oracle(case, config, kernel):
    args, kwargs = testing.make(case)
    want_state, want_out, written = testing.oracle(args, kwargs)
    state, out = gdn_jax.fused_update(
        *args, **kwargs, implementation=kernel, config=config
    )
    state, bar = np.asarray(state), testing.TOLERANCE["state", case.state_dtype]
    assert testing.relative_error(state[written], want_state[written]) < bar
    bar = testing.TOLERANCE["out", out.dtype.name]
    assert testing.relative_error(out, want_out) < bar
    untouched = 0 if kwargs.get("per_token_states") else args[0][~written]
    assert np.array_equal(state[~written], untouched + 0 * state[~written], True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 32), (7, 20), (192, 96), (48, 128)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tiles_hold_every_value_of_a_state_once(config, shape, dtype):
    """Past its end as well: what is not masked there lies in the next head."""
    V, K = shape
    held = np.zeros((2 * V + 64, 2 * K + 256), int)
    state = jax.ShapeDtypeStruct((1, 1, V, K), jnp.dtype(dtype))
    rows = config.block_v * config.tiles
    for index in range(-(-V // rows) * config.tiles):
        tile = Tile.of(state, jnp.int32(index), config)
        for chunk, k in enumerate(tile.k):
            mask = tile.in_v is None or tile.in_v
            mask = mask if tile.in_k is None else mask & tile.in_k[chunk]
            v, k, mask = np.broadcast_arrays(tile.v, k, mask)
            np.add.at(held, (v[mask], k[mask]), 1)
    want = np.zeros_like(held)
    want[:V, :K] = 1
    assert np.array_equal(held, want)


def _find(dtype, heads, device="NVIDIA H200", K=128, walk="one"):
    return tuning.find_config(device, K, 128, dtype, heads=heads, walk=walk)


def _rows(dtype, walk="one"):
    rows = (
        row
        for row in tuning.table("NVIDIA H200")
        if (row.K, row.V, row.state_dtype, row.walk) == (128, 128, dtype, walk)
    )
    return sorted(rows, key=lambda row: row.heads)


@pytest.mark.parametrize("walk", ["one", "few", "any"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_takes_the_smallest_bucket_that_holds_it(dtype, walk):
    rows, below = _rows(dtype, walk), 0
    for row in rows:
        for heads in (below + 1, row.heads):
            assert _find(dtype, heads, walk=walk) == row.config
        below = row.heads
    past = _find(dtype, 2 * below, walk=walk)
    assert past == rows[-1].config


def test_float16_takes_bfloat16s_rows():
    for row in _rows("bfloat16"):
        assert _find("float16", row.heads) == row.config


def test_few_tokens_that_were_not_measured_take_the_rows_of_any(monkeypatch):
    rows = tuple(row for row in tuning.table("NVIDIA H200") if row.walk != "few")
    monkeypatch.setattr(tuning, "table", lambda kind: rows)
    assert _find("float32", 32, walk="few") == _find("float32", 32, walk="any")


@pytest.mark.parametrize(
    ("tokens_per_row", "per_k", "walk"),
    [
        (1, False, "one"),
        (1, True, "one"),
        (2, False, "few"),
        (4, False, "few"),
        (4, True, "any"),
        (5, False, "any"),
        (None, False, "any"),
    ],
)
def test_how_a_row_is_walked(tokens_per_row, per_k, walk):
    assert tuning.find_walk(tokens_per_row, per_k) == walk


def test_what_a_benchmark_tunes_is_what_a_call_takes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    tune = importlib.import_module("tune")
    walks = {"decode": "one", "verify": "any", "few": "few", "olmo": "one"}
    for suite, walk in walks.items():
        for problem in tune.SUITES[suite]:
            rows = [
                dict(config=config, us=1.0)
                for config in tune.candidates(problem)  # the heuristic among them
            ]
            assert tune.tuned_row(problem, rows)["walk"] == walk
            assert (tune.update.boundaries(problem) is None) == (walk != "any")


def test_a_group_reads_no_token_past_the_last():
    assert group_at(np.int32(2), np.int32(9)).tolist() == [2, 3, 4, 5]
    assert group_at(np.int32(8), np.int32(9)).tolist() == [8, 9, 9, 9]
    assert group_at(np.int32(12), np.int32(9)).tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize("unknown", [dict(device="NVIDIA H20"), dict(K=80)])
def test_what_was_never_measured_takes_the_heuristic(unknown):
    K = unknown.get("K", 128)
    assert _find("float32", 32, **unknown) == tuning.heuristic(K, 128)
