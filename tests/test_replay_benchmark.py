"""What benchmarks/replay.py times is right: its steps, with rings begun anywhere."""

import importlib
import itertools
import json
import pathlib

import numpy as np
import pytest

from gdn_jax import testing
from gdn_jax.ops.gated_delta import replay_tuning, tuning

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
SMALL = dict(H=1, HV=6, K=16, V=16)


@pytest.mark.parametrize(
    ("N", "T", "accepts"),
    [(6, 1, "all"), (6, 4, "uniform"), (6, 4, "one")],
)
def test_its_steps_agree_and_fold(N, T, accepts, monkeypatch):
    """Also of as many tokens as value heads."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    replay, update = map(importlib.import_module, ("replay_steps", "update"))
    for module in (replay, update):
        monkeypatch.setattr(module, "L2_BYTES", 2**12)
    problem = replay.Problem(N, T, "float32", accepts, **SMALL)
    ours, wanted = (
        itertools.islice(
            replay.steps_of(
                replay.make_inputs(problem), replay.make_step(implementation=name)
            ),
            40,
        )
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


def _result(rows, **others):
    told = dict(device="NVIDIA H200", versions=dict(jax="0.11.2"), date="2026-11-30")
    told |= dict(commit="0123456789abcdef", time="a mean", inputs="normal")
    return told | others | dict(rows=rows)


def _row(contender, N, T, us=None, accepts="uniform", **others):
    row = dict(contender=contender, N=N, T=T, state_dtype="float32", accepts=accepts)
    if us is not None:
        row["median_us" if contender == "triton" else "mean_us"] = us
    return row | others


def test_reports_of_replay_go_where_their_markers_are(report, tmp_path):
    page = tmp_path / "docs" / "drafts.md"
    names = "replay", "schemes", "drift"
    page.write_text("".join(f"<!-- {x} -->\n<!-- /{x} -->\n" for x in names))
    (tmp_path / "README.md").write_text("")
    rows = [
        _row("replay", 8, 4, 20.0),
        _row("replay", 128, 4, 100.0),
        _row("replay", 128, 4, 110.0, "all"),
        _row("replay", 128, 4, 90.0, "one"),
        _row("replayssm_verify", 128, 4, 123.0, note="rounds to bfloat16"),
        _row("replayssm_verify", 64, 4, 60.0, note="of old", date="2026-01-01"),
        _row("flashinfer_ucache", 128, 4, absent="keeps a bfloat16 state; got float32"),
        _row("triton", 128, 4, 400.0),
        _row("replay", 256, 1, 170.0),
    ]
    point = dict(model="A", rows=64, drafts=3, state_dtype="float32")
    of_row = dict(bytes_a_row=dict(states=9e6, kv=1.0), most_rows=1234)
    kept = [
        point | of_row | dict(decode="replay", tokens_per_s=5000.0),
        point | of_row | dict(decode="checkpoints", absent="9 of 8 GB"),
    ]
    drifts = [
        dict(state_dtype="float32", how=how, step=step, error=step * 1e-7)
        for how in ("in place", "replay, 3 parts")
        for step in (1, 10)
    ] + [dict(state_dtype="bfloat16", how="in place", step=10, error=0.01)]
    files = dict(replay=_result(rows), schemes=_result(kept))
    files["drift"] = _result(drifts, steps=10)
    for name, result in files.items():
        (tmp_path / "nvidia_h200" / f"{name}.json").write_text(json.dumps(result))
    report.main()
    text = page.read_text()
    assert "| verify T=4, float32 state, us a step, N = | 8 | 64 | 128 |" in text
    assert "| gdn_jax, replay | 20.0 | - | 100.0 |" in text
    assert "| ReplaySSM, verifying | - | 60.0 | 123.0 |" in text
    assert "of old" not in text
    assert "| gdn_jax, replay, float32 state | 90.0 | 100.0 | 110.0 |" in text
    where = "verify T=4, N=128, float32 state"
    reason = "keeps a bfloat16 state; got float32"
    assert f"FlashInfer u-cache is absent at {where}: {reason}" in text
    assert (
        "ReplaySSM, verifying: rounds to bfloat16." in text
        and "bfloat16 state, us" not in text
    )
    assert "| float32 state, 3 drafts, replay | 5,000 | 9 | 1,234 |" in text
    assert "| float32 state, 3 drafts, checkpoints | - | 9 | 1,234 |" in text
    assert "| token by token in place | 1.0e-06 | 1.0e-02 |" in text
    assert "| replay, three parts | 1.0e-06 | - |" in text
    assert (tmp_path / "nvidia_h200" / "drift.png").is_file()


def test_a_crossover_is_where_replay_stays_faster(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    crossover = importlib.import_module("crossover")
    monkeypatch.setattr(crossover, "ROWS", (1, 2, 4, 8))

    def rows(T=2, **us):
        of = dict(T=T, state_dtype="float32", H=2, HV=8, K=32, V=16)
        of |= dict(commit="told", date="told")
        for contender, name in crossover.CONTENDERS.items():
            for N, value in zip((1, 2, 4, 8), us[contender], strict=True):
                yield of | {"contender": contender, "N": N, name: value}

    found = list(rows(replay=(1, 9, 9, 9), triton=(2, 2, 10, 20)))
    row = crossover.crossover_of(found)
    assert row.pop("reason").startswith("us of replay / every state: 9.0 / 2.0 at N=2")
    wanted = dict(K=32, V=16, group=4, tokens=2, state_dtype="float32", heads=4 * 8)
    assert row == wanted
    assert crossover.crossover_of(found[:-1]) is None  # a measurement that was cut off
    never = list(rows(T=1, replay=[9] * 4, triton=[8] * 4))
    assert crossover.crossover_of(never)["heads"] is None

    package = tmp_path / "device.json"
    package.write_text(json.dumps({"runs": ["kept"]}))
    about = dict.fromkeys(("date", "commit", "versions", "inputs"), "told")
    older, newest = (dict(commit=x, date=f"of {x}") for x in ("earlier", "last"))
    never = [row | older for row in never[:-1]] + [never[-1] | newest]
    crossover.write_table(about | {"rows": found + never}, package, None)
    table = json.loads(package.read_text())
    assert table["runs"] == ["kept"] and table["replay"]["commit"] == "told"
    first, second = table["replay"]["rows"]
    assert (first["heads"], second["heads"]) == (None, 32)
    assert newest.items() <= first.items() and "commit" not in second
    monkeypatch.setattr(tuning, "read", lambda kind: table)
    read = replay_tuning.crossovers.__wrapped__("device")
    assert [row.heads for row in read] == [None, 32]
