"""Three ways to keep states while decoding: python benchmarks/schemes.py

Blocks of steps of `gdn_jax.Engine` in a model's geometry, as generate.py has them: with
three drafts from a checkpoint for each token and by replay, and plainly in place and by
replay. Beside tokens a second it says what a sequence takes of memory, and so how many
of them a GPU holds.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import typer
from common import RESULTS, commit_of, console, header, need_gpu, rows_besides
from generate import (
    COMPILERS,
    INPUTS,
    MOST_ROUNDS,
    ROUNDS,
    SECONDS,
    SPARE,
    block_of,
    profile,
)
from geometries import (
    MODELS,
    STEPS,
    Point,
    make_model,
    make_state,
    memory,
    num_bytes,
    param_shapes,
    random_of,
    rewind,
    state_shapes,
)
from rich.progress import track
from rich.table import Table

from gdn_jax import timing

MODEL = "Qwen3.5-9B"
BATCHES = (64, 256)
SCHEMES = ((3, "checkpoints"), (3, "replay"), (0, "in_place"), (0, "replay"))


def bytes_of_a_row(point: Point) -> dict[str, float]:
    """What a sequence takes: of the linear layers, and of keys and values."""
    layers = state_shapes(point).model.layers
    kinds = point.config.layer_types
    linear, full = (
        sum(
            num_bytes(layer)
            for layer, kind in zip(layers, kinds, strict=True)
            if (kind == "full_attention") == is_full
        )
        for is_full in (False, True)
    )
    return {"states": linear / point.rows, "kv": full / point.rows}


def measure(point: Point, block: Future, params: Any) -> dict[str, Any]:
    row = dataclasses.asdict(point) | {"bytes_a_row": bytes_of_a_row(point)}
    needed, there = memory(point)
    weights = num_bytes(param_shapes(point.config))
    each = (needed - weights) / point.rows
    row["most_rows"] = int((SPARE * there - weights) // each)
    reason = f"{needed / 1e9:.0f} of {there / 1e9:.0f} GB"
    if needed > SPARE * there:
        return row | {"absent": reason}
    try:
        return row | time_blocks(point, block.result(), params)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"absent": f"{reason}, and a step's own arrays"}


def begin_compiling(point: Point, pool: ThreadPoolExecutor) -> Future:
    shapes = param_shapes(point.config), state_shapes(point)
    lowered = block_of("fused").lower(make_model(point.config), *shapes)
    return pool.submit(lowered.compile)


def time_blocks(point: Point, block: Any, params: Any) -> dict[str, Any]:
    state = make_state(point)

    def run() -> float:
        nonlocal state
        state = jax.block_until_ready(rewind(state))
        begin = time.perf_counter()
        state, emitted = block(params, state)
        jax.block_until_ready(emitted)
        return 1e3 * (time.perf_counter() - begin) / STEPS

    run()
    rounds = min(max(ROUNDS, int(1e3 * SECONDS / (STEPS * run()))), MOST_ROUNDS)
    ms = [run() for _ in range(rounds)]
    with timing.record() as kernels:
        run()
    step = statistics.median(ms)
    return {
        "rounds": rounds,
        "ms_a_step": step,
        "min_ms": min(ms),
        "max_ms": max(ms),
        "tokens_per_s": 1e3 * point.rows * point.tokens_a_step / step,
        **profile(kernels),
    }


def main(
    model: str = MODEL,
    rows: list[int] = typer.Option(list(BATCHES)),  # noqa: B008
    out: pathlib.Path | None = None,
) -> None:
    """rows: texts at once; the results file keeps others."""
    need_gpu()
    result = header(INPUTS)
    result["time"] = (
        f"wall clock of a block of {STEPS} steps, median of {ROUNDS} to {MOST_ROUNDS}"
    )
    committed = RESULTS / result["device"].lower().replace(" ", "_")
    folder = out or committed
    folder.mkdir(parents=True, exist_ok=True)
    points = [
        Point(model, N, drafts, dtype, scheme)
        for dtype in ("float32", "bfloat16")
        for N in rows
        for drafts, scheme in SCHEMES
    ]
    measured = [dataclasses.asdict(point) for point in points]
    paths = [path / "schemes.json" for path in (folder, committed)]
    result["rows"] = rows_besides(measured, *paths)
    with ThreadPoolExecutor(COMPILERS) as pool:
        blocks = [
            begin_compiling(point, pool)
            for point in track(points, description="compile", console=console)
        ]
    params = random_of(param_shapes(MODELS[model]), 0)
    for point, block in zip(points, blocks, strict=True):
        result["rows"].append(commit_of(result) | measure(point, block, params))
        (folder / "schemes.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result["rows"]))


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("state", "N", "drafts", "states", "tokens/s", "MB a row", "most rows")
    for row in rows:
        speed = (
            f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else row["absent"]
        )
        of_row = row["bytes_a_row"]["states"] / 1e6
        shown.add_row(
            row["state_dtype"],
            str(row["rows"]),
            str(row["drafts"]),
            row["decode"],
            speed,
            f"{of_row:.0f}",
            f"{row['most_rows']:,}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
