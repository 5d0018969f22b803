"""What benchmarks/replay.py times is right: its steps, with rings begun anywhere."""

import importlib
import itertools
import pathlib

import numpy as np
import pytest

from gdn_jax import testing

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
SMALL = dict(H=1, HV=6, K=16, V=16)


@pytest.mark.parametrize(
    ("N", "T", "accepts"),
    [(6, 1, "all"), (6, 4, "uniform"), (6, 4, "one")],
)
def test_its_steps_agree_and_fold(N, T, accepts, monkeypatch):
    """Also of as many tokens as value heads."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    replay, update = map(importlib.import_module, ("replay", "update"))
    for module in (replay, update):
        monkeypatch.setattr(module, "L2_BYTES", 2**12)
    problem = replay.Problem(N, T, "float32", accepts, **SMALL)
    ours, wanted = (
        itertools.islice(replay.steps_of(problem, implementation=name), 40)
        for name in ("xla", "reference")
    )
    committed = []
    for (state, out), (want_state, want) in zip(ours, wanted, strict=True):
        error = testing.relative_error(state.to_dense(), want_state.to_dense())
        assert error < testing.TOLERANCE["state", "float32"]
        error = testing.relative_error(out, want)
        assert error < testing.TOLERANCE["out", "bfloat16"]
        committed.append(np.array(state.committed))
    assert len(set(committed[0])) > 1  # each row at its own place
    assert np.any(np.diff(committed, axis=0) < 0, axis=0).all()  # every row folds
