"""What benchmarks/horizon.py tells is so, and where its report goes."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax import testing

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def horizon(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    horizon = importlib.import_module("horizon")
    for name, size in dict(K=16, V=16, MARKS=3).items():
        monkeypatch.setattr(horizon, name, size)
    return horizon


def test_errors_are_of_every_kind_of_head(horizon):
    """A float32 state has lost little, one of 16 bits its digits."""
    marks = list(horizon.measure(horizon.CONTENDERS, 64, "xla"))
    assert [rows[0]["step"] for rows in marks] == [1, 8, 64]
    for rows in marks:
        assert len(rows) == len(horizon.CONTENDERS) * len(horizon.HEADS)
    for row in marks[-1]:
        least, most = dict(
            float32=(0, testing.TOLERANCE["state", "float32"]),
            bfloat16=(1e-3, 0.1),
            float16=(1e-4, 0.05),
        )[row["state_dtype"]]
        assert least < row["error"] < most, row


def test_draws_are_the_same_in_programs_of_any_width(horizon):
    tables = horizon.make_tables()
    one = jax.jit(horizon.draw)(tables, jnp.int32(7))
    with jax.enable_x64(True):
        other = jax.jit(horizon.draw)(tables, jnp.int32(7))
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y)
    assert len({np.asarray(x).tobytes() for x in one}) == len(one)


def test_a_report_goes_where_its_marker_is(report, tmp_path):
    page = tmp_path / "docs" / "numerics.md"
    page.write_text("<!-- horizon -->\n<!-- /horizon -->\n")
    (tmp_path / "README.md").write_text("")
    kinds = [
        ("float32", "nearest"),
        ("bfloat16", "nearest"),
        ("bfloat16", "stochastic"),
    ]
    rows = [
        dict(
            state_dtype=dtype, rounding=rounding, head=head, step=step, error=step / 1e5
        )
        for head in ("typical", "slow", "slower")
        for dtype, rounding in kinds
        for step in (10, 1000)
    ]
    times = [dict(N=64, state_dtype="bfloat16", nearest_us=38.2, stochastic_us=40.0)]
    told = dict(device="NVIDIA H200", versions=dict(jax="0.11.2"), date="2026-11-30")
    told |= dict(commit="0123456789abcdef", inputs="normal", rows=rows, times=times)
    (tmp_path / "nvidia_h200" / "horizon.json").write_text(json.dumps(told))
    report.main()
    text = page.read_text()
    wanted = (
        "| relative error after 1,000 steps, head | float32 | bf16 | bf16, stochastic |"
    )
    assert wanted in text
    assert "| slow | 1.0e-02 | 1.0e-02 | 1.0e-02 |" in text
    assert "| bfloat16 state, stochastic | 40.0 |" in text
    assert (tmp_path / "nvidia_h200" / "horizon.png").is_file()
