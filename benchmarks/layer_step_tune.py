"""Launches of `fused_layer_step`: python benchmarks/layer_step_tune.py [--tokens 1]

One step at a time, whose kernels are timed: the launches that registers hold beside the
ops one after another. The fastest, and whether it pays, is written for the package.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import typer
from common import (
    RESULTS,
    commit_of,
    console,
    header,
    need_gpu,
    passed,
    rows_besides,
    wait,
)
from layer_step import COMPILERS, INPUTS, REPLAY_ROWS, check_step, tolerance
from rich.progress import track
from rich.table import Table
from step_programs import (
    Inputs,
    Problem,
    compile_step,
    contenders,
    make_inputs,
    make_state,
)

import gdn_jax
from gdn_jax import LayerStepConfig, ReplayConfig, timing
from gdn_jax.ops.gated_delta.replay_tuning import replay_heuristic

CALLS = 40
NOISE = 0.01  # what two runs of one step differ by
FOLDER = pathlib.Path(gdn_jax.__file__).parent / "ops/layer_step/tuned"
# block_v, lanes_v, num_warps, programs: of one token a row, and of more, for which
# registers hold less. What lost everywhere is not here any more.
ONE = (
    (64, 2, 8, 1),
    (64, 4, 8, 1),
    (32, 2, 4, 1),
    (32, 2, 4, 2),
    (32, 2, 4, 4),
    (32, 4, 8, 4),
    (16, 2, 4, 8),
)
MORE = ((64, 2, 8, 2), (32, 2, 4, 4), (32, 4, 8, 4), (16, 2, 4, 8))
# (H, HV): those of Qwen3.5-9B, a quarter of them, of 27B and of 397B.
ROWS = {
    (16, 32): (1, 2, 4, 8, 16, 32, 64, 256),
    (4, 8): (1, 8),
    (16, 48): (1, 2, 4, 8, 16, 64),
    (16, 64): (1, 2, 4, 8, 16, 64),
}
# Of replay, beside what `replay_update` was tuned to: how programs convolve, and share
# out V; with steps_v=2 and block_k=64, JAX 0.10.2 and 0.12 spill.
REPLAY = (
    dict(prepare_warps=2),
    dict(prepare_warps=4),
    dict(prepare_k=64, prepare_warps=2),
    dict(steps_v=2, block_k=32),
    dict(steps_v=2, block_k=128),
)

Job = tuple[str, LayerStepConfig | ReplayConfig | None]


def time_step(problem: Problem, inputs: Inputs, step: Any) -> dict[str, Any]:
    tables = inputs.tables
    state = make_state(problem)

    def run(i: int) -> None:
        nonlocal state
        tokens = inputs.tokens[i % len(inputs.tokens)]
        state, _ = step(state, inputs.weights, tokens, tables[i % len(tables)])

    run(0)
    wait()
    with timing.record() as kernels:
        for i in range(CALLS):
            run(i)
        wait()
    each = len(kernels) // CALLS
    steps = [kernels[i : i + each] for i in range(0, len(kernels), each)]
    busy = [sum(kernel.duration_us for kernel in step) for step in steps]
    # rows of replay fold in one step and not in another
    middle = statistics.mean if problem.replay else statistics.median
    return dict(busy_us=middle(busy), launches=each)


def measure(
    problem: Problem,
    inputs: Inputs,
    job: Job,
    compiled: Future,
) -> dict[str, Any]:
    name, config = job
    row = {"contender": name, **dataclasses.asdict(problem)}
    row["config"] = config and dataclasses.asdict(config)
    step = compiled.result()
    if name == "fused":
        row["errors"] = check_step(problem, inputs, step)
        if not passed(functools.partial(tolerance, problem), row["errors"]):
            return row | {"absent": "errors above the tolerance"}
    return row | time_step(problem, inputs, step)


def launches_of(problem: Problem) -> list[Any]:
    if not problem.replay:
        launches = ONE if problem.T == 1 else MORE
        return [LayerStepConfig(*launch) for launch in launches]
    plain = replay_heuristic(
        problem.T, "bfloat16", problem.state_dtype, problem.HV // problem.H
    )
    return [plain, *(dataclasses.replace(plain, **change) for change in REPLAY)]


def jobs_of(problem: Problem) -> list[Job]:
    launches = [("fused", launch) for launch in launches_of(problem)]
    return [*launches, ("chain", None), (problem.op, None)]


def tuned_row(problem: Problem, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest launch, beside the ops one after another."""
    timed = {
        name: sorted(
            (row for row in rows if row["contender"] == name and "busy_us" in row),
            key=lambda row: row["busy_us"],
        )
        for name in ("fused", "chain", problem.op)
    }
    if not all(timed.values()):
        raise RuntimeError(f"not all of {list(timed)} could be timed: {rows}")
    best, in_turn = timed["fused"][0], timed["chain"][0]["busy_us"]
    kind = dict(replay=True) if problem.replay else {}
    return kind | dict(
        K=problem.K,
        V=problem.V,
        state_dtype=problem.state_dtype,
        group=problem.HV // problem.H,
        HV=problem.HV,
        tokens=problem.T,
        programs=problem.N * problem.HV,
        config=best["config"],
        pays=best["busy_us"] < in_turn * (1 - NOISE),
        reason=(
            f"{best['busy_us']:.2f} us at N={problem.N} T={problem.T} HV={problem.HV} "
            f"of {len(timed['fused'])} launches; ops one after another {in_turn:.2f}, "
            f"{problem.op} alone {timed[problem.op][0]['busy_us']:.2f}"
        ),
    )


