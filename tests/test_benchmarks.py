"""What of the benchmarks runs without a GPU: their problems, inputs and checks."""

import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

import gdn_jax
from gdn_jax import ConvConfig, testing
from gdn_jax.ops.layer_step import tuning
from gdn_jax.training import text

pytestmark = pytest.mark.once

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


SUITES = ["decode", "verify", "prefill", "train", "conv", "experts"]
SUITES += ["layer", "layer_step", "few_rows", "generate", "replay", "sharded"]
SUITES += ["load", "horizon"]


@pytest.mark.parametrize("suite", SUITES)
def test_help(suite):
    command = [sys.executable, BENCHMARKS / f"{suite}.py", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--quick" in found.stdout


OTHERS = ["crossover", "schemes", "drift", "layer_step_tune", "fuzz", "memcheck"]
OTHERS += ["pinning"]


@pytest.mark.parametrize("script", OTHERS)
def test_help_of_others(script):
    command = [sys.executable, BENCHMARKS / f"{script}.py", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--out" in found.stdout


def test_what_memcheck_plants_is_named():
    command = [sys.executable, BENCHMARKS / "memcheck_planted.py", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "planted under that name" in found.stdout


@pytest.mark.parametrize("suite", ["prefill", "train", "conv", "experts", "few_rows"])
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
    chunked = importlib.import_module("chunked")
    monkeypatch.setattr(chunked, "L2_BYTES", 1)  # few sets of inputs
    problem = chunked.Problem(3, 4, lengths, H=1, HV=2, K=16, V=16)
    inputs = chunked.make_inputs(problem)
    expected = chunked.expect(problem, inputs, implementation="xla")
    call = chunked.forward(
        problem, inputs, op=gdn_jax.fused_update, implementation="xla"
    )
    tolerance = functools.partial(chunked.tolerance, problem, is_ours=True)
    _passes_but_once(call, expected, tolerance)


def _passes_but_once(call, expected, tolerance):
    """The second call is given other inputs than those that were expected for."""
    common = importlib.import_module("common")
    call.run(0)
    errors = common.errors_of(expected, call.result())
    assert errors.keys() == {"state", "out"}
    assert common.passed(tolerance, errors)
    call.run(1)
    assert not common.passed(tolerance, common.errors_of(expected, call.result()))


CONV = [dict(N=20), dict(N=3, T=4, S=4), dict(N=3, T=4, S=4, lengths=(4, 1, 3))]
CONV += [dict(N=2, T=9), dict(N=3, T=9, lengths=(1, 9, 17))]


@pytest.mark.parametrize("sizes", CONV, ids=str)
def test_a_right_convolution_passes_and_another_does_not(sizes, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    conv = importlib.import_module("conv")
    monkeypatch.setattr(conv, "L2_BYTES", 1)  # few sets of inputs
    problem = conv.Problem(**sizes, C=40)
    inputs = conv.make_inputs(problem)
    expected = conv.expect(problem, inputs)
    call = conv.ours(problem, inputs, implementation="xla")
    tolerance = functools.partial(conv.tolerance, problem, is_ours=True)
    _passes_but_once(call, expected, tolerance)


def test_the_heuristics_launch_is_timed_among_its_neighbours(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    conv = importlib.import_module("conv")
    for problem in conv.problems():
        configs = conv.candidates(problem)
        assert problem.heuristic == configs[0]
        assert 4 <= len(set(configs)) == len(configs)
        assert all(isinstance(config, ConvConfig) for config in configs)
        assert len(conv.contenders(problem, tune=True)) == 2 + len(configs)
        assert list(conv.contenders(problem, tune=False)) == ["triton", "xla"]


def test_the_experts_launch_is_timed_among_its_neighbours(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    experts = importlib.import_module("experts")
    for problem in experts.problems():
        configs = experts.candidates(problem)
        assert problem.heuristic == configs[0]
        assert 10 <= len(set(configs)) == len(configs)
        assert len(experts.contenders(problem, tune=True)) == 1 + len(configs)
        assert list(experts.contenders(problem, tune=False)) == ["triton"]


def test_right_products_of_experts_pass_and_others_do_not(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    experts, common = (importlib.import_module(n) for n in ("experts", "common"))
    monkeypatch.setattr(experts, "L2_BYTES", 1)  # few sets of inputs
    problem = experts.Problem("small", "down", 40, E=5, k=2, D=32, F=16)
    inputs = experts.make_inputs(problem)
    expected = experts.expect(problem, inputs)
    call = experts.dense(problem)["xla"](problem, inputs)
    tolerance = functools.partial(experts.tolerance, problem, is_ours=True)
    for i in range(2):
        call.run(i)
        errors = common.errors_of(expected, call.result())
        assert common.passed(tolerance, errors) == (i == 0)


def test_other_launches_of_the_chunked_kernels_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    chunked = importlib.import_module("chunked")
    assert gdn_jax.ChunkConfig() in chunked.LAUNCHES  # what None takes
    assert len(chunked.launches()) == len(set(chunked.LAUNCHES))


def test_dense_rows_give_what_packed_ones_do(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    update = importlib.import_module("update")
    packed = update.Problem(2, T=3, H=1, HV=2, K=16, V=8)
    dense = dataclasses.replace(packed, dense=True)
    inputs = update.make_inputs(packed)
    tokens = tuple(inputs[name] for name in update.TOKENS)
    found = [
        update.update(
            inputs["state"], tokens, inputs["slots"][0], inputs["num_accepted"],
            update.boundaries(problem), unfused=unfused, implementation="xla",
        )
        for problem in (packed, dense)
        for unfused in (False, True)
    ]  # fmt: skip
    assert update.boundaries(dense) is None is not update.boundaries(packed)
    for state, out in found[1:]:
        assert testing.relative_error(state, found[0][0]) < 1e-6
        assert out.shape == (6, 2, 8) == found[0][1].shape
        assert testing.relative_error(out, found[0][1]) < 1e-2  # bfloat16


def test_a_peer_that_fails_while_it_is_timed_is_a_row(monkeypatch):
    """And so is one that cannot be built; a failure of ours ends the run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    common, conv = (importlib.import_module(n) for n in ("common", "conv"))
    monkeypatch.setattr(conv, "L2_BYTES", 1)
    problem = conv.Problem(2, C=40)
    peer = functools.partial(conv.ours, implementation="xla")
    suite = conv.suite(tune=False)._replace(peers=lambda problem: {"peer": peer})
    inputs = conv.make_inputs(problem)
    expected = conv.expect(problem, inputs)
    monkeypatch.setattr(common.timing, "measure", _fail)
    row = common.time_contender(suite, "peer", problem, inputs, expected)
    assert row["absent"] == "failed: RuntimeError: no kernels"
    with pytest.raises(RuntimeError, match="no kernels"):
        common.time_contender(suite, "xla", problem, inputs, expected)
    for name in conv.peers_of(problem):
        row = common.time_contender(conv.suite(tune=False), name, problem, inputs, {})
        assert "absent" in row


def _fail(*args, **kwargs):
    raise RuntimeError("no kernels")


def test_held_out_figures_of_a_saved_text(tmp_path):
    saved = tmp_path / "text.npz"
    text.save(text.Corpus(b"one\0two\0" * 9, b"one\0one\0", "3.99.0"), saved)
    command = [sys.executable, BENCHMARKS / "held_out.py", "--text", saved]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "this is another, of 3.99.0" in found.stderr
    subprocess.run([*command, "--out", tmp_path], check=True, capture_output=True)
    result = json.loads((tmp_path / "held_out.json").read_text())
    assert result["python"] == "3.99.0"
    assert result["train"]["bytes"] == 72 and result["held_out"]["documents"] == 2
    assert {row["order"] for row in result["kneser_ney"]} == set(range(1, 9))
    for row in result["kneser_ney"]:
        assert 0 < row["bits_per_byte"] < 3


def test_modules_have_names_of_their_own():
    """Both folders are on the path of a process that tests a benchmark, which is given
    whichever of a name was imported first."""
    here, there = (
        {path.stem for path in folder.glob("*.py")}
        for folder in (pathlib.Path(__file__).parent, BENCHMARKS)
    )
    assert here and there and not here & there


def test_a_layers_step_is_checked_and_the_best_launch_kept(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = "layer_step", "step_programs", "layer_step_tune", "update"
    layer_step, steps, tune, update = map(importlib.import_module, names)
    for module in (update, steps.replay_steps):
        monkeypatch.setattr(module, "L2_BYTES", 2**10)
    monkeypatch.setattr(steps, "STEPS", 2)
    for T, replay in ((1, False), (4, False), (4, True)):
        problem = steps.Problem(2, T, 1, 2, "float32", K=16, V=16, replay=replay)
        inputs = steps.make_inputs(problem)
        for step in (
            functools.partial(steps.fused, implementation="interpret"),
            functools.partial(
                steps.chain, split=problem.split, implementation="reference"
            ),
        ):
            for found in (
                layer_step.check(problem, inputs, steps.program_of(step)),
                layer_step.check_step(problem, inputs, jax.jit(step)),
            ):
                assert found["conv"] == 0.0 and set(found) == {"state", "conv", "out"}
                for what, error in found.items():
                    assert error <= layer_step.tolerance(problem, what)
    problem = dataclasses.replace(problem, replay=False)
    row = layer_step.measure_peer(problem, inputs)
    assert "PYTHONPATH" in row["absent"]
    launch = dict(block_v=8, lanes_v=1, num_warps=1, programs=1)
    slow = launch | dict(num_warps=2)
    times = [("fused", slow, 5.0), ("fused", launch, 4.0), ("chain", None, 6.0)]
    times.append(("fused_update", None, 3.0))
    rows = [
        dict(contender=name, config=config, busy_us=us) for name, config, us in times
    ]
    found = tune.tuned_row(problem, rows)
    assert found["config"] == launch and found["pays"]
    rows[2]["busy_us"] = 4.0
    found = tune.tuned_row(problem, rows)
    assert found["config"] == launch and not found["pays"]
    with pytest.raises(RuntimeError, match="could be timed"):
        tune.tuned_row(problem, rows[:2])

    folder = tmp_path / "tuned"
    monkeypatch.setattr(tune, "FOLDER", folder)
    about = dict.fromkeys(("device", "date", "commit", "versions"), "told")
    for tokens in (1, 4, 1):  # a part measured again keeps the other rows
        told = about | dict(commit=f"of {tokens}")
        tune.write_table(told, [found | dict(tokens=tokens)], folder / "gpu.json")
    launch_of_replay = dataclasses.asdict(gdn_jax.ReplayConfig())
    of_replay = [
        dict(contender=name, config=launch_of_replay, busy_us=us)
        for name, us in (("fused", 3.0), ("chain", 4.0), ("replay_update", 2.0))
    ]
    of_replay = tune.tuned_row(dataclasses.replace(problem, replay=True), of_replay)
    tune.write_table(told, [of_replay], folder / "gpu.json")
    *kept, last = json.loads((folder / "gpu.json").read_text())["rows"]
    assert last["replay"] and last["pays"]
    assert {row["tokens"]: row.get("commit") for row in kept} == {1: None, 4: "of 4"}
    monkeypatch.setattr(tuning.importlib.resources, "files", lambda _: tmp_path)
    *rows, of_replay = tuning.table.__wrapped__("gpu")
    assert of_replay.replay and of_replay.config == gdn_jax.ReplayConfig()
    assert sorted(row.tokens for row in rows) == [1, 4]
    assert {row.config for row in rows} == {gdn_jax.LayerStepConfig(**launch)}


@pytest.mark.parametrize("file", ["layer_step", "layer_step_tune"])
def test_a_launch_that_gives_nan_is_not_timed(file, monkeypatch):
    """Nor one whose convolution differs in a bit."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module, steps = map(importlib.import_module, (file, "step_programs"))
    problem = steps.Problem(2, 1, 1, 2, "float32", K=16, V=16)
    right = dict(state=0.0, conv=0.0, out=0.0)
    tuned = file == "layer_step_tune"
    names = ("check_step", "time_step") if tuned else ("check", "time_program")
    name = ("fused", None) if tuned else "fused"

    def measure(errors):
        monkeypatch.setattr(module, names[0], lambda *_: errors)
        monkeypatch.setattr(module, names[1], lambda *_: dict(busy_us=1.0))
        compiled = concurrent.futures.Future()
        compiled.set_result(None)
        return module.measure(problem, None, name, compiled)

    assert measure(right)["busy_us"] == 1.0
    for wrong in (dict(out=math.nan), dict(state=math.nan), dict(conv=1e-9)):
        row = measure(right | wrong)
        assert "busy_us" not in row and "above the tolerance" in row["absent"]


def test_nan_is_the_worst_of_some_errors(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    layer_step, common = map(importlib.import_module, ("layer_step", "common"))
    for errors in itertools.permutations((0.0, math.nan, 1.0)):
        assert math.isnan(layer_step.worst(errors))
    assert layer_step.worst([0.0, 1.0]) == 1.0
    assert common.passed(lambda what: 0.0, dict(conv=0.0))
    assert not common.passed(lambda what: 1.0, dict(conv=math.nan, out=0.0))


def test_a_quick_run_writes_over_nothing_that_is_committed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    command = ["git", "check-ignore", "-q", common.RESULTS / "a_gpu/quick/some.json"]
    folder = BENCHMARKS.parent
    if (folder / ".git").exists():
        assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    found = common.results_folder
    assert found("a GPU") == tmp_path / "a_gpu"
    assert found("a GPU", quick=True) == tmp_path / "a_gpu" / "quick"
    assert found("a GPU", tmp_path / "out", quick=True) == tmp_path / "out"
    assert (tmp_path / "out").is_dir() and (tmp_path / "a_gpu" / "quick").is_dir()


def test_what_pinning_a_launch_costs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pinning = importlib.import_module("pinning")
    for problem in pinning.problems():
        found = pinning.launches(problem, "NVIDIA H200")
        names = {pinning.name_of(config) for config in found}
        assert 2 <= len(names) == len(found) < 9
    times = {("tuned", 1): 2, ("a", 1): 3, ("b", 1): 2, ("tuned", 8): 4, ("a", 8): 4}
    times[("b", 8)] = 5
    rows = [
        dict(state_dtype="float32", T=1, N=N, contender=name, median_us=us)
        for (name, N), us in times.items()
    ]
    best, other = pinning.costs(rows)
    assert (best["launch"], best["worst"]) == ("b", 1.25)
    assert other["by_batch"] == {"T=1 N=1": 1.5, "T=1 N=8": 1.0}
