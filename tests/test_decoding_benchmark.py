"""What benchmarks/generate.py times and takes for the least, by a small model."""

import dataclasses
import importlib
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gdn_jax import models

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
SMALL = dict(linear_num_key_heads=2, linear_num_value_heads=4)
SMALL |= dict(linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16)


@pytest.fixture
def small_model(monkeypatch):
    """Four layers, as `geometries` and `generate` see them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    geometries, generate = map(importlib.import_module, ("geometries", "generate"))
    config = geometries.dense(64, 4, 2, 1, intermediate_size=96, **SMALL)
    config = dataclasses.replace(config, vocab_size=128)
    monkeypatch.setitem(geometries.MODELS, "small", config)
    monkeypatch.setattr(geometries, "make_model", models.Model)
    return geometries, generate, config


@pytest.mark.parametrize("drafts", [0, 2])
def test_blocks_of_a_model_give_the_tokens_they_are_timed_for(drafts, small_model):
    """Fused and unfused; drafts stand as the pattern says, whatever weights say."""
    geometries, generate, config = small_model
    point = geometries.Point("small", 3, drafts, "float32")
    params = geometries.random_of(geometries.param_shapes(config), 0)
    for update in ("fused", "in turn", "unfused"):
        block = generate.block_of(update)
        _, emitted = block(models.Model(config), params, geometries.make_state(point))
        wanted = point.tokens_a_step * geometries.STEPS
        assert np.abs(np.asarray(emitted.num_tokens) - wanted).max() <= 1


@pytest.mark.parametrize("drafts", [0, 3])
def test_so_do_blocks_of_replay(drafts, small_model, monkeypatch):
    """Whose rows begin with records, each as many as its turn says."""
    geometries, _, config = small_model
    schemes = importlib.import_module("schemes")
    monkeypatch.setattr(schemes, "make_model", models.Model)
    point = geometries.Point("small", 20, drafts, "float32", "replay")
    with ThreadPoolExecutor(1) as pool:
        block = schemes.begin_compiling(point, pool).result()
    params = geometries.random_of(geometries.param_shapes(config), 0)
    state = geometries.make_state(point)
    records = state.model.layers[0].recurrent
    assert set(records.committed.tolist()) == set(range(16))
    assert np.all(np.asarray(records.log_decay) <= 0)
    state, emitted = block(params, state)
    wanted = point.tokens_a_step * geometries.STEPS
    assert np.abs(np.asarray(emitted.num_tokens) - wanted).max() <= 1
    assert np.isfinite(state.model.layers[0].recurrent.checkpoint).all()


def test_the_least_bytes_of_a_step(small_model):
    geometries, _, config = small_model
    least = geometries.least_bytes(geometries.Point("small", 3, 0, "float32"))
    params = geometries.param_shapes(config)["params"]
    unused = ("embed", "mtp", "norm")
    used = {k: v for k, v in params.items() if k not in unused}
    assert least["weights"] == geometries.num_bytes(used)
    assert least["kv"] == 2 * 3 * 16 * 1024 * 4  # k and v, rows, dim, positions
    rule, conv = 4 * 16 * 16, (2 * 2 * 16 + 4 * 16) * 4  # of a row
    assert least["state"] == 3 * 3 * 2 * (rule + conv) * 4  # layers, rows, in and out


def test_a_part_measured_again_keeps_the_other_rows(small_model, tmp_path):
    geometries, generate, _ = small_model
    path = tmp_path / "generate_small.json"

    def row(N, **others):
        point = geometries.Point("small", N, 0, "float32")
        return dataclasses.asdict(point) | {"update": "fused"} | others

    rows = [row(1), row(8), row(64, commit="older", date="then")]
    path.write_text(json.dumps({"commit": "old", "date": "once", "rows": rows}))
    measured = generate.points(
        "small", quick=False, batches=[8], drafts=generate.DRAFTS
    )
    measured = [dataclasses.asdict(point) for point in measured]
    kept = generate.rows_besides(measured, tmp_path / "none.json", path)
    assert generate.rows_besides(measured, tmp_path / "none.json") == []
    assert [each["rows"] for each in kept] == [1, 64]
    assert [each["commit"] for each in kept] == ["old", "older"]
    assert [each["date"] for each in kept] == ["once", "then"]