def main(
    state_dtype: list[str] = typer.Option(["float32", "bfloat16"]),  # noqa: B008
    tokens: list[int] = typer.Option([1, 4]),  # noqa: B008
    value_heads: list[int] = typer.Option([32, 8]),  # noqa: B008
    replay: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """state_dtype, tokens, value_heads: what is measured; the files keep other rows.
    replay: of replay's states."""
    need_gpu()
    result = header(INPUTS)
    middle = "mean" if replay else "median"
    result["time"] = f"kernels of a step, {middle} of {CALLS} calls"
    device = result["device"].lower().replace(" ", "_")
    committed, kind = RESULTS / device, "_replay" if replay else ""
    file = f"layer_step_tune{kind}.json"
    folder = out or committed
    folder.mkdir(parents=True, exist_ok=True)
    problems = [
        Problem(N, T, *heads, dtype, replay=replay)
        for T in tokens
        for dtype in state_dtype
        for heads in ROWS
        if heads[1] in value_heads
        for N in (REPLAY_ROWS if replay else ROWS[heads])
    ]
    measured = [
        dict(T=problem.T, state_dtype=problem.state_dtype, HV=problem.HV)
        for problem in problems
    ]
    result["rows"] = rows_besides(measured, folder / file, committed / file)
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = {
            (problem, job): pool.submit(
                compile_step, problem, contenders(problem, job[1])[job[0]]
            )
            for problem in problems
            for job in jobs_of(problem)
        }
    tuned = []
    for problem in track(problems, description="launches", console=console):
        inputs = make_inputs(problem)
        rows = [
            measure(problem, inputs, job, compiled[problem, job])
            for job in jobs_of(problem)
        ]
        tuned.append(tuned_row(problem, rows))
        console.print(table(problem, rows))
        result["rows"] += [commit_of(result) | row for row in rows]
        (folder / file).write_text(json.dumps(result, indent=1) + "\n")
    write_table(result, tuned, (out or FOLDER) / f"{device}.json")


def write_table(
    result: dict[str, Any], tuned: list[dict[str, Any]], path: pathlib.Path
) -> None:
    package = FOLDER / path.name
    keys = "tokens", "state_dtype", "HV", "replay"
    parts = [{key: row.get(key) for key in keys} for row in tuned]
    about = {key: result[key] for key in ("device", "date", "commit", "versions")}
    rows = [*rows_besides(parts, package), *(commit_of(result) | row for row in tuned)]
    for row in rows:  # said once for all of this run
        if row.get("commit") == result["commit"]:
            del row["date"], row["commit"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    console.print(f"wrote {path}")


def table(problem: Problem, rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        *("contender", "us", "launches", "launch", "why absent"),
        title=" ".join(f"{k}={v}" for k, v in dataclasses.asdict(problem).items()),
        title_justify="left",
    )
    for row in rows:
        config = row["config"]
        shown.add_row(
            row["contender"],
            f"{row['busy_us']:.2f}" if "busy_us" in row else "",
            str(row.get("launches", "")),
            "" if config is None else " ".join(map(str, config.values())),
            row.get("absent", ""),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
