"""Random calls as benchmarks/fuzz.py draws them, against the oracle; and the fuzzer."""

import functools
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing
from gdn_jax.testing import draws

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
SEED = 0


@functools.cache
def _update(shapes, path):
    update = functools.partial(
        gdn_jax.fused_update, implementation=path, **shapes.statics
    )
    return jax.jit(update)


def _check(shapes, drawn, path):
    want_state, want_out, written = testing.oracle(
        drawn.args, drawn.tables | shapes.statics
    )
    live = drawn.live
    written = written.reshape(-1)
    assert np.array_equal(written, drawn.written(shapes))
    state, out = map(np.asarray, _update(shapes, path)(*drawn.args, **drawn.tables))
    if shapes.per_token_states:
        state, want_state = (x.reshape(-1, *x.shape[-3:]) for x in (state, want_state))
    out, want_out = (x.reshape(-1, *x.shape[-2:]) for x in (out, want_out))
    pairs = (("out", out, want_out, live), ("state", state, want_state, written))
    for what, got, want, where in pairs:
        if where.any():
            got64, dtype = got[where].astype(np.float64), got.dtype
            found = testing.deviation(got64, want[where], dtype)
            assert found.is_within(what, dtype.name), (what, found)
    assert not np.any(out[~live])
    before = np.zeros_like(state) if shapes.per_token_states else drawn.args[0]
    pair = (np.ascontiguousarray(x[~written]).view(np.uint8) for x in (state, before))
    assert np.array_equal(*pair)


@pytest.mark.parametrize("number", range(11))
def test_drawn_calls_agree_with_the_oracle(number, path):
    shapes = draws.draw_shapes(SEED, number)
    for call in range(4):
        _check(shapes, draws.draw(shapes, SEED, call), path)


@pytest.mark.once
@pytest.mark.parametrize("number", range(22))
def test_what_vllm_leaves_undefined_is_said_in_words_it_defines(number, monkeypatch):
    """Its kernel reads a row's slot in column `num_accepted - 1`, or 0, and writes that
    of each token; slot 0 is null, and it checks no other index."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables_of = importlib.import_module("peers.vllm_drawn").tables_of
    shapes = draws.draw_shapes(SEED, number, shared=True)
    for call in range(20):
        drawn = draws.draw(shapes, SEED, call)
        tables = tables_of(shapes, drawn)
        slots = tables.slots.reshape(shapes.N, -1)
        assert slots.min() >= 0 and slots.max() <= shapes.P
        assert not np.isin(tables.cleared, drawn.read[~drawn.fresh] + 1).any()
        assert tables.cu_seqlens.min() >= 0 and tables.cu_seqlens.max() <= shapes.L
        last = {}  # of each slot, the token whose state it takes
        for n, (begin, end) in enumerate(zip(*_pairs(tables.cu_seqlens), strict=True)):
            count = 1 if tables.num_accepted is None else tables.num_accepted[n]
            assert 1 <= count <= slots.shape[1]
            read = slots[n, count - 1] if end > begin else 0
            assert read == drawn.read[n] + 1
            if read and not shapes.per_token_states:
                last |= {slots[n, t - begin]: t for t in range(begin, end)}
        wanted = {drawn.write[t] + 1: t for t in np.flatnonzero(drawn.write >= 0)}
        assert {slot: t for slot, t in last.items() if slot} == wanted


def _pairs(bounds):
    return bounds[:-1], bounds[1:]


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fuzz")


def _run(fuzz, folder, *, op="fused_update", against="oracle", sets=3, **options):
    """Without a GPU."""
    run = dict(op=op, against=against, implementation="xla", out=folder)
    with pytest.raises(SystemExit) as end:
        fuzz.main(seed=3, sets=sets, **run, **options)
    return end.value.code, json.loads((folder / f"fuzz_{op}.json").read_text())


@pytest.mark.once
def test_the_fuzzer_counts_its_calls(fuzz, tmp_path):
    code, result = _run(fuzz, tmp_path, cases=8)
    assert code == 0
    assert (result["seed"], result["calls"], result["failures"]) == (3, 8, [])
    assert [row["calls"] for row in result["rows"]] == [3, 3, 2]


@pytest.mark.once
@pytest.mark.parametrize("op", ["replay_update", "fused_layer_step"])
def test_the_fuzzer_takes_other_ops(op, fuzz, tmp_path):
    before = jax.config.jax_default_matmul_precision
    code, result = _run(fuzz, tmp_path, op=op, against="", cases=3, sets=2)
    assert (code, result["calls"], result["failures"]) == (0, 3, [])
    assert jax.config.jax_default_matmul_precision == before


@pytest.mark.once
def test_the_fuzzer_pins_launches_of_steps(fuzz):
    """Of one to eight programs a head, or as the op has it; and runs them."""
    steps = fuzz.LayerSteps("reference", "interpret")
    drawn = [steps.shapes(3, number) for number in range(60)]
    assert drawn == [steps.shapes(3, number) for number in range(60)]
    pinned = [shapes for shapes in drawn if shapes.config]
    assert len(pinned) < len(drawn)
    assert {shapes.config.programs for shapes in pinned} == {1, 2, 4, 8}

    def size(shapes):
        return shapes.of.L * shapes.of.HV * shapes.of.V * shapes.of.K

    shapes = min((each for each in pinned if each.config.programs > 1), key=size)
    steps.check(steps.compile(shapes, 3), shapes, steps.draw(shapes, 3, 0))


@pytest.mark.once
@pytest.mark.parametrize("fault", ["a value", "zeros", "a slot"])
def test_the_fuzzer_finds_a_fault_and_replays_it(fault, fuzz, tmp_path, monkeypatch):
    """Of one value in one of the calls."""

    def planted(shapes, drawn, got, *rest, **options):
        state, out = (np.array(x) for x in got)
        live, written = drawn.live, drawn.written(shapes)
        array, where = {
            "a value": (state, written),
            "zeros": (out, ~live),
            "a slot": (state, ~written),
        }[fault]
        if where.any():
            array[np.flatnonzero(where)[-1]].reshape(-1)[-1:] += 0.01
        return check(shapes, drawn, (state, out), *rest, **options)

    calls = importlib.import_module("fuzz_calls")
    check = calls.check
    monkeypatch.setattr(calls, "check", planted)
    code, result = _run(fuzz, tmp_path, cases=6)
    assert code == 1 and result["failures"]
    case = result["failures"][0]["case"]
    assert (
        f"--seed 3 --case {case} --sets 3 --op fused_update"
        in result["failures"][0]["to"]
    )
    code, _ = _run(fuzz, tmp_path, cases=6, case=case)
    assert code == 1
