"""Measures launch configs and writes the tuning table: python benchmarks/tune.py

For each problem every candidate is checked against the reference and timed; the fastest
becomes a row of gdn_jax/ops/gated_delta/tuned/<device>.json, with what it won against.
"""

import concurrent.futures
import functools
import itertools
import json
import pathlib
import statistics
from typing import Any

import common
import jax
import jax.numpy as jnp
import typer
import update
from jax.experimental import pallas as pl
from rich.progress import track
from update import Problem

from gdn_jax import LaunchConfig, timing
from gdn_jax._triton import LANES
from gdn_jax.ops.gated_delta import tile, tuning

FOLDER = pathlib.Path(tuning.__file__).parent / "tuned"
REPEATS = 30
NOISE = 0.005  # by so much do the medians of two runs differ
VALUES_IN_A_LANE = 64  # of state, at most; more would spill


STATES = ("float32", "bfloat16")
OLMO: dict[str, Any] = dict(H=30, HV=30, K=96, V=192)
SUITES = {
    "decode": [
        Problem(N, state_dtype=s) for s in STATES for N in (1, 8, 64, 256, 1024)
    ],
    "verify": [Problem(N, T=4, state_dtype=s) for s in STATES for N in (1, 8, 64, 128)],
    "few": [
        Problem(N, T=4, dense=True, state_dtype=s) for s in STATES for N in (1, 8, 64)
    ],
    "olmo": [Problem(N, **OLMO, state_dtype=s) for s in STATES for N in (8, 64, 256)],
}


def candidates(problem: Problem) -> list[LaunchConfig]:
    """With more than one token a tile's tokens are walked before the next tile's, so
    further tiles would prepare every token again."""
    sizes, warps = (4, 8, 16, 32), (1, 2)
    tiles = (1, 2) if problem.T == 1 else (1,)
    padded = pl.next_power_of_2(problem.K)
    # few lanes along K leave less of it to mask where K is no power of two
    lanes_v = (1, 2, 4) if padded == problem.K else (2, 4, 8)
    itemsize = jnp.dtype(problem.state_dtype).itemsize
    loads = padded * itemsize // tile.LOAD_BYTES  # of a row
    return [
        LaunchConfig(block_v=v, lanes_v=lanes, tiles=count, num_warps=warps)
        for v, lanes, count, warps in itertools.product(sizes, lanes_v, tiles, warps)
        if lanes * warps <= v
        and LANES // lanes <= loads  # no lane without work
        and v * count * padded <= VALUES_IN_A_LANE * LANES * warps
    ]


def compile_all(problem: Problem, inputs, configs: list[LaunchConfig]):
    tokens = tuple(inputs[name] for name in update.TOKENS)
    bounds = update.boundaries(problem)
    args = (tokens, inputs["slots"][0], inputs.get("num_accepted"), bounds)
    lowered = [
        jax.jit(
            functools.partial(
                update.update, unfused=False, implementation="triton", config=config
            ),
            donate_argnums=0,
        ).lower(inputs["state"], *args)
        for config in configs
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda low: low.compile(), lowered))


def measure(problem: Problem) -> list[dict]:
    """Every candidate's config, time and errors, fastest first."""
    inputs = update.make_inputs(problem)
    configs = candidates(problem)
    steps = compile_all(problem, inputs, configs)
    tokens = tuple(inputs[name] for name in update.TOKENS)
    accepted, bounds = inputs.get("num_accepted"), update.boundaries(problem)
    tables = inputs["slots"]

    expected = update.expect(problem, inputs)
    state, rows = inputs.pop("state"), []
    for config, step in zip(configs, steps, strict=True):
        start = state[tables[0].ravel()]
        state, out = step(state, tokens, tables[0], accepted, bounds)
        errors = common.errors_of(expected, {"state": state, "out": out})
        state = state.at[tables[0].ravel()].set(start)
        rows.append({"config": config, "errors": errors})
    with timing.record() as kernels:
        for i in range(REPEATS):  # in turns, so that no candidate has a better minute
            for step in steps:
                table = tables[i % len(tables)]
                state, _ = step(state, tokens, table, accepted, bounds)
        common.wait()
    times = [k.duration_us for k in kernels if "fused_update" in k.name]
    for i, row in enumerate(rows):
        row["us"] = statistics.median(times[i :: len(steps)])
    tolerance = functools.partial(update.tolerance, problem, is_ours=True)
    wrong = [row for row in rows if not common.passed(tolerance, row["errors"])]
    if wrong:
        raise SystemExit(f"wrong results at {problem}: {wrong}")
    return sorted(rows, key=lambda row: row["us"])


def tuned_row(problem: Problem, rows: list[dict]) -> dict:
    """The fastest, unless the heuristic is as fast for all that a run can tell."""
    plain = tuning.heuristic(problem.K, problem.V)
    heuristic = next(row for row in rows if row["config"] == plain)
    best = heuristic if heuristic["us"] <= rows[0]["us"] * (1 + NOISE) else rows[0]
    return {
        "K": problem.K,
        "V": problem.V,
        "state_dtype": problem.state_dtype,
        "walk": tuning.find_walk(problem.tokens_per_row, per_k=False),
        "heads": problem.N * problem.HV,
        "config": vars(best["config"]),
        "reason": (
            f"{best['us']:.2f} us at N={problem.N} T={problem.T} HV={problem.HV}; "
            f"fastest {rows[0]['us']:.2f}, next {rows[1]['us']:.2f}, heuristic "
            f"{heuristic['us']:.2f}, slowest {rows[-1]['us']:.2f} of {len(rows)}"
        ),
    }


def main(suite: list[str] | None = None, out: pathlib.Path = FOLDER) -> None:
    """Measures the suites named, or all, and replaces their runs in the table."""
    common.need_gpu()
    header = common.header(update.INPUTS, REPEATS)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{header['device'].lower().replace(' ', '_')}.json"
    path = out / name
    old = FOLDER / name
    kept = json.loads(old.read_text()) if old.is_file() else {"runs": []}
    runs = kept["runs"]
    for chosen in suite or SUITES:
        table = []
        problems = SUITES[chosen]
        for problem in track(problems, description=chosen, console=common.console):
            rows = measure(problem)
            table.append(tuned_row(problem, rows))
            for row in rows[:4]:
                common.console.print(problem.N, problem.state_dtype, row["us"], row)
        runs = [run for run in runs if run["suite"] != chosen]
        runs.append({"suite": chosen} | header | {"rows": table})
        path.write_text(json.dumps(kept | {"runs": runs}, indent=1) + "\n")
    common.console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
