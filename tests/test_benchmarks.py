"""What of the benchmarks runs without a GPU: their problems, inputs and checks."""

import functools
import importlib
import pathlib
import subprocess
import sys

import pytest

import gdn_jax

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("suite", ["decode", "verify", "prefill", "train"])
def test_help(suite):
    command = [sys.executable, BENCHMARKS / f"{suite}.py", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--quick" in found.stdout


@pytest.mark.parametrize("suite", ["prefill", "train"])
def test_problems_build(suite, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    problems = importlib.import_module(suite).problems()
    assert len({problem.title for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.num_sets >= 2
        assert problem.moved_bytes > 0


@pytest.mark.parametrize("lengths", [(), (1, 4, 7)])
def test_a_right_result_passes_and_another_does_not(lengths, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    common, chunked = (importlib.import_module(n) for n in ("common", "chunked"))
    monkeypatch.setattr(chunked, "L2_BYTES", 1)  # few sets of inputs
    problem = chunked.Problem(3, 4, lengths, H=1, HV=2, K=16, V=16)
    inputs = chunked.make_inputs(problem)
    expected = chunked.expect(problem, inputs, implementation="xla")
    call = chunked.forward(
        problem, inputs, op=gdn_jax.fused_update, implementation="xla"
    )
    tolerance = functools.partial(chunked.tolerance, problem, is_ours=True)
    call.run(0)
    errors = common.errors_of(expected, call.result())
    assert errors.keys() == {"state", "out"}
    assert common.passed(tolerance, errors)
    call.run(1)
    assert not common.passed(tolerance, common.errors_of(expected, call.result()))
