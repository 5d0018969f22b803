"""Measures launch configs and writes the tuning table: python benchmarks/tune.py

For each problem every candidate is checked against the XLA path and timed; the fastest
becomes a row of gdn_jax/ops/gated_delta/tuned/<device>.json, with what it won against.
"""

import concurrent.futures
import functools
import itertools
import json
import pathlib
import statistics

import common
import jax
import jax.numpy as jnp
import typer
from common import Problem
from rich.progress import track

from gdn_jax import LaunchConfig, testing, timing
from gdn_jax.ops.gated_delta import tuning

FOLDER = pathlib.Path(tuning.__file__).parent / "tuned"
REPEATS = 16


def problems() -> list[Problem]:
    states = ("float32", "bfloat16")
    decode = [Problem(N, state_dtype=s) for s in states for N in (1, 8, 64, 256, 1024)]
    verify = [Problem(N, T=4, state_dtype=s) for s in states for N in (8, 64, 128)]
    olmo = dict(H=30, HV=30, K=96, V=192)
    other = [Problem(N, **olmo, state_dtype=s) for s in states for N in (8, 64, 256)]
    return decode + verify + other


def candidates(problem: Problem) -> list[LaunchConfig]:
    """With more than one token a tile's tokens are walked before the next tile's, so
    further tiles prepare every token again; a few show that it does not pay."""
    tiles = (1, 2, 4, 8) if problem.T == 1 else (1, 2)
    return [
        LaunchConfig(block_v=v, lanes_v=lanes, tiles=count, num_warps=1)
        for v, lanes, count in itertools.product((4, 8, 16), (2, 4, 8), tiles)
        if lanes <= v and v * count <= 64
    ]


def compile_all(problem: Problem, inputs, configs: list[LaunchConfig]):
    tokens = tuple(inputs[name] for name in common.TOKENS)
    bounds = common.boundaries(problem)
    args = (tokens, inputs["slots"][0], inputs.get("num_accepted"), bounds)
    lowered = [
        jax.jit(
            functools.partial(
                common.update, unfused=False, implementation="triton", config=config
            ),
            donate_argnums=0,
        ).lower(inputs["state"], *args)
        for config in configs
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda low: low.compile(), lowered))


def measure(problem: Problem) -> list[dict]:
    """Every candidate's config, time and errors, fastest first."""
    inputs = common.make_inputs(problem)
    configs = candidates(problem)
    steps = compile_all(problem, inputs, configs)
    tokens = tuple(inputs[name] for name in common.TOKENS)
    accepted, bounds = inputs.get("num_accepted"), common.boundaries(problem)
    tables = inputs["slots"]
    few = jnp.asarray(tables[0]).ravel()[: common.CHECKED_ROWS]

    state = inputs.pop("state")
    want, want_out = jax.jit(
        functools.partial(common.update, unfused=False, implementation="xla")
    )(state, tokens, tables[0], accepted, bounds)
    want, rows = want[few], []
    for config, step in zip(configs, steps, strict=True):
        start = state[tables[0].ravel()]
        state, out = step(state, tokens, tables[0], accepted, bounds)
        errors = (
            testing.relative_error(state[few], want),
            testing.relative_error(out, want_out),
        )
        state = state.at[tables[0].ravel()].set(start)
        rows.append({"config": config, "errors": errors})
    with timing.record() as kernels:
        for step in steps:
            for i in range(REPEATS):
                table = tables[i % len(tables)]
                state, _ = step(state, tokens, table, accepted, bounds)
        common.wait()
    times = [k.duration_us for k in kernels if "fused_update" in k.name]
    for i, row in enumerate(rows):
        row["us"] = statistics.median(times[i * REPEATS + 1 : (i + 1) * REPEATS])
    bars = [testing.TOLERANCE[w, problem.state_dtype] for w in ("state", "out")]
    bars[1] = testing.TOLERANCE["out", problem.act_dtype]
    # two paths may each round to the other side, so twice the table
    right = [
        row
        for row in rows
        if all(e < 2 * b for e, b in zip(row["errors"], bars, strict=True))
    ]
    return sorted(right, key=lambda row: row["us"])


def tuned_row(problem: Problem, rows: list[dict]) -> dict:
    best = rows[0]
    plain = tuning.heuristic(problem.K, problem.V)
    heuristic = next(row["us"] for row in rows if row["config"] == plain)
    return {
        "K": problem.K,
        "V": problem.V,
        "state_dtype": problem.state_dtype,
        "single_token": problem.T == 1,
        "heads": problem.N * problem.HV,
        "config": vars(best["config"]),
        "reason": (
            f"{best['us']:.2f} us at N={problem.N} T={problem.T} HV={problem.HV}; next "
            f"{rows[1]['us']:.2f}, heuristic {heuristic:.2f}, worst "
            f"{rows[-1]['us']:.2f} of {len(rows)}"
        ),
    }


def main(out: pathlib.Path = FOLDER) -> None:
    header = common.header()
    table = []
    for problem in track(problems(), description="tune", console=common.console):
        rows = measure(problem)
        table.append(tuned_row(problem, rows))
        for row in rows[:4]:
            common.console.print(problem.N, problem.T, problem.state_dtype, row)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{header['device'].lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(header | {"rows": table}, indent=1) + "\n")
    common.console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
