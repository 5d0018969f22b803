"""What it costs to pin a launch, so that a row's bits do not depend on the batch:
python benchmarks/pinning.py [--quick]

Every launch that the tuning table has for a state's dtype, pinned for all batches, one
token a row and four, beside the launch that the table gives each of them.
"""

import functools
import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import typer
from common import Build, Suite, console, need_gpu, run_suite
from rich.table import Table
from update import Problem, ours, suite

from gdn_jax import LaunchConfig
from gdn_jax.ops.gated_delta import tuning

TUNED = "tuned"
WALKS = ("one", "few")  # of the problems below


def problems(quick: bool = False) -> list[Problem]:
    decode, verify = ((8, 256), (8,)) if quick else ((1, 8, 64, 256, 1024), (1, 8, 64))
    return [
        Problem(N, T=T, state_dtype=state, dense=T > 1)
        for state in ("float32", "bfloat16")
        for T, batches in ((1, decode), (4, verify))
        for N in batches
    ]


def launches(problem: Problem, device_kind: str) -> list[LaunchConfig]:
    """That were the best of some batch; a device without a table has the heuristic."""
    shape = (problem.K, problem.V, problem.state_dtype)
    found = [
        row.config
        for row in tuning.table(device_kind)
        if (row.K, row.V, row.state_dtype) == shape and row.walk in WALKS
    ]
    return list(dict.fromkeys([*found, tuning.heuristic(problem.K, problem.V)]))


def name_of(config: LaunchConfig) -> str:
    size = f"{config.block_v} x {config.tiles} rows, {config.lanes_v} lanes along V"
    return f"pinned: {size}, {config.num_warps} warps"


def contenders(problem: Problem) -> dict[str, Build]:
    run = functools.partial(ours, implementation="triton")
    kind = jax.devices()[0].device_kind
    pinned = launches(problem, kind)
    return {TUNED: run} | {
        name_of(config): functools.partial(run, config=config) for config in pinned
    }


def costs(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each dtype and pinned launch, its time in that of the tuned one by batch; the
    launch whose worst batch is the least comes first."""
    times: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        if "absent" not in row:
            key = row["state_dtype"], row["T"], row["N"]
            times.setdefault(key, {})[row["contender"]] = row["median_us"]
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for (dtype, T, N), us in times.items():
        for name, each in us.items():
            if name != TUNED:
                of = ratios.setdefault((dtype, name), {})
                of[f"T={T} N={N}"] = each / us[TUNED]
    found = [
        dict(
            state_dtype=dtype,
            launch=name,
            worst=max(by_batch.values()),
            mean=statistics.geometric_mean(by_batch.values()),
            by_batch=by_batch,
        )
        for (dtype, name), by_batch in ratios.items()
    ]
    return sorted(found, key=lambda x: (x["state_dtype"] != "float32", x["worst"]))


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table(title="time of a pinned launch in that of the tuned one")
    for column in ("state", "launch", "worst", "mean", "by batch"):
        shown.add_column(column, overflow="fold")
    for row in found:
        batches = ", ".join(f"{key} {x:.2f}" for key, x in row["by_batch"].items())
        numbers = f"{row['worst']:.3f}", f"{row['mean']:.3f}"
        shown.add_row(row["state_dtype"], row["launch"], *numbers, batches)
    return shown


def pinning_suite() -> Suite:
    return suite("pinning")._replace(ours=contenders, peers=lambda problem: {})


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    need_gpu()
    path = run_suite(pinning_suite(), problems(quick), out, quick=quick)
    result = json.loads(path.read_text())
    result["costs"] = costs(result["rows"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result["costs"]))


if __name__ == "__main__":
    typer.run(main)
