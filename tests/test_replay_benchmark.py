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


@pytest.mark.parametrize(
    ("peer", "T", "reason"),
    [
        ("replayssm", 4, "one token a row"),
        ("replayssm", 1, "PYTHONPATH"),
        ("replayssm_verify", 1, "two tokens a row or more"),
        ("flashinfer_ucache", 2, "4 or 8 tokens"),
    ],
)
def test_a_peer_says_why_it_is_absent(peer, T, reason, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    replay, peers = map(importlib.import_module, ("replay", "peers.replay"))
    problem = replay.Problem(6, T, "float32", **SMALL)
    row = replay.measure_peer(problem, peer, getattr(peers, peer))
    assert reason in row["absent"]


def test_drift_is_told_against_float64(monkeypatch):
    """Of all contenders; a float32 state has lost little after some steps."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    drift = importlib.import_module("drift")
    for name, size in dict(K=16, V=16, MARKS=3).items():
        monkeypatch.setattr(drift, name, size)
    rows = drift.measure(("float32", "bfloat16"), 9, "xla")
    assert {row["step"] for row in rows} == {1, 3, 9}
    errors = {(row["state_dtype"], row["how"]): row["error"] for row in rows}
    for how in ("replay", "in place"):
        assert 0 < errors["float32", how] < testing.TOLERANCE["state", "float32"]
    assert 1e-5 < errors["bfloat16", "replay"] < errors["bfloat16", "in place"]


def test_a_replay_states_row_takes_a_quarter_of_four_checkpoints(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    schemes, geometries = map(importlib.import_module, ("schemes", "geometries"))
    points = (
        geometries.Point("Qwen3.5-9B", 2, 3, "float32", decode)
        for decode in ("checkpoints", "replay")
    )
    checkpoints, replay = map(schemes.bytes_of_a_row, points)
    assert replay["kv"] == checkpoints["kv"]
    assert 0.25 < replay["states"] / checkpoints["states"] < 0.32
